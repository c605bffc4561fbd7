"""The LoRA family in Triton. The maths, shapes and rounding are in ``fastft/ops/lora.py``, the definition of these ops.

T tokens, K in-features, N out-features, R rank. Every launcher has the name and arguments of its op; tensors are
2-D and contiguous. Operands of a product have the adapter's dtype: float32 adapters get float32 arithmetic, 16-bit
adapters get tensor cores with float32 accumulation.

Sums over a long axis are cut into slabs (`_launch.slabs`), so that small outputs still fill the device.
"""

import torch
import triton
import triton.language as tl

from . import _config
from ._lang import cast, dot, draw_mask, unpack_mask
from ._launch import check, device_name, launch, slabs, split, sum_slabs

# Positions of the activation and of the adapter matrix among an op's arguments, and the adapter's rank dimension.
_OPERANDS = {
    "lora_shrink": (0, 1, 0),
    "lora_expand_": (0, 2, 1),
    "lora_grad_sb": (0, 2, 1),
    "lora_grad_a": (1, 2, 0),
    "lora_grad_x_": (0, 2, 0),
}

_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_ACTIVATION, _FLOAT32, _BYTE, _INT64 = tuple(_TRITON_DTYPES), (torch.float32,), (torch.uint8,), (torch.int64,)

# Bytes of partial dS that lora_grad_sb keeps at a time: they are read back at once, so they should fit a GPU's L2.
_WORKSPACE = 32 * 2**20


def config_for(op: str, *args) -> dict:
    """The configuration that ``op(*args)`` is launched with: a pure function of device, dtypes and sizes."""
    act, adapter, rank_dim = _OPERANDS[op]
    x, a = args[act], args[adapter]
    return _config.lookup(
        device_name(x.device),
        "lora",
        op,
        dtypes=f"{8 * x.element_size()}/{8 * a.element_size()}",
        T=x.shape[0],
        features=x.shape[1],
        R=a.shape[rank_dim],
    )


def _inverse_keep(p: float) -> float:
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def _adapter(x) -> tuple:
    """The dtypes that an adapter on activations x may have."""
    return x.dtype, torch.float32


def _mask_shape(T: int, K: int, p: float) -> tuple:
    return (T, triton.cdiv(K, 8)) if p > 0 else (0,)


def _rank_tiles(rank: int, config: dict) -> int:
    return max(1, triton.cdiv(rank, config["BLOCK_R"]))


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
    slab_tiles,
    inverse_keep,
    threshold,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """s[slab] = inverse_keep * drop(x) @ a.T over one slab of K, and the mask of what it read."""
    n_r = tl.maximum(tl.cdiv(R, BLOCK_R), 1)
    n_slabs = tl.cdiv(tl.cdiv(K, BLOCK_K), slab_tiles)
    pid = tl.program_id(0).to(tl.int64)
    i_r, i_slab, i_m = pid % n_r, pid // n_r % n_slabs, pid // n_r // n_slabs

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    if DROPOUT:
        seed = tl.load(p_seed)
    b_s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for i_k in range(i_slab * slab_tiles, tl.minimum((i_slab + 1) * slab_tiles, tl.cdiv(K, BLOCK_K))):
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        b_x = tl.load(p_x + o_m[:, None] * K + o_k[None, :], mask=(o_m < T)[:, None] & (o_k < K)[None, :], other=0.0)
        if DROPOUT:
            o_byte = i_k * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
            b_mask = draw_mask(seed, o_m, o_byte, threshold, K)
            n_bytes = tl.cdiv(K, 8)
            if i_r == 0:
                m_mask = (o_m < T)[:, None] & (o_byte < n_bytes)[None, :]
                tl.store(p_mask + o_m[:, None] * n_bytes + o_byte[None, :], b_mask, mask=m_mask)
            b_x = tl.where(unpack_mask(b_mask), b_x, 0.0)
        m_a = (o_k < K)[:, None] & (o_r < R)[None, :]
        b_a = tl.load(p_a + o_r[None, :] * K + o_k[:, None], mask=m_a, other=0.0)
        b_s = dot(b_x, b_a, b_s, p_a.dtype.element_ty)
    o_s = (i_slab * T + o_m[:, None]) * R + o_r[None, :]
    tl.store(p_s + o_s, b_s * inverse_keep, mask=(o_m < T)[:, None] & (o_r < R)[None, :])


def lora_shrink(x, a, p, seed, *, config=None):
    constants, programs = split(config or config_for("lora_shrink", x, a, p, seed))
    (T, K), R = x.shape, a.shape[0]
    dropout = p > 0
    check("lora_shrink", x=(x, _ACTIVATION, (T, K)), a=(a, _adapter(x), (R, K)))
    if dropout:
        check("lora_shrink", x=(x, _ACTIVATION, (T, K)), seed=(seed, _INT64, (1,)))
    mask = torch.empty(_mask_shape(T, K, p), dtype=torch.uint8, device=x.device)
    if T == 0 or K == 0 or (R == 0 and not dropout):
        return torch.zeros(T, R, dtype=torch.float32, device=x.device), mask
    others = triton.cdiv(T, constants["BLOCK_M"]) * _rank_tiles(R, constants)
    n_slabs, slab_tiles = slabs(triton.cdiv(K, constants["BLOCK_K"]), others, programs)
    parts = torch.empty(n_slabs, T, R, dtype=torch.float32, device=x.device)
    scalars = T, K, R, slab_tiles, _inverse_keep(p), round(p * 65536)
    launch(_lora_shrink_kernel, n_slabs * others, x, a, seed, parts, mask, *scalars, DROPOUT=dropout, **constants)
    return sum_slabs(parts, torch.float32), mask


@triton.jit(do_not_specialize=["T"])
def _lora_expand_kernel(p_y, p_s, p_b, T, N, R, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):
    """One tile of y += scale * s @ b.T, rounded once."""
    n_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0).to(tl.int64)
    i_n, i_m = pid % n_n, pid // n_n

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_r in range(tl.cdiv(R, BLOCK_R)):
        o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
        m_s = (o_m < T)[:, None] & (o_r < R)[None, :]
        m_b = (o_r < R)[:, None] & (o_n < N)[None, :]
        b_s = tl.load(p_s + o_m[:, None] * R + o_r[None, :], mask=m_s, other=0.0)
        b_b = tl.load(p_b + o_n[None, :] * R + o_r[:, None], mask=m_b, other=0.0)
        b_sum = dot(b_s, b_b, b_sum, p_b.dtype.element_ty)
    p_tile = p_y + o_m[:, None] * N + o_n[None, :]
    m_tile = (o_m < T)[:, None] & (o_n < N)[None, :]
    b_y = tl.load(p_tile, mask=m_tile)
    tl.store(p_tile, cast(cast(b_y, tl.float32) + scale * b_sum, b_y.dtype), mask=m_tile)


def lora_expand_(y, s, b, scale, *, config=None):
    constants, _ = split(config or config_for("lora_expand_", y, s, b, scale))
    (T, N), R = y.shape, b.shape[1]
    check("lora_expand_", y=(y, _ACTIVATION, (T, N)), s=(s, _FLOAT32, (T, R)), b=(b, _adapter(y), (N, R)))
    if T and N and R:
        grid = triton.cdiv(T, constants["BLOCK_M"]) * triton.cdiv(N, constants["BLOCK_N"])
        launch(_lora_expand_kernel, grid, y, s, b, T, N, R, float(scale), **constants)


@triton.jit(do_not_specialize=["T", "slab_tiles"])
def _lora_grad_sb_kernel(
    p_dy,
    p_s,
    p_b,
    p_ds,
    p_db,
    T,
    N,
    R,
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
        b_s = tl.load(p_s + o_m[:, None] * R + o_r[None, :], mask=m_s, other=0.0)
        b_ds = dot(b_dy, b_b, tl.zeros([BLOCK_M, BLOCK_R], tl.float32), p_b.dtype.element_ty)
        b_db = dot(tl.trans(b_dy), b_s, b_db, p_b.dtype.element_ty)
        tl.store(p_ds + (i_n * T + o_m[:, None]) * R + o_r[None, :], scale * b_ds, mask=m_s)
    p_tile = p_db + i_slab * N * R + o_b
    tl.store(p_tile, tl.load(p_tile, mask=m_b) + scale * b_db, mask=m_b)


def lora_grad_sb(dy, s, b, scale, *, config=None):
    constants, programs = split(config or config_for("lora_grad_sb", dy, s, b, scale))
    (T, N), R = dy.shape, b.shape[1]
    check("lora_grad_sb", dy=(dy, _ACTIVATION, (T, N)), s=(s, _FLOAT32, (T, R)), b=(b, _adapter(dy), (N, R)))
    if T == 0 or N == 0 or R == 0:
        return torch.zeros_like(s), torch.zeros_like(b)
    n_n = triton.cdiv(N, constants["BLOCK_N"])
    others = n_n * _rank_tiles(R, constants)
    chunk = triton.cdiv(min(T, max(1, _WORKSPACE // (4 * n_n * R))), constants["BLOCK_M"]) * constants["BLOCK_M"]
    n_slabs, slab_tiles = slabs(chunk // constants["BLOCK_M"], others, programs)
    db = torch.zeros(n_slabs, N, R, dtype=torch.float32, device=dy.device)
    ds = []
    for dy_rows, s_rows in zip(dy.split(chunk), s.split(chunk)):
        parts = torch.empty(n_n, *s_rows.shape, dtype=torch.float32, device=dy.device)
        scalars = dy_rows.shape[0], N, R, slab_tiles, float(scale)
        launch(_lora_grad_sb_kernel, n_slabs * others, dy_rows, s_rows, b, parts, db, *scalars, **constants)
        ds.append(sum_slabs(parts, torch.float32))
    return ds[0] if len(ds) == 1 else torch.cat(ds), sum_slabs(db, b.dtype)


@triton.jit(do_not_specialize=["T", "slab_tiles"])
def _lora_grad_a_kernel(
    p_ds,
    p_x,
    p_mask,
    p_da,
    T,
    K,
    R,
    slab_tiles,
    inverse_keep,
    DTYPE: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """da[slab] = inverse_keep * ds.T @ drop(x) over one slab of T, for a strip of BLOCK_K columns of x."""
    n_r = tl.cdiv(R, BLOCK_R)
    n_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0).to(tl.int64)
    i_r, i_k, i_slab = pid % n_r, pid // n_r % n_k, pid // n_r // n_k

    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    b_da = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for i_m in range(i_slab * slab_tiles, tl.minimum((i_slab + 1) * slab_tiles, tl.cdiv(T, BLOCK_M))):
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        b_x = tl.load(p_x + o_m[:, None] * K + o_k[None, :], mask=(o_m < T)[:, None] & (o_k < K)[None, :], other=0.0)
        if DROPOUT:
            b_x = tl.where(_load_keep(p_mask, o_m, i_k, T, K, BLOCK_K), b_x, 0.0)
        m_ds = (o_m < T)[:, None] & (o_r < R)[None, :]
        b_ds = tl.load(p_ds + o_m[:, None] * R + o_r[None, :], mask=m_ds, other=0.0)
        b_da = dot(tl.trans(b_ds), b_x, b_da, DTYPE)
    o_da = (i_slab * R + o_r[:, None]) * K + o_k[None, :]
    tl.store(p_da + o_da, inverse_keep * b_da, mask=(o_r < R)[:, None] & (o_k < K)[None, :])


@triton.jit
def _load_keep(p_mask, o_m, i_k, T, K, BLOCK_K: tl.constexpr):
    """int1 [BLOCK_M, BLOCK_K]: which elements of column block i_k the packed mask keeps."""
    n_bytes = tl.cdiv(K, 8)
    o_byte = i_k * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
    m_mask = (o_m < T)[:, None] & (o_byte < n_bytes)[None, :]
    return unpack_mask(tl.load(p_mask + o_m[:, None] * n_bytes + o_byte[None, :], mask=m_mask, other=0))


def lora_grad_a(ds, x, a, mask, p, *, config=None):
    constants, programs = split(config or config_for("lora_grad_a", ds, x, a, mask, p))
    (T, K), R = x.shape, a.shape[0]
    check(
        "lora_grad_a",
        x=(x, _ACTIVATION, (T, K)),
        ds=(ds, _FLOAT32, (T, R)),
        a=(a, _adapter(x), (R, K)),
        mask=(mask, _BYTE, _mask_shape(T, K, p)),
    )
    if T == 0 or K == 0 or R == 0:
        return torch.zeros_like(a)
    others = triton.cdiv(K, constants["BLOCK_K"]) * _rank_tiles(R, constants)
    n_slabs, slab_tiles = slabs(triton.cdiv(T, constants["BLOCK_M"]), others, programs)
    parts = torch.empty(n_slabs, R, K, dtype=torch.float32, device=x.device)
    scalars = T, K, R, slab_tiles, _inverse_keep(p)
    switches = {"DTYPE": _TRITON_DTYPES[a.dtype], "DROPOUT": p > 0}
    launch(_lora_grad_a_kernel, n_slabs * others, ds, x, mask, parts, *scalars, **switches, **constants)
    return sum_slabs(parts, a.dtype)


@triton.jit(do_not_specialize=["T"])
def _lora_grad_x_kernel(
    p_dx,
    p_ds,
    p_a,
    p_mask,
    T,
    K,
    R,
    inverse_keep,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of dx += keep * inverse_keep * ds @ a, rounded once; dropped elements keep their bits."""
    n_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0).to(tl.int64)
    i_k, i_m = pid % n_k, pid // n_k

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    b_sum = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for i_r in range(tl.cdiv(R, BLOCK_R)):
        o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
        m_ds = (o_m < T)[:, None] & (o_r < R)[None, :]
        m_a = (o_r < R)[:, None] & (o_k < K)[None, :]
        b_ds = tl.load(p_ds + o_m[:, None] * R + o_r[None, :], mask=m_ds, other=0.0)
        b_a = tl.load(p_a + o_r.to(tl.int64)[:, None] * K + o_k[None, :], mask=m_a, other=0.0)
        b_sum = dot(b_ds, b_a, b_sum, p_a.dtype.element_ty)
    p_tile = p_dx + o_m[:, None] * K + o_k[None, :]
    m_tile = (o_m < T)[:, None] & (o_k < K)[None, :]
    b_dx = tl.load(p_tile, mask=m_tile)
    b_new = cast(cast(b_dx, tl.float32) + inverse_keep * b_sum, b_dx.dtype)
    if DROPOUT:
        b_new = tl.where(_load_keep(p_mask, o_m, i_k, T, K, BLOCK_K), b_new, b_dx)
    tl.store(p_tile, b_new, mask=m_tile)


def lora_grad_x_(dx, ds, a, mask, p, *, config=None):
    constants, _ = split(config or config_for("lora_grad_x_", dx, ds, a, mask, p))
    (T, K), R = dx.shape, a.shape[0]
    check(
        "lora_grad_x_",
        dx=(dx, _ACTIVATION, (T, K)),
        ds=(ds, _FLOAT32, (T, R)),
        a=(a, _adapter(dx), (R, K)),
        mask=(mask, _BYTE, _mask_shape(T, K, p)),
    )
    if T and K and R:
        grid = triton.cdiv(T, constants["BLOCK_M"]) * triton.cdiv(K, constants["BLOCK_K"])
        scalars = T, K, R, _inverse_keep(p)
        launch(_lora_grad_x_kernel, grid, dx, ds, a, mask, *scalars, DROPOUT=p > 0, **constants)
