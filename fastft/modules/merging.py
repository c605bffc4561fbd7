"""Deltas in a module's own tensors, and how they come out without a trace.

Two kinds of delta can stand in a tensor: one that changes all of it (LoRA, merged on request), and a slice of a weight
(rows or columns, as S²FT trains: there from the start, while the adapter is active). While any does, the values from before
are kept: the whole tensor in the buffer ``_pristine_<name>``, or of slices along one dimension only the union of what they
touch, in ``_pristine_slice``. The tensors are always recomputed as round(pristine + all standing deltas in float32), so any
order of merging, switching and detaching is exact, and ``state_dict`` shows the pristine base.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..ops.partial import exchange_slice_, write_slice_
from ..ops.partial_linear import Part

_PRISTINE = "_pristine_"
SLICE = "_pristine_slice"


def pristine(module: nn.Module, own: str) -> torch.Tensor:
    """One of a module's own tensors as it is without deltas; a copy where only a slice of it is kept."""
    stored = module._buffers.get(_PRISTINE + own)
    if stored is None and own == "weight" and SLICE in module._buffers:
        module.check_whole()
        with torch.no_grad():
            stored = module.weight.detach().clone(memory_format=torch.contiguous_format)
            write_slice_(stored, module._slice_store.index(module), module._slice_store.dim, module._buffers[SLICE], None)
    return getattr(module, own) if stored is None else stored


@dataclass(eq=False)
class SliceStore:
    """Whose slices of the weight stand in it, along which dimension of the stored weight; ``_pristine_slice`` is what they
    were before."""

    names: tuple[str, ...]
    dim: int
    union: torch.Tensor | None = None  # of their indices, ascending; on the weight's device

    def index(self, module) -> torch.Tensor:
        if self.union is None or self.union.device != module.weight.device:
            parts = [module.slice_part(name).index for name in self.names]
            self.union = parts[0] if len(parts) == 1 else torch.cat(parts).unique()
        return self.union


class Mergeable(nn.Module):
    """Mixed into adapted modules; `_adapters` holds the adapters by name, `_merged` the names of those that stand in the
    own tensors (slices only while active), `_slice_store` what is kept of slices."""

    def edited(self, name: str) -> tuple[str, ...]:
        """The own tensors that adapter `name`'s delta changes."""
        return ("weight",)

    def merge_obstacle(self, name: str) -> str | None:
        """Why adapter `name` can't be merged here, or None."""
        return None

    def slice_part(self, name: str) -> Part | None:
        """The rows or columns of the weight that adapter `name`'s delta is, or None if it has no such delta here."""
        return None

    def slice_value(self, name: str) -> torch.Tensor:
        """The delta of that slice, oriented as the stored weight."""
        raise NotImplementedError

    def note_written(self, names) -> None:
        """The slices of these adapters have just been written into the weight."""

    def _add_delta(self, totals: dict[str, torch.Tensor], name: str) -> None:
        """Add adapter `name`'s delta to the totals of the tensors it edits, in place, in their layout and (float32 or
        float64) dtype. A total holds the pristine tensor and the standing adapters that were attached before.

        All that a further kind of delta has to say: storing, merging and restoring are here.
        """
        raise NotImplementedError(f"{type(self).__name__} has no weight delta to merge")

    def standing(self) -> list[str]:
        """The adapters whose deltas are in the own tensors, in the order of attaching, whatever the order of merging."""
        merged = [name for name in self._adapters if name in self._merged]
        return [name for name in merged if self.slice_part(name) is None or self._adapters[name].active]

    def set_merged(self, adapter, merged: bool) -> None:
        """Put the adapter's delta into the own tensors, or take it out. The pristine bits come back with the last one."""
        if merged == (adapter.name in self._merged):
            return
        if merged:
            self._merged.append(adapter.name)
        else:
            self._merged.remove(adapter.name)
        self.rebuild()

    @torch.no_grad()
    def rebuild(self) -> None:
        """Keep what has to be kept and write what has to stand, after adapters were merged, taken out or switched."""
        standing = self.standing()
        slices = {name: part for name in standing if (part := self.slice_part(name)) is not None}
        whole = {own for name in standing if name not in slices for own in self.edited(name)}
        dims = {part.dim(self.fan_in_fan_out) for part in slices.values()}
        if len(dims) > 1 or (slices and "weight" in whole):  # then what is touched is no slice
            whole.add("weight")
        sliced = tuple(slices) if "weight" not in whole else ()
        store = SliceStore(sliced, *dims) if sliced else None
        old = self._slice_store
        if old is not None and (store is None or old.dim != store.dim):
            self._write(old, None)
            self._drop_slices()
        for own, value in self._stored().items():
            if own not in whole:
                getattr(self, own).copy_(value)
                delattr(self, _PRISTINE + own)
        for own in whole:
            if _PRISTINE + own not in self._buffers:
                self.register_buffer(_PRISTINE + own, getattr(self, own).detach().clone(), persistent=False)
        if store is None or (self._slice_store is not None and self._slice_store.names == sliced):
            self.refresh()
        else:
            self._exchange(store)

    def _exchange(self, store) -> None:
        """Let these slices stand in the weight instead of those that do, if any; both lie along one dimension."""
        self.check_whole()
        old, index = self._slice_store, store.index(self)
        if old is None:
            out = index[:0], self.weight.detach().narrow(store.dim, 0, 0).contiguous()
        else:
            out = old.index(self), self._buffers[SLICE]
        base = exchange_slice_(self.weight, store.dim, *out, index, self._sum_of_slices(store))
        torch.autograd.graph.increment_version(self.weight)  # a graph that saved the weight must notice
        self._slice_store = store
        self.register_buffer(SLICE, base, persistent=False)
        self.note_written(store.names)

    def _drop_slices(self) -> None:
        self._slice_store = None
        self._buffers.pop(SLICE, None)
        self._non_persistent_buffers_set.discard(SLICE)

    def check_whole(self) -> None:
        """Raises RuntimeError where something sharded the weight, so that its slices can be neither read nor written."""
        if type(self.weight) is not nn.Parameter or self.weight.dim() != 2:
            raise RuntimeError(
                f"the weight is a {type(self.weight).__name__} of shape {list(self.weight.shape)}, in which no slice can "
                "train: fully_shard, FSDP and ZeRO's stage 3 don't go with adapters that train slices of the weights in "
                "place; use DistributedDataParallel"
            )

    def _write(self, store, delta) -> None:
        self.check_whole()
        write_slice_(self.weight, store.index(self), store.dim, self._buffers[SLICE], delta)
        torch.autograd.graph.increment_version(self.weight)  # a graph that saved the weight must notice

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute what stands in the own tensors, after the adapters' values changed."""
        stored, standing = self._stored(), self.standing()
        totals = {own: value.to(torch.promote_types(value.dtype, torch.float32), copy=True) for own, value in stored.items()}
        slices = [name for name in standing if self.slice_part(name) is not None]
        if self._slice_store is not None:
            self._write(self._slice_store, self._sum_of_slices(self._slice_store))
        for name in standing if totals else ():
            part = self.slice_part(name)
            if part is None:
                self._add_delta(totals, name)
            else:
                weight = totals["weight"]
                weight.index_add_(part.dim(self.fan_in_fan_out), part.index, self.slice_value(name).to(weight.dtype))
        for own, total in totals.items():
            getattr(self, own).copy_(total)
        self.note_written(slices)

    def _sum_of_slices(self, store) -> torch.Tensor:
        """The deltas of all slices on the store's indices, float32 (float64)."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        if len(store.names) == 1:
            return self.slice_value(store.names[0]).detach().to(wide).contiguous()
        union, shape = store.index(self), list(self.weight.shape)
        shape[store.dim] = len(union)
        total = torch.zeros(shape, dtype=wide, device=union.device)
        for name in store.names:
            at = torch.searchsorted(union, self.slice_part(name).index)
            total.index_add_(store.dim, at, self.slice_value(name).to(wide))
        return total

    @torch.no_grad()
    def fold(self, adapter) -> None:
        """Make the adapter's copies and delta part of the pristine base for good. The adapter is spent afterwards."""
        merged = [self._adapters[name] for name in self._merged]
        for other in merged:
            self.set_merged(other, False)
        for own, value in self._copies([adapter]).items():
            getattr(self, own).copy_(value)
        if adapter.name in self._settings or self.slice_part(adapter.name) is not None:
            active, adapter.active = adapter.active, True
            self.set_merged(adapter, True)
            adapter.active = active
            self._merged.clear()
            for own in self._stored():
                delattr(self, _PRISTINE + own)
            self._drop_slices()
        for other in merged:
            if other is not adapter:
                self.set_merged(other, True)

    def _stored(self) -> dict[str, torch.Tensor]:
        """The pristine bits of tensors that are kept whole."""
        own = {key[len(_PRISTINE) :]: value for key, value in self._buffers.items() if key.startswith(_PRISTINE)}
        own.pop("slice", None)
        return own

    def _touched(self) -> list[str]:
        """The own tensors in which deltas stand."""
        return [*self._stored(), *(["weight"] if self._slice_store is not None else [])]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for own in self._touched():
            destination[prefix + own] = pristine(self, own)

    def _load_from_state_dict(self, *args, **kwargs):
        if not self._touched():
            return super()._load_from_state_dict(*args, **kwargs)
        stored = self._stored()
        with torch.no_grad():
            if self._slice_store is not None:
                self._write(self._slice_store, None)
                self._drop_slices()
            for own, value in stored.items():
                getattr(self, own).copy_(value)
            super()._load_from_state_dict(*args, **kwargs)
            for own, value in stored.items():
                value.copy_(getattr(self, own))

        def merge_again(module, incompatible_keys):  # the factors are children and load after this method
            hook.remove()
            module.rebuild()

        hook = self.register_load_state_dict_post_hook(merge_again)
