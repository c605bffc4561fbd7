"""Adapters that are a slice of a linear's weight (rows or columns), trained where it stands (S²FT, arXiv:2412.06289).

Such an adapter holds, by its name, ``slice_delta`` (a float32 parameter: how far the slice is from the pretrained weight, in
the orientation of the stored weight) and ``slice_units`` (int32: which units of consecutive features the slice consists of).
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from ..ops.partial_linear import Part, delta_linear, delta_update
from .parts import PartSettings
from .stores import Seen, has_gradient


@dataclass(eq=False)
class SliceSettings(PartSettings):
    """Where a slice lies: unit u is the `size` features from ``offset + u * size`` on, of the rows or columns.

    cast: (the delta as it was seen, the delta in the 16-bit dtype of a forward), for inference beside the weight.
    """

    kind: str
    size: int = 1
    offset: int = 0
    seen: Seen = field(default_factory=Seen, repr=False)
    cast: tuple[Seen, torch.Tensor] | None = field(default=None, repr=False)
    _part: Part | None = field(default=None, repr=False)

    def index(self, units: torch.Tensor) -> torch.Tensor:
        """int32 [units · size], ascending as the units are."""
        first = self.offset + units.to(torch.int32) * self.size
        return (first[:, None] + torch.arange(self.size, dtype=torch.int32, device=units.device)).flatten()

    def part(self, module, name):
        if self._part is None or self._part.index.device != module.weight.device:
            self._part = Part(self.kind, self.index(module.slice_units[name].to(module.weight.device)))
        return self._part

    def delta(self, module, name):
        return module.slice_delta[name]

    def places(self, module, name):
        return module.slice_units[name]

    def forget(self):
        self.seen, self.cast, self._part = Seen(), None, None

    def linear(self, module, name, x, weight, bias):
        delta = self.delta(module, name) if torch.is_grad_enabled() else self._cast(module, name, weight)
        return delta_linear(x, weight, bias, self.part(module, name), delta, fan_in_fan_out=module.fan_in_fan_out)

    def update(self, module, name, x, y):
        part, delta = self.part(module, name), self.delta(module, name)
        return delta_update(y, x, part, delta, fan_in_fan_out=module.fan_in_fan_out)

    def drop_values(self):
        self.cast = None

    def _cast(self, module, name, weight):
        """The delta as inference multiplies it: rounded to a 16-bit weight's dtype, or autocast's, once for all forwards."""
        delta, dtype, kind = self.delta(module, name), weight.dtype, weight.device.type
        if dtype in (torch.float64, delta.dtype) or torch.compiler.is_compiling() or has_gradient(delta):
            return delta
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        cast = self.cast
        if cast is None or not cast[0].still(delta) or cast[1].dtype != dtype or cast[1].device != delta.device:
            self.cast = cast = Seen(delta), delta.detach().to(dtype)
        return cast[1]


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


class Sliced:
    """Mixed into adapted linears beside `TrainsParts`."""

    slice_holders = ("slice_delta", "slice_units")

    def add_slice(self, adapter, slice_delta: torch.Tensor, slice_units: torch.Tensor, settings: SliceSettings) -> None:
        """slice_units int32 [units], ascending; slice_delta the slice's shape in the stored weight, at least float32."""
        self._hold("slice_delta", nn.ParameterDict, adapter, nn.Parameter(slice_delta))
        self._hold("slice_units", Buffers, adapter, slice_units)
        self._parts[adapter.name] = settings
        self.set_merged(adapter, True)
