"""Device functions that the kernel families share."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def cast(b, dtype: tl.constexpr):
    """b in `dtype`, rounded to nearest even."""
    # Triton's interpreter keeps bfloat16 as integers, truncates on conversion and mistakes subnormals.
    if INTERPRETED and b.dtype == tl.float32 and dtype == tl.bfloat16:
        b_bits = b.to(tl.uint32, bitcast=True)
        b_round = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16
        return tl.where(b == b, b_round, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif INTERPRETED and b.dtype == tl.bfloat16 and dtype == tl.float32:
        return (b.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return b.to(dtype)


@triton.jit
def dot(b_left, b_right, b_acc, dtype: tl.constexpr):
    """b_acc + b_left @ b_right in float32, with the operands in `dtype`.

    16-bit operands use tensor cores. "ieee" keeps float32 operands out of them: tf32 has 10 bits of mantissa.
    """
    b_left, b_right = cast(b_left, dtype), cast(b_right, dtype)
    if INTERPRETED:
        # Its product of bfloat16 blocks multiplies the integers that hold them.
        b_left, b_right = cast(b_left, tl.float32), cast(b_right, tl.float32)
    return tl.dot(b_left, b_right, b_acc, input_precision="ieee")


@triton.jit
def split_dot(b_left, b_right, b_acc, dtype: tl.constexpr):
    """b_acc + b_left @ b_right in float32, for a float32 b_left that is not rounded to `dtype`, and b_right of `dtype`.

    16-bit numbers are multiplied on tensor cores, with b_left as a sum of numbers of their dtype: three bfloat16 or two
    float16 have a float32's mantissa.
    """
    parts: tl.constexpr = 1 if dtype == tl.float32 else 2 if dtype == tl.float16 else 3
    for _ in tl.static_range(parts - 1):
        b_acc = dot(b_left, b_right, b_acc, dtype)
        b_left -= cast(cast(b_left, dtype), tl.float32)
        b_left = tl.where(tl.abs(b_left) < float("inf"), b_left, 0.0)  # of what is beyond the dtype's range: inf - inf
    return dot(b_left, b_right, b_acc, dtype)


@triton.jit
def add_dot(b_left, b_right, b_sum, dtype: tl.constexpr, zero):
    """b_sum + b_left @ b_right as `dot`, where float32 sums up the product first and then adds it.

    One running sum of 4096 terms errs by 1.1e-6 of the result, sums of 64 that are added up by 2e-7 (random terms). `zero`
    is 0.0 that the compiler does not know, or it would make one running sum of them again.
    """
    if dtype == tl.float32:
        return b_sum + dot(b_left, b_right, tl.full([b_sum.shape[0], b_sum.shape[1]], zero, tl.float32), dtype)
    else:
        return dot(b_left, b_right, b_sum, dtype)


@triton.jit
def draw_mask(seed, o_t, o_byte, threshold, K):
    """Bytes [BLOCK_T, BLOCK_BYTES] of the packed dropout mask, uint8, at tokens o_t (int64) and byte columns o_byte.

    One Philox4x32-7 call (Salmon et al. 2011) makes one byte: the low and high halves of its four words are eight
    lanes, and bit j is set, i.e. element 8 * o_byte + j is kept, iff lane j >= threshold. Bits past K are 0.
    """
    b_t = tl.broadcast_to(o_t[:, None], [o_t.shape[0], o_byte.shape[0]])
    b_byte = tl.broadcast_to(o_byte[None, :], [o_t.shape[0], o_byte.shape[0]]).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(
        seed, b_t.to(tl.uint32), (b_t >> 32).to(tl.uint32), b_byte, tl.zeros_like(b_byte), n_rounds=7
    )
    b_mask = _two_bits(word0, threshold) | (_two_bits(word1, threshold) << 2)
    b_mask |= (_two_bits(word2, threshold) << 4) | (_two_bits(word3, threshold) << 6)
    n_inside = tl.minimum(tl.maximum(K - 8 * o_byte, 0), 8).to(tl.uint32)
    b_inside = (tl.full(n_inside.shape, 1, tl.uint32) << n_inside) - 1
    return (b_mask & b_inside[None, :]).to(tl.uint8)


@triton.jit
def _two_bits(word, threshold):
    return ((word & 0xFFFF) >= threshold).to(tl.uint32) | (((word >> 16) >= threshold).to(tl.uint32) << 1)


@triton.jit
def unpack_mask(b_mask):
    """int1 [BLOCK_T, 8 * BLOCK_BYTES], True where kept, of mask bytes [BLOCK_T, BLOCK_BYTES]; lowest bit first."""
    b_bits = (b_mask[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]) & 1
    return tl.reshape(b_bits, [b_mask.shape[0], 8 * b_mask.shape[1]]) != 0


@triton.jit
def load_keep(p_mask, group, o_m, i_k, T, K, BLOCK_K: tl.constexpr):
    """int1 [BLOCK_M, BLOCK_K]: what a group's mask, of packed masks [G, T, ceil(K/8)], keeps of column block i_k."""
    n_bytes = tl.cdiv(K, 8)
    o_byte = i_k * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
    m_mask = (o_m < T)[:, None] & (o_byte < n_bytes)[None, :]
    o_mask = (group * T.to(tl.int64) + o_m)[:, None] * n_bytes + o_byte[None, :]
    return unpack_mask(tl.load(p_mask + o_mask, mask=m_mask, other=0))


@triton.jit
def rank_product(p_s, p_w, o_m, o_n, T, N, first, end, s_row, w_rank, w_col, BLOCK_R: tl.constexpr):
    """float32 [BLOCK_M, BLOCK_N]: s[o_m, first:end] @ w[first:end, o_n]; s is float32.

    Element (t, r) of s [T, R] is at t * s_row + r, element (r, n) of w [R, N] at r * w_rank + n * w_col: either adapter
    matrix, A [R, K] or B [N, R], is such a w. o_m and o_n are int64.
    """
    dtype: tl.constexpr = p_w.dtype.element_ty
    b_sum = tl.zeros([o_m.shape[0], o_n.shape[0]], tl.float32)
    for i_r in range(tl.cdiv(end - first, BLOCK_R)):
        o_r = first + i_r * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        m_s = (o_m < T)[:, None] & (o_r < end)[None, :]
        m_w = (o_r < end)[:, None] & (o_n < N)[None, :]
        b_s = tl.load(p_s + o_m[:, None] * s_row + o_r[None, :], mask=m_s, other=0.0)
        b_w = tl.load(p_w + o_r[:, None] * w_rank + o_n[None, :] * w_col, mask=m_w, other=0.0)
        b_sum = split_dot(b_s, b_w, b_sum, dtype)
    return b_sum


@triton.jit
def zero_tiles(count: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """A tuple of `count` float32 tiles [rows, columns] of zeros."""
    tiles = ()
    for _ in tl.static_range(count):
        tiles += (tl.zeros([rows, columns], tl.float32),)
    return tiles
