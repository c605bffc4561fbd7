"""What is kept of a weight in which a part of it trains: whose parts stand in it, and how their pristine values come back.

A store knows what to write where; the pristine values themselves (`base`) are a buffer of the module, to follow it.
`module` is always the adapted linear layer; deltas are float32 (float64 on a float64 weight). `written`: the weight as
the last write left it. `untouched`: all that was ever written into it is zeros.
"""

import weakref
from dataclasses import dataclass, field

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..ops.entries import Entries
from ..ops.partial import exchange_slice_, write_slice_
from ..ops.sparse import gather_entries, write_entries_


class Seen:
    """A tensor as it is now, to ask later whether another one is that one still.

    By a weak reference, as ids are reused (`functional_call` with a new delta each time comes across its old one's id soon).
    `Module.to` and loading may swap tensors, and refuse those that are referenced so: forget before. Inference tensors don't
    count their changes and are new each time. Copies and pickles have seen nothing.
    """

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor=None):
        counts = tensor is not None and not tensor.is_inference()
        self._tensor, self._version = (weakref.ref(tensor), tensor._version) if counts else (_gone, None)

    def __reduce__(self):
        return Seen, ()

    def still(self, tensor) -> bool:
        """Is it this tensor, without any change in place since?"""
        return self._tensor() is tensor and self._version == tensor._version

    def of(self, tensor) -> bool:
        """Is it this tensor, whatever its values?"""
        return self._tensor() is tensor


class SeenWeight(Seen):
    """Also by its address, which ``.data = `` changes without counting; of whole Parameters."""

    __slots__ = ("_address",)

    def __init__(self, weight=None):
        super().__init__(weight)
        self._address = _address(weight)

    def __reduce__(self):
        return SeenWeight, ()

    def still(self, weight) -> bool:
        return super().still(weight) and self._address == _address(weight)

    def is_new_base(self, weight, owns, same, untouched, holds) -> bool:
        """Something else changed the weight into which a delta was written, or replaced it: is that the base from now on?

        Args:
            owns, same: is the delta the tensor that was written, and with the values that it had then?
            untouched, holds: functions, as the answers are waited for. Was what was written 0; does the weight hold what the
                delta makes of the old base?

        Raises:
            RuntimeError: it is not known what of the weight is base and what was trained.
        """
        if self._version is None or type(weight) is not torch.nn.Parameter or weight.is_meta or weight.requires_grad:
            return False  # a copy's; its owner refuses it; an optimizer trains the other entries, which is warned of
        if not owns:
            return False  # functional_call put both there
        if untouched():
            return same or not holds()
        if (self.of(weight) and not same) or holds():
            return False  # both were sent (DistributedDataParallel, averages of all parameters), or the same values
        how = "written" if self.of(weight) else "replaced"
        raise RuntimeError(
            f"the weight {list(weight.shape)} was {how} by something else while a trained delta stands in it, and the next "
            "write would mix it with the old base. To change the base take the delta out first (unmerge() of the handle and "
            "merge() afterwards, restore() of a SparseDeltaLinear), or use load_state_dict, which does so"
        )


def _gone() -> None:
    return None


def _address(weight) -> int:
    return weight.data_ptr() if type(weight) is torch.nn.Parameter else 0  # others may have none


def has_gradient(delta) -> bool:
    """May an optimizer have changed it since without counting that, as fused ones do?"""
    return delta.is_leaf and delta.grad is not None


def surely_zero(delta) -> bool:
    """Nothing is known of a tensor without values (`fastft train --dry-run`, the meta device)."""
    return not (delta.is_meta or isinstance(delta, FakeTensor) or bool(delta.any()))


def _wide(module) -> torch.dtype:
    return torch.promote_types(module.weight.dtype, torch.float32)


@dataclass(eq=False)
class SliceStore:
    """Slices along one dimension of the stored weight; base [rows, width] as the union of them lies there."""

    names: tuple[str, ...]
    dim: int
    union: torch.Tensor | None = None  # of their indices, ascending; on the weight's device
    written: SeenWeight = field(default_factory=SeenWeight, repr=False)
    untouched: bool = False

    def index(self, module) -> torch.Tensor:
        if self.union is None or self.union.device != module.weight.device:
            parts = [module.part_of(name).index for name in self.names]
            self.union = parts[0] if len(parts) == 1 else torch.cat(parts).unique()
        return self.union

    def forget(self) -> None:
        """The indices may have other values now."""
        self.union = None

    def succeeds(self, old) -> bool:
        """Can `exchange` take over from this store directly?"""
        return isinstance(old, SliceStore) and old.dim == self.dim

    def exchange(self, module, old, base) -> torch.Tensor:
        """Put the old store's base back (if there is one) and write what belongs here. Returns the new base."""
        index = self.index(module)
        if old is None:
            out = index[:0], module.weight.detach().narrow(self.dim, 0, 0).contiguous()
        else:
            out = old.index(module), base
        return exchange_slice_(module.weight, self.dim, *out, index, self._total(module))

    def write(self, module, base) -> None:
        write_slice_(module.weight, self.index(module), self.dim, base, self._total(module))

    def restore(self, module, weight, base) -> None:
        """Put the pristine bits into `weight`, the module's or a copy of it."""
        write_slice_(weight, self.index(module), self.dim, base, None)

    def gather(self, module) -> torch.Tensor:
        """What stands in the weight now, as a base."""
        return module.weight.detach().index_select(self.dim, self.index(module))

    def is_zero(self, module) -> bool:
        return all(surely_zero(module.delta_of(name)) for name in self.names)

    def _total(self, module) -> torch.Tensor:
        """The deltas of all slices on the union."""
        wide = _wide(module)
        if len(self.names) == 1:
            return module.delta_of(self.names[0]).detach().to(wide).contiguous()
        union, shape = self.index(module), list(module.weight.shape)
        shape[self.dim] = len(union)
        total = torch.zeros(shape, dtype=wide, device=union.device)
        for name in self.names:
            at = torch.searchsorted(union, module.part_of(name).index)
            total.index_add_(self.dim, at, module.delta_of(name).to(wide))
        return total

    def site(self, module, name, base):
        """(weight, index, dim, base) for an op that updates the delta of adapter `name` and writes it in one pass, where
        that delta stands alone; else None."""
        return (module.weight.detach(), self.index(module), self.dim, base) if self.names == (name,) else None


@dataclass(eq=False)
class EntryStore:
    """Single entries of the weight. One adapter's are what it trains and what it left behind, apart; of several adapters it
    is the union. base [E]: one after the other as `parts` are."""

    names: tuple[str, ...]
    written: SeenWeight = field(default_factory=SeenWeight, repr=False)
    untouched: bool = False
    _parts: list[Entries] = field(default_factory=list, repr=False)

    def parts(self, module) -> list[Entries]:
        if not self._parts or self._parts[0].device != module.weight.device:
            found = [entries for name in self.names for entries, _ in module.entry_deltas(name)]
            if len(self.names) > 1:
                union = found[0]
                for entries in found[1:]:
                    union = union.union(entries)
                found = [union]
            self._parts = [entries.to(module.weight.device) for entries in found]
        return self._parts

    def forget(self) -> None:
        self._parts = []

    def succeeds(self, old) -> bool:
        return False

    def exchange(self, module, old, base) -> torch.Tensor:
        base = self.gather(module)
        self.write(module, base)
        return base

    def gather(self, module) -> torch.Tensor:
        """What stands in the weight now, as a base."""
        weight = module.weight.detach()
        return torch.cat([gather_entries(weight, part.starts, part.columns) for part in self.parts(module)])

    def is_zero(self, module) -> bool:
        return all(surely_zero(delta) for name in self.names for _, delta in module.entry_deltas(name))

    def write(self, module, base) -> None:
        for part, delta, values in zip(self.parts(module), self._deltas(module), self._split(module, base)):
            write_entries_(module.weight, part.starts, part.columns, values, delta)

    def restore(self, module, weight, base) -> None:
        for part, values in zip(self.parts(module), self._split(module, base)):
            write_entries_(weight, part.starts, part.columns, values, None)

    def _split(self, module, base):
        return base.split([len(part) for part in self.parts(module)])

    def _deltas(self, module):
        wide = _wide(module)
        found = [(entries, delta.detach().to(wide)) for name in self.names for entries, delta in module.entry_deltas(name)]
        if len(self.names) == 1:
            return [delta for _, delta in found]
        (union,) = self.parts(module)
        total = torch.zeros(len(union), dtype=wide, device=union.device)
        for entries, delta in found:
            total.index_add_(0, entries.find(union), delta)
        return [total]

    def site(self, module, name, base):
        """(weight, starts, columns, base) of what adapter `name` trains, where it stands alone; else None."""
        if self.names != (name,):
            return None
        part = self.parts(module)[0]
        return module.weight.detach(), part.starts, part.columns, self._split(module, base)[0]
