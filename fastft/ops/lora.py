"""The LoRA family (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    Y = X Wᵀ + bias + s · drop(X) Aᵀ Bᵀ        X [T, K], W [N, K], A [R, K], B [N, R], s = the adapter's scale

Forward, with S = drop(X) Aᵀ:               backward, with dS = s · dY B:
    Y  = X Wᵀ + bias    vendor GEMM              dB = s · dYᵀ S          } lora_grad_sb, one pass over dY
    S  = lora_shrink    one pass over X          dA = dSᵀ drop(X)          lora_grad_a, one pass over X
    Y += s · S Bᵀ       lora_expand_             dX = dY W               vendor GEMM
                                                 dX += drop'(dS A)         lora_grad_x_

Saved for backward: X, S (float32, 4·R bytes a token) and the packed dropout mask (K/8 bytes a token).

Dropout: element (t, k) is kept iff its 16-bit lane of Philox4x32-7 (Salmon et al. 2011) is >= round(65536 p), so
the mask is a pure function of (seed, t, k): the same on every backend, for every tiling and number of threads.

Shapes: T tokens, K in-features, N out-features, R rank; every size may be 0. x, y, dy, dx have one dtype (float32,
bfloat16, float16), A and B that dtype or float32; S and dS are float32. Sums are formed in float32 and rounded once.
The reference also takes float64 (then everything is float64), for gradcheck.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ._philox import dropout_mask, unpack_mask
from .registry import Op, Scope

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _accumulator(*tensors) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _inverse_keep(p: float) -> float:
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def _dropped(x, mask, p, dtype):
    """x in `dtype` with dropped elements exactly 0 (a select: a dropped NaN is 0). The 1/(1-p) is applied to the result."""
    x = x.to(dtype)
    return torch.where(unpack_mask(mask, x.shape[1]), x, 0.0) if p > 0 else x


def _shrink_reference(x, a, p, seed):
    acc = _accumulator(x, a)
    mask = dropout_mask(seed, *x.shape, p) if p > 0 else x.new_empty(0, dtype=torch.uint8)
    return _dropped(x, mask, p, acc) @ a.to(acc).t() * _inverse_keep(p), mask


def _shrink_fake(x, a, p, seed):
    mask = x.new_empty((x.shape[0], (x.shape[1] + 7) // 8) if p > 0 else (0,), dtype=torch.uint8)
    return x.new_empty((x.shape[0], a.shape[0]), dtype=_accumulator(x, a)), mask


def _expand_reference(y, s, b, scale):
    y.copy_(y.to(s.dtype) + scale * (s @ b.to(s.dtype).t()))


def _grad_sb_reference(dy, s, b, scale):
    acc = dy.to(s.dtype)
    return scale * (acc @ b.to(s.dtype)), (scale * (acc.t() @ s)).to(b.dtype)


def _grad_sb_fake(dy, s, b, scale):
    return torch.empty_like(s), torch.empty_like(b)


def _grad_a_reference(ds, x, a, mask, p):
    return (ds.t() @ _dropped(x, mask, p, ds.dtype) * _inverse_keep(p)).to(a.dtype)


def _grad_a_fake(ds, x, a, mask, p):
    return torch.empty_like(a)


def _grad_x_reference(dx, ds, a, mask, p):
    total = dx.to(ds.dtype) + _inverse_keep(p) * (ds @ a.to(ds.dtype))
    dx.copy_(torch.where(unpack_mask(mask, dx.shape[1]), total, dx.to(ds.dtype)) if p > 0 else total)


def _nothing_fake(*args):
    return None


def _refuse_dtypes(act, adapter):
    """For kernels: why these dtypes can't run, given the positions of an activation and an adapter argument."""

    def reason(*args):
        x, a = args[act].dtype, args[adapter].dtype
        if x not in KERNEL_DTYPES:
            return f"{x} activations (kernels take float32, bfloat16, float16)"
        return None if a in (x, torch.float32) else f"{a} adapters on {x} activations (kernels take {x} or float32)"

    return {"cpu": reason, "cuda": reason, "triton": reason}


lora_shrink = Op(
    "lora_shrink(Tensor x, Tensor a, float p, Tensor? seed) -> (Tensor, Tensor)",
    _shrink_reference,
    _shrink_fake,
    _refuse_dtypes(act=0, adapter=1),
)
lora_expand_ = Op(
    "lora_expand_(Tensor(a!) y, Tensor s, Tensor b, float scale) -> ()",
    _expand_reference,
    _nothing_fake,
    _refuse_dtypes(act=0, adapter=2),
)
lora_grad_sb = Op(
    "lora_grad_sb(Tensor dy, Tensor s, Tensor b, float scale) -> (Tensor, Tensor)",
    _grad_sb_reference,
    _grad_sb_fake,
    _refuse_dtypes(act=0, adapter=2),
)
lora_grad_a = Op(
    "lora_grad_a(Tensor ds, Tensor x, Tensor a, Tensor mask, float p) -> Tensor",
    _grad_a_reference,
    _grad_a_fake,
    _refuse_dtypes(act=1, adapter=2),
)
lora_grad_x_ = Op(
    "lora_grad_x_(Tensor(a!) dx, Tensor ds, Tensor a, Tensor mask, float p) -> ()",
    _grad_x_reference,
    _nothing_fake,
    _refuse_dtypes(act=0, adapter=2),
)


def _rows(t, features):
    """t [..., features] as a contiguous [T, features]; a view where the layout allows."""
    return t.reshape(t.numel() // features if features else t.shape[:-1].numel(), features).contiguous()


class _LoRALinear(torch.autograd.Function):
    """The adapted linear as one node on rows x [T, K]: what backward needs of the adapter is S and the packed mask."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale, p, seed):
        y = F.linear(x, weight, bias)
        s, mask = lora_shrink(x, a, p, seed)
        lora_expand_(y, s, b, scale)
        ctx.scope = Scope.captured()
        ctx.scale, ctx.p = scale, p
        keep_x = ctx.needs_input_grad[3] or ctx.needs_input_grad[1]
        ctx.save_for_backward(x if keep_x else None, weight, a, b, s, mask)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return Scope.run(ctx.scope, _linear_backward, ctx, dy)


def _linear_backward(ctx, dy):
    x, weight, a, b, s, mask = ctx.saved_tensors
    need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
    dy = dy.contiguous()
    dx = dw = dbias = None
    if need_x:
        dx = dy @ weight
    if need_w:
        dw = dy.t() @ x
    if need_bias:
        dbias = dy.sum(0)
    da, db = _adapter_backward(dy, x, a, b, s, mask, ctx.scale, ctx.p, dx, need_a, need_b)
    return dx, dw, dbias, da, db, None, None, None


def _adapter_backward(dy, x, a, b, s, mask, scale, p, dx, need_a, need_b):
    """The low-rank part of backward; adds to dx in place unless it is None."""
    da = db = None
    if need_a or need_b or dx is not None:
        ds, db = lora_grad_sb(dy, s, b, scale)
        if need_a:
            da = lora_grad_a(ds, x, a, mask, p)
        if dx is not None:
            lora_grad_x_(dx, ds, a, mask, p)
    return da, db if need_b else None


class _LoRAUpdate(torch.autograd.Function):
    """The low-rank part alone, added to the output of any base layer."""

    @staticmethod
    def forward(ctx, y, x, a, b, scale, p, seed):
        rows = _rows(x, a.shape[1])
        out = y.clone(memory_format=torch.contiguous_format)
        s, mask = lora_shrink(rows, a, p, seed)
        lora_expand_(out.view(rows.shape[0], b.shape[0]), s, b, scale)
        ctx.scope = Scope.captured()
        ctx.scale, ctx.p, ctx.shape = scale, p, x.shape
        ctx.save_for_backward(rows if ctx.needs_input_grad[2] else None, a, b, s, mask)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return Scope.run(ctx.scope, _update_backward, ctx, dy)


def _update_backward(ctx, dy):
    x, a, b, s, mask = ctx.saved_tensors
    need_y, need_x, need_a, need_b = ctx.needs_input_grad[:4]
    rows = _rows(dy, b.shape[0])
    dx = rows.new_zeros(rows.shape[0], a.shape[1]) if need_x else None
    da, db = _adapter_backward(rows, x, a, b, s, mask, ctx.scale, ctx.p, dx, need_a, need_b)
    return dy if need_y else None, dx.view(ctx.shape) if need_x else None, da, db, None, None, None


def lora_linear(x, weight, bias, lora_A, lora_B, scale=1.0, p=0.0, *, fan_in_fan_out=False):
    """``x Wᵀ + bias + scale · dropout(x, p) Aᵀ Bᵀ``, differentiable once in x, weight, bias, lora_A and lora_B.

    Args:
        x: [..., K], any strides. Under autocast it is cast to the autocast dtype, as `F.linear` does.
        weight: [N, K] of x's dtype; [K, N] with `fan_in_fan_out` (GPT-2's Conv1D).
        bias: [N] or None.
        lora_A: [R, K], lora_B: [N, R]: both of x's dtype or both float32, in which case they are never rounded and
            their gradients are those of float32 arithmetic.
        scale: factor of the low-rank term (alpha / r; alpha / sqrt(r) for rsLoRA).
        p: dropout probability of the low-rank path's input; 0 in evaluation. The mask's seed comes from PyTorch's
            generator of x's device.

    Returns:
        [..., N] in x's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: shapes that do not fit, or p outside [0, 1]. TypeError: dtypes. RuntimeError: devices.
    """
    if fan_in_fan_out:
        weight = weight.t()
    x, weight, bias, lora_A, lora_B = _autocast(x, weight, bias, lora_A, lora_B)
    _check(x, weight.shape, lora_A, lora_B, p)
    if weight.dtype != x.dtype:
        raise TypeError(f"lora_linear: x is {x.dtype} but weight is {weight.dtype}; cast one, or use torch.autocast")
    # Reshaped out here: what an autograd.Function returns as a view can't be changed in place (nn.ReLU(inplace=True)).
    y = _LoRALinear.apply(_rows(x, x.shape[-1]), weight, bias, lora_A, lora_B, float(scale), float(p), _seed(x, p))
    return y.view(*x.shape[:-1], weight.shape[0])


def lora_update(y, x, lora_A, lora_B, scale=1.0, p=0.0):
    """``y + scale · dropout(x, p) Aᵀ Bᵀ`` for the output y [..., N] of any base layer on x [..., K].

    For bases that compute themselves (quantised weights) and for the second and further adapters of a layer;
    `lora_linear` saves a pass over y and dX where the base is a plain weight. Arguments and errors as there.
    """
    x, y, _, lora_A, lora_B = _autocast(x, y, None, lora_A, lora_B)
    _check(x, (y.shape[-1], x.shape[-1]), lora_A, lora_B, p)
    if y.dtype != x.dtype or y.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"lora_update: y is {y.dtype}{list(y.shape)} and x {x.dtype}{list(x.shape)}; "
            "they must share dtype and leading dimensions"
        )
    return _LoRAUpdate.apply(y, x, lora_A, lora_B, float(scale), float(p), _seed(x, p))


def _seed(x, p):
    # On x's device, so that drawing it neither synchronises nor freezes the mask in a CUDA graph.
    return torch.randint(2**62, (1,), device=x.device) if p > 0 else None


def _autocast(x, weight, bias, a, b):
    """What autocast does to `F.linear`: everything 16-bit, except float32 adapters, which kernels read as they are."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x, weight, bias, a, b
    dtype = torch.get_autocast_dtype(kind)

    def cast(t, *kept):
        return t if t is None or t.dtype in kept or not t.is_floating_point() else t.to(dtype)

    return (
        *(cast(t, torch.float64) for t in (x, weight, bias)),
        *(cast(t, torch.float64, torch.float32) for t in (a, b)),
    )


def _check(x, weight_shape, a, b, p):
    n, k = weight_shape
    if x.dim() == 0 or x.shape[-1] != k or a.shape != (a.shape[0], k) or b.shape != (n, a.shape[0]):
        raise ValueError(
            f"shapes do not fit: x {list(x.shape)} (want [..., {k}]), lora_A {list(a.shape)} (want [R, {k}]), "
            f"lora_B {list(b.shape)} (want [{n}, R]) for a layer of {k} in- and {n} out-features"
        )
    if a.dtype != b.dtype or a.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"lora_A is {a.dtype} and lora_B {b.dtype} on {x.dtype} activations; "
            f"both must be {x.dtype} or both torch.float32"
        )
    if not x.device == a.device == b.device:
        raise RuntimeError(f"x is on {x.device}, lora_A on {a.device}, lora_B on {b.device}; move them to one device")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout p is {p}; it must lie in [0, 1]")
