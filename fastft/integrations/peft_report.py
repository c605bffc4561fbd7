"""`fastft.report`: which path each adapted layer takes, why, and how often it took which."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from ..modules.adapted_linear import Adapted, AdaptedLinear
from ..modules.adapted_quantized import AdaptedQuantized
from ..modules.quantized import quantization
from ..modules.sharding import weights_come_and_go
from .peft_eligible import DTYPES, Input, base_obstacle, linear_classes
from .peft_layers import DISABLED, REPLACED, FastLinear
from .peft_sparse import FastSparse, sparse_kinds
from .swapping import replaced

FUSED, LOW_RANK, PEFT, PLAIN = "fused", "low-rank part", "peft", "plain"


@dataclass(frozen=True)
class Row:
    """One adapted layer.

    Attributes:
        name: as in `named_modules`. kind: its class; the base layer's, of layers that fastft adapted itself.
        path: what a forward on an input of the base's dtype would take now: ``fused`` (base and adapter by our ops),
            ``low-rank part`` (the base layer computes itself, our ops add to it), ``peft``; ``plain`` where a layer of ours
            runs as it would without adapters: they are disabled, merged, or only copies of its tensors.
        reason: why it is not ``fused``, or what else there is to know; empty otherwise.
        calls: forwards since acceleration by path. Those of compiled graphs are not counted, nor those of layers which
            were not accelerated; nor, so that counting costs nothing, all of those that several threads make at once.
    """

    name: str
    kind: str
    path: str
    reason: str = ""
    calls: dict[str, int] = field(default_factory=dict)


class Report:
    """The rows of a model's adapted layers, one by one when iterated; printed as a table of equal ones together."""

    def __init__(self, rows):
        self.rows: list[Row] = list(rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r} is no adapted layer of this model")

    @property
    def calls(self) -> dict[str, int]:
        """Forwards of all layers by path."""
        return _sum(row.calls for row in self.rows)

    def __str__(self) -> str:
        alike: dict[tuple, list[Row]] = {}
        for row in self.rows:  # layers of one kind that differ in their numbers only
            alike.setdefault((re.sub(r"\b\d+\b", "*", row.name), row.kind, row.path, row.reason), []).append(row)
        lines = [("layer", "n", "kind", "path", "calls", "reason")]
        for (name, kind, path, reason), rows in alike.items():
            calls = ", ".join(f"{count} {path}" for path, count in _sum(r.calls for r in rows).items() if count)
            lines.append((rows[0].name if len(rows) == 1 else name, str(len(rows)), kind, path, calls or "-", reason))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)

    __repr__ = __str__


def _sum(calls) -> dict[str, int]:
    total: dict[str, int] = {}
    for own in calls:
        for path, count in own.items():
            total[path] = total.get(path, 0) + count
    return total


def report(model: nn.Module) -> Report:
    """Every layer of LoRA, SHiRA and Super-Tuning in a PEFT model (accelerated or not), or every adapted layer of an
    attached one, with its path."""
    peft = sys.modules.get("peft.tuners.lora.layer")  # a model can't hold its layers if it was never imported
    rows = []
    linears, sparse = (linear_classes(), sparse_kinds()) if peft is not None else ((), ())
    modules = dict(model.named_modules())
    attentions = [m for m in modules.values() if peft is not None and isinstance(m, peft.MultiheadAttention)]
    merged = {m.get_base_layer().out_proj for m in attentions}
    for name, module in modules.items():
        if module in merged:
            rows.append(Row(name, _kind(type(module)), PEFT, "lora.MultiheadAttention merges it for each forward"))
        elif isinstance(module, (FastLinear, FastSparse)):
            rows.append(_accelerated(name, module))
        elif isinstance(module, Adapted):
            rows.append(_attached(name, module))
        elif peft is not None and isinstance(module, (peft.LoraLayer, *sparse)):
            linear = getattr(module, "plain", type(module)) in (*linears, *sparse)
            reason = "not accelerated: call fastft.accelerate" if linear else "layers of this class are left to PEFT"
            rows.append(Row(name, _kind(type(module)), PEFT, reason))
    return Report(rows)


def _kind(cls) -> str:
    cls = getattr(cls, "plain", cls)  # also of what fully_shard made of it
    peft = re.match(r"peft\.tuners\.(lora|shira|supertuning)\b", cls.__module__)
    return f"{peft[1] if peft else cls.__module__}.{cls.__name__}"


def _accelerated(name, module) -> Row:
    record, given = module._fastft, Input.of(_probe(module))._replace(gathers=weights_come_and_go())
    calls = {FUSED: record.fused, LOW_RANK: record.beside, PEFT: record.peft}
    plan = REPLACED if replaced(module) else module.plan(given)
    path, reason = (PEFT, plan) if isinstance(plan, str) else (FUSED, "")
    if path == FUSED and isinstance(module, FastLinear) and (obstacle := base_obstacle(module.base_layer, given)):
        path, reason = LOW_RANK, obstacle
    notes = [reason] if reason else []
    if (
        path != PEFT and record.group is not None and record.group.reason is not None
    ):  # sharing is what layers do by themselves
        notes.append(record.group.note(record.place))
    if path != PEFT and record.reason:
        notes.append(f"last call on PEFT's path: {record.reason}")
    return Row(name, _kind(type(module)), path, "; ".join(notes), calls)


def _probe(module) -> torch.Tensor:
    """An input of no rows as the layer's base would get."""
    weight = getattr(module.get_base_layer(), "weight", None)
    tensors = [weight, *(a.weight for a in getattr(module, "lora_A", {}).values())]
    like = next((t for t in tensors if isinstance(t, torch.Tensor) and t.dtype in {*DTYPES, torch.float64}), torch.empty(0))
    return torch.empty(0, module.in_features, dtype=like.dtype, device=like.device)


def _attached(name, module) -> Row:
    kind = f"fastft {module.plain.__name__}"
    if not isinstance(module, AdaptedLinear) or not (module._settings or module._parts):
        return Row(name, kind, PLAIN, "trained copies of its own tensors")
    on = [adapter for adapter in module._adapters.values() if adapter.on()]
    names = [adapter.name for adapter in on if adapter.name in module._settings or adapter.name in module._parts]
    if not names:
        return Row(name, kind, PLAIN, DISABLED)
    path, notes = FUSED, []
    if isinstance(module, AdaptedQuantized):
        path, notes = LOW_RANK, [f"the base layer is quantised ({quantization(module)})"]
    if module._merged:
        notes.append(f"merged: {', '.join(module._merged)}")
        if not module._parts and module._stand(names, module._copies(on)):
            names = [own for own in names if own not in module._merged]
    notes += [group.note(group.members.index(module)) for own, group in module._groups.items() if own in names]
    return Row(name, kind, path if names else PLAIN, "; ".join(notes))
