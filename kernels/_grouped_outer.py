"""Gradients of the left rows, for ``kernels/grouped.py``."""

import triton
import triton.language as tl

from ._grouped import (
    COUNT,
    FIELDS,
    KIND,
    LEFT,
    LOW_RANK,
    RIGHT,
    ROWS,
    S_FIRST,
    VECTOR,
    X_FIRST,
    X_WIDTH,
    Y_FIRST,
    factors,
    odd_offsets,
    tokens_of,
)
from ._lang import cast, split_dot


@triton.jit
def _outer_tile(
    p_grad,
    p_values,
    p_other,
    p_s,
    p_offsets,
    p_piece,
    p_assignments,
    p_weights,
    begin,
    end,
    r_first,
    k_first,
    width,
    k,
    values_row,
    other_row,
    UNIT: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_K columns of BLOCK_R rows of the gradient: a sum over the tokens of the segment, in order."""
    o_k, k_end = k_first + tl.arange(0, BLOCK_K), tl.load(p_piece + X_WIDTH) // UNIT * UNIT
    m_k = o_k < k_end
    p_values += tl.load(p_piece + X_FIRST) // UNIT * UNIT + o_k
    o_r, count = r_first + tl.arange(0, BLOCK_R), tl.load(p_piece + COUNT)
    # The coefficients are columns of S or of the other activation: of the two loads below one is masked.
    n_s = tl.where(tl.load(p_piece + KIND) == LOW_RANK, count, 0)
    n_other = count - n_s
    b_channel = tl.load(p_offsets + tl.load(p_piece + RIGHT) + o_r, mask=o_r < n_other, other=0)
    p_s += tl.load(p_piece + S_FIRST) + o_r
    p_other += tl.load(p_piece + Y_FIRST) + b_channel
    b_sum = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for i_m in range(begin, end, BLOCK_M):
        o_m, m_m, b_a = tokens_of(p_assignments, i_m, end, BLOCK_M)
        b_t = (b_a // k).to(tl.int64)
        b_c = tl.load(p_s[:, None] + (o_m * width)[None, :], mask=(o_r < n_s)[:, None] & m_m[None, :], other=0.0)
        p_c = p_other[:, None] + (b_t * other_row)[None, :]
        b_c += cast(tl.load(p_c, mask=(o_r < n_other)[:, None] & m_m[None, :], other=0.0), tl.float32)
        b_c *= factors(p_piece, p_weights, b_a, m_m)[None, :]
        p_v = p_values[None, :] + (b_t * values_row // UNIT * UNIT)[:, None]
        b_v = tl.load(p_v, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_sum = split_dot(b_c, b_v, b_sum, p_grad.dtype.element_ty)
    p_left = p_offsets + tl.load(p_piece + LEFT)
    b_row = tl.load(p_left + o_r, mask=o_r < count, other=0) // GRAD_UNIT * GRAD_UNIT
    p_tile = p_grad + b_row[:, None] + o_k[None, :]
    tl.store(p_tile, cast(b_sum, p_grad.dtype.element_ty), mask=(o_r < count)[:, None] & m_k[None, :])


@triton.jit(do_not_specialize=["P", "width", "n_k", "row_programs"])
def grouped_outer_kernel(
    p_grad,
    p_values,
    p_other,
    p_s,
    p_offsets,
    p_pieces,
    p_segments,
    p_assignments,
    p_weights,
    P,
    width,
    n_k,
    row_programs,
    k,
    values_row,
    other_row,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_K columns of the rows of one piece for all tokens of its segment; rows go round `row_programs` programs."""
    pid = tl.program_id(0)
    k_first, i_r = (pid % n_k).to(tl.int64) * BLOCK_K, (pid // n_k % row_programs).to(tl.int64)
    i_p, i_d = pid // n_k // row_programs % P, pid // n_k // row_programs // P
    p_segment = p_segments + 3 * i_d
    begin, end = tl.load(p_segment + 1), tl.load(p_segment + 2)
    if begin < end:
        p_piece = p_pieces + (tl.load(p_segment).to(tl.int64) * P + i_p) * FIELDS
        kind, x_width = tl.load(p_piece + KIND), tl.load(p_piece + X_WIDTH)
        UNIT: tl.constexpr = 128 // p_grad.dtype.element_ty.primitive_bitwidth
        if ((kind == LOW_RANK) | (kind == ROWS)) & (k_first < x_width):
            count = tl.load(p_piece + COUNT)
            odd = odd_offsets(p_offsets + tl.load(p_piece + LEFT), count, UNIT)
            odd |= (tl.load(p_piece + X_FIRST) | x_width | values_row) % VECTOR
            for r in range(i_r * BLOCK_R, count, row_programs * BLOCK_R):
                if odd == 0:
                    _outer_tile(
                        p_grad, p_values, p_other, p_s, p_offsets, p_piece, p_assignments, p_weights, begin, end, r,
                        k_first, width, k, values_row, other_row, VECTOR, UNIT, BLOCK_M, BLOCK_R, BLOCK_K,
                    )  # fmt: skip
                else:
                    for n in range(0, BLOCK_K, NARROW):
                        _outer_tile(
                            p_grad, p_values, p_other, p_s, p_offsets, p_piece, p_assignments, p_weights, begin, end, r,
                            k_first + n, width, k, values_row, other_row, 1, 1, BLOCK_M, BLOCK_R, NARROW,
                        )  # fmt: skip
