"""Backward passes of `_lora_nodes`, `sparse_linear` and `partial_linear` that are differentiated themselves
(``create_graph=True``: gradient penalties, products with the Hessian), or that take many gradients at once
(``is_grads_batched=True``, vectorised Jacobians).

The kernels compute one backward, without a graph. Where more is asked for, a node's formula is computed again by PyTorch's
ops from what the node saved, and autograd differentiates that. What it only adds is not saved: zeros stand in for it.
"""

import torch
import torch.nn.functional as F

from .lora import accumulator, dropped, term
from .registry import without_autocast


def asked(*dys) -> bool:
    """Is this backward one of those?"""
    if torch.compiler.is_compiling():  # compiled graphs are differentiated once
        return False
    if torch.is_grad_enabled():
        return True
    # Of the tensors of either vmap (`torch.func`'s, and the older one, which `is_grads_batched` uses) none has a storage.
    return any(dy is not None and not torch._C._has_storage(dy) for dy in dys)


def shrink(ctx, dx, ds):
    x, mask, *factors = ctx.saved_tensors
    shape, dtype = ctx.like

    def formula(x, *factors):
        wide = accumulator(x, *factors)
        inputs = dropped(x, mask, ctx.p, wide)
        inputs = inputs if len(inputs) == len(factors) else inputs * len(factors)
        return x, *(kept @ a.to(wide).t() for kept, a in zip(inputs, factors))

    need_x, _, _, *need_factors = ctx.needs_input_grad
    x = factors[0].new_zeros(shape, dtype=dtype) if x is None else x
    dx, *da = _gradients(formula, (x, *factors), (need_x, *need_factors), (dx, *ds))
    return dx, None, None, *da


def expand(ctx, dy, dx):
    x, weight, s, b = ctx.saved_tensors
    x = weight.new_zeros(s.shape[0], weight.shape[1]) if x is None else x

    def formula(x, s, weight, bias, b):
        return _plus(F.linear(x, weight, bias), s, b, ctx.scale), x

    inputs = x, s, weight, weight.new_zeros(weight.shape[0]), b
    return *_gradients(formula, inputs, ctx.needs_input_grad[:5], (dy, dx)), None, None, None


def expand_dora(ctx, dy, dx):
    x, weight, s, b, _, inverse, _, magnitude = ctx.saved_tensors
    x = weight.new_zeros(s.shape[0], weight.shape[1]) if x is None else x

    def formula(x, s, weight, bias, b, magnitude):
        u = F.linear(x, weight).to(s.dtype) + term(s, b, ctx.scale)
        return ((magnitude.to(inverse.dtype) * inverse) * u + bias.to(u.dtype)).to(x.dtype), x

    inputs = x, s, weight, weight.new_zeros(weight.shape[0]), b, magnitude
    return *_gradients(formula, inputs, ctx.needs_input_grad[:6], (dy, dx)), None, None, None, None


def linear(ctx, dy):
    x, weight, a, b, _, mask = ctx.saved_tensors
    if x is None and ctx.needs_input_grad[4]:
        raise RuntimeError(
            "lora_A is frozen and lora_B trains, so that no x was kept: this backward can't be differentiated in turn "
            "(create_graph=True) nor take several gradients at once (is_grads_batched=True). Let lora_A require one too"
        )
    x = weight.new_zeros(*dy.shape[:-1], weight.shape[1]) if x is None else x

    def formula(x, weight, bias, a, b):
        rows = x.reshape(-1, x.shape[-1])
        wide = accumulator(x, a)
        s = dropped(rows, mask, ctx.p, wide)[0] @ a.to(wide).t()
        return (_plus(F.linear(rows, weight, bias), s, b, ctx.scale).view(dy.shape),)

    inputs = x, weight, weight.new_zeros(weight.shape[0]), a, b
    return *_gradients(formula, inputs, ctx.needs_input_grad[:5], (dy,)), None, None, None


def update(ctx, dy):
    s, b = ctx.saved_tensors

    def formula(y, s, bias, b):
        return (_plus(y + bias.to(y.dtype), s, b, ctx.scale),)

    y = torch.zeros(dy.shape, dtype=dy.dtype, device=dy.device)
    inputs = y, s, y.new_zeros(y.shape[1], dtype=ctx.bias_dtype), b
    return *_gradients(formula, inputs, ctx.needs_input_grad[:4], (dy,)), None


def sparse(ctx, dy):
    """The delta is dense here."""
    x, weight, delta = ctx.saved_tensors
    (entries, order), (n, k) = ctx.ways.forth, ctx.ways.forth[0].shape
    if ctx.observer is not None:
        ctx.observer(*(t.detach() for t in ((x, dy) if ctx.ways.transposed else (dy, x))))
    y = torch.zeros(dy.shape, dtype=dy.dtype, device=dy.device)
    x = y.new_zeros(len(y), k) if x is None else x
    weight = y.new_zeros(n, k) if weight is None else weight

    def formula(x, y, weight, bias, delta):
        base = y if ctx.beside else F.linear(x, weight, bias)
        values = delta if order is None else delta[order]
        dense = values.new_zeros(n * k).index_put((entries.flat(),), values).view(n, k)
        return ((base.to(delta.dtype) + x.to(delta.dtype) @ dense.t()).to(base.dtype),)

    inputs = x, y, weight, weight.new_zeros(n), delta
    return *_gradients(formula, inputs, ctx.needs_input_grad[:5], (dy,)), None, None


def partial(ctx, dy):
    """The trained tensors stand in the weight, which the formula is told by adding what is 0 and has their gradient."""
    x, weight, *copies = ctx.saved_tensors
    need_x, need_weight, need_bias, _, _, _, *needed = ctx.needs_input_grad
    for observer in filter(None, ctx.observers):
        observer(*(t.detach() for t in ((x, dy) if ctx.transposed else (dy, x))))
    if x is None:
        columns = [(part.index, copy) for part, copy in zip(ctx.parts, copies) if copy is not None]
        x = _with_columns(dy, ctx.features, columns, need_x)
    weight = x.new_zeros(dy.shape[1], x.shape[1]) if weight is None else weight

    def formula(x, weight, bias, *trained):
        for part, t in zip(ctx.parts, trained):
            weight = _plus_part(weight, part, t - t.detach(), ctx.transposed)
        return (F.linear(x, weight, bias),)

    inputs = x, weight, weight.new_zeros(weight.shape[0]), *ctx.trained
    dx, dw, dbias, *found = _gradients(formula, inputs, (need_x, need_weight, need_bias, *needed), (dy,))
    return dx, dw, dbias, None, None, None, *found


def delta(ctx, dy):
    kept, weight, delta = ctx.saved_tensors
    need_x, need_y, _, need_bias, need_delta = ctx.needs_input_grad[:5]
    x = kept
    if kept is None or ctx.part.kind == "columns":
        x = _with_columns(dy, ctx.features, [(ctx.part.index, kept)] if need_delta else [], need_x)
    y = torch.zeros(dy.shape, dtype=dy.dtype, device=dy.device)
    weight = x.new_zeros(dy.shape[1], ctx.features) if weight is None else weight

    def formula(x, y, bias, delta):
        w = _plus_part(weight, ctx.part, delta, ctx.transposed)
        return (F.linear(x, w, bias) + y,)

    inputs = x, y, weight.new_zeros(weight.shape[0]), delta
    dx, dy, dbias, ddelta = _gradients(formula, inputs, (need_x, need_y, need_bias, need_delta), (dy,))
    return dx, dy, None, dbias, ddelta, None, None


def _with_columns(dy, features, columns, need_x):
    """x of which only these [(index, columns)] were kept; zeros stand in where no gradient depends on it."""
    if columns and need_x and torch.is_grad_enabled():  # what depends on x would be cut off from it
        raise RuntimeError(
            "columns of the weight train, so that of x only those columns were kept: where x requires a gradient, too, this "
            "backward can't be differentiated in turn (create_graph=True). Let rows or single entries train, which keep all "
            "of x, or detach the layer's input"
        )
    x = torch.zeros(dy.shape[0], features, dtype=dy.dtype, device=dy.device)
    for index, values in columns:
        x = x.index_copy(1, index.long(), values)
    return x


def _plus_part(weight, part, change, transposed):
    """The weight [N, K] with `change` (oriented as the stored weight) added to its part."""
    stored, change = weight.t() if transposed else weight, change.to(weight.dtype)
    if part.kind == "entries":
        stored = stored.flatten().index_add(0, part.index.flat(), change).view(stored.shape)
    elif part.kind in ("rows", "columns"):
        stored = stored.index_add(part.dim(transposed), part.index, change)
    else:
        stored = stored + (change if part.kind == "all" else change.sum())
    return stored.t() if transposed else stored


def _plus(y, s, b, scale):
    return (y.to(s.dtype) + term(s, b, scale)).to(y.dtype)


def _gradients(formula, inputs, needed, grad_outputs):
    """Of ``formula(*inputs)``, for the inputs that need one; with a graph of their own if gradients are enabled."""
    graph = torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast(inputs[0].device.type):
        # Aliases, so that a path from one input to another (an A that was made of x) is not taken for the node's own.
        inputs = [
            t if not need else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t, need in zip(inputs, needed)
        ]
        pairs = [(y, dy) for y, dy in zip(formula(*inputs), grad_outputs, strict=True) if dy is not None and y.requires_grad]
        if not pairs:
            return [None] * len(needed)
        wanted = [t for t, need in zip(inputs, needed) if need]
        outputs, dys = zip(*pairs)
        found = iter(torch.autograd.grad(outputs, wanted, dys, create_graph=graph, allow_unused=True))
    return [next(found) if need else None for need in needed]
