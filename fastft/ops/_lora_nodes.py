"""The autograd nodes under `lora_linear`: what each saves, and what backward computes of it.

Rows x [T, K] only, but for `LoRALinearNode`: views of its input and output would be nodes of their own. Backward passes that
are differentiated in turn are in `_twice`. A node's tensors are of one device and at most two dtypes, the activations' and
the adapter's, so that it asks the registry once (3 us, and more with cold caches).
"""

import torch
import torch.nn.functional as F

from . import _twice
from ._written import announced, to_write_on
from .dora import dora_expand_, dora_grad_y, inverse_norm
from .lora import lora_expand_, lora_grad_a, lora_grad_sb, lora_grad_x_, lora_shrink
from .registry import Scope, signature_of


class ShrinkNode(torch.autograd.Function):
    """x [T, K] -> an alias of x, and S_g [T, R_g] for every adapter."""

    @staticmethod
    def forward(ctx, *inputs):  # (inputs named beside *factors Dynamo takes for ctx where as many names are given)
        x, p, seed, *factors = inputs
        ctx.ranks, ctx.p, ctx.scope = [a.shape[0] for a in factors], p, Scope.captured()
        ctx.set_materialize_grads(False)
        s, mask = lora_shrink(x, _stack(factors), ctx.ranks, p, seed)
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None, mask, *factors)
        ctx.like = (x.shape, x.dtype)
        return x, *(s.unsafe_split_with_sizes(ctx.ranks, 1) if len(factors) > 1 else (s,))

    @staticmethod
    def backward(ctx, dx, *ds):
        if _twice.asked(dx, *ds):
            return _twice.shrink(ctx, dx, ds)
        return Scope.run(ctx.scope, _shrink_backward, ctx, dx, ds)


def _stack(factors):
    return factors[0] if len(factors) == 1 else torch.cat(factors)


def _shrink_backward(ctx, dx, ds):
    x, mask, *factors = ctx.saved_tensors
    need_x, need_a = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
    known = next((part for part in ds if part is not None), None)
    if known is None:  # nothing that was projected reached the loss
        return dx, None, None, *(None for _ in factors)
    # None where nothing was projected, not zeros, which an optimizer would take for a gradient.
    need_a = [need and part is not None for need, part in zip(need_a, ds)]
    ds = [part if part is not None else known.new_zeros(known.shape[0], r) for part, r in zip(ds, ctx.ranks)]
    ds, a = (ds[0] if len(ds) == 1 else torch.cat(ds, 1)).contiguous(), _stack(factors)
    if dx is None and need_x:
        dx = torch.zeros(ctx.like[0], dtype=ctx.like[1], device=ds.device)
    signature = signature_of((dx, ds, x, a))
    da = lora_grad_a.signed(signature, ds, x, a, ctx.ranks, mask, ctx.p).split(ctx.ranks) if any(need_a) else ()
    if need_x:
        lora_grad_x_.signed(signature, dx, ds, a, ctx.ranks, mask, ctx.p)
    return dx if need_x else None, None, None, *(da[g] if need else None for g, need in enumerate(need_a))


class ExpandNode(torch.autograd.Function):
    """x Wᵀ + bias + scale · S Bᵀ, and the alias of x for the next projection if `hand_on`."""

    @staticmethod
    def forward(ctx, x, s, weight, bias, b, scale, base, hand_on):
        # .data: what autograd knows as a view can't be changed in place later on.
        y = to_write_on(F.linear(x, weight, bias) if base is None else base[0].data)
        lora_expand_(y, s, b, scale)
        ctx.scale, ctx.scope = scale, Scope.captured()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight, s, b)
        return (y, x) if hand_on else y

    @staticmethod
    def backward(ctx, dy, dx=None):
        if _twice.asked(dy, dx):
            return _twice.expand(ctx, dy, dx)
        return Scope.run(ctx.scope, _expand_backward, ctx, dy, dx)


def _expand_backward(ctx, dy, dx):
    x, weight, s, b = ctx.saved_tensors
    need_x, need_s, need_w, need_bias, need_b = ctx.needs_input_grad[:5]
    if dy is None:
        return dx, *(None for _ in range(7))
    dy = dy.contiguous()
    ds, db = lora_grad_sb(dy, s, b, ctx.scale) if need_s or need_b else (None, None)
    dx, dw = _base_backward(dy, dx, x, weight, need_x, need_w)
    return dx, ds, dw, dy.sum(0) if need_bias else None, db if need_b else None, None, None, None


def _base_backward(dy, dx, x, weight, need_x, need_w):
    """dX, added to what later projections of the same x left there, and dW."""
    if need_x:
        dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
    return dx, dy.t() @ x if need_w else None


class ExpandDoraNode(torch.autograd.Function):
    """g ∘ (x Wᵀ + scale · S Bᵀ) + bias with g = magnitude / norm, and the alias of x if `hand_on`."""

    @staticmethod
    def forward(ctx, x, s, weight, bias, b, magnitude, norm, scale, base, hand_on):
        u = to_write_on(F.linear(x, weight) if base is None else base[0])
        inverse = inverse_norm(norm)
        g = magnitude.to(norm.dtype) * inverse
        y = dora_expand_(u, s, b, g, bias, scale)
        ctx.scale, ctx.scope = scale, Scope.captured()
        ctx.set_materialize_grads(False)
        need_w, need_m = ctx.needs_input_grad[2], ctx.needs_input_grad[5]
        # x for the magnitude's sake only where its backward is differentiated; the shrink node keeps it anyway if A trains.
        keep_x = need_w or need_m
        ctx.save_for_backward(x if keep_x else None, weight, s, b, g, inverse, u if need_m else None, magnitude)
        ctx.magnitude_dtype = magnitude.dtype
        return (y, x) if hand_on else y

    @staticmethod
    def backward(ctx, dy, dx=None):
        if _twice.asked(dy, dx):
            return _twice.expand_dora(ctx, dy, dx)
        return Scope.run(ctx.scope, _dora_backward, ctx, dy, dx)


def _dora_backward(ctx, dy, dx):
    x, weight, s, b, g, inverse, u, _ = ctx.saved_tensors
    need_x, need_s, need_w, need_bias, need_b, need_m = ctx.needs_input_grad[:6]
    if dy is None:
        return dx, *(None for _ in range(9))
    dy = dy.contiguous()
    ds = db = dw = dm = None
    if need_s or need_b:  # g goes into the small factors, so that their gradients see dY itself, not a rounded g ∘ dY
        column = g[:, None]
        ds, db = lora_grad_sb(dy, s, (column * b).to(b.dtype), ctx.scale)
        db = (column * db).to(b.dtype)
    if need_x or need_w or need_m:
        scaled, dots = dora_grad_y(dy, dy if u is None else u, g)
        dx, dw = _base_backward(scaled, dx, x, weight, need_x, need_w)
        dm = (dots * inverse).to(ctx.magnitude_dtype) if need_m else None
    dbias = dy.sum(0) if need_bias else None
    return dx, ds, dw, dbias, db if need_b else None, dm, None, None, None, None


class LoRALinearNode(torch.autograd.Function):
    """`ShrinkNode` and `ExpandNode` of a single plain adapter as one node: half the Python, which a GEMM has pushed out of
    the caches each time (measured: 1.070 of the floor against 1.078, bfloat16, 1024 tokens, 2048 x 2048).

    x [..., K] is contiguous.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale, p, seed):
        rows = x if x.dim() == 2 else x.view(-1, x.shape[-1])
        y, signature = to_write_on(F.linear(rows, weight, bias)), signature_of((x, weight, a, b))
        s, mask = lora_shrink.signed(signature, rows, a, [a.shape[0]], p, seed)
        lora_expand_.signed(signature, y, s, b, scale)
        ctx.scale, ctx.p, ctx.scope = scale, p, Scope.captured()
        ctx.save_for_backward(x if ctx.needs_input_grad[3] or ctx.needs_input_grad[1] else None, weight, a, b, s, mask)
        # .data: what autograd knows as a view can't be changed in place later on.
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1]).data

    @staticmethod
    def backward(ctx, dy):
        if _twice.asked(dy):
            return _twice.linear(ctx, dy)
        return Scope.run(ctx.scope, _linear_backward, ctx, dy)


def _linear_backward(ctx, dy):
    x, weight, a, b, s, mask = ctx.saved_tensors
    need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
    lead, ranks = dy.shape[:-1], [a.shape[0]]
    dy = dy.contiguous()
    if len(lead) != 1:
        dy, x = dy.view(-1, dy.shape[-1]), None if x is None else x.view(-1, x.shape[-1])
    da = db = None
    # dX last: what is added to it, and the layer before, find it in a cache (measured: 1.102 instead of 1.121 of the floor,
    # float32, 1024 tokens, 768 to 2048 features).
    signature = signature_of((dy, x, a, b))
    if need_a or need_b or need_x:
        ds, db = lora_grad_sb.signed(signature, dy, s, b, ctx.scale)
        if need_a:
            da = lora_grad_a.signed(signature, ds, x, a, ranks, mask, ctx.p)
    dx, dw = _base_backward(dy, None, x, weight, need_x, need_w)
    if need_x:
        lora_grad_x_.signed(signature, dx, ds, a, ranks, mask, ctx.p)
        if len(lead) != 1:
            dx = dx.view(*lead, dx.shape[1])
    return dx, dw, dy.sum(0) if need_bias else None, da, db if need_b else None, None, None, None


class UpdateNode(torch.autograd.Function):
    """y + bias + scale · S Bᵀ for a y that something else computed; the bias's gradient is summed in the bias's dtype."""

    @staticmethod
    def forward(ctx, y, s, bias, b, scale):
        out = y.clone(memory_format=torch.contiguous_format) if bias is None else (y + bias.to(y.dtype)).contiguous()
        lora_expand_(announced(out), s, b, scale)
        ctx.scale, ctx.scope, ctx.bias_dtype = scale, Scope.captured(), None if bias is None else bias.dtype
        ctx.save_for_backward(s, b)
        return out

    @staticmethod
    def backward(ctx, dy):
        if _twice.asked(dy):
            return _twice.update(ctx, dy)
        return Scope.run(ctx.scope, _update_backward, ctx, dy)


def _update_backward(ctx, dy):
    s, b = ctx.saved_tensors
    need_y, need_s, need_bias, need_b = ctx.needs_input_grad[:4]
    dy = dy.contiguous()
    ds, db = lora_grad_sb(dy, s, b, ctx.scale) if need_s or need_b else (None, None)
    dbias = dy.sum(0, dtype=ctx.bias_dtype) if need_bias else None
    return dy if need_y else None, ds, dbias, db if need_b else None, None
