"""Linears whose tokens each name their own adapters, as differentiable functions: mixtures of LoRA, batches of adapters.

    grouped_lora(x, weight, bias, lora_A, lora_B, routing)   x Wᵀ + bias + Σ_j w_tj · scale_a · x_t A_aᵀ B_aᵀ,  a = a(t, j)
    grouped_update(y, x, store, tables, routing)             y + what adapters of any kind add (`grouped`)

Backward runs the forward's kernels with x and y exchanged. Of x, S and dY nothing but what is named here is kept: x, S
(float32, the width of the widest adapter a token and assignment) and the adapters themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ._written import output_to_write_on
from .entries import Entries
from .grouped import (
    ENTRIES,
    LOW_RANK,
    NONE,
    _entries,
    _factor,
    _live,
    grouped_expand_,
    grouped_outer_,
    grouped_shrink,
    scale_bits,
    transposed,
)
from .lora_linear import _autocast, _rows
from .registry import Scope, check_dtype
from .sparse import add_sparse_product_, sampled_product_


def _without_numbers() -> bool:
    """May tensors have no numbers now, as while a graph is made?"""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


@dataclass(frozen=True, eq=False)
class Routing:
    """Which adapters each token has, as the kernels read it; made on the tokens' device without waiting for it.

    Attributes:
        segments int32 [D, 3], assignments int32 [T·k]: see `grouped`. k: assignments a token. weights: [T, k] or None.
    """

    segments: torch.Tensor
    assignments: torch.Tensor
    k: int = 1
    weights: torch.Tensor | None = None

    @staticmethod
    def of(adapters, count: int, weights=None) -> "Routing":
        """
        Args:
            adapters: integers [T] or [T, k], the adapter of each token (of each of its k choices) or a negative number for
                none. count: how many adapters there are. weights: [T, k], a factor for each choice; may require a gradient.

        Raises:
            ValueError: shapes that don't fit; on a CPU an adapter that isn't there (a GPU, which isn't waited for, ends with
                its own error). TypeError: adapters that are no integers.
        """
        if adapters.is_floating_point() or adapters.dim() not in (1, 2):
            raise TypeError(f"adapters are integers [T] or [T, k], not {adapters.dtype}{list(adapters.shape)}")
        k = 1 if adapters.dim() == 1 else adapters.shape[1]
        if weights is not None and weights.shape != (adapters.shape[0], k):
            raise ValueError(f"weights {list(weights.shape)} for adapters {list(adapters.shape)}; want [T, k]")
        named = adapters.reshape(-1).long()
        looks = named.device.type == "cpu" and len(named) and not _without_numbers()
        if looks and int(named.max()) >= count:
            raise ValueError(f"adapters name number {int(named.max())}, there are {count}, counted from 0")
        # None's number, and beyond it what would be taken for it: the sum below then fails.
        named = torch.where(named < 0, count, named + (named >= count))
        # Those without an adapter come last, beyond every segment.
        ends = torch.zeros(count + 1, dtype=torch.int64, device=named.device)
        ends = ends.scatter_add_(0, named, torch.ones_like(named)).cumsum(0)[:count]
        slots = torch.arange(count, device=named.device)
        begins = F.pad(ends, (1, 0))[:count]
        segments = torch.stack([slots, begins, ends], 1).int()
        return Routing(segments, named.argsort(stable=True).int(), k, weights)


@dataclass(frozen=True, eq=False)
class Tables:
    """Where adapters lie in a store: `offsets`, `columns` and `pieces` of `grouped`, and the width of S.

    For backward each piece of a slot needs columns of S of its own, COLUMNS too, since it is ROWS there.

    has_entries: is any piece ENTRIES? Backward would have to wait for the device to see. Said wrongly, their gradients and
    what they add to dX are missing.
    """

    offsets: torch.Tensor
    columns: torch.Tensor
    pieces: torch.Tensor
    width: int
    has_entries: bool


def grouped_lora(x, weight, bias, lora_A: Sequence, lora_B: Sequence, routing: Routing, scales=1.0):
    """``x Wᵀ + bias + Σ_j w_tj · scale_a · x_t A_aᵀ B_aᵀ`` with a = a(t, j): LoRA adapters of any ranks, k a token.

    Args:
        x: [..., K], its leading dimensions flattened are the T tokens of `routing`. weight [N, K], bias [N] or None, of x's
            dtype.
        lora_A: for each adapter A [R_a, K], lora_B: B [N, R_a]; all of x's dtype or all float32, in which case they are
            never rounded.
        routing: `Routing.of(adapters, len(lora_A), weights)`.
        scales: one factor, or one for each adapter.

    Returns:
        [..., N]. Differentiable once in x, weight, bias, every A and B, and the routing's weights.

    Raises:
        ValueError: shapes that don't fit. TypeError: dtypes.
    """
    count = len(lora_A)
    x, weight, bias, *factors = _autocast(x, weight, bias, *lora_A, *lora_B, wide=tuple(range(3, 3 + 2 * count)))
    (n, k), ranks = weight.shape, tuple(a.shape[0] for a in factors[:count])
    scales = tuple(map(float, scales)) if isinstance(scales, Sequence) else (float(scales),) * count
    for a, b in zip(factors[:count], factors[count:], strict=True):
        if a.dim() != 2 or a.shape[1] != k or b.shape != (n, a.shape[0]):
            raise ValueError(
                f"lora_A {list(a.shape)} and lora_B {list(b.shape)} on a weight {[n, k]}; want [R, K] and [N, R]"
            )
    if len(scales) != count or routing.segments[:, 0].numel() > max(count, 1):
        raise ValueError(f"{count} adapters, {len(scales)} scales, a routing among {len(routing.segments)}")
    dtypes = {factor.dtype for factor in factors}
    if len(dtypes) > 1 or not dtypes <= {x.dtype, torch.float32, torch.float64}:
        raise TypeError(f"adapters in {', '.join(map(str, dtypes))} on {x.dtype}; all must be {x.dtype}, or all float32")
    parts = [a.reshape(-1) for a in factors[:count]] + [b.t().reshape(-1) for b in factors[count:]]
    store = torch.cat(parts) if parts else x.new_empty(0)
    # What is made under a mode (FakeTensorMode) is of no use outside of it, and the other way round.
    tables = (_make_lora_tables if _without_numbers() else _lora_tables)(ranks, k, n, scales, str(x.device))
    return _apply(x, None, weight, bias, store, tables, routing)


def _make_lora_tables(ranks, k, n, scales, device) -> Tables:
    offsets, pieces, above = [], [], sum(ranks) * k
    for a, rank in enumerate(ranks):
        first, table = sum(ranks[:a]), len(offsets)
        offsets += [(first + r) * k for r in range(rank)] + [above + (first + r) * n for r in range(rank)]
        pieces.append([[LOW_RANK if rank else NONE, rank, table, table + rank, 0, k, 0, n, 0, scale_bits(scales[a])]])
    make = {"dtype": torch.int64, "device": device}
    columns = torch.zeros(0, dtype=torch.int16, device=device)
    pieces = torch.tensor(pieces, **make).view(len(ranks), 1, 10)
    return Tables(torch.tensor(offsets, **make), columns, pieces, max(ranks, default=0), has_entries=False)


_lora_tables = lru_cache(256)(_make_lora_tables)


def grouped_update(y, x, store, tables: Tables, routing: Routing):
    """y + what the adapters of `routing` add to it for x (`grouped`), differentiable once in y, x, store and the weights.

    Args:
        y [..., N], x [..., K]: of one dtype and equal leading dimensions. store: 1-D, that dtype or float32; every row and
        every block of entries belongs to one piece.

    The gradient of single entries (SpIEL, LIFT) is computed adapter by adapter and waits for the device.
    """
    if x.shape[:-1] != y.shape[:-1] or x.dtype != y.dtype:
        raise ValueError(f"y is {y.dtype}{list(y.shape)}, x {x.dtype}{list(x.shape)}; want one dtype and leading dimensions")
    return _apply(x, y, None, None, store, tables, routing)


def _apply(x, y, weight, bias, store, tables, routing):
    check_dtype(x)
    tokens = x.numel() // max(x.shape[-1], 1)
    if tokens * routing.k != len(routing.assignments):
        raise ValueError(
            f"{tokens} tokens, but the routing has {len(routing.assignments)} assignments, {routing.k} a token: each token "
            "(of a batch of samples too) names its adapters, a negative number for none"
        )
    out = None if y is None else _rows(y)
    result = GroupedNode.apply(_rows(x), out, weight, bias, store.contiguous(), routing.weights, tables, routing)
    return result.view(*x.shape[:-1], result.shape[-1])


def _wide(t):
    return torch.promote_types(t.dtype, torch.float32)


class GroupedNode(torch.autograd.Function):
    """x Wᵀ + bias, or a copy of y, and what the adapters add."""

    @staticmethod
    def forward(ctx, x, y, weight, bias, store, weights, tables, routing):
        out = output_to_write_on(x, y, weight, bias)
        pieces, plan = tables.pieces, (routing.segments, routing.assignments)
        s = grouped_shrink(x, store, tables.offsets, pieces, *plan, routing.k, tables.width)
        weights = None if weights is None else weights.detach().to(_wide(x)).contiguous()
        grouped_expand_(out, x, s, store, tables.offsets, tables.columns, pieces, *plan, weights, routing.k)
        ctx.tables, ctx.k, ctx.scope = tables, routing.k, Scope.captured()
        ctx.features, keep_x = x.shape[1], any(ctx.needs_input_grad[i] for i in (2, 4, 5))
        ctx.save_for_backward(x if keep_x else None, weight, store, weights, s, *plan)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return Scope.run(ctx.scope, _grouped_backward, ctx, dy)


def _grouped_backward(ctx, dy):
    x, weight, store, weights, s, segments, assignments = ctx.saved_tensors
    need_x, need_y, need_w, need_bias, need_store, need_gates = ctx.needs_input_grad[:6]
    dy, tables, plan = dy.contiguous(), ctx.tables, (segments, assignments)
    back, dx, dstore = transposed(tables.pieces), None, None
    shared = tables.offsets, tables.columns, back, *plan, weights, ctx.k
    ds = grouped_shrink(dy, store, tables.offsets, back, *plan, ctx.k, tables.width)
    if need_x:
        dx = dy.new_zeros(len(dy), ctx.features) if weight is None else dy @ weight
        grouped_expand_(dx, dy, ds, store, *shared)
    if need_store:
        dstore = torch.zeros_like(store)
        grouped_outer_(dstore, x, dy, ds, tables.offsets, tables.pieces, *plan, weights, ctx.k)
        grouped_outer_(dstore, dy, x, s, tables.offsets, back, *plan, weights, ctx.k)
    if tables.has_entries and (need_x or need_store):
        _entries_backward(dx, dstore, dy, x, store, tables, plan, weights, ctx.k)
    dgates = _gate_gradient(dy, x, s, store, tables, plan, ctx.k) if need_gates else None
    dw = dy.t() @ x if need_w else None
    return dx, dy if need_y else None, dw, dy.sum(0) if need_bias else None, dstore, dgates, None, None


def _entries_backward(dx, dstore, dy, x, store, tables, plan, weights, k):
    """dX and the gradient of the values of the ENTRIES pieces, one after the other, added where they belong."""
    wide = _wide(dy)
    for piece, _, tokens, chosen in _live(tables.pieces, *plan, k):
        if piece["kind"] != ENTRIES:
            continue
        rows, columns, places = _entries(store, tables.offsets, tables.columns, piece)
        inputs = slice(piece["x_first"], piece["x_first"] + piece["x_width"])
        left = dy[tokens, piece["y_first"] : piece["y_first"] + piece["y_width"]].to(wide)
        left = (left * _factor(piece, weights, chosen, wide)).to(dy.dtype)
        if dx is not None:
            there = Entries.of_flat(columns * piece["y_width"] + rows, (piece["x_width"], piece["y_width"]))
            order = (columns * piece["y_width"] + rows).argsort()
            added = dy.new_zeros(len(tokens), piece["x_width"])
            add_sparse_product_(added, left, there.starts, there.columns, store[places[order]].to(wide))
            dx[:, inputs].index_add_(0, tokens, added)
        if dstore is not None:
            flat = rows * piece["x_width"] + columns
            there, order = Entries.of_flat(flat, (piece["y_width"], piece["x_width"])), flat.argsort()
            values = torch.empty(len(flat), dtype=wide, device=dy.device)
            sampled_product_(values, left, x[tokens, inputs].contiguous(), there.starts, there.columns, False)
            dstore[places[order]] = values.to(dstore.dtype)


def _gate_gradient(dy, x, s, store, tables, plan, k):
    """⟨dY, what the adapter added⟩ of every assignment, [T, k]; that is computed again, each assignment in its own row."""
    segments, assignments = plan
    own = torch.arange(len(assignments), dtype=torch.int32, device=dy.device)
    tokens = (assignments // k).long()
    added = dy.new_zeros(len(assignments), dy.shape[1])
    grouped_expand_(added, x[tokens], s, store, tables.offsets, tables.columns, tables.pieces, segments, own, None, 1)
    wide = _wide(dy)
    dots = (added.to(wide) * dy[tokens].to(wide)).sum(1)
    gates = dots.new_zeros(len(dy) * k).index_copy_(0, assignments.long(), dots)
    return gates.view(len(dy), k)
