"""The LoRA family (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    Y = X Wᵀ + bias + s · drop(X) Aᵀ Bᵀ        X [T, K], W [N, K], A [R, K], B [N, R], s = the adapter's scale

Forward, with S = drop(X) Aᵀ:               backward, with dS = s · dY B:
    Y  = X Wᵀ + bias    vendor GEMM              dB = s · dYᵀ S          } lora_grad_sb, one pass over dY
    S  = lora_shrink    one pass over X          dA = dSᵀ drop(X)          lora_grad_a, one pass over X
    Y += s · S Bᵀ       lora_expand_             dX = dY W               vendor GEMM
                                                 dX += drop'(dS A)         lora_grad_x_

Without a gradient S is not wanted: Y += s · X Aᵀ Bᵀ in one call is lora_add_ (`lora_inference`), whose x and y may have
leading dimensions.

Dropout: element (t, k) is kept iff its 16-bit lane of Philox4x32-7 (Salmon et al. 2011) is >= round(65536 p), so
the mask is a pure function of (seed, t, k): the same on every backend, for every tiling and number of threads.

Groups: G adapters that share x (q, k and v of an attention block) are one stack A [R, K] of their matrices, with
`ranks` = [R_0, ..., R_{G-1}], R their sum. The ops that touch x or dX then do so once for all of them. Each has its own
dropout mask. Without dropout a group is nothing but a larger rank.

Shapes: T tokens, K in-features, N out-features, R rank; every size may be 0. x, y, dy, dx have one dtype (float32,
bfloat16, float16), A and B that dtype or float32; S and dS are float32. Sums are formed in float32 and rounded once.
Where A and B are bfloat16, S and dS may be rounded to it as factors of the second products, as PyTorch's composition does.
Rows of y and s may lie apart (columns of a wider matrix). The reference also takes float64 (then everything is float64),
for gradcheck. The autograd and public functions on top are in `lora_linear`.
"""

import torch

from ._philox import dropout_mask, unpack_mask
from .registry import KERNEL_DTYPES, Op, nothing_fake


def accumulator(*tensors) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _inverse_keep(p: float) -> float:
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def _kept(x, mask, p, dtype):
    """x in `dtype` as each group sees it: dropped elements exactly 0 (a select: a dropped NaN is 0)."""
    x = x.to(dtype)
    return [torch.where(unpack_mask(m, x.shape[1]), x, 0.0) for m in mask] if p > 0 else [x]


def dropped(x, mask, p, dtype):
    """drop(x) in `dtype` of each group; of all together without dropout."""
    return [kept * _inverse_keep(p) for kept in _kept(x, mask, p, dtype)]


def term(s, b, scale):
    """scale · S Bᵀ in S's dtype."""
    return scale * (s @ b.to(s.dtype).t())


def _groups(t, ranks, p):
    """The groups' rows of a stack [R, ...]. Without dropout they are computed as one."""
    return t.split(ranks) if p > 0 else (t,)


def _shrink_reference(x, a, ranks, p, seed):
    acc = accumulator(x, a)
    mask = x.new_empty(0, dtype=torch.uint8)
    if p > 0:
        mask = torch.stack([dropout_mask(one, *x.shape, p) for one in seed.split(1)])
    parts = [kept @ part.t() for kept, part in zip(_kept(x, mask, p, acc), _groups(a.to(acc), ranks, p))]
    return torch.cat(parts, 1) * _inverse_keep(p), mask


def _shrink_fake(x, a, ranks, p, seed):
    mask = x.new_empty((len(ranks), x.shape[0], (x.shape[1] + 7) // 8) if p > 0 else (0,), dtype=torch.uint8)
    return x.new_empty((x.shape[0], a.shape[0]), dtype=accumulator(x, a)), mask


def _expand_reference(y, s, b, scale):
    y.copy_(y.to(s.dtype) + term(s, b, scale))


def _add_reference(y, x, a, b, scale):
    acc = accumulator(x, a)
    y.copy_(y.to(acc) + term(x.to(acc) @ a.to(acc).t(), b, scale))


def _grad_sb_reference(dy, s, b, scale):
    acc = dy.to(s.dtype)
    return scale * (acc @ b.to(s.dtype)), (scale * (acc.t() @ s)).to(b.dtype)


def _grad_sb_fake(dy, s, b, scale):
    return s.new_empty(s.shape), torch.empty_like(b)


def _grad_a_reference(ds, x, a, ranks, mask, p):
    parts = [part @ kept for part, kept in zip(_groups(ds.t(), ranks, p), _kept(x, mask, p, ds.dtype))]
    return (torch.cat(parts) * _inverse_keep(p)).to(a.dtype)


def _grad_a_fake(ds, x, a, ranks, mask, p):
    return torch.empty_like(a)


def _grad_x_reference(dx, ds, a, ranks, mask, p):
    wide, a = dx.to(ds.dtype), a.to(ds.dtype)
    if p == 0:
        dx.copy_(wide + ds @ a)
        return
    keep = torch.stack([unpack_mask(m, dx.shape[1]) for m in mask])
    parts = torch.stack([coefficients @ part for coefficients, part in zip(ds.split(ranks, 1), a.split(ranks))])
    total = wide + _inverse_keep(p) * torch.where(keep, parts, 0.0).sum(0)
    dx.copy_(torch.where(keep.any(0), total, wide))  # what every group drops keeps its bits


def refuse_dtypes(act, adapter):
    """For kernels: why these dtypes can't run, given the positions of an activation and an adapter argument."""

    def reason(*args):
        x, a = args[act].dtype, args[adapter].dtype
        if x not in KERNEL_DTYPES:
            return f"{x} activations (kernels take float32, bfloat16, float16)"
        return None if a in (x, torch.float32) else f"{a} adapters on {x} activations (kernels take {x} or float32)"

    return {"cpu": reason, "cuda": reason, "triton": reason}


lora_shrink = Op(
    "lora_shrink(Tensor x, Tensor a, int[] ranks, float p, Tensor? seed) -> (Tensor, Tensor)",
    _shrink_reference,
    _shrink_fake,
    refuse_dtypes(act=0, adapter=1),
)
lora_expand_ = Op(
    "lora_expand_(Tensor(a!) y, Tensor s, Tensor b, float scale) -> ()",
    _expand_reference,
    nothing_fake,
    refuse_dtypes(act=0, adapter=2),
)
lora_add_ = Op(
    "lora_add_(Tensor(a!) y, Tensor x, Tensor a, Tensor b, float scale) -> ()",
    _add_reference,
    nothing_fake,
    refuse_dtypes(act=0, adapter=2),
    cpu_alone=True,
)
lora_grad_sb = Op(
    "lora_grad_sb(Tensor dy, Tensor s, Tensor b, float scale) -> (Tensor, Tensor)",
    _grad_sb_reference,
    _grad_sb_fake,
    refuse_dtypes(act=0, adapter=2),
)
lora_grad_a = Op(
    "lora_grad_a(Tensor ds, Tensor x, Tensor a, int[] ranks, Tensor mask, float p) -> Tensor",
    _grad_a_reference,
    _grad_a_fake,
    refuse_dtypes(act=1, adapter=2),
)
lora_grad_x_ = Op(
    "lora_grad_x_(Tensor(a!) dx, Tensor ds, Tensor a, int[] ranks, Tensor mask, float p) -> ()",
    _grad_x_reference,
    nothing_fake,
    refuse_dtypes(act=0, adapter=2),
)
