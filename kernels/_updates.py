"""The sparse family's optimizer steps (``fastft/ops/sparse.py``): an update of each entry and its write, in one pass."""

import torch
import triton
import triton.language as tl

from ._entries import checked_entries, entry_block, entry_config, nothing
from ._lang import cast
from ._launch import FLOAT32, launch, planned
from ._tiles import cdiv

_MOMENTS = torch.float32, torch.bfloat16


@triton.jit
def _noise(o_e, mix):
    """The two random 16-bit numbers of each entry, the uint32 halves of a hash; mix is seed * 0x85EBCA77 mod 2³²."""
    h = o_e.to(tl.uint32) * 0x9E3779B1 + mix.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    h = h ^ (h >> 16)
    return h & 0xFFFF, h >> 16


@triton.jit
def _store_moment(p_moment, b_moment, b_noise, mask):
    """Into bfloat16: up with the probability of the part that is cut off. A NaN or infinity stays one."""
    if p_moment.dtype.element_ty == tl.bfloat16:
        b_cut = ((b_moment.to(tl.uint32, bitcast=True) + b_noise) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        b_moment = tl.where(tl.abs(b_moment) < float("inf"), b_cut, cast(b_moment, tl.bfloat16))
    tl.store(p_moment, b_moment, mask=mask)


@triton.jit(do_not_specialize=["A", "E", "n_ages", "mix"])
def _sparse_adamw_kernel(
    p_weight,
    p_starts,
    p_columns,
    p_base,
    p_delta,
    p_grad,
    p_exp_avg,
    p_exp_avg_sq,
    p_age,
    p_corrections,
    A,
    E,
    w_row,
    n_ages,
    decay,
    beta1,
    rest1,
    beta2,
    rest2,
    first,
    second,
    eps,
    lr,
    mix,
    BLOCK: tl.constexpr,
):
    """One block of entries: a step of AdamW on the delta, and the weight = round(base + delta)."""
    o_e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < E
    # Asked for first: what an entry has arrives while its row is searched.
    b_base = tl.load(p_base + o_e, mask=m_e)
    b_grad = tl.load(p_grad + o_e, mask=m_e)
    b_mean = cast(tl.load(p_exp_avg + o_e, mask=m_e), tl.float32)
    b_square = cast(tl.load(p_exp_avg_sq + o_e, mask=m_e), tl.float32)
    b_delta = tl.load(p_delta + o_e, mask=m_e)
    o_e, m_e, _, _, o_w = entry_block(p_starts, p_columns, A, E, w_row, BLOCK)

    if p_age is not None:
        b_age = tl.load(p_age + o_e, mask=m_e, other=0) + 1
        tl.store(p_age + o_e, b_age, mask=m_e)
        p_correction = p_corrections + 2 * tl.minimum(b_age, n_ages - 1).to(tl.int64)
        first, second = tl.load(p_correction, mask=m_e), tl.load(p_correction + 1, mask=m_e)
    b_mean = beta1 * b_mean + rest1 * b_grad
    b_square = beta2 * b_square + rest2 * b_grad * b_grad
    # The plain operators are approximations of 2 ulp; the time is the memory's.
    b_delta = decay * b_delta - tl.div_rn(lr * first * b_mean, tl.sqrt_rn(b_square) * second + eps)
    b_low, b_high = _noise(o_e, mix)
    _store_moment(p_exp_avg + o_e, b_mean, b_low, m_e)
    _store_moment(p_exp_avg_sq + o_e, b_square, b_high, m_e)
    tl.store(p_delta + o_e, b_delta, mask=m_e)
    tl.store(p_weight + o_w, cast(cast(b_base, tl.float32) + b_delta, b_base.dtype), mask=m_e)


def _plan_adamw(config, weight, starts, columns, base, delta, grad, exp_avg, exp_avg_sq, age, corrections):
    op = "sparse_adamw_"
    constants = config or entry_config(op, weight)
    parts = {"base": (base, (weight.dtype,)), "delta": (delta, FLOAT32), "grad": (grad, FLOAT32)}
    parts |= {"exp_avg": (exp_avg, _MOMENTS), "exp_avg_sq": (exp_avg_sq, (exp_avg.dtype,))}
    others, n_ages = {}, 0
    if age is not None:
        if corrections is None or len(corrections) == 0:
            raise ValueError(f"{op}: age needs corrections, float32 [n, 2] with n > 0")
        parts["age"], n_ages = (age, (torch.int32,)), len(corrections)
        others["corrections"] = corrections, FLOAT32, (n_ages, 2)
    A, E, w_row = checked_entries(op, weight, starts, columns, others=others, **parts)
    if E == 0:
        return nothing
    grid, n_tensors = cdiv(E, constants["BLOCK"]), 10
    # Not a `Launch` that is kept, in which scalars are fixed: these change in every step.
    return lambda *args: launch(
        _sparse_adamw_kernel, grid, *args[:n_tensors], A, E, w_row, n_ages, *args[n_tensors:], **constants
    )


def sparse_adamw_(
    weight,
    starts,
    columns,
    base,
    delta,
    grad,
    exp_avg,
    exp_avg_sq,
    age,
    corrections,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    step,
    seed,
    *,
    config=None,
):
    first = second = 1.0
    if age is None:
        corrections = None
        if step < 1:
            raise ValueError(f"sparse_adamw_: step is {step}, the first is 1")
        first, second = 1 / (1 - beta1**step), (1 - beta2**step) ** -0.5
    scalars = 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, first, second, eps, lr
    tensors = weight, starts, columns, base, delta, grad, exp_avg, exp_avg_sq, age, corrections
    # As int32, whatever its bits: a larger integer would be another type, and another kernel.
    mix = (seed * 0x85EBCA77 + 2**31) % 2**32 - 2**31
    planned(_plan_adamw, config, tensors)(*tensors, *map(float, scalars), mix)


@triton.jit(do_not_specialize=["A", "E"])
def _sparse_sm3_kernel(
    p_weight,
    p_starts,
    p_columns,
    p_base,
    p_delta,
    p_grad,
    p_old_row,
    p_old_column,
    p_row,
    p_column,
    A,
    E,
    w_row,
    decay,
    eps,
    lr,
    BLOCK: tl.constexpr,
):
    """One block of entries: a step of SM3 on the delta, and the weight = round(base + delta).

    p_row and p_column are int32 with the bits of float32 that are not negative, which compare as the floats do; a NaN is
    the largest. So maxima need integer atomics only, whose order changes nothing.
    """
    o_e, m_e, b_row, b_column, o_w = entry_block(p_starts, p_columns, A, E, w_row, BLOCK)
    b_base = tl.load(p_base + o_e, mask=m_e)
    b_grad = tl.load(p_grad + o_e, mask=m_e)
    b_delta = tl.load(p_delta + o_e, mask=m_e)
    b_row_max = tl.load(p_old_row + b_row, mask=m_e)
    b_column_max = tl.load(p_old_column + b_column, mask=m_e)
    b_bound = tl.minimum(b_row_max, b_column_max, propagate_nan=tl.PropagateNan.ALL) + b_grad * b_grad
    b_delta = decay * b_delta - tl.div_rn(lr * b_grad, tl.sqrt_rn(b_bound + eps))
    b_bits = tl.where(b_bound == b_bound, b_bound.to(tl.int32, bitcast=True), 0x7FC00000)
    # About half of all bounds raise neither: min(row, column) + g² is below the larger of the two more often than not.
    tl.atomic_max(p_row + b_row, b_bits, mask=m_e & ((b_bound <= b_row_max) == 0), sem="relaxed")
    tl.atomic_max(p_column + b_column, b_bits, mask=m_e & ((b_bound <= b_column_max) == 0), sem="relaxed")
    tl.store(p_delta + o_e, b_delta, mask=m_e)
    tl.store(p_weight + o_w, cast(cast(b_base, tl.float32) + b_delta, b_base.dtype), mask=m_e)


def _plan_sm3(config, weight, starts, columns, base, delta, grad, row_max, column_max):
    op = "sparse_sm3_"
    constants = config or entry_config(op, weight)
    parts = {"base": (base, (weight.dtype,)), "delta": (delta, FLOAT32), "grad": (grad, FLOAT32)}
    A, B = weight.shape
    maxima = {"row_max": (row_max, FLOAT32, (A,)), "column_max": (column_max, FLOAT32, (B,))}
    sizes = checked_entries(op, weight, starts, columns, others=maxima, **parts)
    if columns.numel() == 0:
        return nothing
    grid = cdiv(columns.numel(), constants["BLOCK"])

    def run(*args):
        *tensors, row_max, column_max = args[:8]
        # All bounds are made of the maxima from before this step.
        before, after = (row_max.clone(), column_max.clone()), (row_max.view(torch.int32), column_max.view(torch.int32))
        launch(_sparse_sm3_kernel, grid, *tensors, *before, *after, *sizes, *args[8:], **constants)

    return run


def sparse_sm3_(
    weight, starts, columns, base, delta, grad, row_max, column_max, lr, eps, weight_decay, *, config=None
):  # fmt: skip
    tensors = weight, starts, columns, base, delta, grad, row_max, column_max
    planned(_plan_sm3, config, tensors)(*tensors, float(1 - lr * weight_decay), float(eps), float(lr))
