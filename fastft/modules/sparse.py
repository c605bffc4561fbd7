"""Adapters that are single entries of a linear's weight, trained where they stand (SpIEL, arXiv:2401.16405; LIFT,
arXiv:2506.00772). On a quantised weight the delta works beside it.

Such an adapter holds, by its name, one `SparseEntries` in the module's ``sparse``.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..ops.entries import Entries
from ..ops.partial_linear import Part
from ..ops.sparse_linear import Ways, sparse_linear, sparse_update
from .parts import PartSettings
from .quantized import quantization
from .stores import Seen

_WATCHED = 64  # numbers of a gradient that tell by what it was multiplied
SUMS = ("candidate_sum", "candidate_square", "candidate_pending")
# All buffers that there can be.
BUFFERS = ("starts", "columns", "kept_starts", "kept_columns", "kept_delta", "candidate_starts", "candidate_columns")
BUFFERS += (*SUMS, "first", "kept_first")


def pack_bits(flags: torch.Tensor) -> torch.Tensor:
    """bool [n] -> uint8 [n / 8, rounded up]"""
    eight = nn.functional.pad(flags, (0, -len(flags) % 8)).view(-(-len(flags) // 8), 8)
    return (eight * (1 << torch.arange(8, device=flags.device))).sum(1).to(torch.uint8)


def unpack_bits(packed: torch.Tensor, count: int) -> torch.Tensor:
    """What `pack_bits` packed."""
    return ((packed[:, None] >> torch.arange(8, device=packed.device)) & 1).bool().flatten()[:count]


class SparseEntries(nn.Module):
    """What one adapter trains of one weight [A, B], and where the choice of it stands.

    Attributes:
        delta: float32 parameter [E], how far each entry is from its pretrained value.
        starts, columns: of the entries, see `ops.sparse`.
        kept_starts, kept_columns, kept_delta: entries that were trained before and keep what they have learnt (LIFT).
        candidate_starts, candidate_columns, candidate_sum, candidate_square, candidate_pending: entries that may come in,
            and what was seen of their gradients (SpIEL): float32 sums over updates, and of the update that is being
            accumulated. They exist while a choice is being prepared.
        first, kept_first: uint8, a bit for each that says whether it trained first (LIFT).
        updates: of the optimizer so far; observed: those that the sums hold.
        proposed: do other processes not know the candidates yet?
        observer: called in backward with (these entries, left, right) while a choice is being prepared, or None.

    Entries, sums and counts are all in ``state_dict``; loading takes over another number of kept entries and candidates.
    """

    def __init__(self, entries: Entries, delta: torch.Tensor):
        super().__init__()
        self.shape = entries.shape
        self.delta = nn.Parameter(delta)
        self._set("", entries)
        self.updates = self.observed = 0
        self.proposed = False
        self.observer: Any = None
        # Some numbers of the gradient: as the update's last backward left them, and as the optimizer took them.
        self._gradient: torch.Tensor | None = None
        self._taken: torch.Tensor | None = None

    @property
    def entries(self) -> Entries:
        return self._get("")

    @property
    def kept(self) -> Entries | None:
        return self._get("kept_")

    @property
    def candidates(self) -> Entries | None:
        return self._get("candidate_")

    def _get(self, prefix):
        starts = self._buffers.get(prefix + "starts")
        return None if starts is None else Entries(starts, self._buffers[prefix + "columns"], self.shape)

    def _set(self, prefix, entries: Entries | None):
        for name in ("starts", "columns"):
            self._put(prefix + name, None if entries is None else getattr(entries, name))

    def _put(self, name, value):
        """A buffer of any size; in place where it fits, so that whoever holds it sees the change."""
        held = self._buffers.get(name)
        if value is None:
            self._buffers.pop(name, None)
        elif held is not None and held.shape == value.shape:
            held.copy_(value)
        else:
            self._buffers.pop(name, None)
            self.register_buffer(name, value)

    @torch.no_grad()
    def choose(self, entries: Entries, delta: torch.Tensor) -> None:
        """Other entries, as many, with these deltas."""
        self._set("", entries)
        self.delta.copy_(delta)
        self.delta.grad = None

    def keep(self, entries: Entries | None, delta: torch.Tensor | None, first: torch.Tensor | None = None) -> None:
        """What stays in the weight without training, all of it; `first`: packed bits."""
        self._set("kept_", entries)
        self._put("kept_delta", delta)
        self._put("kept_first", first)

    def all_first(self) -> None:
        """The entries are those that train first."""
        self._put("first", pack_bits(torch.ones(len(self.entries), dtype=torch.bool, device=self.columns.device)))

    def of_first(self) -> int:
        """How many of the entries trained first, too."""
        return int(unpack_bits(self.first, len(self.entries)).sum())

    @torch.no_grad()
    def succeed(self, new: Entries) -> None:
        """Train these entries, as many; those that stop training keep what they have learnt, and go on from it when they
        come back."""
        union, learnt, first = self.entries, self.delta.detach(), unpack_bits(self.first, len(self.entries))
        if self.kept is not None:
            parts = (self.entries, learnt, first), (self.kept, self.kept_delta, unpack_bits(self.kept_first, len(self.kept)))
            union = self.entries.union(self.kept)
            learnt, first = learnt.new_zeros(len(union)), first.new_zeros(len(union))
            for entries, delta, flags in parts:
                at = entries.find(union)
                learnt[at], first[at] = delta, flags
        at = new.find(union)
        rest = (learnt != 0) | first
        rest[at[at >= 0]] = False
        old, values = at >= 0, learnt[at.clamp(min=0)]
        self._put("first", pack_bits(old & first[at.clamp(min=0)]))
        kept = union.select(rest)
        some = len(kept) > 0
        self.keep(kept if some else None, learnt[rest] if some else None, pack_bits(first[rest]) if some else None)
        self.choose(new, torch.where(old, values, 0))

    def consider(self, candidates: Entries | None) -> None:
        """Begin with sums of 0 over these candidates, or forget them and what was summed."""
        self._set("candidate_", candidates)
        zeros = None if candidates is None else torch.zeros(len(candidates), dtype=torch.float32, device=candidates.device)
        for name in SUMS:
            self._put(name, None if zeros is None else zeros.clone())
        self.observed, self.proposed = 0, False

    def watch_gradient(self) -> None:
        """To be called in every backward that adds to `candidate_pending`, before it does: remembers some numbers of the
        gradient as backward leaves it, for `changed_since`, and forgets what was seen with gradients that were cleared."""
        hooks = getattr(self.delta, "_post_accumulate_grad_hooks", None) or {}  # (copies of parameters lose theirs)
        if self._note_gradient not in hooks.values():
            self.delta.register_post_accumulate_grad_hook(self._note_gradient)
        if (before := self._gradient) is not None:
            self._gradient = self._sample()
            cleared = True if self._gradient is None else before.any() & ~self._gradient.any()
            self.candidate_pending.masked_fill_(torch.as_tensor(cleared, device=before.device), 0)

    def _note_gradient(self, delta) -> None:
        self._gradient = self._sample()

    def _sample(self) -> torch.Tensor | None:
        return None if self.delta.grad is None else _some(self.delta.grad).clone()

    def note_update(self) -> None:
        """The optimizer has just made a step; the gradients may be cleared before `changed_since` is asked."""
        self._taken = None if self.candidates is None else self._sample()

    def changed_since(self, average) -> torch.Tensor | float:
        """By what the gradient was multiplied between the update's last backward and the optimizer's step: a GradScaler's
        unscaling, clipping. To be asked once an update, by all processes: `average` makes the mean over them, in place."""
        before, taken = self._gradient, self._taken
        self._gradient = self._taken = None
        if before is None:  # no gradient here, but maybe in others
            before = torch.zeros_like(_some(self.delta))
        average(before)
        if taken is None:
            return 1.0
        square = (before * before).sum()
        return torch.where(square > 0, (before * taken).sum() / square, 1.0)

    def deltas(self) -> list[tuple[Entries, torch.Tensor]]:
        """All that differs from the pretrained weight: what trains, and what is kept."""
        kept = self.kept
        return [(self.entries, self.delta), *([] if kept is None else [(kept, self.kept_delta)])]

    def progress(self) -> torch.Tensor:
        return torch.tensor([self.updates, self.observed])

    def get_extra_state(self):
        sizes = (0 if entries is None else len(entries) for entries in (self.kept, self.candidates))
        return torch.cat([self.progress(), torch.tensor([*sizes])])

    def set_extra_state(self, state):
        self.updates, self.observed = map(int, state[:2])

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        delta = state_dict.get(prefix + "delta", self.delta)
        if delta.shape != self.delta.shape:  # nothing is taken over, or entries and deltas would not belong together
            errors.append(
                f"{prefix}delta: {len(delta)} entries in the checkpoint, {len(self.delta)} in the model; attach the method "
                "with the options of the run that wrote it"
            )
            return
        # Whoever reads only what the model names, as torch.distributed.checkpoint does, leaves out what came while training.
        for part, size in zip(("kept", "candidate"), state_dict.get(prefix + "_extra_state", ())[2:]):
            held = len(state_dict.get(f"{prefix}{part}_columns", ()))
            if held != int(size):
                errors.append(
                    f"{prefix}{part}_columns: {held} entries were read, but {int(size)} saved; torch.distributed.checkpoint "
                    "reads no tensors that a model just attached has not: save with handle.save, and attach by fastft.load"
                )
                return
        if prefix + "columns" in state_dict:
            device = self.columns.device
            for name in list(self._buffers):
                if prefix + name not in state_dict:
                    del self._buffers[name]
            for key, value in state_dict.items():
                name = key.removeprefix(prefix)
                if key.startswith(prefix) and "." not in name and name not in ("delta", "_extra_state"):
                    held = self._buffers.get(name)
                    if held is None or held.shape != value.shape:
                        self._buffers.pop(name, None)
                        self.register_buffer(name, torch.empty_like(value, device=device))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def _apply(self, fn, *args, **kwargs):
        # A cast of the model rounds its weights; deltas and sums stay what 16-bit weights need them for.
        wide = {name: t.data for name, t in (*self._parameters.items(), *self._buffers.items()) if t.is_floating_point()}
        super()._apply(fn, *args, **kwargs)
        for name, old in wide.items():
            new = getattr(self, name)
            if new.dtype != (kind := torch.promote_types(new.dtype, torch.float32)):
                new.data = old.to(new.device, kind)
        return self


@dataclass(eq=False)
class EntrySettings(PartSettings):
    seen: Seen = field(default_factory=Seen, repr=False)
    _part: Part | None = field(default=None, repr=False)
    _ways: list[Ways] = field(default_factory=list, repr=False)  # of `SparseEntries.deltas`

    def part(self, module, name):
        if self._part is None or self._part.index.device != module.sparse[name].columns.device:
            self._part = Part("entries", module.sparse[name].entries)
        return self._part

    def delta(self, module, name):
        return module.sparse[name].delta

    def deltas(self, module, name):
        return module.sparse[name].deltas()

    def places(self, module, name):
        return module.sparse[name].columns

    def forget(self):
        self.seen, self._part, self._ways = Seen(), None, []

    def linear(self, module, name, x, weight, bias):
        ((entries, delta, options), *rest) = self._beside(module, name)
        return self._add(x, sparse_linear(x, weight, bias, entries, delta, **options), rest)

    def update(self, module, name, x, y):
        return self._add(x, y, self._beside(module, name))

    def observer(self, module, name):
        held = module.sparse[name]
        trains = held.observer is not None and held.delta.requires_grad
        return _Observed(held.observer, held) if trains else None

    def _add(self, x, y, deltas):
        for entries, delta, options in deltas:
            y = sparse_update(y, x, entries, delta, **options)
        return y

    def _beside(self, module, name):
        """[(entries, delta, options)] of what is applied beside the weight; the first is what trains."""
        deltas = self.deltas(module, name)
        if len(self._ways) != len(deltas) or self._ways[0].stored.device != deltas[0][0].device:
            self._ways = [Ways.of(entries, module.fan_in_fan_out) for entries, _ in deltas]
        stored = {"fan_in_fan_out": module.fan_in_fan_out}
        found = [(entries, delta, {**stored, "ways": ways}) for (entries, delta), ways in zip(deltas, self._ways)]
        found[0][2]["observer"] = self.observer(module, name)
        return found


@dataclass(frozen=True)
class _Observed:
    """What backward calls: the observer, told whose gradients it sees."""

    observer: Any
    held: SparseEntries

    def __call__(self, left, right):
        if not torch.compiler.is_compiling() and not _accumulates(self.held.delta):
            return
        with torch.no_grad():
            self.observer(self.held, left, right)


def _some(values) -> torch.Tensor:
    """From all over them: of a gradient whole rows may be 0."""
    return values.detach()[:: max(1, len(values) // _WATCHED)]


def _accumulates(parameter) -> bool:
    """Does the running backward add to the parameter's .grad? `torch.autograd.grad` does not, whatever it is asked for."""
    try:
        return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(parameter).node)
    except RuntimeError:  # it is asked for this parameter's
        return False


class Sparse:
    """Mixed into adapted linears beside `TrainsParts`."""

    def add_entries(self, adapter, held: SparseEntries) -> None:
        """The adapter trains these entries; in the weight, unless that is quantised."""
        self._hold("sparse", nn.ModuleDict, adapter, held)
        self._parts[adapter.name] = EntrySettings()
        if quantization(self) is None:
            self.set_merged(adapter, True)

    def change_entries(self, name: str, change) -> None:
        """Let `change(held)` choose other entries for adapter `name`. What stands in the weight follows."""
        adapter, merged = self._adapters[name], name in self._merged
        self.set_merged(adapter, False)
        try:
            change(self.sparse[name])
        finally:
            self._parts[name].forget()
            self.set_merged(adapter, merged)
