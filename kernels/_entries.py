"""What the kernels of chosen entries (``kernels/sparse.py``) share: checks, searches, and blocks of entries."""

import torch
import triton
import triton.language as tl

from . import _config
from ._launch import ACTIVATION, check, device_name

_STARTS, _COLUMNS = (torch.int64,), (torch.int32,)


def entry_config(op: str, weight) -> dict:
    """The configuration of an op that walks over the entries of a weight."""
    return _config.lookup(device_name(weight.device), "sparse", op, dtype=f"{8 * weight.element_size()}")


def nothing(*args):
    """The plan of no entries."""


def indices(starts, columns, A: int) -> dict:
    return {"starts": (starts, _STARTS, (A + 1,)), "columns": (columns, _COLUMNS, (columns.numel(),))}


def checked_entries(op: str, weight, starts, columns, *, others=None, **parts) -> tuple[int, int, int]:
    """A, E and the weight's row stride; each of `parts`, a tensor and its dtypes, has a number an entry.

    `others` are checked as they stand: name -> (tensor, dtypes, shape).
    """
    (A, B), E = weight.shape, columns.numel()
    layouts = indices(starts, columns, A) | {name: (part, dtypes, (E,)) for name, (part, dtypes) in parts.items()}
    check(op, apart=("weight",), weight=(weight, ACTIVATION, (A, B)), **layouts, **(others or {}))
    return A, E, weight.stride(0)


@triton.jit
def search(p, b_value, b_low, b_high, span):
    """int64: the first index in [b_low, b_high) whose element of the ascending p is above b_value, else b_high.

    `span` (int64) is the largest b_high - b_low. A step halves what is left, and all lanes take as many.
    """
    while span > 0:
        b_middle = (b_low + b_high) // 2
        m_open = b_low < b_high
        m_above = tl.load(p + b_middle, mask=m_open, other=0) > b_value
        b_high = tl.where(m_open & m_above, b_middle, b_high)
        b_low = tl.where(m_open & (m_above == 0), b_middle + 1, b_low)
        span = span // 2
    return b_low


@triton.jit
def rows_of_block(p_starts, o_e, A, E):
    """int64: the rows of the entries o_e, one after the other; an entry past E gets the last one's row.

    The rows of the block's ends are found first, in log2(A) steps of one lane each; the others lie between: 5 steps in a
    block of 1024 entries where rows hold 40 of them, 8 where they hold 4. One search of the whole weight would be 12 steps
    for each of a thread's entries. Its loads are of a few addresses that lie in L1, and run under those of what is chosen.
    """
    b_ends = tl.where(tl.arange(0, 2) == 0, tl.min(o_e), tl.minimum(tl.max(o_e), E - 1))
    b_ends = search(p_starts + 1, b_ends, tl.zeros([2], tl.int64), tl.full([2], A, tl.int64), A.to(tl.int64))
    first, last = tl.min(b_ends), tl.max(b_ends)
    b_low = tl.zeros(o_e.shape, tl.int64) + first
    return search(p_starts + 1, o_e, b_low, tl.zeros(o_e.shape, tl.int64) + last, last - first)


@triton.jit
def entry_block(p_starts, p_columns, A, E, w_row, BLOCK: tl.constexpr):
    """This program's entries: their numbers, which of them exist, rows, columns and offsets in the weight."""
    o_e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < E
    b_column = tl.load(p_columns + o_e, mask=m_e, other=0)
    b_row = rows_of_block(p_starts, o_e, A, E)
    return o_e, m_e, b_row, b_column, b_row * w_row + b_column
