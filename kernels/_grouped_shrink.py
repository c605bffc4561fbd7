"""S = products of tokens with the left rows of their adapters, for ``kernels/grouped.py``."""

import triton
import triton.language as tl

from ._grouped import (
    COUNT,
    FIELDS,
    KIND,
    LEFT,
    LOW_RANK,
    ROWS,
    S_FIRST,
    VECTOR,
    X_FIRST,
    X_WIDTH,
    token_tile,
    tokens_of,
)
from ._lang import cast, dot, zero_tiles


@triton.jit
def _window(p_piece):
    """One number for a piece's window of x; negative for a piece without columns of S."""
    kind = tl.load(p_piece + KIND)
    window = (tl.load(p_piece + X_FIRST) << 32) | tl.load(p_piece + X_WIDTH)
    return tl.where((kind == LOW_RANK) | (kind == ROWS), window, -1)


@triton.jit
def _rows_of(p_offsets, p_own, i_piece, last, window, o_c):
    """Element offsets of the rows that columns o_c of S belong to, -1 for columns of no piece of this window."""
    b_row = tl.full(o_c.shape, -1, tl.int64)
    for i in range(i_piece, last + 1):
        p_piece = p_own + FIELDS * i
        if _window(p_piece) == window:
            b_r = o_c - tl.load(p_piece + S_FIRST)
            m_own = (b_r >= 0) & (b_r < tl.load(p_piece + COUNT))
            b_row = tl.maximum(b_row, tl.load(p_offsets + tl.load(p_piece + LEFT) + b_r, mask=m_own, other=-1))
    return b_row


@triton.jit
def _shrink_tile(
    p_x,
    p_store,
    p_offsets,
    p_own,
    p_assignments,
    p_s,
    first,
    end,
    i_piece,
    last,
    window,
    c_first,
    low,
    high,
    s_first,
    width,
    k,
    x_row,
    UNIT: tl.constexpr,
    STORE_UNIT: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """s[token, c] = Σ_k x[token, k] row_c[k], low <= k < high, for BLOCK_R columns c of the pieces of one window."""
    o_c = c_first + tl.arange(0, BLOCK_R)
    b_row = _rows_of(p_offsets, p_own, i_piece, last, window, o_c)
    m_c = b_row >= 0
    b_row, high = b_row // STORE_UNIT * STORE_UNIT, high // UNIT * UNIT
    p_columns = p_s + s_first * width + o_c
    if TENSOR_CORES:
        o_m, m_m, b_a = tokens_of(p_assignments, first, end, BLOCK_M)
        b_x_row = ((b_a // k).to(tl.int64) * x_row + (window >> 32)) // UNIT * UNIT
        b_sum = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for i_k in tl.range(low, high, BLOCK_K, num_stages=STAGES):
            o_k = i_k + tl.arange(0, BLOCK_K)
            m_k = o_k < high
            b_x = tl.load(p_x + b_x_row[:, None] + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_w = tl.load(p_store + b_row[None, :] + o_k[:, None], mask=m_k[:, None] & m_c[None, :], other=0.0)
            b_sum = dot(b_x, b_w, b_sum, p_store.dtype.element_ty)
        tl.store(p_columns[None, :] + (o_m * width)[:, None], b_sum, mask=m_m[:, None] & m_c[None, :])
    else:
        x_rows = ()
        for m in tl.static_range(BLOCK_M):
            token = tl.load(p_assignments + first + m, mask=first + m < end, other=0) // k
            x_rows += ((token.to(tl.int64) * x_row + (window >> 32)) // UNIT * UNIT,)
        # A sum a lane and token, and exchanges between lanes only at the end.
        sums = zero_tiles(BLOCK_M, BLOCK_R, BLOCK_K)
        for i_k in tl.range(low, high, BLOCK_K, num_stages=STAGES):
            o_k = i_k + tl.arange(0, BLOCK_K)[None, :]
            m_k = o_k < high
            b_w = cast(tl.load(p_store + b_row[:, None] + o_k, mask=m_c[:, None] & m_k, other=0.0), tl.float32)
            added = ()
            for m in tl.static_range(BLOCK_M):
                b_x = tl.load(p_x + x_rows[m] + o_k, mask=o_k < tl.where(first + m < end, high, 0), other=0.0)
                added += (sums[m] + cast(b_x, tl.float32) * b_w,)
            sums = added
        for m in tl.static_range(BLOCK_M):
            if first + m < end:
                tl.store(p_columns + (first + m).to(tl.int64) * width, tl.sum(sums[m], axis=1), mask=m_c)


@triton.jit(do_not_specialize=["M", "D", "P", "width", "column_programs", "n_slabs", "slab_tiles"])
def grouped_shrink_kernel(
    p_x,
    p_store,
    p_offsets,
    p_pieces,
    p_segments,
    p_assignments,
    p_s,
    M,
    D,
    P,
    width,
    column_programs,
    n_slabs,
    slab_tiles,
    k,
    x_row,
    TENSOR_CORES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Columns of S for one tile of tokens and one slab of every window: each column is of the piece that has it.

    Tiles of BLOCK_R columns go round `column_programs` programs, which stop where the adapter's own columns end: a wide
    adapter elsewhere costs this one nothing.
    """
    pid = tl.program_id(0)
    i_c, i_slab = (pid % column_programs).to(tl.int64), (pid // column_programs % n_slabs).to(tl.int64)
    i_tile = pid // column_programs // n_slabs
    slot, first, end = token_tile(p_segments, i_tile, D, BLOCK_M, BLOCK_D)
    if first < end:
        p_own = p_pieces + slot * P * FIELDS
        o_p = tl.arange(0, BLOCK_P)
        p_all = p_own + FIELDS * o_p
        b_kind = tl.load(p_all + KIND, mask=o_p < P, other=0)
        b_first = tl.load(p_all + S_FIRST, mask=o_p < P, other=0)
        b_stop = b_first + tl.load(p_all + COUNT, mask=o_p < P, other=0)
        b_stop = tl.where((b_kind == LOW_RANK) | (b_kind == ROWS), b_stop, 0)
        NARROW: tl.constexpr = BLOCK_K // VECTOR if BLOCK_K > 128 else 16  # where each element needs an address
        UNIT: tl.constexpr = 128 // p_store.dtype.element_ty.primitive_bitwidth
        low = i_slab * slab_tiles * BLOCK_K
        for c in range(i_c * BLOCK_R, tl.minimum(tl.max(b_stop, 0), width), column_programs * BLOCK_R):
            m_p = (b_first < c + BLOCK_R) & (b_stop > c)
            leader = tl.min(tl.where(m_p, o_p, BLOCK_P), 0)
            last = tl.max(tl.where(m_p, o_p, -1), 0)
            for i_piece in range(leader, last + 1):
                # Pieces on one input (q, k and v, forward) share what is read of it: the first takes the others' columns.
                window = _window(p_own + FIELDS * i_piece)
                done = window < 0
                for i in range(leader, i_piece):
                    done = done | (_window(p_own + FIELDS * i) == window)
                if done == 0:
                    high = tl.minimum(window & 0xFFFFFFFF, low + slab_tiles * BLOCK_K)
                    b_row = _rows_of(p_offsets, p_own, i_piece, last, window, c + tl.arange(0, BLOCK_R))
                    odd = tl.max(tl.where(b_row >= 0, b_row % UNIT, 0), 0)
                    if odd | (((window >> 32) | high | x_row) % VECTOR) == 0:
                        _shrink_tile(
                            p_x, p_store, p_offsets, p_own, p_assignments, p_s, first, end, i_piece, last, window, c,
                            low, high, i_slab * M, width, k, x_row,
                            VECTOR, UNIT, TENSOR_CORES, BLOCK_M, BLOCK_R, BLOCK_K, STAGES,
                        )  # fmt: skip
                    else:
                        _shrink_tile(
                            p_x, p_store, p_offsets, p_own, p_assignments, p_s, first, end, i_piece, last, window, c,
                            low, high, i_slab * M, width, k, x_row,
                            1, 1, TENSOR_CORES, BLOCK_M, BLOCK_R, NARROW, STAGES,
                        )  # fmt: skip
