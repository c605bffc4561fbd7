"""LoRA and DoRA layers as differentiable functions: one adapted linear, or several on one input.

`SharedInput` reads x once for the A's of all adapters on it; each `project` is one vendor GEMM and one pass of
`lora_expand_` over its output. Every projection hands on an alias of x, so that in backward one node after the other
adds its dY W to the same dX in place; the shrink node, last, adds the low-rank part of them all. Left to itself, autograd
would sum the dX of the projections in passes of their own.

Saved for backward: x once, S (float32, 4·R bytes a token) and the packed dropout mask (K/8 bytes a token) per adapter;
with A frozen no x; with DoRA also the output before the magnitude, because the magnitude's gradient sums over it.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .dora import dora_expand_, dora_grad_y
from .lora import lora_expand_, lora_grad_a, lora_grad_sb, lora_grad_x_, lora_shrink
from .registry import Scope, without_autocast


class _Shrink(torch.autograd.Function):
    """x [T, K] -> an alias of x, and S_g [T, R_g] for every adapter."""

    @staticmethod
    def forward(ctx, x, p, seed, *factors):
        ctx.ranks, ctx.p, ctx.scope = [a.shape[0] for a in factors], p, Scope.captured()
        ctx.set_materialize_grads(False)
        s, mask = lora_shrink(x, _stack(factors), ctx.ranks, p, seed)
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None, mask, *factors)
        ctx.like = (x.shape, x.dtype)
        return x, *(s.unsafe_split_with_sizes(ctx.ranks, 1) if len(factors) > 1 else (s,))

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, *ds):
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
    da = lora_grad_a(ds, x, a, ctx.ranks, mask, ctx.p).split(ctx.ranks) if any(need_a) else ()
    if need_x:
        if dx is None:
            dx = torch.zeros(ctx.like[0], dtype=ctx.like[1], device=ds.device)
        lora_grad_x_(dx, ds, a, ctx.ranks, mask, ctx.p)
    return dx if need_x else None, None, None, *(da[g] if need else None for g, need in enumerate(need_a))


class _Expand(torch.autograd.Function):
    """x Wᵀ + bias + scale · S Bᵀ, and the alias of x for the next projection if `hand_on`."""

    @staticmethod
    def forward(ctx, x, s, weight, bias, b, scale, base, hand_on):
        # .data: what autograd knows as a view can't be changed in place later on.
        y = F.linear(x, weight, bias) if base is None else base[0].data
        lora_expand_(y, s, b, scale)
        ctx.scale, ctx.scope = scale, Scope.captured()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight, s, b)
        return (y, x) if hand_on else y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dx=None):
        return Scope.run(ctx.scope, _expand_backward, ctx, dy, dx)


def _expand_backward(ctx, dy, dx):
    x, weight, s, b = ctx.saved_tensors
    need_x, need_s, need_w, need_bias, need_b = ctx.needs_input_grad[:5]
    if dy is None:
        return dx, *(None for _ in range(7))
    dy = dy.contiguous()
    dx, dw = _base_backward(dy, dx, x, weight, need_x, need_w)
    ds, db = lora_grad_sb(dy, s, b, ctx.scale) if need_s or need_b else (None, None)
    return dx, ds, dw, dy.sum(0) if need_bias else None, db if need_b else None, None, None, None


def _base_backward(dy, dx, x, weight, need_x, need_w):
    """dX, added to what later projections of the same x left there, and dW."""
    if need_x:
        dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
    return dx, dy.t() @ x if need_w else None


class _ExpandDora(torch.autograd.Function):
    """g ∘ (x Wᵀ + scale · S Bᵀ) + bias with g = magnitude / norm, and the alias of x if `hand_on`."""

    @staticmethod
    def forward(ctx, x, s, weight, bias, b, magnitude, norm, scale, base, hand_on):
        u = F.linear(x, weight) if base is None else base[0]
        # A row of zeros stays 0 whatever its magnitude, where m / 0 · 0 would be NaN.
        inverse = torch.where(norm > 0, norm.clamp_min(torch.finfo(norm.dtype).tiny).reciprocal(), 0.0)
        g = magnitude.to(norm.dtype) * inverse
        y = dora_expand_(u, s, b, g, bias, scale)
        ctx.scale, ctx.scope = scale, Scope.captured()
        ctx.set_materialize_grads(False)
        need_w, need_m = ctx.needs_input_grad[2], ctx.needs_input_grad[5]
        ctx.save_for_backward(x if need_w else None, weight, s, b, g, inverse, u if need_m else None)
        ctx.magnitude_dtype = magnitude.dtype
        return (y, x) if hand_on else y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dx=None):
        return Scope.run(ctx.scope, _dora_backward, ctx, dy, dx)


def _dora_backward(ctx, dy, dx):
    x, weight, s, b, g, inverse, u = ctx.saved_tensors
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


class _LoRALinear(torch.autograd.Function):
    """`_Shrink` and `_Expand` of a single plain adapter as one node: half the Python, which a GEMM has pushed out of the
    caches each time (measured: 1.070 of the floor against 1.078, bfloat16, 1024 tokens, 2048 x 2048)."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale, p, seed):
        y = F.linear(x, weight, bias)
        s, mask = lora_shrink(x, a, [a.shape[0]], p, seed)
        lora_expand_(y, s, b, scale)
        ctx.scale, ctx.p, ctx.scope = scale, p, Scope.captured()
        ctx.save_for_backward(x if ctx.needs_input_grad[3] or ctx.needs_input_grad[1] else None, weight, a, b, s, mask)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return Scope.run(ctx.scope, _linear_backward, ctx, dy)


def _linear_backward(ctx, dy):
    x, weight, a, b, s, mask = ctx.saved_tensors
    need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
    dy, ranks = dy.contiguous(), [a.shape[0]]
    dx, dw = _base_backward(dy, None, x, weight, need_x, need_w)
    da = db = None
    if need_a or need_b or need_x:
        ds, db = lora_grad_sb(dy, s, b, ctx.scale)
        if need_a:
            da = lora_grad_a(ds, x, a, ranks, mask, ctx.p)
        if need_x:
            lora_grad_x_(dx, ds, a, ranks, mask, ctx.p)
    return dx, dw, dy.sum(0) if need_bias else None, da, db if need_b else None, None, None, None


class _Update(torch.autograd.Function):
    """y + bias + scale · S Bᵀ for a y that something else computed."""

    @staticmethod
    def forward(ctx, y, s, bias, b, scale):
        out = y.clone(memory_format=torch.contiguous_format) if bias is None else (y + bias).contiguous()
        lora_expand_(out, s, b, scale)
        ctx.scale, ctx.scope = scale, Scope.captured()
        ctx.save_for_backward(s, b)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return Scope.run(ctx.scope, _update_backward, ctx, dy)


def _update_backward(ctx, dy):
    s, b = ctx.saved_tensors
    need_y, need_s, need_bias, need_b = ctx.needs_input_grad[:4]
    dy = dy.contiguous()
    ds, db = lora_grad_sb(dy, s, b, ctx.scale) if need_s or need_b else (None, None)
    return dy if need_y else None, ds, dy.sum(0) if need_bias else None, db if need_b else None, None


class SharedInput:
    """One input x [..., K] of several adapters: S of each of them from one read of x.

    Args:
        x: any strides. Under autocast it is cast to the autocast dtype, as `F.linear` does.
        factors: the adapters' A [R_g, K], each of x's dtype or float32, in which case it is never rounded and its gradient
            is that of float32 arithmetic.
        p: dropout probability of the low-rank paths' input; every adapter draws a mask of its own from PyTorch's generator
            of x's device.

    `project` and `update` take each adapter at most once, in any order, and not all need to be taken.

    Raises:
        ValueError: shapes that do not fit, or p outside [0, 1]. TypeError: dtypes. RuntimeError: devices.
    """

    def __init__(self, x, factors, p=0.0):
        x, *factors = _autocast(x, *factors)
        _check_input(x, factors, p)
        self.lead, self.left = x.shape[:-1], len(factors)
        rows, factors = _rows(x), [a.contiguous() for a in factors]
        # On x's device, so that drawing it neither synchronises nor freezes the mask in a CUDA graph.
        seed = torch.randint(2**62, (len(factors),), device=x.device) if p > 0 else None
        alias, *self.s = _Shrink.apply(rows, float(p), seed, *factors)
        self.x = alias if rows.requires_grad else rows  # the alias requires a gradient as soon as an A does
        self.dtypes = [a.dtype for a in factors]

    def project(
        self,
        i,
        weight,
        bias,
        lora_B,
        scale=1.0,
        *,
        lora_bias=None,
        middle=None,
        magnitude=None,
        weight_norm=None,
        base=None,
    ):
        """``x Wᵀ + bias + scale · (middle(S_i) Bᵀ + lora_bias)`` [..., N], of adapter i; arguments as in `lora_linear`.

        base: x Wᵀ + bias [T, N] (x Wᵀ with a magnitude) where it is known already, as the columns of a packed GEMM; rows
            may lie apart. It is overwritten and becomes the result.
        """
        weight, bias, lora_B, lora_bias = _autocast(weight, bias, lora_B, lora_bias, wide=(2, 3))
        s = self._s(i, middle)
        _check_output(self, i, s, weight.shape, lora_B)
        _check_options(self, weight.shape[0], bias, lora_bias, magnitude, weight_norm, base)
        if weight.dtype != self.x.dtype:
            raise TypeError(
                f"lora_linear: x is {self.x.dtype} but weight is {weight.dtype}; cast one, or use torch.autocast"
            )
        if lora_bias is not None:
            bias = _with_lora_bias(bias, lora_bias, scale, weight.dtype)
        self.left, lora_B = self.left - 1, lora_B.contiguous()
        # Dynamo (torch 2.13) takes the alias for an in-place change of x; compiled, autograd adds the dX of the projections.
        hand_on = self.left > 0 and self.x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        tail = float(scale), None if base is None else (base,), hand_on
        if magnitude is None:
            y = _Expand.apply(self.x, s, weight, bias, lora_B, *tail)
        else:
            y = _ExpandDora.apply(self.x, s, weight, bias, lora_B, magnitude, weight_norm, *tail)
        if hand_on:
            y, self.x = y
        # Reshaped out here: what an autograd.Function returns as a view can't be changed in place (nn.ReLU(inplace=True)).
        return y.view(*self.lead, weight.shape[0])

    def update(self, i, y, lora_B, scale=1.0, *, lora_bias=None, middle=None):
        """``y + scale · (middle(S_i) Bᵀ + lora_bias)`` for the output y [..., N] of any base layer on x."""
        y, lora_B, lora_bias = _autocast(y, lora_B, lora_bias, wide=(1, 2))
        s = self._s(i, middle)
        _check_output(self, i, s, (y.shape[-1], self.x.shape[-1]), lora_B)
        _check_options(self, y.shape[-1], None, lora_bias)
        if y.dtype != self.x.dtype or y.shape[:-1] != self.lead:
            raise ValueError(
                f"lora_update: y is {y.dtype}{list(y.shape)} and x {self.x.dtype}{[*self.lead, self.x.shape[-1]]}; "
                "they must share dtype and leading dimensions"
            )
        bias = None if lora_bias is None else _with_lora_bias(None, lora_bias, scale, y.dtype)
        return _Update.apply(_rows(y), s, bias, lora_B.contiguous(), float(scale)).view(y.shape)

    def _s(self, i, middle):
        if middle is None:
            return self.s[i]
        with without_autocast(self.x.device.type):
            s = middle(self.s[i])
        if s.dtype != self.s[i].dtype or s.dim() != 2 or s.shape[0] != self.s[i].shape[0]:
            raise ValueError(
                f"middle turned S, {self.s[i].dtype}{list(self.s[i].shape)}, into {s.dtype}{list(s.shape)}; it must "
                "return [T, R'] of the same dtype"
            )
        return s.contiguous()


def lora_linear(
    x,
    weight,
    bias,
    lora_A,
    lora_B,
    scale=1.0,
    p=0.0,
    *,
    fan_in_fan_out=False,
    lora_bias=None,
    middle=None,
    magnitude=None,
    weight_norm=None,
):
    """``x Wᵀ + bias + scale · dropout(x, p) Aᵀ Bᵀ``, differentiable once in every tensor that requires a gradient.

    Args:
        x: [..., K], any strides. Under autocast it is cast to the autocast dtype, as `F.linear` does.
        weight: [N, K] of x's dtype; [K, N] with `fan_in_fan_out` (GPT-2's Conv1D).
        bias: [N] or None.
        lora_A: [R, K], lora_B: [N, R]: both of x's dtype or both float32, in which case they are never rounded and
            their gradients are those of float32 arithmetic. What is frozen costs no gradient; a frozen A keeps no x.
        scale: factor of the low-rank term (alpha / r; alpha / sqrt(r) for rsLoRA).
        p: dropout probability of the low-rank path's input; 0 in evaluation. The mask's seed comes from PyTorch's
            generator of x's device.
        lora_bias: [N], trained with B (PEFT's ``lora_bias``): adds scale · lora_bias.
        middle: a differentiable function of S = drop(x) Aᵀ [T, R] (float32) that stands between A and B: a diagonal, a
            dense matrix, an activation, a scale per token of every rank block. Then lora_B is [N, R'] of what it returns.
        magnitude, weight_norm: DoRA (Liu et al. 2024): magnitude [N] trained, weight_norm [N] = ‖W + scale B A‖ of the
            rows, a constant (`ops.dora.dora_norm`). The result before the bias is multiplied by magnitude / weight_norm.
            Dropout acts on the low-rank term alone, as without a magnitude.

    Returns:
        [..., N] in x's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: shapes that do not fit, or p outside [0, 1]. TypeError: dtypes. RuntimeError: devices.
    """
    weight = weight.t() if fan_in_fan_out else weight
    if lora_bias is None and middle is None and magnitude is None and weight_norm is None:
        y = _plain_linear(x, weight, bias, lora_A, lora_B, scale, p)
        if y is not None:
            return y
    options = {"lora_bias": lora_bias, "middle": middle, "magnitude": magnitude, "weight_norm": weight_norm}
    return SharedInput(x, [lora_A], p).project(0, weight, bias, lora_B, scale, **options)


def _plain_linear(x, weight, bias, a, b, scale, p):
    """`lora_linear` without options as one node; None for what does not fit, which `SharedInput` refuses in words."""
    x, weight, bias, a, b = _autocast(x, weight, bias, a, b, wide=(3, 4))
    if not x.dim() or not weight.dim() == a.dim() == b.dim() == 2:
        return None
    (n, k), r = weight.shape, a.shape[0]
    fits = (
        (x.shape[-1], a.shape[1], b.shape, x.dtype, a.dtype) == (k, k, (n, r), weight.dtype, b.dtype)
        and (a.dtype == x.dtype or a.dtype == torch.float32)
        and x.device == weight.device == a.device == b.device
        and (bias is None or bias.shape == (n,))
        and 0.0 <= p <= 1.0
    )
    if not fits:
        return None
    seed = torch.randint(2**62, (1,), device=x.device) if p > 0 else None
    y = _LoRALinear.apply(_rows(x), weight, bias, a.contiguous(), b.contiguous(), float(scale), float(p), seed)
    return y.view(*x.shape[:-1], n)


def lora_update(y, x, lora_A, lora_B, scale=1.0, p=0.0, *, lora_bias=None, middle=None):
    """``y + scale · dropout(x, p) Aᵀ Bᵀ`` for the output y [..., N] of any base layer on x [..., K].

    For bases that compute themselves (quantised weights) and for the second and further adapters of a layer;
    `lora_linear` saves a pass over y and dX where the base is a plain weight. Arguments and errors as there.
    """
    return SharedInput(x, [lora_A], p).update(0, y, lora_B, scale, lora_bias=lora_bias, middle=middle)


def _rows(t):
    """t [..., F] as a contiguous [T, F]; a view where the layout allows."""
    features = t.shape[-1]
    return t.reshape(t.numel() // features if features else t.shape[:-1].numel(), features).contiguous()


def _with_lora_bias(bias, lora_bias, scale, dtype):
    extra = scale * lora_bias
    return (extra if bias is None else bias + extra).to(dtype)


def _autocast(first, *others, wide=None):
    """What autocast does to `F.linear`: everything 16-bit, except float32 adapters, which kernels read as they are.

    wide: the positions that may stay float32; by default all but the first.
    """
    tensors, kind = (first, *others), first.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype, out = torch.get_autocast_dtype(kind), []
    for i, t in enumerate(tensors):
        keeps = t is None or not t.is_floating_point() or t.dtype == torch.float64
        stays = t is not None and t.dtype == torch.float32 and (i > 0 if wide is None else i in wide)
        out.append(t if keeps or stays else t.to(dtype))
    return tuple(out)


def _check_input(x, factors, p):
    for a in factors:
        if x.dim() == 0 or a.dim() != 2 or x.shape[-1] != a.shape[1]:
            want = a.shape[1] if a.dim() == 2 else "K"
            raise ValueError(
                f"shapes do not fit: x {list(x.shape)} (want [..., {want}]), lora_A {list(a.shape)} (want [R, K])"
            )
        if a.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"lora_A is {a.dtype} on {x.dtype} activations; it must be {x.dtype} or torch.float32")
        if a.device != x.device:
            raise RuntimeError(f"x is on {x.device}, lora_A on {a.device}; move them to one device")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout p is {p}; it must lie in [0, 1]")


def _check_output(shared, i, s, weight_shape, b):
    n, k = weight_shape
    if k != shared.x.shape[1] or b.shape != (n, s.shape[1]):
        raise ValueError(
            f"shapes do not fit: x {[*shared.lead, shared.x.shape[1]]} (want [..., {k}]), lora_B {list(b.shape)} (want "
            f"[{n}, {s.shape[1]}]) for a layer of {k} in- and {n} out-features and rank {s.shape[1]}"
        )
    if b.dtype != shared.dtypes[i]:
        raise TypeError(
            f"lora_A is {shared.dtypes[i]} and lora_B {b.dtype} on {shared.x.dtype} activations; "
            f"both must be {shared.x.dtype} or both torch.float32"
        )
    if b.device != shared.x.device:
        raise RuntimeError(f"x is on {shared.x.device}, lora_B on {b.device}; move them to one device")


def _check_options(shared, n, bias, lora_bias, magnitude=None, weight_norm=None, base=None):
    vectors = {"bias": bias, "lora_bias": lora_bias, "magnitude": magnitude, "weight_norm": weight_norm}
    for name, t in vectors.items():
        if t is not None and t.shape != (n,):
            raise ValueError(f"{name} is {list(t.shape)}, must be [{n}], one number for each out-feature")
    if (magnitude is None) != (weight_norm is None):
        raise ValueError("magnitude and weight_norm belong together: give both or neither (`ops.dora.dora_norm`)")
    if base is not None and (base.shape != (shared.x.shape[0], n) or base.dtype != shared.x.dtype or base.requires_grad):
        raise ValueError(
            f"base is {base.dtype}{list(base.shape)}{' with a gradient' if base.requires_grad else ''}, must be "
            f"{shared.x.dtype}{[shared.x.shape[0], n]} without one: the gradients of x Wᵀ are the projection's own"
        )
