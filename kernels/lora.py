"""The LoRA family in Triton. The maths, shapes and rounding are in ``fastft/ops/lora.py``, the definition of these ops.

T tokens, K in-features, N out-features, R rank. Every launcher has the name and arguments of its op. float32 adapters get
float32 arithmetic, 16-bit adapters get tensor cores with float32 accumulation: S and dS keep float32's precision where
they make activations (`_lang.rank_product`) and are rounded to the adapter's dtype where they make its gradients.

A launcher's plan (`_launch.planned`) checks the arguments and returns a function of the tensors alone.

Groups: a program holds one tile of x and makes each group's product from it, with that group's mask and its own rank
tiles, so that x crosses the memory bus once and no rank is computed for another group's mask. Kernels get `ranks` as a
tuple and unroll their loops over it: their code grows with the number of groups, and each number compiles once.
Without dropout all groups are one.

Sums over a long axis are cut into slabs (`_tiles.slabs`), so that small outputs still fill the device.
"""

import math

import torch
import triton
import triton.language as tl

from . import _config
from ._lang import add_dot, cast, dot, draw_mask, load_keep, rank_product, unpack_mask, zero_tiles
from ._launch import ACTIVATION, FLOAT32, TRITON_DTYPES, Launch, Sum, adapter_dtypes, check, device_name, planned
from ._tiles import cdiv, chunk_rows, rank_tiles, slabs, split, told_apart

# Positions of the activation and of the adapter matrix among an op's arguments, and the adapter's rank dimension.
_OPERANDS = {
    "lora_shrink": (0, 1, 0),
    "lora_expand_": (0, 2, 1),
    "lora_grad_sb": (0, 2, 1),
    "lora_grad_a": (1, 2, 0),
    "lora_grad_x_": (0, 2, 0),
}

# Positions of `ranks` and p among the arguments of the ops that have groups.
_GROUPS = {"lora_shrink": (2, 3), "lora_grad_a": (3, 5), "lora_grad_x_": (3, 5)}


def config_for(op: str, *args) -> dict:
    """The configuration that ``op(*args)`` is launched with: a pure function of device, dtypes and sizes.

    G is the number of groups that the kernel tells apart and R the largest rank among them.
    """
    act, adapter, rank_dim = _OPERANDS[op]
    x, a = args[act], args[adapter]
    R, G = a.shape[rank_dim], 1
    if op in _GROUPS:
        ranks, p = (args[i] for i in _GROUPS[op])
        groups = told_apart(ranks, p)
        R, G = max(groups, default=0), len(groups)
    return _config.lookup(
        device_name(x.device),
        "lora",
        op,
        dtypes=f"{8 * x.element_size()}/{8 * a.element_size()}",
        T=x.shape[0],
        features=x.shape[1],
        R=R,
        G=G,
    )


def _checked_groups(op: str, ranks, R: int, p: float) -> tuple:
    if sum(ranks) != R or min(ranks, default=0) < 0:
        raise ValueError(f"{op}: ranks are {list(ranks)}, must be the ranks of the groups, {R} in all")
    return told_apart(ranks, p)


def _inverse_keep(p: float) -> float:
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def _check_mask(op: str, x, mask, ranks, p: float) -> None:
    check(op, x=(x, ACTIVATION, x.shape), mask=(mask, (torch.uint8,), _mask_shape(*x.shape, ranks, p)))


def _mask_shape(T: int, K: int, ranks, p: float) -> tuple:
    return (len(ranks), T, cdiv(K, 8)) if p > 0 else (0,)


@triton.jit(do_not_specialize=["T", "slab_tiles", "threshold"])
def _lora_shrink_kernel(
    p_x,
    p_a,
    p_seed,
    p_s,
    p_mask,
    T,
    K,
    R,
    ranks,
    n_r,
    slab_tiles,
    inverse_keep,
    threshold,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """s[slab] = inverse_keep * drop(x) @ a.T over one slab of K, and the masks of what it read.

    A program has rank tile i_r of every group.
    """
    G: tl.constexpr = len(ranks)
    n_bytes = tl.cdiv(K, 8)
    n_slabs = tl.cdiv(tl.cdiv(K, BLOCK_K), slab_tiles)
    pid = tl.program_id(0).to(tl.int64)
    i_r, i_slab, i_m = pid % n_r, pid // n_r % n_slabs, pid // n_r // n_slabs

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    seeds = ()
    if DROPOUT:
        for g in tl.static_range(G):
            seeds += (tl.load(p_seed + g),)
    sums = zero_tiles(G, BLOCK_M, BLOCK_R)
    for i_k in range(i_slab * slab_tiles, tl.minimum((i_slab + 1) * slab_tiles, tl.cdiv(K, BLOCK_K))):
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        b_x = tl.load(p_x + o_m[:, None] * K + o_k[None, :], mask=(o_m < T)[:, None] & (o_k < K)[None, :], other=0.0)
        first, added = 0, ()
        for g in tl.static_range(G):
            b_kept = b_x
            if DROPOUT:
                o_byte = i_k * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
                b_mask = draw_mask(seeds[g], o_m, o_byte, threshold, K)
                if i_r == 0:
                    m_mask = (o_m < T)[:, None] & (o_byte < n_bytes)[None, :]
                    o_mask = (g * T.to(tl.int64) + o_m)[:, None] * n_bytes + o_byte[None, :]
                    tl.store(p_mask + o_mask, b_mask, mask=m_mask)
                b_kept = tl.where(unpack_mask(b_mask), b_x, 0.0)
            m_a = (o_k < K)[:, None] & (o_r < ranks[g])[None, :]
            b_a = tl.load(p_a + (first + o_r)[None, :] * K + o_k[:, None], mask=m_a, other=0.0)
            added += (dot(b_kept, b_a, sums[g], p_a.dtype.element_ty),)
            first += ranks[g]
        sums = added
    first = 0
    for g in tl.static_range(G):
        o_s = (i_slab * T + o_m[:, None]) * R + (first + o_r)[None, :]
        tl.store(p_s + o_s, sums[g] * inverse_keep, mask=(o_m < T)[:, None] & (o_r < ranks[g])[None, :])
        first += ranks[g]


def _plan_shrink(config, x, a, seed, ranks, p):
    constants, programs = split(config or config_for("lora_shrink", x, a, ranks, p, seed))
    (T, K), R = x.shape, a.shape[0]
    groups = _checked_groups("lora_shrink", ranks, R, p)
    check("lora_shrink", x=(x, ACTIVATION, (T, K)), a=(a, adapter_dtypes(x), (R, K)))
    if p > 0:
        check("lora_shrink", x=(x, ACTIVATION, (T, K)), seed=(seed, (torch.int64,), (len(ranks),)))
    shape = _mask_shape(T, K, ranks, p)
    if T == 0 or K == 0 or not (R or math.prod(shape)):
        return lambda x, a, seed: (x.new_zeros(T, R, dtype=torch.float32), x.new_empty(shape, dtype=torch.uint8))
    n_r = rank_tiles(groups, constants)
    others = cdiv(T, constants["BLOCK_M"]) * n_r
    n_slabs, slab_tiles = slabs(cdiv(K, constants["BLOCK_K"]), others, programs)
    scalars = T, K, R, groups, n_r, slab_tiles, _inverse_keep(p), round(p * 65536)
    launch = Launch(_lora_shrink_kernel, n_slabs * others, *scalars, DROPOUT=p > 0, **constants)
    total = Sum(n_slabs, (T, R), torch.float32)

    def run(x, a, seed):
        mask = x.new_empty(shape, dtype=torch.uint8)
        parts = x.new_empty(total.workspace, dtype=torch.float32)
        launch(x, a, seed, parts, mask)
        return total(parts), mask

    return run


def lora_shrink(x, a, ranks, p, seed, *, config=None):
    seed = seed if p > 0 else None
    return planned(_plan_shrink, config, (x, a, seed), tuple(ranks), p)(x, a, seed)


@triton.jit(do_not_specialize=["T"])
def _lora_update_kernel(
    p_out,
    p_s,
    p_w,
    p_mask,
    T,
    N,
    ranks,
    out_row,
    s_row,
    w_rank,
    w_col,
    scale,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of out += scale * sum over groups of keep * (s @ w), rounded once; what all groups drop keeps its bits."""
    n_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    i_n, i_m = pid % n_n, pid // n_n

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    p_tile = p_out + o_m[:, None] * out_row + o_n[None, :]
    m_tile = (o_m < T)[:, None] & (o_n < N)[None, :]
    b_out = tl.load(p_tile, mask=m_tile)  # asked for first: it arrives while the product is made
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_kept = tl.zeros([BLOCK_M, BLOCK_N], tl.int1)
    first = 0
    for g in tl.static_range(len(ranks)):
        b_part = rank_product(p_s, p_w, o_m, o_n, T, N, first, first + ranks[g], s_row, w_rank, w_col, BLOCK_R)
        if DROPOUT:
            b_keep = load_keep(p_mask, g, o_m, i_n, T, N, BLOCK_N)
            b_part = tl.where(b_keep, b_part, 0.0)
            b_kept = b_kept | b_keep
        b_sum += b_part
        first += ranks[g]
    b_new = cast(cast(b_out, tl.float32) + scale * b_sum, b_out.dtype)
    if DROPOUT:
        b_new = tl.where(b_kept, b_new, b_out)
    tl.store(p_tile, b_new, mask=m_tile)


def _nothing(*tensors):
    pass


def _plan_expand(config, y, s, b, scale):
    constants, _ = split(config or config_for("lora_expand_", y, s, b, scale))
    (T, N), R = y.shape, b.shape[1]
    layouts = {"y": (y, ACTIVATION, (T, N)), "s": (s, FLOAT32, (T, R)), "b": (b, adapter_dtypes(y), (N, R))}
    check("lora_expand_", apart=("y", "s"), **layouts)
    if not (T and N and R):
        return _nothing
    grid = cdiv(T, constants["BLOCK_M"]) * cdiv(N, constants["BLOCK_N"])
    scalars = T, N, (R,), y.stride(0), s.stride(0), 1, R, float(scale)
    return Launch(_lora_update_kernel, grid, *scalars, DROPOUT=False, **constants)


def lora_expand_(y, s, b, scale, *, config=None):
    planned(_plan_expand, config, (y, s, b), scale)(y, s, b, None)


def _plan_grad_x(config, dx, ds, a, mask, ranks, p):
    constants, _ = split(config or config_for("lora_grad_x_", dx, ds, a, ranks, mask, p))
    (T, K), R = dx.shape, a.shape[0]
    groups = _checked_groups("lora_grad_x_", ranks, R, p)
    check("lora_grad_x_", dx=(dx, ACTIVATION, (T, K)), ds=(ds, FLOAT32, (T, R)), a=(a, adapter_dtypes(dx), (R, K)))
    _check_mask("lora_grad_x_", dx, mask, ranks, p)
    if not (T and K and R):
        return _nothing
    grid = cdiv(T, constants["BLOCK_M"]) * cdiv(K, constants["BLOCK_N"])
    scalars = T, K, groups, K, R, K, 1, _inverse_keep(p)
    return Launch(_lora_update_kernel, grid, *scalars, DROPOUT=p > 0, **constants)


def lora_grad_x_(dx, ds, a, ranks, mask, p, *, config=None):
    run = planned(_plan_grad_x, config, (dx, ds, a, mask), tuple(ranks), p)
    run(dx, ds, a, mask if p > 0 else None)


@triton.jit(do_not_specialize=["T", "slab_tiles", "first_row"])
def _lora_grad_sb_kernel(
    p_dy,
    p_s,
    p_b,
    p_ds,
    p_db,
    T,
    N,
    R,
    s_row,
    first_row,
    slab_tiles,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Walks down one slab of T in a strip of BLOCK_N columns of dy, which it reads once.

    ds = scale * dy @ b sums over columns, so each strip is a slab of its own: written as it is met.
    db += scale * dy.T @ s sums over tokens, so it stays in registers down the walk: one slab of T.
    """
    n_r = tl.cdiv(R, BLOCK_R)
    n_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    i_r, i_n, i_slab = pid % n_r, pid // n_r % n_n, pid // n_r // n_n

    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_b = o_n[:, None] * R + o_r[None, :]
    m_b = (o_n < N)[:, None] & (o_r < R)[None, :]
    b_b = tl.load(p_b + o_b, mask=m_b, other=0.0)
    b_db = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for i_m in range(i_slab * slab_tiles, tl.minimum((i_slab + 1) * slab_tiles, tl.cdiv(T, BLOCK_M))):
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        m_dy = (o_m < T)[:, None] & (o_n < N)[None, :]
        m_s = (o_m < T)[:, None] & (o_r < R)[None, :]
        b_dy = tl.load(p_dy + o_m[:, None] * N + o_n[None, :], mask=m_dy, other=0.0)
        b_s = tl.load(p_s + o_m[:, None] * s_row + o_r[None, :], mask=m_s, other=0.0)
        b_ds = dot(b_dy, b_b, tl.zeros([BLOCK_M, BLOCK_R], tl.float32), p_b.dtype.element_ty)
        b_db = dot(tl.trans(b_dy), b_s, b_db, p_b.dtype.element_ty)
        tl.store(p_ds + (i_n * T + o_m[:, None]) * R + o_r[None, :], scale * b_ds, mask=m_s)
    p_tile = p_db + i_slab * N * R + o_b
    b_db *= scale
    if first_row > 0:
        b_db += tl.load(p_tile, mask=m_b)
    tl.store(p_tile, b_db, mask=m_b)


def _plan_grad_sb(config, dy, s, b, scale):
    constants, programs = split(config or config_for("lora_grad_sb", dy, s, b, scale))
    (T, N), R = dy.shape, b.shape[1]
    layouts = {"s": (s, FLOAT32, (T, R)), "b": (b, adapter_dtypes(dy), (N, R))}
    check("lora_grad_sb", apart=("s",), dy=(dy, ACTIVATION, (T, N)), **layouts)
    if T == 0 or N == 0 or R == 0:
        return lambda dy, s, b: (s.new_zeros(T, R), torch.zeros_like(b))
    n_n = cdiv(N, constants["BLOCK_N"])
    others = n_n * rank_tiles((R,), constants)
    chunk = chunk_rows(T, n_n, R, constants["BLOCK_M"])
    n_slabs, slab_tiles = slabs(chunk // constants["BLOCK_M"], others, programs)
    steps = []
    for first_row in range(0, T, chunk):  # the first chunk has every slab, and stores where the others add
        rows = min(chunk, T - first_row)
        scalars = rows, N, R, s.stride(0), first_row, slab_tiles, float(scale)
        launch = Launch(_lora_grad_sb_kernel, n_slabs * others, *scalars, **constants)
        steps.append((slice(first_row, first_row + rows), launch, Sum(n_n, (rows, R), torch.float32)))
    db_total = Sum(n_slabs, (N, R), b.dtype)

    def run(dy, s, b):
        db = dy.new_empty(db_total.workspace, dtype=torch.float32)
        if len(steps) == 1:
            _, launch, ds_total = steps[0]
            parts = dy.new_empty(ds_total.workspace, dtype=torch.float32)
            launch(dy, s, b, parts, db)
            return ds_total(parts), db_total(db)
        ds = dy.new_empty(T, R, dtype=torch.float32)
        for rows, launch, ds_total in steps:
            parts = ds[rows] if n_n == 1 else dy.new_empty(ds_total.workspace, dtype=torch.float32)
            launch(dy[rows], s[rows], b, parts, db)
            if n_n > 1:
                ds_total(parts, out=ds[rows])
        return ds, db_total(db)

    return run


def lora_grad_sb(dy, s, b, scale, *, config=None):
    return planned(_plan_grad_sb, config, (dy, s, b), scale)(dy, s, b)


@triton.jit(do_not_specialize=["T", "slab_tiles"])
def _lora_grad_a_kernel(
    p_ds,
    p_x,
    p_mask,
    p_da,
    T,
    K,
    R,
    ranks,
    n_r,
    slab_tiles,
    inverse_keep,
    DTYPE: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """da[slab] = inverse_keep * ds.T @ drop(x) over one slab of T, for a strip of BLOCK_K columns of x.

    A program has rank tile i_r of every group.
    """
    G: tl.constexpr = len(ranks)
    n_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0).to(tl.int64)
    i_r, i_k, i_slab = pid % n_r, pid // n_r % n_k, pid // n_r // n_k

    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    sums = zero_tiles(G, BLOCK_R, BLOCK_K)
    for i_m in range(i_slab * slab_tiles, tl.minimum((i_slab + 1) * slab_tiles, tl.cdiv(T, BLOCK_M))):
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        b_x = tl.load(p_x + o_m[:, None] * K + o_k[None, :], mask=(o_m < T)[:, None] & (o_k < K)[None, :], other=0.0)
        first, added = 0, ()
        for g in tl.static_range(G):
            b_kept = b_x
            if DROPOUT:
                b_kept = tl.where(load_keep(p_mask, g, o_m, i_k, T, K, BLOCK_K), b_x, 0.0)
            m_ds = (o_m < T)[:, None] & (o_r < ranks[g])[None, :]
            b_ds = tl.load(p_ds + o_m[:, None] * R + (first + o_r)[None, :], mask=m_ds, other=0.0)
            added += (add_dot(tl.trans(b_ds), b_kept, sums[g], DTYPE, 0.0 * inverse_keep),)
            first += ranks[g]
        sums = added
    first = 0
    for g in tl.static_range(G):
        o_da = (i_slab * R + first + o_r[:, None]) * K + o_k[None, :]
        tl.store(p_da + o_da, inverse_keep * sums[g], mask=(o_r < ranks[g])[:, None] & (o_k < K)[None, :])
        first += ranks[g]


def _plan_grad_a(config, ds, x, a, mask, ranks, p):
    constants, programs = split(config or config_for("lora_grad_a", ds, x, a, ranks, mask, p))
    (T, K), R = x.shape, a.shape[0]
    groups = _checked_groups("lora_grad_a", ranks, R, p)
    check("lora_grad_a", x=(x, ACTIVATION, (T, K)), ds=(ds, FLOAT32, (T, R)), a=(a, adapter_dtypes(x), (R, K)))
    _check_mask("lora_grad_a", x, mask, ranks, p)
    if T == 0 or K == 0 or R == 0:
        return lambda ds, x, a, mask: torch.zeros_like(a)
    n_r = rank_tiles(groups, constants)
    others = cdiv(K, constants["BLOCK_K"]) * n_r
    n_slabs, slab_tiles = slabs(cdiv(T, constants["BLOCK_M"]), others, programs)
    scalars = T, K, R, groups, n_r, slab_tiles, _inverse_keep(p)
    switches = {"DTYPE": TRITON_DTYPES[a.dtype], "DROPOUT": p > 0}
    launch = Launch(_lora_grad_a_kernel, n_slabs * others, *scalars, **switches, **constants)
    total = Sum(n_slabs, (R, K), a.dtype)

    def run(ds, x, a, mask):
        parts = x.new_empty(total.workspace, dtype=torch.float32)
        launch(ds, x, mask if p > 0 else None, parts)
        return total(parts)

    return run


def lora_grad_a(ds, x, a, ranks, mask, p, *, config=None):
    return planned(_plan_grad_a, config, (ds, x, a, mask), tuple(ranks), p)(ds, x, a, mask)
