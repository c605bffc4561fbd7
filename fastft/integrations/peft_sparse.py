"""PEFT's sparse layers, SHiRA's and Super-Tuning's, on our ops: their classes are swapped in place as `lora.Linear`'s is.

PEFT makes a copy of the weight with the delta in every forward, and so all of dW in every backward. Here the delta works
beside the weight, which nobody writes: x Wᵀ + x deltaᵀ, and of dW only the entries are computed. (In the weight, as
`fastft.attach` trains entries, it would cost less still, but the weight is PEFT's, and threads may share it.)
"""

from __future__ import annotations

import torch
from torch import nn

from ..ops.entries import Entries
from ..ops.lora_linear import lora_update
from ..ops.sparse_linear import Ways, sparse_linear, sparse_update
from .peft_eligible import Input, bare, base_obstacle, dtype_name, is_plain
from .peft_layers import DISABLED, INACTIVE, MERGED, FallbackError, Record
from .swapping import Swapped, swap


class SparseRecord(Record):
    """Besides what `Record` holds: for each adapter's indices what products with them need, made when they change."""

    def __init__(self, name: str, strict: bool):
        super().__init__(name, strict)
        self.made: dict[str, tuple] = {}

    def places(self, adapter: str, index, flat, shape):
        """(Entries, their order among the values or None, `Ways`). flat: () -> the positions of the values in the
        weight."""
        made = self.made.get(adapter)
        if made is None or made[0] is not index or made[1] != index._version:
            with torch.inference_mode(False):  # a first forward in inference mode makes what backward needs later
                made = self.made[adapter] = index, index._version, _places(flat().long(), shape)
        return made[2]


def _places(positions, shape):
    ordered, order = positions.sort()
    entries = Entries.of_flat(ordered, shape)
    return entries, None if torch.equal(ordered, positions) else order, Ways.of(entries)


def accelerate_sparse_layers(model: nn.Module, strict: bool) -> None:
    """Swap every layer that is exactly PEFT's `shira.Linear` or `supertuning.Linear`."""
    kinds = sparse_kinds()
    for name, module in model.named_modules():
        if type(module) in kinds:
            swap(module, kinds[type(module)], SparseRecord(name, strict))
        elif isinstance(module, FastSparse):
            module._fastft.strict = strict


def sparse_kinds() -> dict[type, type]:
    """PEFT's class -> what is mixed into it. Super-Tuning came with PEFT 0.21."""
    from peft.tuners.shira.layer import Linear as Shira

    kinds: dict[type, type] = {Shira: FastShira}
    try:
        from peft.tuners.supertuning.layer import Linear as SuperTuning
    except ImportError:
        return kinds
    return {**kinds, SuperTuning: FastSuperTuning}


class FastSparse(Swapped):
    """Mixed into either. `values_of` names PEFT's dictionary of values by adapter."""

    values_of: str

    def forward(self, x, *args, **kwargs):
        plan = "arguments for the base layer" if args or kwargs else self.plan(Input.of(x))
        record = self._fastft
        if isinstance(plan, str):
            if record.strict and plan not in (DISABLED, MERGED, INACTIVE):
                raise FallbackError(f"{record.name}: {plan}; so PEFT's own forward would run, which strict=True forbids")
            if not torch.compiler.is_compiling():
                record.peft += 1
                record.reason = plan
            return self.plain.forward(self, x, *args, **kwargs)
        if not torch.compiler.is_compiling():
            record.fused += 1
        base, y = self.base_layer, None
        for name in plan:
            values, (entries, order, ways) = self._values(name), self._places(name)
            values = values if order is None else values[order]
            if y is None:
                y = sparse_linear(x, base.weight, base.bias, entries, values, ways=ways)
            else:
                y = sparse_update(y, x, entries, values, ways=ways)
        for name in plan:
            y = self._more(name, x, y)
        return y

    def plan(self, given: Input) -> list[str] | str:
        """The adapters that count in a forward on this `Input`, or why PEFT has to compute it."""
        if self.disable_adapters:
            return DISABLED
        if self.merged:
            return MERGED
        held = getattr(self, self.values_of)
        names = [name for name in self.active_adapters if name in held]
        if not names:
            return INACTIVE
        if given.reason:
            return given.reason
        base = self.base_layer
        if not bare(base, nn.Linear):
            return base_obstacle(base, given) or "the base layer is no plain nn.Linear"
        if reason := base_obstacle(base, given):
            return reason
        for name in names:
            values, index = held[name], self._index(name)
            if not is_plain(values, given) or not isinstance(index, torch.Tensor):
                return f"the values are a {type(values).__name__}"
            if values.device != given.device or index.device != given.device:
                return f"the input is on {given.device}, the values on {values.device}, their indices on {index.device}"
            if not values.is_floating_point() or values.dtype == torch.float64:
                return f"the values are {dtype_name(values.dtype)}"
            if reason := self._obstacle(name):
                return reason
        return names

    def _obstacle(self, name) -> str | None:
        return None

    def _more(self, name, x, y):
        """y with what the adapter adds besides its entries."""
        return y


class FastShira(FastSparse):
    values_of = "shira_weight"

    def _index(self, name):
        index = self.shira_indices[name]
        if index.device != self.shira_weight[name].device:  # as PEFT does in its forward
            with torch.inference_mode(False):  # its version is asked for
                index = self.shira_indices[name] = index.to(self.shira_weight[name].device)
        return index

    def _values(self, name):
        return (self.shira_weight[name] * self.scaling[name]).float()

    def _places(self, name):
        index, (n, k) = self._index(name), self.base_layer.weight.shape
        return self._fastft.places(name, index, lambda: index[0].long() * k + index[1], (n, k))


class FastSuperTuning(FastSparse):
    values_of = "supertuning_values"

    def _index(self, name):
        return self.supertuning_indices[name]

    def _values(self, name):
        return self.supertuning_values[name].to(self.base_layer.weight.dtype).float()  # PEFT rounds them, too

    def _places(self, name):
        index = self._index(name)
        return self._fastft.places(name, index, lambda: index, tuple(self.base_layer.weight.shape))

    def _low_rank(self, name):
        """(A, B, dropout) of the hybrid with LoRA, or None."""
        if not self.supertuning_rank[name]:
            return None
        return self.supertuning_lora_A[name], self.supertuning_lora_B[name], self.supertuning_lora_dropout[name]

    def _obstacle(self, name):
        parts = self._low_rank(name)
        if parts is None:
            return None
        a, b, drop = parts
        if not (bare(a, nn.Linear) and bare(b, nn.Linear)) or a.weight.dtype != b.weight.dtype:
            return "lora_A or lora_B is hooked or no plain Linear"
        if not (bare(drop, nn.Identity) or bare(drop, nn.Dropout)):
            return f"dropout is a {type(drop).__name__}, or hooked"
        return None

    def _more(self, name, x, y):
        parts = self._low_rank(name)
        if parts is None:
            return y
        a, b, drop = parts
        p = drop.p if type(drop) is nn.Dropout and drop.training else 0.0
        scale = self.supertuning_lora_alpha[name] / self.supertuning_rank[name]
        return lora_update(y, x.to(y.dtype), a.weight, b.weight, scale, p)
