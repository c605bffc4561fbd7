"""The sparse family in Triton. The maths and shapes are in ``fastft/ops/sparse.py``, the definition of these ops.

A, B rows and columns of the weight, E entries, T tokens. What walks over entries does so in blocks of equally many of them,
whatever rows they are in (`_entries.rows_of_block`). Every launcher has the name and arguments of its op. Indices are the
caller's promise.
"""

import triton
import triton.language as tl

from . import _config
from ._entries import checked_entries, entry_block, indices, nothing, search
from ._lang import cast
from ._launch import ACTIVATION, FLOAT32, Launch, check, device_name, planned
from ._sampled import Slabs, plan_entries, plan_tiles, work_per_million
from ._tiles import cdiv
from ._updates import sparse_adamw_, sparse_sm3_

__all__ = [
    "add_sparse_product_",
    "config_for",
    "gather_entries",
    "match_entries",
    "sampled_product_",
    "sparse_adamw_",
    "sparse_sm3_",
    "write_entries_",
]
_ENGINES = {"entries": plan_entries, "tiles": plan_tiles}


def config_for(op: str, *args) -> dict:
    """The configuration that ``op(*args)`` is launched with: a pure function of device, dtype and sizes.

    That of sampled_product_ says with which engine, as `_sampled` explains.
    """
    if op == "match_entries":
        return _config.lookup(device_name(args[0].device), "sparse", op)
    activation = args[1] if op == "sampled_product_" else args[0]
    problem = {"dtype": f"{8 * activation.element_size()}"}
    if op == "sampled_product_":
        _, left, right, _, columns = args[:5]
        problem["work"] = work_per_million(max(left.shape[1], 1), max(right.shape[1], 1), columns.numel())
    return _config.lookup(device_name(activation.device), "sparse", op, **problem)


@triton.jit(do_not_specialize=["A", "E"])
def _gather_entries_kernel(p_weight, p_starts, p_columns, p_out, A, E, w_row, BLOCK: tl.constexpr):
    o_e, m_e, _, _, o_w = entry_block(p_starts, p_columns, A, E, w_row, BLOCK)
    tl.store(p_out + o_e, tl.load(p_weight + o_w, mask=m_e), mask=m_e)


def _plan_gather(config, weight, starts, columns):
    constants = config or config_for("gather_entries", weight, starts, columns)
    A, E, w_row = checked_entries("gather_entries", weight, starts, columns)
    if E == 0:
        return lambda weight, starts, columns: weight.new_empty(0)
    gather = Launch(_gather_entries_kernel, cdiv(E, constants["BLOCK"]), A, E, w_row, **constants)

    def run(weight, starts, columns):
        out = weight.new_empty(E)
        gather(weight, starts, columns, out)
        return out

    return run


def gather_entries(weight, starts, columns, *, config=None):
    return planned(_plan_gather, config, (weight, starts, columns))(weight, starts, columns)


@triton.jit(do_not_specialize=["A", "E"])
def _write_entries_kernel(p_weight, p_starts, p_columns, p_base, p_delta, A, E, w_row, BLOCK: tl.constexpr):
    """The entries of one block = round(base + delta), or the bits of base without a delta."""
    o_e, m_e, _, _, o_w = entry_block(p_starts, p_columns, A, E, w_row, BLOCK)
    b_base = tl.load(p_base + o_e, mask=m_e)
    if p_delta is not None:
        b_base = cast(cast(b_base, tl.float32) + tl.load(p_delta + o_e, mask=m_e), b_base.dtype)
    tl.store(p_weight + o_w, b_base, mask=m_e)


def _plan_write(config, weight, starts, columns, base, delta):
    constants = config or config_for("write_entries_", weight, starts, columns, base, delta)
    parts = {"base": (base, (weight.dtype,))} | ({} if delta is None else {"delta": (delta, FLOAT32)})
    sizes = checked_entries("write_entries_", weight, starts, columns, **parts)
    if columns.numel() == 0:
        return nothing
    return Launch(_write_entries_kernel, cdiv(columns.numel(), constants["BLOCK"]), *sizes, **constants)


def write_entries_(weight, starts, columns, base, delta, *, config=None):
    tensors = weight, starts, columns, base, delta
    planned(_plan_write, config, tensors)(*tensors)


def _plan_sampled(config, out, left, right, starts, columns, add):
    constants = dict(config or config_for("sampled_product_", out, left, right, starts, columns, add))
    (T, A), B, E = left.shape, right.shape[1], columns.numel()
    layouts = {"left": (left, ACTIVATION, (T, A)), "right": (right, (left.dtype,), (T, B)), "out": (out, FLOAT32, (E,))}
    check("sampled_product_", apart=("left", "right"), **layouts, **indices(starts, columns, A))
    if E == 0 or (T == 0 and add):
        return nothing
    if T == 0:
        return lambda out, *_: out.zero_()
    return _ENGINES[constants.pop("engine")](constants, out, left, right, starts, columns, add)


def sampled_product_(out, left, right, starts, columns, add, *, config=None):
    tensors = out, left, right, starts, columns
    planned(_plan_sampled, config, tensors, add)(*tensors)


@triton.jit(do_not_specialize=["A", "E"])
def _match_entries_kernel(p_starts, p_columns, p_other_starts, p_other_columns, p_out, A, E, BLOCK: tl.constexpr):
    """One block of entries: where each is among the others of its row, or -1."""
    o_e, m_e, b_row, b_column, _ = entry_block(p_starts, p_columns, A, E, 0, BLOCK)
    b_low = tl.load(p_other_starts + b_row, mask=m_e, other=0)
    b_high = tl.load(p_other_starts + b_row + 1, mask=m_e, other=0)
    b_at = search(p_other_columns, b_column - 1, b_low, b_high, tl.max(b_high - b_low))
    b_found = tl.load(p_other_columns + b_at, mask=m_e & (b_at < b_high), other=-1)
    tl.store(p_out + o_e, tl.where(b_found == b_column, b_at, -1), mask=m_e)


def _plan_match(config, starts, columns, other_starts, other_columns):
    constants = config or config_for("match_entries", starts)
    A, E = starts.numel() - 1, columns.numel()
    others = {f"other_{name}": layout for name, layout in indices(other_starts, other_columns, A).items()}
    check("match_entries", **indices(starts, columns, A), **others)
    if E == 0:
        return lambda *tensors: tensors[0].new_empty(0)
    match = Launch(_match_entries_kernel, cdiv(E, constants["BLOCK"]), A, E, **constants)

    def run(starts, columns, other_starts, other_columns):
        out = starts.new_empty(E)
        match(starts, columns, other_starts, other_columns, out)
        return out

    return run


def match_entries(starts, columns, other_starts, other_columns, *, config=None):
    tensors = starts, columns, other_starts, other_columns
    return planned(_plan_match, config, tensors)(*tensors)


@triton.jit(do_not_specialize=["T", "A"])
def _add_sparse_product_kernel(
    p_y,
    p_x,
    p_starts,
    p_columns,
    p_values,
    T,
    A,
    tokens,
    y_row,
    BLOCK_T: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """One tile of y [T, A] += x deltaᵀ over a slab of tokens, for x as [B, tokens]; summed in float32 and rounded once.

    Each step takes the next entry of every row of the tile: one run of x's tokens, 2 T bytes an entry from L2 in all.
    """
    n_a = tl.cdiv(A, BLOCK_A)
    pid = tl.program_id(0).to(tl.int64)
    o_t = pid // n_a * BLOCK_T + tl.arange(0, BLOCK_T)
    o_a = pid % n_a * BLOCK_A + tl.arange(0, BLOCK_A)
    m_a = o_a < A
    b_start = tl.load(p_starts + o_a, mask=m_a, other=0)
    b_end = tl.load(p_starts + o_a + 1, mask=m_a, other=0)
    b_sum = tl.zeros([BLOCK_A, BLOCK_T], tl.float32)
    for j in range(0, tl.max(b_end - b_start).to(tl.int32)):
        m_e = b_start + j < b_end
        b_column = tl.load(p_columns + b_start + j, mask=m_e, other=0).to(tl.int64)
        b_value = tl.load(p_values + b_start + j, mask=m_e, other=0.0)
        b_x = tl.load(p_x + b_column[:, None] * tokens + o_t[None, :], mask=m_e[:, None], other=0.0)
        b_sum += b_value[:, None] * cast(b_x, tl.float32)
    p_tile = p_y + o_t[:, None] * y_row + o_a[None, :]
    m_tile = (o_t < T)[:, None] & (m_a & (b_start < b_end))[None, :]
    b_y = tl.load(p_tile, mask=m_tile)
    tl.store(p_tile, cast(cast(b_y, tl.float32) + tl.trans(b_sum), b_y.dtype), mask=m_tile)


def _plan_add_product(config, y, x, starts, columns, values):
    op = "add_sparse_product_"
    constants = config or config_for(op, y, x, starts, columns, values)
    (T, A), B, E = y.shape, x.shape[1], columns.numel()
    layouts = {"x": (x, (y.dtype,), (T, B)), "values": (values, FLOAT32, (E,))} | indices(starts, columns, A)
    check(op, apart=("y", "x"), y=(y, ACTIVATION, (T, A)), **layouts)
    if T == 0 or E == 0:
        return nothing
    cut = Slabs(T, B, x.element_size(), constants["BLOCK_T"])
    copies, n_a = cut.copies(x), cdiv(A, constants["BLOCK_A"])
    products = {}
    for tokens, padded in cut.padded.items():
        grid = n_a * cdiv(tokens, constants["BLOCK_T"])
        sizes = tokens, A, padded, y.stride(0)
        products[tokens] = Launch(_add_sparse_product_kernel, grid, *sizes, **constants)

    def run(y, x, starts, columns, values):
        copy = cut.buffer(x)
        for first, tokens in cut:
            copies[tokens](x[first:], copy)
            products[tokens](y[first:], copy, starts, columns, values)

    return run


def add_sparse_product_(y, x, starts, columns, values, *, config=None):
    tensors = y, x, starts, columns, values
    planned(_plan_add_product, config, tensors)(*tensors)
