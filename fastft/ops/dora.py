"""DoRA, weight-decomposed low-rank adaptation (Liu et al. 2024, https://arxiv.org/abs/2402.09353).

    Y = g ∘ (X Wᵀ + s · drop(X) Aᵀ Bᵀ) + bias        g = magnitude / ‖W + s · B A‖, row norms; X, W, A, B, s as in `lora`

The norm is a constant in backward (section 4.3 of the paper). On top of LoRA's ops, with U = X Wᵀ + s · S Bᵀ:

    forward:  U = X Wᵀ        vendor GEMM      backward:  dY' = g ∘ dY         } dora_grad_y, one pass over dY and U
              Y = g ∘ U + bias  dora_expand_              dg = Σ_t dY ∘ U
                                                          dX = dY' W, and dS, dB from dY and g ∘ B as in `lora`

The row norm needs no product B A: ‖W + sBA‖² = ‖W‖² + 2s ⟨B, W Aᵀ⟩ + s² ⟨B (A Aᵀ), B⟩, see `dora_norm`.

Shapes: T tokens, N out-features, R rank; u, y, dy, bias have one dtype (float32, bfloat16, float16), B that dtype or
float32; s, g and dots are float32. Sums are formed in float32 and rounded once. Rows of u and s may lie apart. The
reference also takes float64.
"""

import torch

from .lora import lora_grad_a, lora_shrink, refuse_dtypes, term
from .registry import Op, without_autocast


def _expand_reference(u, s, b, g, bias, scale):
    total = u.to(s.dtype) + term(s, b, scale)
    u.copy_(total)
    y = g * total
    return (y if bias is None else y + bias.to(y.dtype)).to(u.dtype)


def _expand_fake(u, s, b, g, bias, scale):
    return u.new_empty(u.shape)


def _grad_y_reference(dy, u, g):
    wide = dy.to(g.dtype)
    return (g * wide).to(dy.dtype), (wide * u.to(g.dtype)).sum(0)


def _grad_y_fake(dy, u, g):
    return dy.new_empty(dy.shape), torch.empty_like(g)


dora_expand_ = Op(
    "dora_expand_(Tensor(a!) u, Tensor s, Tensor b, Tensor g, Tensor? bias, float scale) -> Tensor",
    _expand_reference,
    _expand_fake,
    refuse_dtypes(act=0, adapter=2),
)
dora_grad_y = Op(
    "dora_grad_y(Tensor dy, Tensor u, Tensor g) -> (Tensor, Tensor)",
    _grad_y_reference,
    _grad_y_fake,
    refuse_dtypes(act=0, adapter=1),
)


@torch.no_grad()
def squared_row_norm(weight, fan_in_fan_out=False):
    """‖W‖² of each of the N rows, float32 (float64 of a float64 weight).

    weight: [N, K]; [K, N] with `fan_in_fan_out`. Depends on the frozen weight alone, so it can be kept.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    # Row by row block, so that no float32 copy of a whole 16-bit weight is made.
    blocks = weight.split(256, dim=1 if fan_in_fan_out else 0)
    return torch.cat([block.to(dtype).square().sum(0 if fan_in_fan_out else 1) for block in blocks])


@torch.no_grad()
def dora_norm(weight, squared_norm, lora_A, lora_B, scale, fan_in_fan_out=False):
    """Row norms ‖W + scale · B A‖ without forming B A: one pass over W, the rest on [N, R] and [R, R].

    Args:
        weight: [N, K] contiguous; [K, N] with `fan_in_fan_out`.
        squared_norm: [N], of `squared_row_norm`.
        lora_A: [R, K], lora_B: [N, R], both of weight's dtype or float32, any strides.

    Returns:
        [N] float32 (float64 of a float64 weight), no gradient. Its square errs by some eps · (‖W‖ + ‖scale · B A‖)², so
        where the update cancels the weight a norm is known down to sqrt(eps) · ‖W‖, and no smaller one is returned.
    """
    rank, wide = [lora_A.shape[0]], squared_norm.dtype
    a, b = lora_A.to(wide), lora_B.to(wide)
    if fan_in_fan_out:  # the product with the stored W [K, N] is the gradient of an A [R, N] over K tokens
        like = torch.empty(rank[0], weight.shape[1], dtype=wide, device=weight.device)
        no_mask = torch.empty(0, dtype=torch.uint8, device=weight.device)
        wa = lora_grad_a(a.t().contiguous(), weight, like, rank, no_mask, 0.0).t()
    else:
        wa = lora_shrink(weight, lora_A.contiguous(), rank, 0.0, None)[0]
    with without_autocast(weight.device.type):  # layers call this inside autocast, which would round the products
        linear, quadratic = (b * wa).sum(1), ((b @ (a @ a.t())) * b).sum(1)
    square = squared_norm + 2 * scale * linear + scale**2 * quadratic
    return torch.maximum(square, torch.finfo(wide).eps * squared_norm).sqrt_()


def inverse_norm(norm):
    """1 / norm of each row; 0 for a row of zeros, which stays 0 whatever its magnitude, where m / 0 · 0 would be NaN."""
    return torch.where(norm > 0, norm.clamp_min(torch.finfo(norm.dtype).tiny).reciprocal(), 0.0)
