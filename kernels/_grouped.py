"""What the kernels of the grouped family share: how a program finds its tokens, and rows that it may load in vectors."""

import triton
import triton.language as tl

# As in fastft/ops/grouped.py, which tests compare.
LOW_RANK, COLUMNS, ROWS, ENTRIES = (tl.constexpr(kind) for kind in (1, 2, 3, 4))
KIND, COUNT, LEFT, RIGHT, X_FIRST, X_WIDTH, Y_FIRST, Y_WIDTH, S_FIRST, SCALE = (tl.constexpr(i) for i in range(10))
FIELDS = tl.constexpr(10)
# Where windows start and end at multiples of this many elements, 16-byte loads of float32 and of 16-bit numbers fit them.
# Kernels look and then say so to the compiler: x // UNIT * UNIT is x.
VECTOR = tl.constexpr(8)
# So many offsets of a table are looked at in one step.
GLANCE = tl.constexpr(256)


@triton.jit
def token_tile(p_segments, i_tile, D, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """(slot, first, end): the i_tile-th tile of BLOCK_M positions, first == end past the last. Tiles don't cross segments.

    A grid of (segments x tiles of all tokens) would be D times as large as what can be filled. So all programs are numbered
    along one axis, and each counts the tiles of the segments before its own.
    """
    o_d = tl.arange(0, BLOCK_D)
    p_d = p_segments + 3 * o_d
    b_length = tl.load(p_d + 2, mask=o_d < D, other=0) - tl.load(p_d + 1, mask=o_d < D, other=0)
    b_last = tl.cumsum((b_length + BLOCK_M - 1) // BLOCK_M, 0)
    m_before = b_last <= i_tile
    own = tl.sum(m_before.to(tl.int32), 0)
    skipped = tl.max(tl.where(m_before, b_last, 0), 0)
    p_own = p_segments + 3 * own
    slot = tl.load(p_own, mask=own < D, other=0).to(tl.int64)
    end = tl.load(p_own + 2, mask=own < D, other=0)
    first = tl.load(p_own + 1, mask=own < D, other=0) + (i_tile - skipped) * BLOCK_M
    end = tl.minimum(end, first + BLOCK_M)
    return slot, tl.minimum(first, end), end


@triton.jit
def tokens_of(p_assignments, first, end, BLOCK_M: tl.constexpr):
    """Positions first, first + 1, ..., which of them are below `end`, and their assignments."""
    o_m = first + tl.arange(0, BLOCK_M)
    m_m = o_m < end
    return o_m.to(tl.int64), m_m, tl.load(p_assignments + o_m, mask=m_m, other=0)


@triton.jit
def odd_offsets(p_table, count, UNIT: tl.constexpr):
    """Not 0 if a row of the table starts at no multiple of UNIT elements."""
    b_odd = tl.zeros([GLANCE], tl.int64)
    for i in range(0, count, GLANCE):
        o = i + tl.arange(0, GLANCE)
        b_odd |= tl.load(p_table + o, mask=o < count, other=0) % UNIT
    return tl.max(b_odd, 0)


@triton.jit
def factor(p_piece, p_weights, a):
    """float32: the scale of a piece times the weight of an assignment."""
    scale = tl.load(p_piece + SCALE).to(tl.int32).to(tl.float32, bitcast=True)
    return scale if p_weights is None else scale * tl.load(p_weights + a)


@triton.jit
def factors(p_piece, p_weights, b_a, m_a):
    """The same for a block of assignments, those outside of the mask 0 or whatever the scale is."""
    scale = tl.load(p_piece + SCALE).to(tl.int32).to(tl.float32, bitcast=True)
    b_factor = tl.zeros(b_a.shape, tl.float32) + scale
    return b_factor if p_weights is None else b_factor * tl.load(p_weights + b_a, mask=m_a, other=0.0)
