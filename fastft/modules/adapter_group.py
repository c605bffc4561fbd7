"""The projections of one input that one of our adapters is on; their base weights may lie in one buffer (`packed`)."""

from dataclasses import dataclass

import torch

from .groups import ProjectionGroup
from .packed import PackedWeights


@dataclass(frozen=True)
class GroupState:
    """What a group does: `reason` says why it is not grouped any more, `unpacked` why its weights are not packed."""

    members: tuple[str, ...]
    grouped: bool
    reason: str | None
    packed: bool
    unpacked: str | None


class AdapterGroup(ProjectionGroup):
    """Every member's `_groups` holds it under the adapter's name.

    Args:
        adapter: the `Adapter`. names, members: as of `ProjectionGroup`.
    """

    def __init__(self, adapter, names, members):
        super().__init__(names, members)
        self.adapter = adapter
        self.packed: PackedWeights | None = None
        self.unpacked: str | None = None  # why `packed` is None though it was asked for

    def state(self) -> GroupState:
        packed, unpacked = self.packed is not None and self.packed.intact(), self.unpacked
        if self.packed is not None and not packed:
            unpacked = self.packed.reason or "the weights left their buffer; the next forward packs them again"
        return GroupState(self.names, self.reason is None, self.reason, packed, unpacked)

    def release(self) -> None:
        """The adapter is taken off: weights get their own memory back, unless another group still packs them."""
        self._waiting.clear()
        packed, self.packed = self.packed, None
        if packed is not None and not any(g.packed is packed for m in self.members for g in m._groups.values()):
            packed.unpack()

    def _factors(self, x, i, projection):
        factors, p = [], projection.dropout
        for member in self.members:
            adapters = [a for a in member._adapters.values() if a.name in member._settings and a.on()]
            if adapters != [self.adapter] or member._merged:
                return None
            if (member._settings[self.adapter.name].dropout if member.training else 0.0) != p:
                return None
            a = member.lora_A[self.adapter.name]
            # Not DTensors, nor what sharding leaves of a parameter between forwards.
            if type(a) not in (torch.Tensor, torch.nn.Parameter) or a.dim() != 2 or a.shape[1] != x.shape[-1]:
                return None
            if a.device != x.device or a.dtype != (factors[0] if factors else a).dtype:
                return None
            factors.append(a)
        return factors

    def _open_round(self, x, i, circumstances, projection):
        opened = super()._open_round(x, i, circumstances, projection)
        if opened is not None and self.packed is not None and self._own_weights_on():
            opened.columns_have_bias = projection.magnitude is None  # DoRA multiplies before the bias is added
            opened.columns = self.packed.columns(opened.shared.x, opened.columns_have_bias)
        return opened

    def _base(self, opened, i, weight, bias, projection):
        """The member's part of the packed GEMM, if that is what the member would compute."""
        if opened.columns is None or self.packed is None:
            return None
        column, opened.columns[i] = opened.columns[i], None
        fits = opened.columns_have_bias == (projection.magnitude is None) and self.packed.holds(i, weight, bias)
        return column if fits else None

    def _own_weights_on(self) -> bool:
        """Do all members use their own weight and bias, no trained copies?"""
        return not any(m._copies([a for a in m._adapters.values() if a.on()]) for m in self.members)
