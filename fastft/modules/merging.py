"""Deltas in a module's own tensors, and how they come out without a trace.

Two kinds of delta can stand in a tensor: one that changes all of it (LoRA, merged on request), and a part of a weight: rows
or columns as S²FT trains, single entries as SpIEL and LIFT do; there from the start, while the adapter is active. While any
does, the values from before are kept: the whole tensor in the buffer ``_pristine_<name>``, or of parts of one kind only
what they touch, in ``_pristine_part`` (see `stores`). The tensors are always recomputed as round(pristine + all standing
deltas in float32), so any order of merging, switching and detaching is exact, and ``state_dict`` shows the pristine base.
"""

import torch
from torch import nn

from ..ops.partial_linear import Part
from .stores import EntryStore, SeenWeight, SliceStore

_PRISTINE = "_pristine_"
PART = "_pristine_part"
DATA_PARALLEL = (
    "adapters that train parts of the weights in place don't go with nn.DataParallel, whose replicas of the layers live for "
    "one forward (transformers' Trainer wraps models in it where it sees several GPUs). Start one process for each GPU "
    "(torchrun --nproc-per-node N script.py), or use one GPU: CUDA_VISIBLE_DEVICES=0, or args._n_gpu = 1 before the Trainer "
    "is made"
)


def pristine(module: nn.Module, own: str) -> torch.Tensor:
    """One of a module's own tensors as it is without deltas; a copy where only a slice of it is kept."""
    stored = module._buffers.get(_PRISTINE + own)
    if stored is None and own == "weight" and PART in module._buffers:
        module.check_whole()
        module.follow_weight()
        with torch.no_grad():
            stored = module.weight.detach().clone(memory_format=torch.contiguous_format)
            module._store.restore(module, stored, module._buffers[PART])
    return getattr(module, own) if stored is None else stored


def holds_pristine(value: torch.Tensor, kept: torch.Tensor) -> bool:
    """Was the tensor into which a delta was merged replaced for this forward by one with the pristine values `kept`?

    `functional_call` does so with ``state_dict``, which shows the pristine base. What it is given of ``named_parameters``
    has the merged values, as has what FSDP gathers, so that the values have to tell.

    Raises:
        RuntimeError: another number of values.
    """
    if type(value) is not torch.Tensor or torch.compiler.is_compiling():  # a Parameter is the module's own
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    if type(value) is not torch.Tensor or value.is_meta or kept.is_meta:
        return False
    if value.shape != kept.shape:
        raise RuntimeError(
            f"an adapter is merged into a tensor {list(kept.shape)}, and a transform replaced that by {list(value.shape)}: "
            "whether these hold the adapter, too, can't be told. unmerge() it first"
        )
    return value is kept or torch.equal(value, kept.to(value))


class Mergeable(nn.Module):
    """Mixed into adapted modules; `_adapters` holds the adapters by name, `_merged` the names of those that stand in the
    own tensors (parts of the weight only while active), `_store` what is kept where only such parts do."""

    def edited(self, name: str) -> tuple[str, ...]:
        """The own tensors that adapter `name`'s delta changes."""
        return ("weight",)

    def merge_obstacle(self, name: str) -> str | None:
        """Why adapter `name` can't be merged here, or None."""
        return None

    def part_of(self, name: str) -> Part | None:
        """The part of the weight that adapter `name`'s delta is, or None if it has no such delta here."""
        return None

    def delta_of(self, name: str) -> torch.Tensor:
        """The delta of that part, oriented as the stored weight."""
        raise NotImplementedError

    def entry_deltas(self, name: str) -> list:
        """[(Entries, delta)] of adapter `name`, where its part is of entries."""
        raise NotImplementedError

    def note_written(self, names) -> None:
        """The parts of these adapters have just been written into the weight, and no others stand in it."""

    def _add_delta(self, totals: dict[str, torch.Tensor], name: str) -> None:
        """Add adapter `name`'s delta to the totals of the tensors it edits, in place, in their layout and (float32 or
        float64) dtype. A total holds the pristine tensor and the standing adapters that were attached before.

        All that a further kind of delta has to say: storing, merging and restoring are here.
        """
        raise NotImplementedError(f"{type(self).__name__} has no weight delta to merge")

    def standing(self) -> list[str]:
        """The adapters whose deltas are in the own tensors, in the order of attaching, whatever the order of merging."""
        merged = [name for name in self._adapters if name in self._merged]
        return [name for name in merged if self.part_of(name) is None or self._adapters[name].active]

    def set_merged(self, adapter, merged: bool) -> None:
        """Put the adapter's delta into the own tensors, or take it out. The pristine bits come back with the last one."""
        if merged == (adapter.name in self._merged):
            return
        self.follow_weight()  # before anything is changed
        if merged:
            self._merged.append(adapter.name)
        else:
            self._merged.remove(adapter.name)
        self.rebuild()

    @torch.no_grad()
    def rebuild(self) -> None:
        """Keep what has to be kept and write what has to stand, after adapters were merged, taken out or switched."""
        standing = self.standing()
        parts = {name: part for name in standing if (part := self.part_of(name)) is not None}
        whole = {own for name in standing if name not in parts for own in self.edited(name)}
        dims = {None if part.kind == "entries" else part.dim(self.fan_in_fan_out) for part in parts.values()}
        if len(dims) > 1 or (parts and "weight" in whole):  # then what is touched is no part of one kind
            whole.add("weight")
        store = None
        if parts and "weight" not in whole:
            (dim,) = dims
            store = EntryStore(tuple(parts)) if dim is None else SliceStore(tuple(parts), dim)
        old = self._store
        same = store is not None and type(store) is type(old) and store.names == old.names
        if old is not None and not same and (store is None or not store.succeeds(old)):
            self._drop_parts(restore=True)
        for own, value in self._stored().items():
            if own not in whole:
                getattr(self, own).copy_(value)
                delattr(self, _PRISTINE + own)
        for own in whole:
            if _PRISTINE + own not in self._buffers:
                with torch.inference_mode(False):  # else nothing could be loaded into the copy outside inference mode
                    kept = getattr(self, own).detach().clone()
                self.register_buffer(_PRISTINE + own, kept, persistent=False)
        if store is None or same:
            self.refresh()
        else:
            self._exchange(store)

    def _exchange(self, store) -> None:
        """Let these parts stand in the weight instead of those that do, if any."""
        self.check_whole()
        self.follow_weight()
        first = self._store is None and store.is_zero(self) and not self.weight.is_inference()
        base = store.exchange(self, self._store, self._buffers.get(PART))
        torch.autograd.graph.increment_version(self.weight)  # a graph that saved the weight must notice
        self._store = store
        self.register_buffer(PART, base, persistent=False)
        self.note_written(store.names)
        store.untouched = first

    def _drop_parts(self, restore: bool) -> None:
        """Forget the store; with `restore` put the pristine bits back before."""
        if restore:
            self.check_whole()
            self.follow_weight()
            self._store.restore(self, self.weight, self._buffers[PART])
            torch.autograd.graph.increment_version(self.weight)
        self._store = None
        self._buffers.pop(PART, None)
        self._non_persistent_buffers_set.discard(PART)

    def follow_weight(self) -> None:
        """What something else wrote into the weight while no delta but 0 stood in it is the base from now on.

        DistributedDataParallel sends rank 0's weights when it is made, and other ranks may have had others (a head with new
        values), which would come back at the adapter's places with its first update. Of entries it sends nothing else.

        Raises:
            RuntimeError: something wrote into the weight while a trained delta stands in it.
        """
        store, weight = self._store, self._parameters.get("weight")
        if store is None or weight is None or torch.compiler.is_compiling() or store.written.still(weight):
            return
        with torch.no_grad():
            self._follow(store, weight)

    def _follow(self, store, weight):
        owns = all(seen.of(self.delta_of(name)) for name, seen in self._written.items())
        same = all(seen.still(self.delta_of(name)) for name, seen in self._written.items())

        def untouched():
            return store.untouched or (same and store.is_zero(self))

        if store.written.is_new_base(weight, owns, same, untouched, self._holds):
            self._buffers[PART].copy_(store.gather(self))
        if owns:  # else it is functional_call's, for this forward
            store.written = SeenWeight(weight)

    def _holds(self) -> bool:
        """Does the weight hold what the deltas make of the pristine values?"""
        found = self._store.gather(self)
        self._store.write(self, self._buffers[PART])
        holds = torch.equal(found, self._store.gather(self))
        if not holds:
            self._store.restore(self, self.weight, found)
        return holds

    def misses(self, name: str) -> bool:
        """Does adapter `name` stand in the weight with other values than its own, which no count of changes tells of?"""
        store, weight = self._store, self._parameters.get("weight")
        if store is None or name not in self._written or weight is None or weight.is_meta or not store.written.still(weight):
            return False
        with torch.no_grad():
            return all(seen.still(self.delta_of(own)) for own, seen in self._written.items()) and not self._holds()

    def check_whole(self) -> None:
        """Raises RuntimeError where the weight is not the module's own whole Parameter, so that parts of it can be neither
        read nor written."""
        self.refuse_replica()
        if type(self.weight) is nn.Parameter and self.weight.dim() == 2:
            return
        if "weight" not in self._parameters:
            cause = (
                "pruning and parametrizations (weight_norm among them) compute it from others; remove them (prune.remove, "
                "parametrize.remove_parametrizations), best before attaching"
            )
        elif type(self.weight) is torch.Tensor and self.weight.dim() == 2:
            cause = (
                "functional_call put it there, or FSDP; give functional_call the adapter's tensors alone "
                "(handle.named_parameters()), and use DistributedDataParallel instead of FSDP"
            )
        else:
            cause = "it is sharded: fully_shard, FSDP and ZeRO's stage 3 don't go with this; use DistributedDataParallel"
        raise RuntimeError(
            f"the weight is a {type(self.weight).__name__} of shape {list(self.weight.shape)} and not the layer's own "
            f"Parameter, in which alone adapters that train parts of the weights in place can train: {cause}"
        )

    def refuse_replica(self) -> None:
        """Raises RuntimeError in what nn.DataParallel makes of the module for one forward."""
        if "_is_replica" in self.__dict__:
            raise RuntimeError(DATA_PARALLEL)

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute what stands in the own tensors, after the adapters' values changed."""
        stored, standing = self._stored(), self.standing()
        totals = {own: value.to(torch.promote_types(value.dtype, torch.float32), copy=True) for own, value in stored.items()}
        if self._store is not None:
            self.check_whole()
            self.follow_weight()
            self._store.write(self, self._buffers[PART])
            torch.autograd.graph.increment_version(self.weight)
        for name in standing if totals else ():
            part = self.part_of(name)
            if part is None:
                self._add_delta(totals, name)
            elif part.kind == "entries":
                weight = totals["weight"]
                for entries, delta in self.entry_deltas(name):
                    weight[entries.rows(), entries.columns.long()] += delta.to(weight.dtype)
            else:
                weight = totals["weight"]
                weight.index_add_(part.dim(self.fan_in_fan_out), part.index, self.delta_of(name).to(weight.dtype))
        for own, total in totals.items():
            getattr(self, own).copy_(total)
        self.note_written([name for name in standing if self.part_of(name) is not None])

    def update_site(self, name):
        """What an op needs to update the delta of adapter `name` and write it into the weight in one pass, where it stands
        there alone: (weight, index, dim, base) of a slice, (weight, starts, columns, base) of entries. Else None, and
        whoever changes the delta calls `refresh`."""
        delta = self.delta_of(name)
        if self._store is None or delta.dtype != torch.float32 or not delta.is_contiguous():
            return None
        self.check_whole()
        self.follow_weight()
        return self._store.site(self, name, self._buffers[PART])

    @torch.no_grad()
    def fold(self, adapter) -> None:
        """Make the adapter's copies and delta part of the pristine base for good. The adapter is spent afterwards."""
        merged = [self._adapters[name] for name in self._merged]
        for other in merged:
            self.set_merged(other, False)
        for own, value in self._copies([adapter]).items():
            getattr(self, own).copy_(value)
        if adapter.name in self._settings or self.part_of(adapter.name) is not None:
            active, adapter.active = adapter.active, True
            self.set_merged(adapter, True)
            adapter.active = active
            self._merged.clear()
            for own in self._stored():
                delattr(self, _PRISTINE + own)
            self._drop_parts(restore=False)
        for other in merged:
            if other is not adapter:
                self.set_merged(other, True)

    def _stored(self) -> dict[str, torch.Tensor]:
        """The pristine bits of tensors that are kept whole."""
        own = {key[len(_PRISTINE) :]: value for key, value in self._buffers.items() if key.startswith(_PRISTINE)}
        own.pop("part", None)
        return own

    def _passed(self) -> dict[str, torch.Tensor]:
        """What `functional_call` put in the place of the own tensors into which deltas were merged, where it is pristine."""
        return {own: value for own, kept in self._stored().items() if holds_pristine(value := getattr(self, own), kept)}

    def _touched(self) -> list[str]:
        """The own tensors in which deltas stand."""
        return [*self._stored(), *(["weight"] if self._store is not None else [])]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for own in self._touched():
            destination[prefix + own] = pristine(self, own)

    def _load_from_state_dict(self, *args, **kwargs):
        if not self._touched():
            return super()._load_from_state_dict(*args, **kwargs)
        stored = self._stored()
        with torch.no_grad():
            if self._store is not None:
                self._drop_parts(restore=True)
            for own, value in stored.items():
                getattr(self, own).copy_(value)
            super()._load_from_state_dict(*args, **kwargs)
            for own, value in stored.items():
                value.copy_(getattr(self, own))

        def merge_again(module, incompatible_keys):  # the factors are children and load after this method
            hook.remove()
            module.rebuild()

        hook = self.register_load_state_dict_post_hook(merge_again)
