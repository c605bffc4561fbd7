"""The chosen entries of leftᵀ right, for ``kernels/sparse.py``: two engines, and which one costs less.

"entries" (SDDMM): a product of two token vectors an entry. It reads them from token-contiguous copies of left and right,
a slab of tokens at a time that L2 holds, so its time is that of

    E T tokens of right from L2    and of    2 (A + B) T elements to copy.

"tiles": a GEMM on tensor cores, of which only the chosen entries are written. Its time is that of the dense product, 2 A B T
operations. At 4.5 TB/s from L2, 3.5 TB/s of memory and 600 TF/s (H200, a model), two 16-bit token vectors to copy cost as
much as 2.5 entries, and "tiles" wins above E + 2.5 (A + B) = 0.75 % of A B; for float32, at 40 TF/s, above 5.6 %. Neither
uses atomics: the same bits every time.
"""

import torch
import triton
import triton.language as tl

from ._entries import rows_of_block, search
from ._lang import add_dot, cast
from ._launch import Launch
from ._tiles import WORKSPACE, cdiv

_TRANSPOSE = {"BLOCK_T": 64, "BLOCK_F": 64, "num_warps": 4, "num_stages": 1}
_BOUNDS = {"BLOCK": 256, "num_warps": 4, "num_stages": 1}


def work_per_million(A: int, B: int, E: int) -> int:
    """What the engine "entries" has to do, as a density: of a million elements of the weight. Sizes are positive."""
    return round(1e6 * (E + 2.5 * (A + B)) / (A * B))


@triton.jit(do_not_specialize=["T"])
def _transpose_kernel(p_x, p_out, T, F, x_row, out_row, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    """One tile of out [F, out_row] = the transpose of x [T, F], with zeros past T."""
    n_f = tl.cdiv(F, BLOCK_F)
    pid = tl.program_id(0).to(tl.int64)
    o_t = pid // n_f * BLOCK_T + tl.arange(0, BLOCK_T)
    o_f = pid % n_f * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = (o_f < F)[None, :]
    b_x = tl.load(p_x + o_t[:, None] * x_row + o_f[None, :], mask=(o_t < T)[:, None] & m_f, other=0.0)
    tl.store(p_out + o_f[:, None] * out_row + o_t[None, :], tl.trans(b_x), mask=(o_f < F)[:, None])


class Slabs:
    """A cut of T tokens into slabs, of which a token-contiguous copy of a [T, F] matrix fits L2.

    Rows of the copies are padded to a multiple of `block` with zeros, so that kernels need no masks for tokens.
    """

    def __init__(self, T: int, F: int, itemsize: int, block: int):
        pad = max(block, _TRANSPOSE["BLOCK_T"])
        self.T, self.most = T, max(1, WORKSPACE // (F * itemsize * pad)) * pad
        self.padded = {min(T - first, self.most): 0 for first in range(0, T, self.most)}
        self.padded = {tokens: cdiv(tokens, pad) * pad for tokens in self.padded}

    def __iter__(self):
        """Yields (first token, tokens) of each slab."""
        for first in range(0, self.T, self.most):
            yield first, min(self.T - first, self.most)

    def buffer(self, x):
        return x.new_empty(x.shape[1] * max(self.padded.values()))

    def copies(self, x) -> dict:
        """{tokens of a slab: the launch that transposes as many rows of a matrix like x into a buffer}."""
        F, found = x.shape[1], {}
        for tokens, padded in self.padded.items():
            grid = padded // _TRANSPOSE["BLOCK_T"] * cdiv(F, _TRANSPOSE["BLOCK_F"])
            found[tokens] = Launch(_transpose_kernel, grid, tokens, F, x.stride(0), padded, **_TRANSPOSE)
        return found


@triton.jit(do_not_specialize=["A", "E"])
def _entry_products_kernel(
    p_left,
    p_right,
    p_starts,
    p_columns,
    p_out,
    A,
    E,
    tokens,
    ADD: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A block of entries: out = left[row] · right[column] over a slab of tokens, or += with ADD; left [A, tokens].

    Blocks are of equally many entries, however full the rows are. Each entry loads its row of left, but all but the first
    in a row from L1, which is not what this waits for.
    """
    o_e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_e = o_e < E
    b_row = rows_of_block(p_starts, o_e, A, E)
    b_column = tl.load(p_columns + o_e, mask=m_e, other=0).to(tl.int64)
    p_l, p_r = p_left + b_row[:, None] * tokens, p_right + b_column[:, None] * tokens
    b_sum = tl.zeros([BLOCK_E, BLOCK_T], tl.float32)
    for t in range(0, tokens, BLOCK_T):
        o_t = t + tl.arange(0, BLOCK_T)[None, :]
        b_sum += cast(tl.load(p_l + o_t), tl.float32) * cast(tl.load(p_r + o_t), tl.float32)
    b_value = tl.sum(b_sum, axis=1)
    if ADD:
        b_value += tl.load(p_out + o_e, mask=m_e)
    tl.store(p_out + o_e, b_value, mask=m_e)


def plan_entries(constants, out, left, right, starts, columns, add):
    """The launches of the engine "entries" as a function of the tensors. Sizes are positive."""
    (T, A), E = left.shape, columns.numel()
    cut = Slabs(T, right.shape[1], right.element_size(), constants["BLOCK_T"])
    copy_left, copy_right = cut.copies(left), cut.copies(right)
    grid = cdiv(E, constants["BLOCK_E"])
    products = {
        (tokens, more): Launch(_entry_products_kernel, grid, A, E, padded, ADD=more, **constants)
        for tokens, padded in cut.padded.items()
        for more in (False, True)
    }

    def run(out, left, right, starts, columns):
        left_copy, right_copy = cut.buffer(left), cut.buffer(right)
        for first, tokens in cut:
            copy_left[tokens](left[first:], left_copy)
            copy_right[tokens](right[first:], right_copy)
            products[tokens, add or first > 0](left_copy, right_copy, starts, columns, out)

    return run


@triton.jit(do_not_specialize=["A", "n_b"])
def _tile_bounds_kernel(p_starts, p_columns, p_bounds, A, n_b, BLOCK_B: tl.constexpr, BLOCK: tl.constexpr):
    """bounds [n_b + 1, A], int32: how many entries of each row lie left of each tile of BLOCK_B columns."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < A * (n_b + 1).to(tl.int64)
    b_row = o % A
    b_low = tl.load(p_starts + b_row, mask=m, other=0)
    b_high = tl.load(p_starts + b_row + 1, mask=m, other=0)
    b_found = search(p_columns, o // A * BLOCK_B - 1, b_low, b_high, tl.max(b_high - b_low))
    tl.store(p_bounds + o, (b_found - b_low).to(tl.int32), mask=m)


@triton.jit
def _pick(b_tile, b_at):
    """b_tile[i, b_at[i, j]], [rows, j], for columns of which 32 is a factor.

    A warp holds whole rows, a run of 32 columns in its lanes at a time, and looks into every run: four shuffles an entry for
    128 columns. `tl.gather` of the row in one piece holds four neighbours in a lane, of the indices too, which makes 16 of
    them (256 in a thread, not 64, on sm_90), and takes the registers of a second program on the SM.
    """
    rows: tl.constexpr = b_tile.shape[0]
    runs: tl.constexpr = b_tile.shape[1] // 32
    b_lane = tl.broadcast_to((b_at % 32)[:, None, :], [rows, runs, b_at.shape[1]])
    b_found = tl.gather(tl.reshape(b_tile, [rows, runs, 32]), b_lane, 2)
    m_run = (b_at // 32)[:, None, :] == tl.arange(0, runs)[None, :, None]
    return tl.sum(tl.where(m_run, b_found, 0.0), axis=1)


@triton.jit(do_not_specialize=["T"])
def _sampled_tile_kernel(
    p_left,
    p_right,
    p_starts,
    p_columns,
    p_bounds,
    p_out,
    T,
    A,
    B,
    left_row,
    right_row,
    zero,
    ADD: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The chosen entries in one tile of leftᵀ right. A tile that holds none is not multiplied.

    BLOCK_E entries of every row are picked at a time. A tile of 128 x 128 crosses shared memory once, about 600 cycles, and
    each turn takes about 900, next to 31,000 of tensor cores at their peak for its product of 4096 tokens (sm_90, counted
    in its machine code). At 1 % of random entries the fullest of 128 rows has 5 or 6 of them in the tile, at 5 % about 15:
    two turns of 4 entries or four, 8 or 14 %, and a quarter of that at 16,384 tokens. BLOCK_E = 4 keeps to 128 registers,
    so that a second program's product hides it. Comparing all elements with the column of each entry would take 256 cycles
    for every entry of the fullest row.
    """
    n_a, n_b = tl.cdiv(A, BLOCK_A), tl.cdiv(B, BLOCK_B)
    pid = tl.program_id(0).to(tl.int64)
    # Programs that run at the same time form a square as nearly as possible: fewer rows and columns to read.
    band = pid // (GROUP * n_b)
    height = tl.minimum(n_a - band * GROUP, GROUP)
    inside = pid - band * GROUP * n_b
    i_a, i_b = band * GROUP + inside % height, inside // height

    o_a = i_a * BLOCK_A + tl.arange(0, BLOCK_A)
    o_b = i_b * BLOCK_B + tl.arange(0, BLOCK_B)
    m_a, m_b = o_a < A, o_b < B
    b_first = tl.load(p_bounds + i_b * A + o_a, mask=m_a, other=0)
    b_end = tl.load(p_bounds + (i_b + 1) * A + o_a, mask=m_a, other=0)
    most = tl.max(b_end - b_first)

    b_sum = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    for t in range(0, tl.where(most > 0, T, 0), BLOCK_T):
        o_t = t + tl.arange(0, BLOCK_T).to(tl.int64)
        m_t = o_t < T
        p_l = p_left + o_t[None, :] * left_row + o_a[:, None]
        p_r = p_right + o_t[:, None] * right_row + o_b[None, :]
        b_left = tl.load(p_l, mask=m_a[:, None] & m_t[None, :], other=0.0)
        b_right = tl.load(p_r, mask=m_t[:, None] & m_b[None, :], other=0.0)
        b_sum = add_dot(b_left, b_right, b_sum, p_left.dtype.element_ty, zero)

    b_start = tl.load(p_starts + o_a, mask=m_a, other=0)
    for j in range(0, most, BLOCK_E):
        o_j = b_first[:, None] + j + tl.arange(0, BLOCK_E)[None, :]
        m_e = o_j < b_end[:, None]
        o_e = b_start[:, None] + o_j
        b_at = tl.load(p_columns + o_e, mask=m_e, other=0) - (i_b * BLOCK_B).to(tl.int32)
        b_value = _pick(b_sum, tl.where(m_e, b_at, 0))
        if ADD:
            b_value += tl.load(p_out + o_e, mask=m_e)
        tl.store(p_out + o_e, b_value, mask=m_e)


def plan_tiles(constants, out, left, right, starts, columns, add):
    """The launches of the engine "tiles" as a function of the tensors. Sizes are positive."""
    (T, A), B = left.shape, right.shape[1]
    n_a, n_b = cdiv(A, constants["BLOCK_A"]), cdiv(B, constants["BLOCK_B"])
    bounds_grid = cdiv((n_b + 1) * A, _BOUNDS["BLOCK"])
    find_bounds = Launch(_tile_bounds_kernel, bounds_grid, A, n_b, BLOCK_B=constants["BLOCK_B"], **_BOUNDS)
    sizes = T, A, B, left.stride(0), right.stride(0), 0.0
    multiply = Launch(_sampled_tile_kernel, n_a * n_b, *sizes, ADD=add, **constants)

    def run(out, left, right, starts, columns):
        bounds = starts.new_empty((n_b + 1, A), dtype=torch.int32)
        find_bounds(starts, columns, bounds)
        multiply(left, right, starts, columns, bounds, out)

    return run
