"""The selection family in Triton. The maths and shapes are in ``fastft/ops/selection.py``, the definition of these ops.

R rows of B scores, which may lie apart. Scores are read once an op, 16 bits of them in 7 us from a 4096 x 4096 matrix on an
H200, next to some 200 us for the product that makes them. Every launcher has the name and arguments of its op.
"""

import torch
import triton
import triton.language as tl

from . import _config
from ._lang import cast
from ._launch import ACTIVATION, Launch, check, device_name, planned
from ._tiles import cdiv

_BINS = 1 << 16
_INT64, _INT32 = (torch.int64,), (torch.int32,)
_SCORES = {"count_bins_": 1, "count_at_least": 0, "take_at_least_": 2}  # position among the arguments


def config_for(op: str, *args) -> dict:
    """The configuration that ``op(*args)`` is launched with: a pure function of device and dtype."""
    scores = args[_SCORES[op]]
    return _config.lookup(device_name(scores.device), "selection", op, dtype=f"{8 * scores.element_size()}")


@triton.jit
def _keys(b_score):
    """int32: the bits of |score| as float32. In integers where a conversion would replace those of a NaN."""
    if b_score.dtype == tl.bfloat16:
        return (b_score.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF) << 16
    elif b_score.dtype == tl.float16:
        b_half = b_score.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
        b_wide = cast(b_score, tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        return tl.where(b_half > 0x7C00, b_half << 13 | 0x7F800000, b_wide)
    else:
        return b_score.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _load_keys(p_scores, row, o_b, B, s_row):
    """The keys of a row's columns o_b, and which of those exist."""
    m_b = o_b < B
    return _keys(tl.load(p_scores + row * s_row + o_b, mask=m_b, other=0.0)), m_b


@triton.jit
def _count_bins_kernel(p_scores, p_counts, B, s_row, BLOCK: tl.constexpr):
    """Adds one block of one row to the histogram.

    65,536 counters fit no program's shared memory, so these are L2's atomics, of integers, whose order changes nothing. Some
    thousand of the bins hold nearly all of what is about normally distributed, enough to keep them from waiting for each
    other: 100 us for 16 M scores at one of them a cycle and L2 slice. Only bin 0 can be everybody's: where a gradient is
    zero. It is counted within the program.
    """
    n_b = tl.cdiv(B, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    o_b = pid % n_b * BLOCK + tl.arange(0, BLOCK)
    b_key, m_b = _load_keys(p_scores, pid // n_b, o_b, B, s_row)
    b_bin = b_key >> 15
    n_zeros = tl.sum((m_b & (b_bin == 0)).to(tl.int64))
    tl.atomic_add(p_counts, n_zeros, mask=n_zeros > 0, sem="relaxed")
    tl.atomic_add(p_counts + b_bin, tl.full([BLOCK], 1, tl.int64), mask=m_b & (b_bin > 0), sem="relaxed")


def _plan_count_bins(config, counts, scores):
    constants = config or config_for("count_bins_", counts, scores)
    R, B = scores.shape
    check("count_bins_", apart=("scores",), scores=(scores, ACTIVATION, (R, B)), counts=(counts, _INT64, (_BINS,)))
    if R == 0 or B == 0:
        return lambda counts, scores: None
    count = Launch(_count_bins_kernel, R * cdiv(B, constants["BLOCK"]), B, scores.stride(0), **constants)
    return lambda counts, scores: count(scores, counts)


def count_bins_(counts, scores, *, config=None):
    planned(_plan_count_bins, config, (counts, scores))(counts, scores)


@triton.jit(do_not_specialize=["bin"])
def _count_at_least_kernel(p_scores, p_out, B, s_row, bin, BLOCK: tl.constexpr):
    """out[row] = how many of its scores are in `bin` or above."""
    row = tl.program_id(0).to(tl.int64)
    b_count = tl.zeros([BLOCK], tl.int32)
    for first in range(0, B, BLOCK):
        b_key, m_b = _load_keys(p_scores, row, first + tl.arange(0, BLOCK), B, s_row)
        b_count += (m_b & (b_key >> 15 >= bin)).to(tl.int32)
    tl.store(p_out + row, tl.sum(b_count).to(tl.int64))


def _plan_count(config, scores, bin):
    constants = config or config_for("count_at_least", scores, bin)
    R, B = scores.shape
    check("count_at_least", apart=("scores",), scores=(scores, ACTIVATION, (R, B)))
    if R == 0 or B == 0:
        return lambda scores: scores.new_zeros(R, dtype=torch.int64)
    count = Launch(_count_at_least_kernel, R, B, scores.stride(0), bin, **constants)

    def run(scores):
        out = scores.new_empty(R, dtype=torch.int64)
        count(scores, out)
        return out

    return run


def count_at_least(scores, bin, *, config=None):
    return planned(_plan_count, config, (scores,), bin)(scores)


@triton.jit(do_not_specialize=["bin"])
def _take_at_least_kernel(p_columns, p_keys, p_scores, p_offsets, B, s_row, bin, BLOCK: tl.constexpr):
    """Writes from offsets[row] on where a row's scores in `bin` or above are, by ascending column, and their keys."""
    row = tl.program_id(0).to(tl.int64)
    next_place = tl.load(p_offsets + row)
    for first in range(0, B, BLOCK):
        o_b = first + tl.arange(0, BLOCK)
        b_key, m_b = _load_keys(p_scores, row, o_b, B, s_row)
        m_taken = m_b & (b_key >> 15 >= bin)
        b_count = tl.cumsum(m_taken.to(tl.int32), 0)
        b_place = next_place + b_count - 1
        tl.store(p_columns + b_place, o_b, mask=m_taken)
        tl.store(p_keys + b_place, b_key, mask=m_taken)
        next_place += tl.max(b_count)


def _plan_take(config, columns, keys, scores, offsets, bin):
    constants = config or config_for("take_at_least_", columns, keys, scores, offsets, bin)
    (R, B), N = scores.shape, columns.numel()
    found = {"columns": (columns, _INT32, (N,)), "keys": (keys, _INT32, (N,))}
    layouts = {"scores": (scores, ACTIVATION, (R, B)), "offsets": (offsets, _INT64, (R,))}
    check("take_at_least_", apart=("scores",), **layouts, **found)
    if R == 0 or B == 0:
        return lambda *tensors: None
    return Launch(_take_at_least_kernel, R, B, scores.stride(0), bin, **constants)


def take_at_least_(columns, keys, scores, offsets, bin, *, config=None):
    tensors = columns, keys, scores, offsets
    planned(_plan_take, config, tensors, bin)(*tensors)
