"""The DoRA family in Triton. The maths, shapes and rounding are in ``fastft/ops/dora.py``, the definition of these ops.

T tokens, N out-features, R rank. Each activation crosses the memory bus once each way. Every launcher has the name and
arguments of its op; the product with B has the operands' precision of ``lora``.
"""

import torch
import triton
import triton.language as tl

from . import _config
from ._lang import cast, rank_product
from ._launch import ACTIVATION, FLOAT32, Launch, Sum, adapter_dtypes, check, device_name, planned
from ._tiles import cdiv, slabs, split


def config_for(op: str, *args) -> dict:
    """The configuration that ``op(*args)`` is launched with: a pure function of device, dtypes and sizes."""
    x = args[0]
    dtypes, sizes = f"{8 * x.element_size()}", {"T": x.shape[0], "features": x.shape[1]}
    if op == "dora_expand_":
        b = args[2]
        dtypes, sizes["R"] = f"{dtypes}/{8 * b.element_size()}", b.shape[1]
    return _config.lookup(device_name(x.device), "dora", op, dtypes=dtypes, **sizes)


@triton.jit(do_not_specialize=["T"])
def _dora_expand_kernel(
    p_u,
    p_s,
    p_b,
    p_g,
    p_bias,
    p_y,
    T,
    N,
    R,
    u_row,
    s_row,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of u += scale * s @ b.T and of y = g * (that sum, unrounded) + bias, each rounded once."""
    n_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    i_n, i_m = pid % n_n, pid // n_n

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    m_tile = (o_m < T)[:, None] & m_n[None, :]
    p_tile = p_u + o_m[:, None] * u_row + o_n[None, :]
    b_u = tl.load(p_tile, mask=m_tile)  # asked for first: it arrives while the product is made
    b_sum = rank_product(p_s, p_b, o_m, o_n, T, N, 0, R, s_row, 1, R, BLOCK_R)
    b_total = cast(b_u, tl.float32) + scale * b_sum
    tl.store(p_tile, cast(b_total, b_u.dtype), mask=m_tile)
    b_y = tl.load(p_g + o_n, mask=m_n)[None, :] * b_total
    if p_bias is not None:
        b_y += cast(tl.load(p_bias + o_n, mask=m_n), tl.float32)[None, :]
    tl.store(p_y + o_m[:, None] * N + o_n[None, :], cast(b_y, b_u.dtype), mask=m_tile)


def _plan_expand(config, u, s, b, g, bias, scale):
    constants, _ = split(config or config_for("dora_expand_", u, s, b, g, bias, scale))
    (T, N), R = u.shape, b.shape[1]
    layouts = {"s": (s, FLOAT32, (T, R)), "b": (b, adapter_dtypes(u), (N, R)), "g": (g, FLOAT32, (N,))}
    if bias is not None:
        layouts["bias"] = (bias, (u.dtype,), (N,))
    check("dora_expand_", apart=("u", "s"), u=(u, ACTIVATION, (T, N)), **layouts)
    if T == 0 or N == 0:
        return lambda u, *others: u.new_empty(T, N)
    grid = cdiv(T, constants["BLOCK_M"]) * cdiv(N, constants["BLOCK_N"])
    launch = Launch(_dora_expand_kernel, grid, T, N, R, u.stride(0), s.stride(0), float(scale), **constants)

    def run(u, s, b, g, bias):
        y = u.new_empty(T, N)
        launch(u, s, b, g, bias, y)
        return y

    return run


def dora_expand_(u, s, b, g, bias, scale, *, config=None):
    return planned(_plan_expand, config, (u, s, b, g, bias), scale)(u, s, b, g, bias)


@triton.jit(do_not_specialize=["T", "slab_tiles"])
def _dora_grad_y_kernel(
    p_dy,
    p_u,
    p_g,
    p_dyg,
    p_dots,
    T,
    N,
    u_row,
    slab_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Walks down one slab of T in a strip of BLOCK_N columns: dyg = g * dy, and dots[slab] = sum of dy * u."""
    n_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    i_n, i_slab = pid % n_n, pid // n_n

    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_g = tl.load(p_g + o_n, mask=m_n)[None, :]
    b_dots = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_m in range(i_slab * slab_tiles, tl.minimum((i_slab + 1) * slab_tiles, tl.cdiv(T, BLOCK_M))):
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        m_tile = (o_m < T)[:, None] & m_n[None, :]
        o_tile = o_m[:, None] * N + o_n[None, :]
        b_dy = tl.load(p_dy + o_tile, mask=m_tile, other=0.0)
        b_u = tl.load(p_u + o_m[:, None] * u_row + o_n[None, :], mask=m_tile, other=0.0)
        b_wide = cast(b_dy, tl.float32)
        b_dots += b_wide * cast(b_u, tl.float32)
        tl.store(p_dyg + o_tile, cast(b_g * b_wide, b_dy.dtype), mask=m_tile)
    tl.store(p_dots + i_slab * N + o_n, tl.sum(b_dots, 0), mask=m_n)


def _plan_grad_y(config, dy, u, g):
    constants, programs = split(config or config_for("dora_grad_y", dy, u, g))
    T, N = dy.shape
    check("dora_grad_y", apart=("u",), dy=(dy, ACTIVATION, (T, N)), u=(u, (dy.dtype,), (T, N)), g=(g, FLOAT32, (N,)))
    if T == 0 or N == 0:
        return lambda dy, u, g: (torch.empty_like(dy), torch.zeros_like(g))
    n_n = cdiv(N, constants["BLOCK_N"])
    n_slabs, slab_tiles = slabs(cdiv(T, constants["BLOCK_M"]), n_n, programs)
    launch = Launch(_dora_grad_y_kernel, n_slabs * n_n, T, N, u.stride(0), slab_tiles, **constants)
    total = Sum(n_slabs, (N,), torch.float32)

    def run(dy, u, g):
        dyg, parts = torch.empty_like(dy), dy.new_empty(total.workspace, dtype=torch.float32)
        launch(dy, u, g, dyg, parts)
        return dyg, total(parts)

    return run


def dora_grad_y(dy, u, g, *, config=None):
    return planned(_plan_grad_y, config, (dy, u, g))(dy, u, g)
