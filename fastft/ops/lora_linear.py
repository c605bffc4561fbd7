"""LoRA and DoRA layers as differentiable functions: one adapted linear, or several on one input.

`SharedInput` reads x once for the A's of all adapters on it; each `project` is one vendor GEMM and one pass of
`lora_expand_` over its output. Every projection hands on an alias of x, so that in backward one node after the other
adds its dY W to the same dX in place; the shrink node, last, adds the low-rank part of them all. Left to itself, autograd
would sum the dX of the projections in passes of their own.

Saved for backward: x once, S (float32, 4·R bytes a token) and the packed dropout mask (K/8 bytes a token) per adapter;
with A frozen no x; with a magnitude that trains x, and the output before the magnitude, over which its gradient sums.
"""

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from ._lora_nodes import ExpandDoraNode, ExpandNode, LoRALinearNode, ShrinkNode, UpdateNode
from .dora import inverse_norm
from .lora import accumulator, term
from .registry import DTYPES, check_dtype, without_autocast


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
        self._plainly = transformed()
        if self._plainly:
            wide = accumulator(rows, *factors)
            self.x, self.s = rows, [F.dropout(rows.to(wide), p) @ a.to(wide).t() for a in factors]
            self.dtypes = [a.dtype for a in factors]
            return
        # On x's device, so that drawing it neither synchronises nor freezes the mask in a CUDA graph.
        seed = torch.randint(2**62, (len(factors),), device=x.device) if p > 0 else None
        alias, *self.s = ShrinkNode.apply(rows, float(p), seed, *factors)
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
        if lora_bias is not None and lora_bias.dtype != weight.dtype and magnitude is None:
            s, lora_B = _as_column(s, lora_B, lora_bias)
        elif lora_bias is not None:
            bias = _with_lora_bias(bias, lora_bias, scale, weight.dtype)
        if self._plainly:
            y = F.linear(self.x, weight, bias if magnitude is None else None).to(s.dtype) + term(s, lora_B, scale)
            if magnitude is not None:
                y = magnitude.to(weight_norm.dtype) * inverse_norm(weight_norm) * y
                y = y if bias is None else y + bias
            return y.to(self.x.dtype).view(*self.lead, weight.shape[0])
        self.left, lora_B = self.left - 1, lora_B.contiguous()
        # Dynamo (torch 2.13) takes the alias for an in-place change of x; compiled, autograd adds the dX of the projections.
        hand_on = self.left > 0 and self.x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        tail = float(scale), None if base is None else (base,), hand_on
        if magnitude is None:
            y = ExpandNode.apply(self.x, s, weight, bias, lora_B, *tail)
        else:
            y = ExpandDoraNode.apply(self.x, s, weight, bias, lora_B, magnitude, weight_norm, *tail)
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
        bias = None if lora_bias is None else scale * lora_bias
        if self._plainly:
            total = y if bias is None else y + bias.to(y.dtype)
            return (total.to(s.dtype) + term(s, lora_B, scale).view(*self.lead, -1)).to(y.dtype)
        return UpdateNode.apply(_rows(y), s, bias, lora_B.contiguous(), float(scale)).view(y.shape)

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


def transformed() -> bool:
    """Are we inside a transform of ``torch.func`` or a forward-mode differentiation? They know PyTorch's own ops alone, so
    that these compute then."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_mode()


def forward_mode() -> bool:
    """Are we inside a forward-mode differentiation (`torch.func.jvp` is one)? It goes on without gradients, too, and in our
    ops its tangents end without a word: there a node has to refuse them."""
    return forward_ad._current_level >= 0


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
    """``x Wᵀ + bias + scale · dropout(x, p) Aᵀ Bᵀ``, differentiable in every tensor that requires a gradient.

    Twice, too (``create_graph=True``), though not where A is frozen and B trains, as no x is kept then, and under the
    transforms of ``torch.func`` and forward-mode differentiation: all these by PyTorch's ops instead of our kernels.

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
    if not x.dim() or not weight.dim() == a.dim() == b.dim() == 2 or transformed():
        return None
    n, k = weight.shape
    fits = (
        (x.shape[-1], a.shape[1], x.dtype, a.dtype) == (k, k, weight.dtype, b.dtype)
        and (a.dtype == x.dtype or a.dtype == torch.float32)
        and x.device == weight.device == a.device == b.device
        and (bias is None or bias.shape == (n,))
    )
    return _in_one_node(x, weight, bias, a, b, scale, p) if fits else None


def _in_one_node(x, weight, bias, a, b, scale, p):
    """None for sizes and a dtype that don't fit, or sizes of nothing, whose rows `view` could not tell."""
    n = weight.shape[0]
    if x.dim() == 1 or b.shape != (n, a.shape[0]) or not (x.numel() and n and 0.0 <= p <= 1.0 and x.dtype in DTYPES):
        return None
    seed = torch.randint(2**62, (1,), device=x.device) if p > 0 else None
    return LoRALinearNode.apply(x.contiguous(), weight, bias, a.contiguous(), b.contiguous(), float(scale), float(p), seed)


def examined_linear(x, weight, bias, a, b, scale, p):
    """`lora_linear` without options, for a caller that has examined all but sizes: dtypes and devices fit, x's features, a
    [R, K], b and weight are matrices, and neither autocast nor a transform is at work. To ask again takes 5 us a layer."""
    y = _in_one_node(x, weight, bias, a, b, scale, p)
    return lora_linear(x, weight, bias, a, b, scale, p) if y is None else y


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


def _as_column(s, b, lora_bias):
    """S and B with the bias as one more column, on an S of ones: the wider dtype rounds neither it nor its gradient."""
    wide = torch.promote_types(b.dtype, lora_bias.dtype)
    return torch.nn.functional.pad(s, (0, 1), value=1.0), torch.cat([b.to(wide), lora_bias[:, None].to(wide)], 1)


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
    check_dtype(x)
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
