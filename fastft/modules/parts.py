"""Adapters that train a part of a linear's weight where it stands: slices of it (`slices`) or single entries (`sparse`).

While such an adapter is active and merged, which it is from the start, round(pretrained + delta) stands in the weight:
forward and dX are the frozen layer's. Unmerged, the weight has its pretrained bits and the delta is applied beside it.
"""

import warnings

import torch

from ..ops.lora_linear import forward_mode, lora_update
from ..ops.partial_linear import partial_linear
from .merging import pristine
from .stores import Seen, SeenWeight


class PartSettings:
    """What a module knows of one adapter's part, beside the tensors that the adapter holds there.

    seen: the tensor that the indices follow, as it was when they did.
    """

    seen: Seen

    def part(self, module, name):
        """Its `Part`, with indices on the weight's device."""
        raise NotImplementedError

    def delta(self, module, name) -> torch.nn.Parameter:
        raise NotImplementedError

    def places(self, module, name) -> torch.Tensor:
        """The tensor that the indices follow."""
        raise NotImplementedError

    def forget(self) -> None:
        """The indices have changed, or may have."""
        raise NotImplementedError

    def drop_values(self) -> None:
        """The delta may have changed without counting it."""

    def linear(self, module, name, x, weight, bias):
        """x Wᵀ + bias with the delta beside the weight."""
        raise NotImplementedError

    def update(self, module, name, x, y):
        """y with the delta's part added."""
        raise NotImplementedError

    def deltas(self, module, name) -> list:
        """[(Entries, delta)] of a part of entries."""
        raise NotImplementedError

    def observer(self, module, name):
        """What backward calls with (left, right), whose leftᵀ right is the gradient of the whole stored weight, or None."""
        return None


class TrainsParts:
    """Mixed into adapted linears; `_parts` holds the `PartSettings` by adapter name."""

    def part_of(self, name):
        settings = self._parts.get(name)
        return None if settings is None else settings.part(self, name)

    def delta_of(self, name):
        return self._parts[name].delta(self, name)

    def entry_deltas(self, name):
        return self._parts[name].deltas(self, name)

    def note_written(self, names):
        if self._store is not None:
            self._store.written, self._store.untouched = SeenWeight(self.weight), False
        self._written = {name: Seen(self.delta_of(name)) for name in names}

    def check_class(self) -> None:
        """Also where something else has changed the base."""
        super().check_class()
        self.follow_weight()

    def forget_indices(self) -> None:
        """The indices may have other values now."""
        for settings in self._parts.values():
            settings.forget()
        if self._store is not None:
            self._store.forget()

    def refresh(self) -> None:
        for settings in self._parts.values():
            settings.drop_values()
        super().refresh()

    def _forget_seen(self) -> None:
        """Before tensors may be swapped, which is refused for those that a weak reference knows."""
        self._written = dict.fromkeys(self._written, Seen())
        for settings in self._parts.values():
            settings.forget()
        if self._store is not None:
            self._store.written = SeenWeight()

    def _load_from_state_dict(self, *args, **kwargs):
        if self._store is not None and self._store.untouched:
            self.follow_weight()
        self._forget_seen()
        super()._load_from_state_dict(*args, **kwargs)
        self.forget_indices()  # read again by the rebuild that follows when the children are loaded

    def _apply(self, fn, *args, **kwargs):
        if not self._parts:
            return super()._apply(fn, *args, **kwargs)
        deltas = {name: self.delta_of(name).data for name in self._parts}
        before = self.weight.dtype
        self.follow_weight()
        current = [name for name, seen in self._written.items() if seen.still(self.delta_of(name))]
        self._forget_seen()
        super()._apply(fn, *args, **kwargs)
        # A cast of the model rounds its weights, also one to the dtype that they have (Trainer's of bf16_full_eval); the
        # delta stays what 16-bit weights need it for.
        for name, before_cast in deltas.items():
            delta = self.delta_of(name)
            if delta.dtype != (wide := torch.promote_types(delta.dtype, torch.float32)):
                delta.data = before_cast.to(delta.device, wide)
        self._written.update((name, Seen(self.delta_of(name))) for name in current)
        if self._store is not None:
            self._store.written = SeenWeight(self._parameters.get("weight"))
        if self.weight.dtype != before:
            self.refresh()
        return self

    def _parts_forward(self, input):
        """The output where parts train, with other adapters besides (but no DoRA: attaching refuses that)."""
        if (
            len(self._adapters) == 1
            and not (torch.is_grad_enabled() or forward_mode())
            and not torch.compiler.is_compiling()
        ):
            y = self._inference(input)
            if y is not None:
                return y
        on = [adapter for adapter in self._adapters.values() if adapter.on()]
        replaced = self._copies(on)
        names = [adapter.name for adapter in on if adapter.name in self._parts or adapter.name in self._settings]
        if not torch.compiler.is_compiling():
            if self._passed():  # a delta that it passed, too, would be written into what is kept as pristine
                self.check_whole()
            self._write_changes()
        standing = self.standing()
        if all(name in names for name in standing) and not any(own in replaced for own in self._touched()):
            weight, bias = self.weight, self.bias
        else:  # a delta that stands in the weight is not wanted in this forward
            standing, weight, bias = [], pristine(self, "weight"), pristine(self, "bias")
        weight, bias = replaced.get("weight", weight), replaced.get("bias", bias)
        trained = [name for name in standing if name in self._parts]
        if trained and weight.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            warnings.warn(
                "a weight requires a gradient while adapters train parts of it in place: what an optimizer changes of it at "
                "their positions is lost when their deltas are written next. Freeze it (weight.requires_grad_(False)), or "
                "train a full copy instead: modules_to_save",
                stacklevel=2,
            )
        beside = [name for name in names if name not in standing]
        if not trained and beside and beside[0] in self._parts:
            first, beside = beside[0], beside[1:]
            y = self._parts[first].linear(self, first, input, weight, bias)
        else:
            parts = [self.part_of(name) for name in trained]
            deltas = [self.delta_of(name) for name in trained]
            observers = [self._parts[name].observer(self, name) for name in trained]
            y = partial_linear(input, weight, bias, parts, deltas, observers=observers, fan_in_fan_out=self.fan_in_fan_out)
        for name in beside:
            if name in self._parts:
                y = self._parts[name].update(self, name, input, y)
            else:
                one = self._projection(name, replaced.get("weight"))
                y = lora_update(y, input, one.lora_A, one.lora_B, one.scale, one.dropout, lora_bias=one.lora_bias)
        return y

    def _inference(self, input):
        """The output without gradients with the one adapter there is, by the shortest way: a token's products take less time
        than the general way's lists. None where it does not lead."""
        ((name, adapter),) = self._adapters.items()
        if "modules_to_save" in self._modules:
            return None
        self._write_changes()
        on, stands = adapter.on(), self._store is not None
        if on == stands:  # the weight holds what this forward wants
            return self.plain.forward(self, input)
        if stands:
            return None
        return self._parts[name].linear(self, name, input, self.weight, self.bias)

    def _write_changes(self) -> None:
        """Deltas that were changed in place by something else than an optimizer are written before they are used."""
        self.refuse_replica()  # before it changes what all replicas share
        if self._store is not None and type(self._parameters.get("weight")) is torch.Tensor:
            self.check_whole()  # functional_call's, of a state_dict: no delta stands in it, and none would count
        for name, settings in self._parts.items():
            if not settings.seen.still(places := settings.places(self, name)):
                # DistributedDataParallel sends rank 0's to all ranks: indices, deltas, weights and what they were before.
                settings.forget()
                settings.seen = Seen(places)
                if self._store is not None:
                    self._store.forget()
        self.follow_weight()
        for name, seen in self._written.items():
            if not seen.still(self.delta_of(name)):
                return self.refresh()
