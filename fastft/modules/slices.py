"""Adapters that are a slice of a linear's weight (rows or columns), trained where it stands (S²FT, arXiv:2412.06289).

Such an adapter holds, by its name, ``slice_delta`` (a float32 parameter: how far the slice is from the pretrained weight, in
the orientation of the stored weight) and ``slice_units`` (int32: which units of consecutive features the slice consists of).
While it is active and merged, which it is from the start, round(pretrained + delta) stands in the weight: forward and dX are
the frozen layer's. Unmerged, the weight has its pretrained bits and the delta is applied beside it.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from ..ops.lora_linear import lora_update
from ..ops.partial_linear import Part, delta_linear, delta_update, partial_linear
from .merging import SLICE, pristine


@dataclass(eq=False)
class SliceSettings:
    """Where a slice lies: unit u is the `size` features from ``offset + u * size`` on, of the rows or columns.

    part: the same as an index, on the weight's device; made when it is asked for. version: of the units that it follows.
    cast: (version of the delta, the delta in the weight's 16-bit dtype), for inference beside the weight.
    """

    kind: str
    size: int = 1
    offset: int = 0
    part: Part | None = None
    version: tuple[int, int] | None = None
    cast: tuple | None = field(default=None, repr=False)

    def index(self, units: torch.Tensor) -> torch.Tensor:
        """int32 [units · size], ascending as the units are."""
        first = self.offset + units.to(torch.int32) * self.size
        return (first[:, None] + torch.arange(self.size, dtype=torch.int32, device=units.device)).flatten()


class Buffers(nn.Module):
    """Tensors by name that are saved with the model and follow it to its device, and are not parameters."""

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        self.register_buffer(name, value)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._buffers[name]

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]

    def __contains__(self, name: str) -> bool:
        return name in self._buffers

    def __len__(self) -> int:
        return len(self._buffers)


def _version(delta) -> tuple[int, int]:
    """Changes with every change in place, and is another's for a copy, whose counter starts anew."""
    return id(delta), delta._version


class Sliced:
    """Mixed into adapted linears; `_slices` holds the `SliceSettings` by adapter name."""

    slice_holders = ("slice_delta", "slice_units")

    def add_slice(self, adapter, slice_delta: torch.Tensor, slice_units: torch.Tensor, settings: SliceSettings) -> None:
        """slice_units int32 [units], ascending; slice_delta the slice's shape in the stored weight, at least float32."""
        self._hold("slice_delta", nn.ParameterDict, adapter, nn.Parameter(slice_delta))
        self._hold("slice_units", Buffers, adapter, slice_units)
        self._slices[adapter.name] = settings
        self.set_merged(adapter, True)

    def slice_part(self, name):
        settings = self._slices.get(name)
        if settings is None:
            return None
        if settings.part is None or settings.part.index.device != self.weight.device:
            units = self.slice_units[name].to(self.weight.device)
            settings.part = Part(settings.kind, settings.index(units))
        return settings.part

    def slice_value(self, name):
        return self.slice_delta[name]

    def slice_site(self, name):
        """(weight, index, dim, base) for `slice_adamw_` where the slice of adapter `name` stands in the weight alone; else
        None, and whoever changes the delta calls `refresh`."""
        store, delta = self._slice_store, self.slice_delta[name]
        alone = store is not None and store.names == (name,)
        if not alone or delta.dtype != torch.float32 or not delta.is_contiguous():
            return None
        self.check_whole()
        return self.weight.detach(), store.index(self), store.dim, self._buffers[SLICE]

    def note_written(self, names):
        for name in names:
            self._written[name] = _version(self.slice_delta[name])

    def forget_indices(self) -> None:
        """The units may have other values now."""
        for settings in self._slices.values():
            settings.part = None

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.forget_indices()  # read again by the rebuild that follows when the children are loaded

    def _apply(self, fn, *args, **kwargs):
        if not self._slices:
            return super()._apply(fn, *args, **kwargs)
        deltas = {name: self.slice_delta[name].data for name in self._slices}
        before = self.weight.dtype
        super()._apply(fn, *args, **kwargs)
        if self.weight.dtype != before:
            # A cast of the model rounds its weights; the delta stays what 16-bit weights need it for.
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            for name, delta in deltas.items():
                self.slice_delta[name].data = delta.to(self.weight.device, wide)
            self.refresh()
        return self

    def _sliced_forward(self, input):
        """The output where slices are attached, with other adapters besides (but no DoRA: attaching refuses that)."""
        if len(self._adapters) == 1 and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            y = self._inference(input)
            if y is not None:
                return y
        on = [adapter for adapter in self._adapters.values() if adapter.on()]
        replaced = self._copies(on)
        names = [adapter.name for adapter in on if adapter.name in self._slices or adapter.name in self._settings]
        if not torch.compiler.is_compiling():
            self._write_changes()
        standing = self.standing()
        if all(name in names for name in standing) and not any(own in replaced for own in self._touched()):
            weight, bias = self.weight, self.bias
        else:  # a delta that stands in the weight is not wanted in this forward
            standing, weight, bias = [], pristine(self, "weight"), pristine(self, "bias")
        weight, bias = replaced.get("weight", weight), replaced.get("bias", bias)
        stored = {"fan_in_fan_out": self.fan_in_fan_out}
        trained = {name: self.slice_delta[name] for name in standing if name in self._slices}
        beside = [name for name in names if name not in standing]
        if not trained and beside and beside[0] in self._slices:
            first, beside = beside[0], beside[1:]
            y = delta_linear(input, weight, bias, self.slice_part(first), self.slice_delta[first], **stored)
        else:
            parts = [self.slice_part(name) for name in trained]
            y = partial_linear(input, weight, bias, parts, list(trained.values()), **stored)
        for name in beside:
            if name in self._slices:
                y = delta_update(y, input, self.slice_part(name), self.slice_delta[name], **stored)
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
        on, stands = adapter.on(), self._slice_store is not None
        if on == stands:  # the weight holds what this forward wants
            return self.plain.forward(self, input)
        if stands:
            return None
        stored = {"fan_in_fan_out": self.fan_in_fan_out}
        return delta_linear(input, self.weight, self.bias, self.slice_part(name), self._cast(name), **stored)

    def _cast(self, name):
        """The delta as inference multiplies it: of a 16-bit weight rounded to its dtype, once for all forwards."""
        delta, settings, dtype = self.slice_delta[name], self._slices[name], self.weight.dtype
        if delta.dtype == dtype or dtype == torch.float64:
            return delta
        if settings.cast is None or settings.cast[0] != _version(delta) or settings.cast[1].device != delta.device:
            settings.cast = _version(delta), delta.detach().to(dtype)
        return settings.cast[1]

    def _write_changes(self) -> None:
        """Deltas that were changed in place by something else than an optimizer are written before they are used."""
        for name, settings in self._slices.items():
            if settings.version != (version := _version(self.slice_units[name])):
                # DistributedDataParallel sends rank 0's to all ranks: units, deltas, weights and what they were before.
                settings.version, settings.part = version, None
                if self._slice_store is not None:
                    self._slice_store.union = None
        for name, version in self._written.items():
            if _version(self.slice_delta[name]) != version:
                return self.refresh()
