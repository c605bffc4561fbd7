"""A linear of whose weight a part trains: what forward keeps and what backward computes follow from the part alone.

    partial_linear(x, weight, bias, parts, trained)    the trained values stand in `weight`; forward is F.linear
    delta_linear(x, weight, bias, parts, deltas)       they stand beside it: y = x (W + delta)ᵀ + bias, W untouched
    delta_update(y, x, part, delta)                    the same on the output of a layer that computes itself

The kernels are in `partial`; the table of what each part costs is in its docstring.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from . import _twice
from ._written import output_to_write_on
from .entries import Entries
from .lora_linear import _autocast, _rows, forward_mode
from .partial import gather_columns, scatter_add_columns_
from .registry import Scope, check_dtype
from .sparse_linear import Sampling, entries_gradient, product

KINDS = ("all", "rows", "columns", "entries", "nothing")
# Below so many columns the transposed product and its copy are faster (1024 tokens, 2048 rows, float32, one run on a 2-core
# Xeon: 8 columns 0.38 against 0.70 ms, 61 columns 1.4 against 1.8, 128 columns 2.3 against 2.1).
_NARROW = 64
# There the vendor's fast kernels want rows on 16-byte boundaries: on an H100 a slice of 430 of 14336 rows cost 16 % of the
# floor, the same product with an operand whose rows are aligned 4 % (bfloat16, 4096 tokens).
_TENSOR_CORES, _ALIGNED = ("cuda",), 8
# Up to so many tokens PyTorch's own gather is faster on a CPU than reaching ours through the registry (1.4 against 7.5 us).
_FEW_TOKENS = 16


@dataclass(frozen=True, eq=False)
class Part:
    """Which part of a linear's weight [N, K] trains.

    Attributes:
        kind: "all", "rows" (outputs), "columns" (inputs), "entries" (of the stored weight) or "nothing".
        index: for rows and columns int32 [C], ascending, each once; for entries `Entries`; None otherwise.
    """

    kind: str
    index: torch.Tensor | Entries | None = None
    _sampling: list[Sampling] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"part {self.kind!r}; known: {', '.join(KINDS)}")
        if (self.index is None) != (self.kind in ("all", "nothing")):
            raise ValueError(f"a part of {self.kind} {'needs an' if self.index is None else 'has no'} index")

    @staticmethod
    @torch.inference_mode(False)  # backward saves the index where it is differentiated in turn
    def of(kind: str, index, size: int, device=None) -> "Part":
        """Rows or columns by any sequence of integers, checked against `size`, how many there are.

        Raises:
            ValueError: an index out of [0, size), or given twice.
        """
        index = torch.as_tensor(index, dtype=torch.int64).flatten().sort()[0]
        if index.numel() and not 0 <= index[0] <= index[-1] < size:
            raise ValueError(f"{kind} {index[0].item()} to {index[-1].item()} of a weight that has {size}")
        if (index.diff() == 0).any():
            raise ValueError(f"{kind} {index[:-1][index.diff() == 0][0].item()} is given twice")
        return Part(kind, index.to(device, torch.int32))

    def dim(self, fan_in_fan_out: bool = False) -> int:
        """The dimension of the stored weight that a slice of rows or columns is taken along."""
        return slice_dim(self.kind, fan_in_fan_out)

    def shape(self, weight: torch.Tensor, fan_in_fan_out: bool = False) -> tuple[int, ...]:
        """The shape of what trains, of a weight as it is stored ([N, K]; [K, N] with `fan_in_fan_out`)."""
        if self.kind == "all":
            return tuple(weight.shape)
        if self.index is None:
            return (0,)
        if self.kind == "entries":
            return (len(self.index),)
        sizes = list(weight.shape)
        sizes[self.dim(fan_in_fan_out)] = len(self.index)
        return tuple(sizes)

    def sampling(self) -> Sampling:
        """How the gradient of entries is computed; looked at once."""
        if not self._sampling:
            self._sampling.append(Sampling.of(self.index))
        return self._sampling[0]


def slice_dim(kind: str, fan_in_fan_out: bool = False) -> int:
    """The dimension of the stored weight that "rows" or "columns" of W [N, K] count along."""
    return int((kind == "columns") != fan_in_fan_out)


class _PartialNode(torch.autograd.Function):
    """x [T, K] -> x Wᵀ + bias; the gradient of each trained tensor is its part's of W."""

    @staticmethod
    def forward(ctx, *inputs):  # (named ones beside *trained Dynamo takes for ctx where as many names are given)
        x, weight, bias, parts, observers, transposed, *trained = inputs
        y = F.linear(x, weight, bias)
        ctx.parts, ctx.observers, ctx.transposed, ctx.scope = parts, observers, transposed, Scope.captured()
        ctx.kinds, ctx.features = [t.dtype for t in trained], x.shape[1]
        # For second derivatives, which ask whom the gradients belong to; what they hold may have changed by then.
        ctx.trained = () if torch.compiler.is_compiling() else trained
        needed = [need and part.kind != "nothing" for part, need in zip(parts, ctx.needs_input_grad[6:])]
        # The compact copy is what lets go of x; a view of x's columns would keep all of it.
        copies = [gather_columns(x, p.index) if need and p.kind == "columns" else None for p, need in zip(parts, needed)]
        whole = ctx.needs_input_grad[1] or any(need and p.kind != "columns" for p, need in zip(parts, needed))
        whole = whole or any(observers)
        ctx.save_for_backward(x if whole else None, weight if ctx.needs_input_grad[0] else None, *copies)
        return y

    @staticmethod
    def backward(ctx, dy):
        if _twice.asked(dy):
            return _twice.partial(ctx, dy)
        return Scope.run(ctx.scope, _partial_backward, ctx, dy)


def _partial_backward(ctx, dy):
    x, weight, *copies = ctx.saved_tensors
    need_x, need_w, need_bias, _, _, _, *needed = ctx.needs_input_grad
    dy = dy.contiguous()
    for observer in filter(None, ctx.observers):
        observer(*((x, dy) if ctx.transposed else (dy, x)))
    gradients = [
        _part_gradient(dy, x, copy, part, ctx.transposed, kind) if need else None
        for part, copy, kind, need in zip(ctx.parts, copies, ctx.kinds, needed)
    ]
    dx = dy @ weight if need_x else None
    return dx, dy.t() @ x if need_w else None, dy.sum(0) if need_bias else None, None, None, None, *gradients


def _part_gradient(dy, x, copy, part, transposed, dtype):
    """The part's gradient in its stored orientation, in the trained tensor's dtype."""
    if part.kind == "nothing":
        return dy.new_zeros(0, dtype=dtype)
    if part.kind == "entries":
        return entries_gradient(*((x, dy) if transposed else (dy, x)), part.index, dtype, part.sampling())
    if part.kind == "columns":
        left, right = dy, copy
    else:
        left, right = dy if part.kind == "all" else gather_columns(dy, part.index), x
    if transposed:
        left, right = right, left
    if left.device.type == "cpu" and right.shape[1] < _NARROW:
        return product(right.t(), left, dtype).t().contiguous()
    if left.device.type in _TENSOR_CORES:
        rows, columns = left.shape[1], right.shape[1]
        return product(_padded(left).t(), _padded(right), dtype)[:rows, :columns]
    return product(left.t(), right, dtype)


def _padded(t):
    """t [T, F] with columns of zeros up to a multiple of 8."""
    return F.pad(t, (0, -t.shape[1] % _ALIGNED)) if t.shape[1] % _ALIGNED else t


class _DeltaNode(torch.autograd.Function):
    """y + x deltaᵀ on the part's rows or columns, y = x Wᵀ + bias computed here or, with weight None, given as `y`."""

    @staticmethod
    def forward(ctx, x, y, weight, bias, delta, part, transposed):
        ctx.part, ctx.transposed, ctx.scope = part, transposed, Scope.captured()
        out = output_to_write_on(x, y, weight, bias)
        d = (delta.t() if transposed else delta).to(x.dtype)
        kept = add_delta_(out, x, d, part)
        ctx.save_for_backward(kept if ctx.needs_input_grad[4] else None, weight if ctx.needs_input_grad[0] else None, delta)
        ctx.features = x.shape[1]
        return out

    @staticmethod
    def backward(ctx, dy):
        if _twice.asked(dy):
            return _twice.delta(ctx, dy)
        return Scope.run(ctx.scope, _delta_backward, ctx, dy)


def add_delta_(y, x, delta, part):
    """y += x deltaᵀ on the part, in place; delta [N, C] or [R, K] of x's dtype. Returns what a gradient of it needs of x."""
    few = x.shape[0] <= _FEW_TOKENS and x.device.type == "cpu"
    if part.kind == "columns":
        x = x.index_select(1, part.index) if few else gather_columns(x, part.index)
        y.addmm_(x, delta.t())
    elif few:
        y.index_add_(1, part.index, x @ delta.t())
    else:
        scatter_add_columns_(y, part.index, x @ delta.t())
    return x


def _delta_backward(ctx, dy):
    kept, weight, delta = ctx.saved_tensors
    need_x, need_y, _, need_bias, need_delta = ctx.needs_input_grad[:5]
    dy, part = dy.contiguous(), ctx.part
    d = (delta.t() if ctx.transposed else delta).to(dy.dtype)
    dx = None
    if need_x:
        dx = dy.new_zeros(dy.shape[0], ctx.features) if weight is None else dy @ weight
    ddelta = None
    if part.kind == "columns":
        if need_x:
            scatter_add_columns_(dx, part.index, dy @ d)
        left = dy
    else:
        left = gather_columns(dy, part.index)
        if need_x:
            dx.addmm_(left, d)
    if need_delta:
        ddelta = product(kept.t(), left, delta.dtype) if ctx.transposed else product(left.t(), kept, delta.dtype)
    return dx, dy if need_y else None, None, dy.sum(0) if need_bias else None, ddelta, None, None


def partial_linear(
    x,
    weight,
    bias=None,
    parts: Part | Sequence[Part] = (),
    trained=(),
    *,
    observers: Sequence[Callable | None] = (),
    fan_in_fan_out: bool = False,
):
    """``x Wᵀ + bias``, of whose weight the `parts` train: the values that train stand in `weight`, and only there.

    Args:
        x: [..., K], any strides. Under autocast it is cast to the autocast dtype, as `F.linear` does.
        weight: [N, K] of x's dtype; [K, N] with `fan_in_fan_out` (GPT-2's Conv1D). Its own `requires_grad` counts too.
        bias: [N] or None.
        parts, trained: one part or several, and as many tensors of shape ``part.shape(weight)``, oriented as the weight,
            float32 or x's dtype. They are not read; their gradients are those of the part of W.
        observers: called in backward with (left, right), whose leftᵀ right is the gradient of the stored weight; x is kept
            for them.

    Returns:
        [..., N] in x's dtype (the autocast dtype under autocast). Kept for backward: [T, C] a part of columns, x (by
        reference) for rows, entries and all, nothing for nothing and for what needs no gradient.

    Raises:
        ValueError: shapes that do not fit. TypeError: dtypes.
    """
    parts, trained = _listed(parts, trained)
    x, weight, bias = _autocast(x, weight, bias, wide=())
    _check(x, weight, parts, trained, fan_in_fan_out)
    logical = weight.t() if fan_in_fan_out else weight
    if not parts or not (torch.is_grad_enabled() or forward_mode()):
        return F.linear(x, logical, bias)
    y = _PartialNode.apply(_rows(x), logical, bias, parts, tuple(observers), fan_in_fan_out, *trained)
    return y.view(*x.shape[:-1], logical.shape[0])


def delta_linear(x, weight, bias, part: Part, delta, *, fan_in_fan_out: bool = False):
    """``x (W + delta)ᵀ + bias`` with the delta of a part (rows or columns) beside an untouched weight.

    Args and errors as `partial_linear`; delta has the part's shape and float32 or x's dtype, and gets a gradient.
    """
    x, weight, bias = _autocast(x, weight, bias, wide=())
    _check(x, weight, (part,), (delta,), fan_in_fan_out)
    _check_slice(part)
    logical = weight.t() if fan_in_fan_out else weight
    # Decoding: a node that keeps nothing costs as much as the product of one token.
    if not torch.is_grad_enabled() and not forward_mode():
        rows = _rows(x)
        y = F.linear(rows, logical, bias)
        add_delta_(y, rows, (delta.t() if fan_in_fan_out else delta).to(x.dtype), part)
        return y.view(*x.shape[:-1], logical.shape[0])
    y = _DeltaNode.apply(_rows(x), None, logical, bias, delta, part, fan_in_fan_out)
    return y.view(*x.shape[:-1], logical.shape[0])


def delta_update(y, x, part: Part, delta, *, fan_in_fan_out: bool = False):
    """``y + x deltaᵀ`` on the part, for the output y [..., N] of any base layer on x [..., K] (quantised weights, or a
    second adapter). Args and errors as `delta_linear`."""
    y, x = _autocast(y, x, wide=())
    check_dtype(x)
    _check_slice(part)
    n, k = y.shape[-1], x.shape[-1]
    shape = part.shape(torch.empty((k, n) if fan_in_fan_out else (n, k), device="meta"), fan_in_fan_out)
    if y.shape[:-1] != x.shape[:-1] or y.dtype != x.dtype or tuple(delta.shape) != shape:
        raise ValueError(
            f"y {list(y.shape)} {y.dtype} and delta {list(delta.shape)} do not fit x {list(x.shape)} {x.dtype}: they must "
            f"share dtype and leading dimensions, and delta must be {list(shape)}"
        )
    return _DeltaNode.apply(_rows(x), _rows(y), None, None, delta, part, fan_in_fan_out).view(y.shape)


def _listed(parts, trained):
    if isinstance(parts, Part):
        return (parts,), (trained,)
    return tuple(parts), tuple(trained)


def _check_slice(part):
    if part.kind not in ("rows", "columns"):
        raise ValueError(f"a delta beside the weight is of rows or columns, not of {part.kind}")


def _check(x, weight, parts, trained, fan_in_fan_out):
    check_dtype(x)
    k = weight.shape[0 if fan_in_fan_out else 1]
    if not x.dim() or x.shape[-1] != k:
        raise ValueError(f"x {list(x.shape)} does not fit a weight of {k} in-features")
    if x.dtype != weight.dtype:
        raise TypeError(f"x is {x.dtype}, the weight {weight.dtype}; they must be of one dtype")
    if len(parts) != len(trained):
        raise ValueError(f"{len(parts)} parts and {len(trained)} trained tensors; one each is needed")
    for part, t in zip(parts, trained):
        shape = part.shape(weight, fan_in_fan_out)
        if part.kind == "entries" and tuple(part.index.shape) != tuple(weight.shape):
            raise ValueError(f"entries of a weight {list(part.index.shape)} are not those of a weight {list(weight.shape)}")
        if tuple(t.shape) != shape:
            raise ValueError(f"a part of {part.kind} of weight {list(weight.shape)} is {list(shape)}, not {list(t.shape)}")
        if t.dtype not in (torch.promote_types(weight.dtype, torch.float32), weight.dtype):
            raise TypeError(f"the trained tensor is {t.dtype} on a {weight.dtype} weight; use that or float32")
