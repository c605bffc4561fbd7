"""What `fastft train` says of an attached adapter: its share of the model, its memory, and the slices of a sparse one."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import Any

from torch import nn

from ..modules.quantized import quantization, sizes


def share(handle: Any) -> tuple[int, int]:
    """(parameters that train, parameters of the model with them). Slices that train in place are the model's own."""
    trainable = sum(p.numel() for p in handle.parameters())
    with_copies = parameter_count(handle.model)
    return trainable, with_copies - trainable if handle.method.trains_merged else with_copies


def parameter_count(model: Any) -> int:
    """Numbers that the model's parameters stand for: two where a byte holds two quantised ones."""
    layers = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Linear) and quantization(m) is not None}
    return sum(math.prod(sizes(layers[id(p)])) if id(p) in layers else p.numel() for p in model.parameters())


def memory(handle: Any) -> dict[str, int]:
    """Bytes by kind of what training holds besides the model and activations."""
    adapter = sum(p.numel() * p.element_size() for p in handle.parameters())
    pristine = {}
    if handle.method.trains_merged:
        slices = ((m.slice_delta[handle.name], m.weight) for m in handle.targets.values())
        pristine = {"slices from before": sum(delta.numel() * weight.element_size() for delta, weight in slices)}
    return {"adapter weights": adapter, "gradients": adapter, "AdamW state": 2 * adapter, **pristine}


def per_layer(handle: Any) -> dict[str, dict[str, Any]]:
    """Module name with * for layer numbers -> which slices of it train: {"line": in words, "units": how many units of each
    layer, in the model's order}. Empty for methods without slices."""
    chosen = getattr(handle.method, "chosen", None) or {}
    layers = defaultdict(list)
    for name, _ in handle.model.named_modules():
        layers[pattern(name)].append(name)
    found = {}
    for key in dict.fromkeys(map(pattern, chosen)):
        slices = [chosen[name] for name in layers[key] if name in chosen]
        units = [chosen[name].units if name in chosen else 0 for name in layers[key]]
        sizes = " or ".join(map(str, sorted({one.size for one in slices})))
        what = slices[0].kind if sizes == "1" else f"units of {sizes} {slices[0].kind}"
        counts = " ".join(map(str, units)) if len(units) <= 128 else f"{min(units)} to {max(units)}"
        found[key] = {"line": f"{sum(units):,} {what} train; in each layer: {counts}", "units": units}
    return found


def pattern(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)
