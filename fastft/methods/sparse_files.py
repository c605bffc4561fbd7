"""Entries in files: at most 4 bytes of index each.

A weight of less than 2³¹ elements: row-major positions, int32, ascending. A larger one: the distances between them, int32,
the first from 0.
"""

import torch

from ..ops.entries import Entries

_LARGEST = torch.iinfo(torch.int32).max


def in_steps(shape) -> bool:
    """Are positions in a weight of this shape written as distances?"""
    return shape[0] * shape[1] > _LARGEST


def pack_index(entries: Entries) -> torch.Tensor:
    """int32 [E].

    Raises:
        ValueError: 2³¹ or more elements lie between two entries.
    """
    flat = entries.flat()
    if in_steps(entries.shape):
        flat = torch.diff(flat, prepend=flat.new_zeros(1))
        if len(flat) and int(flat.max()) > _LARGEST:
            raise ValueError(f"more than {_LARGEST} elements lie between two entries of a weight {list(entries.shape)}")
    return flat.int()


def unpack_index(index: torch.Tensor, shape, what: str = "index") -> Entries:
    """The entries that `pack_index` wrote.

    Raises:
        ValueError: another dtype, positions out of range, or not ascending.
    """
    if index.dtype != torch.int32:
        raise ValueError(f"the {what} is {index.dtype}, not torch.int32")
    flat = index.long()
    flat = flat.cumsum(0) if in_steps(shape) else flat
    if (flat.diff() <= 0).any():
        raise ValueError(f"the {what} must ascend, each entry once")
    try:
        return Entries.of_flat(flat, shape)
    except ValueError as error:
        raise ValueError(f"the {what}: {error}") from error
