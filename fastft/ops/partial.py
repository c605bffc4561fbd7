"""Partial back-propagation: a linear of whose weight only a part trains (S²FT, Yang et al. 2024, https://arxiv.org/abs/2412.06289).

    Y = X Wᵀ + bias      X [T, K], W [N, K];  forward is the frozen layer's, for the trained values stand in W itself

    `Part`     trains            backward computes besides dX = dY W     and keeps for it
    columns    W[:, C]           dYᵀ X[:, C]  [N, C]                     a compact copy of X[:, C]   (gather_columns)
    rows       W[R, :]           dY[:, R]ᵀ X  [R, K]                     X, by reference
    entries    W at entries E    (dYᵀ X) at E, and nothing else of it (`sparse`)      X, by reference
    all        W                 dYᵀ X                                   X, by reference
    nothing    -                 -                                       nothing

What trains is held as a float32 delta, the slice's distance from the pretrained weight: W's slice = round(base + delta). The
delta is at once the master of a 16-bit weight. `write_slice_` writes it; `slice_adamw_` makes an update and writes it in one
pass; `exchange_slice_` takes one slice out (its base goes back), keeps the base of another and writes that one, in one walk
over the weight. With delta = 0 no value changes (a base of -0.0 is written as 0.0); without a delta bits are copied. A delta
can also be applied beside the weight (`delta_linear`):

    columns: Y += X[:, C] deltaᵀ            rows: Y[:, R] += X deltaᵀ

The products stay with the vendor's GEMM. C and R are index lists in W's own order, so nothing is permuted, and the heads of
a grouped-query attention are indices as any others.

Shapes: T tokens, K in-features, N out-features, C indices (int32, each at most once). x, y, weight have one dtype (float32,
bfloat16, float16); deltas and moments are float32. Rows of x, y and weight may lie apart. `dim` is that of the stored
weight: a slice lies in its rows (0) or its columns (1). The reference also takes float64 (then everything is float64).
Indices out of range are refused on CPUs; on GPUs, where looking would wait for the device, they are the caller's promise.
"""

import torch

from .registry import Op, nothing_fake, refuse_dtypes


def _accumulator(t) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _gather_reference(x, index):
    return x.index_select(1, index)


def _gather_fake(x, index):
    return x.new_empty((x.shape[0], index.shape[0]))


def _scatter_add_reference(y, index, z):
    wide = _accumulator(y)
    index = index.long()
    y[:, index] = (y[:, index].to(wide) + z.to(wide)).to(y.dtype)


def _write_reference(weight, index, dim, base, delta):
    value = base if delta is None else (base.to(delta.dtype) + delta).to(weight.dtype)
    weight.index_copy_(dim, index.long(), value)


def _exchange_reference(weight, dim, old_index, old_base, index, delta):
    weight.index_copy_(dim, old_index.long(), old_base)
    base = weight.index_select(dim, index)
    _write_reference(weight, index, dim, base, delta)
    return base


def _exchange_fake(weight, dim, old_index, old_base, index, delta):
    return torch.empty_like(delta, dtype=weight.dtype)


def _adamw_reference(weight, index, dim, base, delta, grad, exp_avg, exp_avg_sq, lr, beta1, beta2, eps, weight_decay, step):
    delta.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    delta.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
    _write_reference(weight, index, dim, base, delta)


gather_columns = Op(
    "gather_columns(Tensor x, Tensor index) -> Tensor",
    _gather_reference,
    _gather_fake,
    refuse_dtypes(0),
)
scatter_add_columns_ = Op(
    "scatter_add_columns_(Tensor(a!) y, Tensor index, Tensor z) -> ()",
    _scatter_add_reference,
    nothing_fake,
    refuse_dtypes(0),
)
write_slice_ = Op(
    "write_slice_(Tensor(a!) weight, Tensor index, int dim, Tensor base, Tensor? delta) -> ()",
    _write_reference,
    nothing_fake,
    refuse_dtypes(0),
)
exchange_slice_ = Op(
    "exchange_slice_(Tensor(a!) weight, int dim, Tensor old_index, Tensor old_base, Tensor index, Tensor delta) -> Tensor",
    _exchange_reference,
    _exchange_fake,
    refuse_dtypes(0),
)
slice_adamw_ = Op(
    "slice_adamw_(Tensor(a!) weight, Tensor index, int dim, Tensor base, Tensor(b!) delta, Tensor grad, "
    "Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "int step) -> ()",
    _adamw_reference,
    nothing_fake,
    refuse_dtypes(0),
)
