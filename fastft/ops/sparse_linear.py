"""Linears of whose weight single entries train, and which way their gradient is computed.

    entries_gradient(left, right, entries, dtype)     (leftᵀ right) at the entries
    sparse_linear(x, weight, bias, entries, delta)    y = x (W + delta)ᵀ + bias, W untouched
    sparse_update(y, x, entries, delta)               y + x deltaᵀ for the output of a layer that computes itself

Where the entries stand in the weight, `partial_linear` is the layer. The kernels are in `sparse`.
"""

import itertools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from . import _twice
from ._written import output_to_write_on
from .entries import Entries
from .lora_linear import _autocast, _rows, forward_mode
from .partial import gather_columns
from .registry import Scope, check_dtype
from .sparse import add_sparse_product_, gather_entries, sampled_product_

_BLOCK = 256  # rows of leftᵀ right that exist at a time where a GEMM forms them
# Bytes of them on a GPU: what the GEMM wrote is read from L2. An H200's times of Llama-3-8B's linears at 1 %, with 4096
# tokens: q 198, gate 735, down 821 us; with 16 MiB 213, 755, 902; with 64 MiB 188, 767, 758.
_HELD = 32 << 20
# From this density on a GEMM of which only the entries are read is faster on a CPU than the sampled product.
DENSE = 0.2
# The same on a GPU, of what the sampled product has to do (a row or column to be copied costs as much as 2.5 entries): of
# 16-bit operands both took as long at 0.31 % (k), 0.40 % (q) and 0.59 % (gate, down) on an H200. float32, without tensor
# cores, is a model.
DENSE_GPU, DENSE_GPU_FLOAT32, COLUMN = 0.0045, 0.056, 2.5
COMPACT = 0.5  # leaving empty rows and columns out must save half of a GEMM


def engine(device: str, shape: tuple[int, int], count: int, rows: int, columns: int) -> str:
    """How the gradient of `count` entries, in so many different rows and columns of a weight of `shape`, is computed:

    "sampled" (the kernel), "compacted" (a GEMM over the rows and columns that have any: masks that cluster) or "blocks" (a
    GEMM over all of them, some rows at a time).
    """
    inside = max(1, rows * columns)
    if count < DENSE * inside if device == "cpu" else _sparse(DENSE_GPU, shape, count, inside):
        return "sampled"
    return "compacted" if inside < COMPACT * max(1, shape[0] * shape[1]) else "blocks"


def _sparse(density, shape, count, inside):
    return count + COLUMN * sum(shape) < density * inside


@dataclass(eq=False)
class Sampling:
    """What `entries_gradient` has to know of a choice of entries; made once for it, since it reads sizes from the device.

    rows, columns: int32, those that hold any entry, for "compacted". inner: the same entries among those rows and columns
    ("compacted") or all ("blocks"). blocks: of each block of rows in them that holds any entry, the rows, the entries, and
    the rows' starts. sparse: there are too few entries for GEMMs of float32.
    """

    engine: str
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    inner: Entries | None = None
    blocks: list[tuple[slice, slice, torch.Tensor]] | None = None
    sparse: bool = False

    @staticmethod
    def of(entries: Entries) -> "Sampling":
        used = entries.starts.diff() > 0
        rows = used.nonzero().flatten().int()
        present = torch.zeros(entries.shape[1], dtype=torch.bool, device=entries.device)
        present[entries.columns.long()] = True
        columns = present.nonzero().flatten().int()
        kind = engine(entries.device.type, entries.shape, len(entries), len(rows), len(columns))
        if kind == "sampled":
            return Sampling(kind)
        inner = entries
        if kind == "compacted":
            starts = torch.cat([entries.starts[:-1][used], entries.starts[-1:]])
            place = (present.cumsum(0) - 1).int()
            inner = Entries(starts, place[entries.columns.long()], (len(rows), len(columns)))
        inside = len(rows) * len(columns)
        sparse = entries.device.type != "cpu" and _sparse(DENSE_GPU_FLOAT32, entries.shape, len(entries), inside)
        return Sampling(kind, rows, columns, inner, _blocks(inner), sparse)


def _blocks(entries):
    height, fit = _BLOCK, _HELD // (4 * max(1, entries.shape[1]))
    if entries.device.type != "cpu":
        height = max(height, fit // 128 * 128)
    bounds = entries.starts[::height].tolist()
    if entries.shape[0] % height:
        bounds.append(len(entries))
    found = []
    for block, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if begin < end:
            rows = slice(block * height, (block + 1) * height)
            found.append((rows, slice(begin, end), entries.starts[rows.start : rows.stop + 1] - begin))
    return found


def entries_gradient(left, right, entries: Entries, dtype, sampling: Sampling | None = None):
    """(leftᵀ right) at the entries, in `dtype` (at least float32), without the whole product ever existing.

    Args:
        left: [T, A], right: [T, B], of one dtype, for entries of a weight [A, B].
        sampling: ``Sampling.of(entries)``, if it is at hand.
    """
    sampling = Sampling.of(entries) if sampling is None else sampling
    wide = torch.promote_types(left.dtype, torch.float32)
    if sampling.engine == "sampled" or (sampling.sparse and left.dtype == torch.float32):
        out = torch.empty(len(entries), dtype=wide, device=left.device)
        sampled_product_(out, left, right, entries.starts, entries.columns, False)
        return out.to(dtype)
    if sampling.engine == "compacted":
        left, right = gather_columns(left, sampling.rows), gather_columns(right, sampling.columns)
    found = [
        gather_entries(product(left[:, rows].t(), right, wide), starts, sampling.inner.columns[inside])
        for rows, inside, starts in sampling.blocks
    ]
    out = found[0] if len(found) == 1 else torch.cat([left.new_empty(0, dtype=wide), *found])
    return out.to(dtype)


def product(left, right, dtype):
    """left @ right in `dtype`: of 16-bit operands on CUDA without rounding the float32 sums to 16 bits in between."""
    if dtype != left.dtype and left.is_cuda and dtype == torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def transposed(entries: Entries) -> tuple[Entries, torch.Tensor]:
    """The same entries of the transposed weight, and where each of them is among the untransposed ones (int64)."""
    order = torch.argsort(entries.columns, stable=True)
    rows, (a, b) = entries.rows()[order].int(), entries.shape
    starts = torch.searchsorted(entries.columns[order].long(), torch.arange(b + 1, device=entries.device))
    return Entries(starts, rows, (b, a)), order


@dataclass(eq=False)
class Ways:
    """What products with chosen entries of a stored weight need, forward and backward: made once for a choice.

    stored: the entries. transposed: is the stored weight [K, N]? forth, back: (entries, where each one's value is among
    those of `stored`, or None for the same order) of the logical weight [N, K] and of its transpose.
    """

    stored: Entries
    transposed: bool
    forth: tuple[Entries, torch.Tensor | None]
    back: tuple[Entries, torch.Tensor | None]
    _sampling: list[Sampling] = field(default_factory=list, repr=False)

    @staticmethod
    @torch.inference_mode(False)  # backward saves the order where it is differentiated in turn
    def of(entries: Entries, fan_in_fan_out: bool = False) -> "Ways":
        own, other = (entries, None), transposed(entries)
        forth, back = (other, own) if fan_in_fan_out else (own, other)
        return Ways(entries, fan_in_fan_out, forth, back)

    def sampling(self) -> Sampling:
        """How the gradient is computed; looked at once."""
        if not self._sampling:
            self._sampling.append(Sampling.of(self.stored))
        return self._sampling[0]


class _SparseNode(torch.autograd.Function):
    """y + x deltaᵀ on chosen entries, y = x Wᵀ + bias computed here or, with weight None, given as `y`."""

    @staticmethod
    def forward(ctx, x, y, weight, bias, delta, observer, ways):
        ctx.ways, ctx.observer, ctx.scope = ways, observer, Scope.captured()
        out = output_to_write_on(x, y, weight, bias)
        add_delta_(out, x, delta, *ways.forth)
        keep_x = ctx.needs_input_grad[4] or ctx.needs_input_grad[2] or observer is not None
        keep_weight = ctx.needs_input_grad[0]
        ctx.save_for_backward(x if keep_x else None, weight if keep_weight else None, delta)
        ctx.features, ctx.beside = x.shape[1], y is not None
        return out

    @staticmethod
    def backward(ctx, dy):
        if _twice.asked(dy):
            return _twice.sparse(ctx, dy)
        return Scope.run(ctx.scope, _sparse_backward, ctx, dy)


def _sparse_backward(ctx, dy):
    x, weight, delta = ctx.saved_tensors
    need_x, need_y, need_weight, need_bias, need_delta = ctx.needs_input_grad[:5]
    dy = dy.contiguous()
    dx = None
    if need_x:
        dx = dy.new_zeros(dy.shape[0], ctx.features) if weight is None else dy @ weight
        add_delta_(dx, dy, delta, *ctx.ways.back)
    left, right = (x, dy) if ctx.ways.transposed else (dy, x)
    ddelta = None
    if ctx.observer is not None:
        ctx.observer(left, right)
    if need_delta:
        ddelta = entries_gradient(left, right, ctx.ways.stored, delta.dtype, ctx.ways.sampling())
    dweight = dy.t() @ x if need_weight else None
    return dx, dy if need_y else None, dweight, dy.sum(0) if need_bias else None, ddelta, None, None


def add_delta_(y, x, delta, entries: Entries, order=None):
    """y += x deltaᵀ in place, for entries [N, K] whose values are ``delta[order]``."""
    values = delta.detach() if order is None else delta.detach()[order]
    add_sparse_product_(y, x.contiguous(), entries.starts, entries.columns, values)


def sparse_linear(x, weight, bias, entries: Entries, delta, *, fan_in_fan_out: bool = False, observer=None, ways=None):
    """``x (W + delta)ᵀ + bias`` with the delta of chosen entries beside an untouched weight.

    Args:
        x: [..., K], any strides; cast as `F.linear` casts it under autocast.
        weight: [N, K] of x's dtype; [K, N] with `fan_in_fan_out`.
        bias: [N] or None. entries: of the stored weight. delta: [E] float32 (float64), gets a gradient.
        observer: called in backward with (left, right), whose leftᵀ right is the gradient of the stored weight.
        ways: ``Ways.of(entries, fan_in_fan_out)``, if it is at hand.

    Raises:
        ValueError: shapes that do not fit. TypeError: dtypes.
    """
    x, weight, bias = _autocast(x, weight, bias, wide=())
    logical = weight.t() if fan_in_fan_out else weight
    _check(x, weight.shape, logical.shape, entries, delta)
    if x.dtype != weight.dtype:
        raise TypeError(f"x is {x.dtype}, the weight {weight.dtype}; they must be of one dtype")
    ways = ways or Ways.of(entries, fan_in_fan_out)
    if not torch.is_grad_enabled() and not forward_mode():
        rows = _rows(x)
        y = F.linear(rows, logical, bias)
        add_delta_(y, rows, delta, *ways.forth)
    else:
        y = _SparseNode.apply(_rows(x), None, logical, bias, delta, observer, ways)
    return y.view(*x.shape[:-1], logical.shape[0])


def sparse_update(y, x, entries: Entries, delta, *, fan_in_fan_out: bool = False, observer=None, ways=None):
    """``y + x deltaᵀ`` on chosen entries, for the output y [..., N] of any base layer on x [..., K] (quantised weights, or a
    second adapter). Args and errors as `sparse_linear`."""
    y, x = _autocast(y, x, wide=())
    n, k = y.shape[-1], x.shape[-1]
    _check(x, (k, n) if fan_in_fan_out else (n, k), (n, k), entries, delta)
    if y.shape[:-1] != x.shape[:-1] or y.dtype != x.dtype:
        raise ValueError(f"y {list(y.shape)} {y.dtype} does not fit x {list(x.shape)} {x.dtype}")
    ways = ways or Ways.of(entries, fan_in_fan_out)
    return _SparseNode.apply(_rows(x), _rows(y), None, None, delta, observer, ways).view(y.shape)


def _check(x, stored, logical, entries, delta):
    check_dtype(x)
    if not x.dim() or x.shape[-1] != logical[1]:
        raise ValueError(f"x {list(x.shape)} does not fit a weight of {logical[1]} in-features")
    if tuple(entries.shape) != tuple(stored):
        raise ValueError(f"entries of a weight {list(entries.shape)} are not those of a weight {list(stored)}")
    if tuple(delta.shape) != (len(entries),):
        raise ValueError(f"{len(entries)} entries have a delta [{len(entries)}], not {list(delta.shape)}")
    if delta.dtype != torch.promote_types(x.dtype, torch.float32):
        raise TypeError(f"the delta is {delta.dtype}; on {x.dtype} it must be {torch.promote_types(x.dtype, torch.float32)}")
