"""What `fastft train` says of an attached adapter: its share of the model, its memory, its slices or entries."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import Any

from ..methods.sparse import SparseMethod
from ..methods.targets import parameter_count
from ..modules.merging import PART
from ..optim.sparse import SparseSM3


def share(handle: Any) -> tuple[int, int]:
    """(parameters that train, parameters of the model with them). Slices and entries are the model's own."""
    trainable, base = sum(p.numel() for p in handle.parameters()), parameter_count(handle.model)
    return trainable, base if handle.method.trains_merged else base + trainable


def memory(handle: Any) -> dict[str, int]:
    """Bytes by kind of what training holds besides the model and activations."""
    adapter = sum(p.numel() * p.element_size() for p in handle.parameters())
    found = {"adapter weights": adapter, "gradients": adapter}
    if isinstance(handle.method, SparseMethod):
        return {**found, **_memory_of_entries(handle)}
    found["AdamW state"] = 2 * adapter
    if handle.method.trains_merged:
        slices = ((m.slice_delta[handle.name], m.weight) for m in handle.targets.values())
        found["slices from before"] = sum(delta.numel() * weight.element_size() for delta, weight in slices)
    return found


def _memory_of_entries(handle: Any) -> dict[str, int]:
    held = entries_of(handle)
    count = sum(one.delta.numel() for one in held.values())
    optimizer = handle.optimizer()
    if isinstance(optimizer, SparseSM3):
        state = {"SM3 state": sum(4 * sum(one.shape) for one in held.values())}
    else:
        state = {"AdamW state, with ages" if optimizer.ages else "AdamW state": (12 if optimizer.ages else 8) * count}
    base = [m._buffers[PART] for m in handle.targets.values() if m._buffers.get(PART) is not None]
    found = {**state, "places": 0, "entries from before": sum(map(_bytes, base)), "entries that are kept": 0}
    for one in held.values():
        for name, tensor in one.named_buffers():
            if not name.startswith("candidate_"):
                found["entries that are kept" if name.startswith("kept_") else "places"] += _bytes(tensor)
    if handle.method.scheduled and handle.method.observer() is not None:
        found["candidates, while a choice is prepared"] = 16 * count  # three sums and a place
    return {name: size for name, size in found.items() if size}


def _bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()


def entries_of(handle: Any) -> dict[str, Any]:
    """Module name -> the single entries that the adapter trains there; empty for other methods."""
    if not isinstance(handle.method, SparseMethod):
        return {}
    return {name: module.sparse[handle.name] for name, module in handle.targets.items()}


def densities(handle: Any) -> dict[str, dict[str, Any]]:
    """Module name with * for layer numbers -> of each layer, in the model's order: "entries" that train, their "density" and
    the density of all that have "changed" (LIFT's keep what they have learnt). "size": of its weight. Empty for methods of
    other parts."""
    found: dict[str, dict[str, Any]] = {}
    for name, one in entries_of(handle).items():
        entries, size = one.delta.numel(), math.prod(one.shape)
        kept = 0 if one.kept is None else len(one.kept)
        layer = found.setdefault(pattern(name), {"size": size, "entries": [], "density": [], "changed": []})
        layer["entries"].append(entries)
        layer["density"].append(entries / size)
        layer["changed"].append((entries + kept) / size)
    return found


def span(values: list[Any], form: str) -> str:
    """The one value, or from where to where they go."""
    ends = dict.fromkeys((form.format(min(values)), form.format(max(values))))
    return " to ".join(ends)


def percent(fractions: list[float]) -> str:
    return span([100 * one for one in fractions], "{:.2f}") + " %"


def per_layer(handle: Any) -> dict[str, dict[str, Any]]:
    """Module name with * for layer numbers -> what of it trains: {"line": in words} and for slices "units", how many of each
    layer, in the model's order. Empty for methods that train no parts of the weights."""
    if layers := densities(handle):
        return {
            key: {"line": f"{span(one['entries'], '{:,}')} of {one['size']:,} entries train, {percent(one['density'])}"}
            for key, one in layers.items()
        }
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
