"""The base weights of several linear layers on one input in one buffer, so that one GEMM computes them all.

Each layer's Parameters keep their identity and become slices of the buffer. Whoever moves, copies or replaces them
(``deepcopy``, ``.to()``, assigning a Parameter) silently takes them out of it, so that is looked at in every forward: then
they are packed again, or the layers compute apart and `reason` says why.
"""

import threading

import torch
from torch import nn

from . import huge_pages
from .sharding import weights_come_and_go

# Devices on which one GEMM over all the weights is taken for faster than one for each layer. Not CPUs, where it was slower
# (hidden size 768, 2 threads: a training step took 1.02 of the time): the library is no faster on wide products, and
# whoever reads the columns of a wide output strides through memory. On GPUs it saves launches; nobody has measured it.
ONE_GEMM_DEVICES = {"cuda"}
# A model that is moved back and forth at every call would be copied each time.
MAX_REPACKS = 8
_packing = threading.Lock()


class PackedWeights:
    """The weights [N_i, K] of `members` as one [sum of N_i, K], and their biases if all have one."""

    def __init__(self, members):
        self.members = list(members)
        self.sizes = [member.weight.shape[0] for member in members]
        self.reason: str | None = None
        self.weight = self.bias = None
        self._repacks = MAX_REPACKS
        self._pack()

    def __getstate__(self):  # deepcopy and pickle copy each Parameter by itself
        return {**self.__dict__, "weight": None, "bias": None, "_repacks": MAX_REPACKS}

    def columns(self, x, bias: bool) -> list[torch.Tensor] | None:
        """x Wᵀ (+ bias) [T, N_i] of every member, columns of one matrix, each of which may be changed in place; or None
        if the layers have to compute apart, or do it faster."""
        with _packing:
            if not (self.intact() or self._pack_again()):
                return None
            weight, bias = self.weight, self.bias if bias else None
        if x.dtype != weight.dtype or x.device != weight.device or not self.is_one_gemm(x.device):
            return None
        with torch.no_grad():
            return list(nn.functional.linear(x, weight, bias).unsafe_split_with_sizes(self.sizes, 1))

    @staticmethod
    def is_one_gemm(device) -> bool:
        """Is one GEMM of all members the faster one on such a device?"""
        return device.type in ONE_GEMM_DEVICES

    def intact(self) -> bool:
        """Are all Parameters slices of the buffer?"""
        return self.weight is not None and are_packed(self.members, self.weight, self.bias)

    def holds(self, i, weight, bias) -> bool:
        """Are these tensors the i-th slices of the buffer?"""
        rows = sum(self.sizes[:i])
        return all(
            (own is None) == (whole is None)
            and (own is None or own.data_ptr() == whole.data_ptr() + rows * whole.stride(0) * whole.element_size())
            for own, whole in ((weight, self.weight), (bias, self.bias))
        )

    def unpack(self) -> None:
        """Give every Parameter memory of its own again."""
        with torch.inference_mode(False):
            for member in self.members:
                for parameter in (member.weight, member.bias):
                    if isinstance(parameter, nn.Parameter) and shares_memory(parameter):
                        parameter.data = parameter.data.clone()
        self.weight = self.bias = None

    def _pack(self) -> bool:
        self.weight = self.bias = None
        self.reason = packing_obstacle(self.members)
        if self.reason is None:
            self.weight = into_one([member.weight for member in self.members])
            if self.members[0].bias is not None:
                self.bias = into_one([member.bias for member in self.members])
        return self.reason is None

    def _pack_again(self) -> bool:
        if self._repacks == 0:
            self.reason = f"the weights left their buffer {MAX_REPACKS + 1} times"
            return False
        if weights_come_and_go():  # what is gathered for a forward has its place, to which later values will come
            self.reason = "fully_shard moves the weights for every forward"
            self.weight = self.bias = None
            return False
        packed = self._pack()
        self._repacks -= packed
        return packed


def into_one(parameters):
    """A new buffer with the rows of these Parameters one after the other, of which they become slices."""
    # In inference mode Parameters would become inference tensors, which can't be trained through ever after.
    with torch.inference_mode(False), torch.no_grad():
        packed = huge_pages.cat([parameter.detach() for parameter in parameters])
        for parameter, part in zip(parameters, packed.split([p.shape[0] for p in parameters])):
            parameter.data = part
    return packed


def are_packed(members, weight, bias, trainable: bool = False) -> bool:
    """Are the members' weights and biases the slices of these buffers? trainable: may they require gradients?"""
    biases = [member.bias for member in members]
    return _are_slices([member.weight for member in members], weight, trainable) and (
        all(b is None for b in biases) if bias is None else _are_slices(biases, bias, trainable)
    )


def _are_slices(parameters, packed, trainable) -> bool:
    place = packed.data_ptr()
    for p in parameters:
        if type(p) is not nn.Parameter or p.data_ptr() != place or p.shape[1:] != packed.shape[1:]:
            return False
        if p.requires_grad and not trainable:
            return False
        if p.dtype != packed.dtype or p.device != packed.device or not p.is_contiguous():
            return False
        place += p.numel() * p.element_size()
    return place == packed.data_ptr() + packed.numel() * packed.element_size()


def packing_obstacle(members, trainable: bool = False) -> str | None:
    """Why the weights of these layers can't lie in one buffer, or None. trainable: may they require gradients?"""
    if any(getattr(member, "fan_in_fan_out", False) for member in members):
        return "a Conv1D's weight is [K, N]: its outputs are columns, which can't be packed as rows"
    biases = [member.bias for member in members]
    if any(b is None for b in biases) and any(b is not None for b in biases):
        return "some have a bias and some have none"
    for tensors, what in (([m.weight for m in members], "weights"), (biases, "biases")):
        if tensors[0] is None:
            continue
        if any(type(t) is not nn.Parameter or (t.requires_grad and not trainable) for t in tensors):
            return f"the {what} are not all plain frozen Parameters"
        first = tensors[0]
        if any((t.dtype, t.device, t.shape[1:]) != (first.dtype, first.device, first.shape[1:]) for t in tensors):
            return f"the {what} differ in dtype, device or in-features"
        if first.device.type == "meta" or not all(t.numel() for t in tensors):
            return f"the {what} are not in memory"
        if not all(t.is_contiguous() for t in tensors):
            return f"the {what} are not contiguous"
    return None


def unshare(tensors: dict[str, torch.Tensor], names) -> None:
    """Replace what lies in a buffer by a copy: safetensors refuses tensors that share memory."""
    for name in names:
        if name in tensors and shares_memory(tensors[name]):
            tensors[name] = tensors[name].clone()


def shares_memory(t: torch.Tensor) -> bool:
    """Does t lie in memory that holds more than t?"""
    return t.untyped_storage().nbytes() > t.numel() * t.element_size()
