"""y += what adapters add, for ``kernels/grouped.py``: a program owns a tile of y, whatever pieces reach into it."""

import triton
import triton.language as tl

from ._grouped import (
    COLUMNS,
    COUNT,
    ENTRIES,
    FIELDS,
    KIND,
    LEFT,
    LOW_RANK,
    RIGHT,
    ROWS,
    S_FIRST,
    VECTOR,
    X_FIRST,
    Y_FIRST,
    Y_WIDTH,
    factor,
    factors,
    odd_offsets,
    token_tile,
    tokens_of,
)
from ._lang import cast, split_dot


@triton.jit
def _add_table(
    p_y,
    p_x,
    p_s,
    p_store,
    p_offsets,
    p_piece,
    p_assignments,
    p_weights,
    first,
    end,
    n_first,
    width,
    j,
    k,
    y_row,
    x_row,
    UNIT: tl.constexpr,
    STORE_UNIT: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y += the coefficients of a LOW_RANK or COLUMNS piece times BLOCK_N columns, from n_first on, of its right rows."""
    n_end = tl.load(p_piece + Y_WIDTH) // UNIT * UNIT
    o_n = n_first // UNIT * UNIT + tl.arange(0, BLOCK_N)
    m_n = (o_n >= 0) & (o_n < n_end)
    p_y += tl.load(p_piece + Y_FIRST) // UNIT * UNIT + o_n
    p_left, p_right = p_offsets + tl.load(p_piece + LEFT), p_offsets + tl.load(p_piece + RIGHT)
    x_first, s_first = tl.load(p_piece + X_FIRST), tl.load(p_piece + S_FIRST)
    # The coefficients are columns of S or channels of x: of the two loads below one is masked.
    count = tl.load(p_piece + COUNT)
    n_s = tl.where(tl.load(p_piece + KIND) == LOW_RANK, count, 0)
    n_x = count - n_s
    if TENSOR_CORES:
        o_m, m_m, b_a = tokens_of(p_assignments, first, end, BLOCK_M)
        m_m = m_m & (b_a % k == j)
        b_token = (b_a // k).to(tl.int64)
        p_tile, m_tile = p_y[None, :] + (b_token * y_row)[:, None], m_m[:, None] & m_n[None, :]
        b_y = tl.load(p_tile, mask=m_tile)  # asked for first: it arrives while the product is made
        b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i_r in tl.range(0, count, BLOCK_R, num_stages=STAGES):
            o_r = i_r + tl.arange(0, BLOCK_R)
            m_r = o_r < count
            b_row = tl.load(p_right + o_r, mask=m_r, other=0) // STORE_UNIT * STORE_UNIT
            b_w = tl.load(p_store + b_row[:, None] + o_n[None, :], mask=m_r[:, None] & m_n[None, :], other=0.0)
            p_c = p_s + s_first + (o_m * width)[:, None] + o_r[None, :]
            b_c = tl.load(p_c, mask=m_m[:, None] & (o_r < n_s)[None, :], other=0.0)
            b_channel = x_first + tl.load(p_left + o_r, mask=o_r < n_x, other=0)
            p_c = p_x + (b_token * x_row)[:, None] + b_channel[None, :]
            b_c += cast(tl.load(p_c, mask=m_m[:, None] & (o_r < n_x)[None, :], other=0.0), tl.float32)
            b_sum = split_dot(b_c, b_w, b_sum, p_store.dtype.element_ty)
        b_sum *= factors(p_piece, p_weights, b_a, m_m)[:, None]
        tl.store(p_tile, cast(cast(b_y, tl.float32) + b_sum, b_y.dtype), mask=m_tile)
    else:
        assignments, outputs, sums = (), (), ()
        for m in tl.static_range(BLOCK_M):
            a = tl.load(p_assignments + first + m, mask=first + m < end, other=-1)
            a = tl.where(a % k == j, a, -1)
            p_row, stop = p_y + (a // k).to(tl.int64) * y_row // UNIT * UNIT, tl.where(a >= 0, n_end, 0)
            assignments += (a,)
            outputs += (tl.load(p_row, mask=(o_n >= 0) & (o_n < stop)),)  # asked for first, as above
            sums += (tl.zeros([BLOCK_R, BLOCK_N], tl.float32),)
        for i_r in tl.range(0, count, BLOCK_R, num_stages=STAGES):
            o_r = i_r + tl.arange(0, BLOCK_R)
            m_r = o_r < count
            b_row = tl.load(p_right + o_r, mask=m_r, other=0) // STORE_UNIT * STORE_UNIT
            b_w = tl.load(p_store + b_row[:, None] + o_n[None, :], mask=m_r[:, None] & m_n[None, :], other=0.0)
            b_channel = x_first + tl.load(p_left + o_r, mask=o_r < n_x, other=0)
            added = ()
            for m in tl.static_range(BLOCK_M):
                own = assignments[m] >= 0
                p_c = p_s + (first + m).to(tl.int64) * width + s_first + o_r
                b_c = tl.load(p_c, mask=o_r < tl.where(own, n_s, 0), other=0.0)
                p_c = p_x + (assignments[m] // k).to(tl.int64) * x_row + b_channel
                b_c += cast(tl.load(p_c, mask=o_r < tl.where(own, n_x, 0), other=0.0), tl.float32)
                added += (sums[m] + b_c[:, None] * cast(b_w, tl.float32),)
            sums = added
        for m in tl.static_range(BLOCK_M):
            if assignments[m] >= 0:
                b_sum = tl.sum(sums[m], axis=0) * factor(p_piece, p_weights, assignments[m])
                p_row = p_y + (assignments[m] // k).to(tl.int64) * y_row // UNIT * UNIT
                tl.store(p_row, cast(cast(outputs[m], tl.float32) + b_sum, outputs[m].dtype), mask=m_n)


@triton.jit
def _add_rows(
    p_y,
    p_s,
    p_offsets,
    p_piece,
    p_weights,
    o_m,
    b_a,
    m_m,
    b_y_row,
    n_first,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """y += the columns of S of a ROWS piece, where they belong among BLOCK_N columns from n_first on."""
    o_n = tl.arange(0, BLOCK_N)
    p_right = p_offsets + tl.load(p_piece + RIGHT)
    count = tl.load(p_piece + COUNT).to(tl.int32)
    # Which of S's columns belongs to a column of y, or -1: a column of y has one writer, whatever order the channels have.
    b_at = tl.full([BLOCK_N], -1, tl.int32)
    for i in range(0, count, BLOCK_I):
        o_i = i + tl.arange(0, BLOCK_I)
        b_column = tl.load(p_right + o_i, mask=o_i < count, other=-1)
        b_column = tl.where(b_column >= 0, b_column - n_first, -1).to(tl.int32)
        b_at = tl.maximum(b_at, tl.max(tl.where(b_column[:, None] == o_n[None, :], o_i[:, None], -1), axis=0))
    m_tile = m_m[:, None] & (b_at >= 0)[None, :]
    b_s = tl.load(p_s + (o_m * width + tl.load(p_piece + S_FIRST))[:, None] + b_at[None, :], mask=m_tile, other=0.0)
    p_tile = p_y + b_y_row[:, None] + (tl.load(p_piece + Y_FIRST) + n_first + o_n)[None, :]
    b_y = tl.load(p_tile, mask=m_tile)
    b_s *= factors(p_piece, p_weights, b_a, m_m)[:, None]
    tl.store(p_tile, cast(cast(b_y, tl.float32) + b_s, b_y.dtype), mask=m_tile)


@triton.jit
def _add_block(
    p_y,
    p_x,
    p_values,
    p_columns,
    rows,
    low,
    high,
    b_y,
    b_x,
    b_factor,
    m_m,
    BLOCK_A: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """y += the entries in rows low <= row < high of one block; b_y and b_x are where tokens have the block's row 0, x's 0.

    BLOCK_A rows at a time, each row's entries BLOCK_E at a time: they lie one after the other.
    """
    p_entries = p_columns + rows + 1
    for row in range(low, high, BLOCK_A):
        o_a = row + tl.arange(0, BLOCK_A)
        m_a = o_a < high
        b_start = tl.load(p_columns + o_a, mask=m_a, other=0).to(tl.int32) & 0xFFFF
        b_end = tl.load(p_columns + o_a + 1, mask=m_a, other=0).to(tl.int32) & 0xFFFF
        b_sum = tl.zeros([b_x.shape[0], BLOCK_A], tl.float32)
        for j in range(0, tl.max(b_end - b_start, 0), BLOCK_E):
            o_e = b_start[:, None] + j + tl.arange(0, BLOCK_E)[None, :]
            m_e = o_e < b_end[:, None]
            b_column = tl.load(p_entries + o_e, mask=m_e, other=0).to(tl.int32) & 0xFFFF
            b_value = cast(tl.load(p_values + o_e, mask=m_e, other=0.0), tl.float32)
            b_in = tl.load(
                p_x + b_x[:, None, None] + b_column[None, :, :], mask=m_m[:, None, None] & m_e[None, :, :], other=0.0
            )
            b_sum += tl.sum(cast(b_in, tl.float32) * b_value[None, :, :], axis=2)
        p_tile = p_y + b_y[:, None] + o_a[None, :]
        m_tile = m_m[:, None] & (m_a & (b_start < b_end))[None, :]
        b_old = tl.load(p_tile, mask=m_tile)
        tl.store(p_tile, cast(cast(b_old, tl.float32) + b_factor[:, None] * b_sum, b_old.dtype), mask=m_tile)


@triton.jit
def _add_entries(
    p_y,
    p_x,
    p_store,
    p_offsets,
    p_columns,
    p_piece,
    b_y,
    b_x,
    b_factor,
    m_m,
    n_first,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """y += an ENTRIES piece in BLOCK_N columns from n_first of the piece's own, block by block of those that reach there."""
    p_blocks = p_offsets + tl.load(p_piece + LEFT)
    count = tl.load(p_piece + COUNT).to(tl.int32)
    b_leader, b_last = tl.full([BLOCK_B], count, tl.int32), tl.full([BLOCK_B], -1, tl.int32)
    for i in range(0, count, BLOCK_B):
        o_b = i + tl.arange(0, BLOCK_B)
        b_first = tl.load(p_blocks + 4 * o_b, mask=o_b < count, other=0)
        b_rows = tl.load(p_blocks + 4 * o_b + 1, mask=o_b < count, other=0)
        m_here = (b_rows > 0) & (b_first < n_first + BLOCK_N) & (b_first + b_rows > n_first)
        b_leader = tl.minimum(b_leader, tl.where(m_here, o_b, count))
        b_last = tl.maximum(b_last, tl.where(m_here, o_b, -1))
    b_y, b_x = b_y + tl.load(p_piece + Y_FIRST), b_x + tl.load(p_piece + X_FIRST)
    for block in range(tl.min(b_leader, 0), tl.max(b_last, 0) + 1):
        p_block = p_blocks + 4 * block
        first, rows = tl.load(p_block), tl.load(p_block + 1)
        low = tl.maximum(n_first - first, 0).to(tl.int32)
        high = tl.minimum(n_first + BLOCK_N - first, rows).to(tl.int32)
        p_values, p_starts = p_store + tl.load(p_block + 2), p_columns + tl.load(p_block + 3)
        _add_block(p_y, p_x, p_values, p_starts, rows, low, high, b_y + first, b_x, b_factor, m_m, BLOCK_A, BLOCK_E)


@triton.jit(do_not_specialize=["D", "P", "width", "j"])
def grouped_expand_kernel(
    p_y,
    p_x,
    p_s,
    p_store,
    p_offsets,
    p_columns,
    p_pieces,
    p_segments,
    p_assignments,
    p_weights,
    D,
    P,
    N,
    width,
    j,
    k,
    y_row,
    x_row,
    TENSOR_CORES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of y += what the j-th assignments of its tokens add. No other program of the launch has a part of it."""
    n_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    slot, first, end = token_tile(p_segments, pid // n_n, D, BLOCK_M, BLOCK_D)
    n_first = (pid % n_n).to(tl.int64) * BLOCK_N
    if first < end:
        p_own = p_pieces + slot * P * FIELDS
        o_p = tl.arange(0, BLOCK_P)
        p_all = p_own + FIELDS * o_p
        b_kind = tl.load(p_all + KIND, mask=o_p < P, other=0)
        b_first = tl.load(p_all + Y_FIRST, mask=o_p < P, other=0)
        b_stop = b_first + tl.load(p_all + Y_WIDTH, mask=o_p < P, other=0)
        b_count = tl.load(p_all + COUNT, mask=o_p < P, other=0)
        m_p = (b_kind > 0) & (b_count > 0) & (b_first < n_first + BLOCK_N) & (b_stop > n_first)
        leader = tl.min(tl.where(m_p, o_p, BLOCK_P), 0)
        last = tl.max(tl.where(m_p, o_p, -1), 0)
        UNIT: tl.constexpr = 128 // p_store.dtype.element_ty.primitive_bitwidth
        for i_piece in range(leader, last + 1):
            p_piece = p_own + FIELDS * i_piece
            kind, here = tl.load(p_piece + KIND), n_first - tl.load(p_piece + Y_FIRST)
            if i_piece > leader:
                tl.debug_barrier()  # pieces may overlap: what other threads of this program stored is to be seen
            if (kind == LOW_RANK) | (kind == COLUMNS):
                odd = odd_offsets(p_offsets + tl.load(p_piece + RIGHT), tl.load(p_piece + COUNT), UNIT)
                if odd | ((here | tl.load(p_piece + Y_WIDTH) | y_row) % VECTOR) == 0:
                    _add_table(
                        p_y, p_x, p_s, p_store, p_offsets, p_piece, p_assignments, p_weights, first, end, here, width,
                        j, k, y_row, x_row, VECTOR, UNIT, TENSOR_CORES, BLOCK_M, BLOCK_N, BLOCK_R, STAGES,
                    )  # fmt: skip
                else:
                    for n in range(0, BLOCK_N, NARROW):
                        _add_table(
                            p_y, p_x, p_s, p_store, p_offsets, p_piece, p_assignments, p_weights, first, end, here + n,
                            width, j, k, y_row, x_row, 1, 1, TENSOR_CORES, BLOCK_M, NARROW, BLOCK_R, STAGES,
                        )  # fmt: skip
            elif (kind == ROWS) | (kind == ENTRIES):
                for m in range(0, BLOCK_M, BLOCK_T):
                    o_m, m_m, b_a = tokens_of(p_assignments, first + m, end, BLOCK_T)
                    m_m = m_m & (b_a % k == j)
                    b_token = (b_a // k).to(tl.int64)
                    if kind == ROWS:
                        _add_rows(
                            p_y, p_s, p_offsets, p_piece, p_weights, o_m, b_a, m_m, b_token * y_row, here, width,
                            BLOCK_N, BLOCK_I,
                        )  # fmt: skip
                    else:
                        _add_entries(
                            p_y, p_x, p_store, p_offsets, p_columns, p_piece, b_token * y_row, b_token * x_row,
                            factors(p_piece, p_weights, b_a, m_m), m_m, here, BLOCK_N, BLOCK_B, BLOCK_A, BLOCK_E,
                        )  # fmt: skip
