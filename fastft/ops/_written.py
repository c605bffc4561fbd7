"""Results of PyTorch's ops that ours write on."""

import torch
import torch.nn.functional as F


def to_write_on(y):
    """y, or a copy of it where modes of ``__torch_dispatch__`` look on.

    Selective activation checkpointing is such a mode: it keeps what chosen ops returned, not a copy, for the second forward,
    which must not find there what we added in the first. Where it keeps our copy too it raises: that counts as changed.
    """
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return y
    return announced(y.clone())


def announced(y):
    """y, which is about to be changed by ops that count no versions; said only where somebody may have kept it."""
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():
        torch.autograd.graph.increment_version(y)
    return y


def output_to_write_on(x, y, weight, bias):
    """x Wᵀ + bias, or a copy of y where that is given."""
    return to_write_on(F.linear(x, weight, bias) if y is None else y.clone(memory_format=torch.contiguous_format))
