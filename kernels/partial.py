"""The partial family in Triton. The maths and shapes are in ``fastft/ops/partial.py``, the definition of these ops.

T tokens, C indices. All of it is memory traffic: lanes run along what is contiguous, and a program has the loads of several
rows in flight. Every launcher has the name and arguments of its op. Indices are the caller's promise.
"""

import math

import torch
import triton
import triton.language as tl

from . import _config
from ._lang import cast
from ._launch import ACTIVATION, FLOAT32, Launch, check, device_name, launch, planned
from ._tiles import cdiv

_INDEX = (torch.int32,)


def config_for(op: str, *args) -> dict:
    """The configuration that ``op(*args)`` is launched with: a pure function of device, dtype and dim."""
    problem = {"dtype": f"{8 * args[0].element_size()}"}
    if op == "exchange_slice_":  # its two writes
        op, args = "write_slice_", (args[0], args[2], args[1])
    if op in ("write_slice_", "slice_adamw_"):
        problem["dim"] = str(_checked_dim(op, args[2]))
    return _config.lookup(device_name(args[0].device), "partial", op, **problem)


@triton.jit(do_not_specialize=["T", "C"])
def _gather_columns_kernel(p_x, p_index, p_out, T, C, x_row, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One tile of out = x[:, index]."""
    n_c = tl.cdiv(C, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    i_c, i_m = pid % n_c, pid // n_c

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = i_c * BLOCK_N + tl.arange(0, BLOCK_N)
    m_tile = (o_m < T)[:, None] & (o_c < C)[None, :]
    b_from = tl.load(p_index + o_c, mask=o_c < C, other=0).to(tl.int64)
    b_x = tl.load(p_x + o_m[:, None] * x_row + b_from[None, :], mask=m_tile)
    tl.store(p_out + o_m[:, None] * C + o_c[None, :], b_x, mask=m_tile)


def _plan_gather(config, x, index):
    constants = config or config_for("gather_columns", x, index)
    (T, K), C = x.shape, index.numel()
    check("gather_columns", apart=("x",), x=(x, ACTIVATION, (T, K)), index=(index, _INDEX, (C,)))
    if T == 0 or C == 0:
        return lambda x, index: x.new_empty(T, C)
    launch = Launch(_gather_columns_kernel, _tiles(T, C, constants), T, C, x.stride(0), **constants)

    def run(x, index):
        out = x.new_empty(T, C)
        launch(x, index, out)
        return out

    return run


def gather_columns(x, index, *, config=None):
    return planned(_plan_gather, config, (x, index))(x, index)


@triton.jit(do_not_specialize=["T", "C"])
def _scatter_add_columns_kernel(p_y, p_index, p_z, T, C, y_row, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One tile of y[:, index] += z, the sum in float32 and rounded once."""
    n_c = tl.cdiv(C, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    i_c, i_m = pid % n_c, pid // n_c

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = i_c * BLOCK_N + tl.arange(0, BLOCK_N)
    m_tile = (o_m < T)[:, None] & (o_c < C)[None, :]
    b_z = tl.load(p_z + o_m[:, None] * C + o_c[None, :], mask=m_tile)
    b_to = tl.load(p_index + o_c, mask=o_c < C, other=0).to(tl.int64)
    p_tile = p_y + o_m[:, None] * y_row + b_to[None, :]
    b_y = tl.load(p_tile, mask=m_tile)
    tl.store(p_tile, cast(cast(b_y, tl.float32) + cast(b_z, tl.float32), b_y.dtype), mask=m_tile)


def _plan_scatter_add(config, y, index, z):
    constants = config or config_for("scatter_add_columns_", y, index, z)
    (T, N), C = y.shape, index.numel()
    layouts = {"index": (index, _INDEX, (C,)), "z": (z, (y.dtype, torch.float32), (T, C))}
    check("scatter_add_columns_", apart=("y",), y=(y, ACTIVATION, (T, N)), **layouts)
    if T == 0 or C == 0:
        return _nothing
    return Launch(_scatter_add_columns_kernel, _tiles(T, C, constants), T, C, y.stride(0), **constants)


def scatter_add_columns_(y, index, z, *, config=None):
    planned(_plan_scatter_add, config, (y, index, z))(y, index, z)


@triton.jit
def _slice_tile(p_weight, p_index, FEATURES, C, w_row, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's tile of a slice: addresses in the weight, offsets in what is contiguous, and the mask of both.

    A slice is [C, FEATURES] in rows of the weight (DIM 0) or [FEATURES, C] in its columns (DIM 1).
    """
    if DIM == 0:
        rows, cols = C, FEATURES
    else:
        rows, cols = FEATURES, C
    n_n = tl.cdiv(cols, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    i_n, i_m = pid % n_n, pid // n_n

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < rows, o_n < cols
    if DIM == 0:
        b_row, b_col = tl.load(p_index + o_m, mask=m_m, other=0).to(tl.int64), o_n
    else:
        b_row, b_col = o_m, tl.load(p_index + o_n, mask=m_n, other=0).to(tl.int64)
    p_tile = p_weight + b_row[:, None] * w_row + b_col[None, :]
    return p_tile, o_m[:, None] * cols + o_n[None, :], m_m[:, None] & m_n[None, :]


@triton.jit(do_not_specialize=["C"])
def _write_slice_kernel(
    p_weight,
    p_index,
    p_base,
    p_delta,
    FEATURES,
    C,
    w_row,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of the weight's slice = round(base + delta), or the bits of base without a delta."""
    p_tile, o_tile, m_tile = _slice_tile(p_weight, p_index, FEATURES, C, w_row, DIM, BLOCK_M, BLOCK_N)
    b_base = tl.load(p_base + o_tile, mask=m_tile)
    if p_delta is not None:
        b_delta = tl.load(p_delta + o_tile, mask=m_tile)
        b_base = cast(cast(b_base, tl.float32) + b_delta, b_base.dtype)
    tl.store(p_tile, b_base, mask=m_tile)


def _plan_write(config, weight, index, base, delta, dim):
    parts = {} if delta is None else {"delta": delta}
    constants, *sizes = _checked_slice("write_slice_", config, weight, index, dim, base, parts)
    if base.numel() == 0:
        return _nothing
    return Launch(_write_slice_kernel, _tiles(*base.shape, constants), *sizes, DIM=dim, **constants)


def write_slice_(weight, index, dim, base, delta, *, config=None):
    tensors = weight, index, base, delta
    planned(_plan_write, config, tensors, dim)(*tensors)


def exchange_slice_(weight, dim, old_index, old_base, index, delta, *, config=None):
    """Three launches: a weight row's slices may lie in several programs."""
    write_slice_(weight, old_index, dim, old_base, None, config=config)
    if _checked_dim("exchange_slice_", dim) == 1:
        base = gather_columns(weight, index)
    else:
        check("exchange_slice_", apart=("weight",), weight=(weight, ACTIVATION, tuple(weight.shape)))
        base = weight.index_select(0, index)
    write_slice_(weight, index, dim, base, delta, config=config)
    return base


@triton.jit(do_not_specialize=["C"])
def _slice_adamw_kernel(
    p_weight,
    p_index,
    p_base,
    p_delta,
    p_grad,
    p_exp_avg,
    p_exp_avg_sq,
    FEATURES,
    C,
    w_row,
    decay,
    beta1,
    rest1,
    beta2,
    rest2,
    spread,
    eps,
    rate,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of a step of AdamW on the delta, and of the weight's slice = round(base + delta)."""
    p_tile, o_tile, m_tile = _slice_tile(p_weight, p_index, FEATURES, C, w_row, DIM, BLOCK_M, BLOCK_N)
    b_base = tl.load(p_base + o_tile, mask=m_tile)
    b_grad = tl.load(p_grad + o_tile, mask=m_tile)
    b_mean = tl.load(p_exp_avg + o_tile, mask=m_tile)
    b_square = tl.load(p_exp_avg_sq + o_tile, mask=m_tile)
    b_delta = tl.load(p_delta + o_tile, mask=m_tile)
    b_mean = beta1 * b_mean + rest1 * b_grad
    b_square = beta2 * b_square + rest2 * b_grad * b_grad
    # The plain operators are approximations of 2 ulp; the time is the memory's.
    b_delta = decay * b_delta + tl.div_rn(rate * b_mean, tl.sqrt_rn(b_square) * spread + eps)
    tl.store(p_exp_avg + o_tile, b_mean, mask=m_tile)
    tl.store(p_exp_avg_sq + o_tile, b_square, mask=m_tile)
    tl.store(p_delta + o_tile, b_delta, mask=m_tile)
    tl.store(p_tile, cast(cast(b_base, tl.float32) + b_delta, b_base.dtype), mask=m_tile)


def _plan_adamw(config, weight, index, base, delta, grad, exp_avg, exp_avg_sq, dim):
    parts = {"delta": delta, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    constants, *sizes = _checked_slice("slice_adamw_", config, weight, index, dim, base, parts)
    if base.numel() == 0:
        return _nothing
    grid = _tiles(*base.shape, constants)
    # Not a `Launch` that is kept, in which scalars are fixed: these change in every step.
    return lambda *args: launch(_slice_adamw_kernel, grid, *args[:7], *sizes, *args[7:], DIM=dim, **constants)


def slice_adamw_(
    weight,
    index,
    dim,
    base,
    delta,
    grad,
    exp_avg,
    exp_avg_sq,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    step,
    *,
    config=None,
):
    if step < 1:
        raise ValueError(f"slice_adamw_: step is {step}, the first is 1")
    spread, rate = 1 / math.sqrt(1 - beta2**step), -lr / (1 - beta1**step)
    scalars = 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, spread, eps, rate
    tensors = weight, index, base, delta, grad, exp_avg, exp_avg_sq
    planned(_plan_adamw, config, tensors, dim)(*tensors, *map(float, scalars))


def _checked_slice(op: str, config, weight, index, dim: int, base, parts: dict) -> tuple:
    """The configuration, FEATURES, C and the weight's row stride; `parts` are float32 and belong to the slice."""
    constants = config or config_for(op, weight, index, dim)
    (A, B), C = weight.shape, index.numel()
    shape = (A, C) if _checked_dim(op, dim) else (C, B)
    layouts = {"index": (index, _INDEX, (C,)), "base": (base, (weight.dtype,), shape)}
    layouts |= {name: (part, FLOAT32, shape) for name, part in parts.items()}
    check(op, apart=("weight",), weight=(weight, ACTIVATION, (A, B)), **layouts)
    return constants, weight.shape[1 - dim], C, weight.stride(0)


def _nothing(*args):
    """The plan of an empty slice."""


def _checked_dim(op: str, dim: int) -> int:
    if dim not in (0, 1):
        raise ValueError(f"{op}: dim is {dim}, must be 0 or 1")
    return dim


def _tiles(rows: int, cols: int, constants: dict) -> int:
    return cdiv(rows, constants["BLOCK_M"]) * cdiv(cols, constants["BLOCK_N"])
