"""Other implementations of the same layer, each built from the same tensors. Absent ones say why."""

import importlib.util

import torch
from torch import nn


def frozen_linear(d) -> nn.Linear:
    """The bare layer under every adapter: `nn.Linear` over the inputs' weight and bias, neither trained."""
    layer = nn.Linear(d.weight.shape[1], d.weight.shape[0], bias=d.bias is not None, device="meta")
    layer.weight = nn.Parameter(d.weight, requires_grad=False)
    if d.bias is not None:
        layer.bias = nn.Parameter(d.bias, requires_grad=False)
    return layer


class AddmmLoRA(torch.autograd.Function):
    """What a careful user writes in 20 lines of PyTorch: one node, in-place addmm_, dropped input and mask saved."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale, p):
        keep = torch.empty_like(x).bernoulli_(1 - p).div_(1 - p) if p > 0 else None
        dropped = (x if keep is None else x * keep).to(a.dtype)
        s = dropped @ a.t()
        y = nn.functional.linear(x, weight, bias).addmm_(s.to(x.dtype), b.t().to(x.dtype), alpha=scale)
        ctx.save_for_backward(dropped, weight, a, b, s, keep)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, dy):
        dropped, weight, a, b, s, keep = ctx.saved_tensors
        wide = dy.to(b.dtype)
        ds = (wide @ b).mul_(ctx.scale)
        da, db, dx = ds.t() @ dropped, (wide.t() @ s).mul_(ctx.scale), None
        if ctx.needs_input_grad[0]:  # a model's first q, k and v need none
            dx = dy @ weight
            if keep is None:
                dx.addmm_(ds.to(dx.dtype), a.to(dx.dtype))
            else:
                dx.addcmul_((ds @ a).to(dx.dtype), keep)
        return dx, None, None, da, db, None, None


def addmm(d):
    return lambda x: AddmmLoRA.apply(x, d.weight, d.bias, d.a, d.b, d.scale, d.p)


class AddmmDoRA(torch.autograd.Function):
    """The same for DoRA. A row's norm comes from W Aᵀ and from `squares`, the frozen row's own, which is kept:
    ‖w + s b A‖² = ‖w‖² + s b · (2 A wᵀ + s A Aᵀ bᵀ)."""

    @staticmethod
    def forward(ctx, x, weight, squares, bias, a, b, magnitude, scale):
        wide = x.to(a.dtype)
        s = wide @ a.t()
        cross = weight.to(a.dtype) @ a.t()
        norm = (b * (b @ (a @ a.t())).mul_(scale).add_(cross, alpha=2)).sum(1).mul_(scale).add(squares).sqrt_()
        z = (x @ weight.t()).to(a.dtype).addmm_(s, b.t(), alpha=scale)
        g = (magnitude / norm).to(a.dtype)
        ctx.save_for_backward(wide, weight, a, b, s, z, g, norm)
        ctx.scale = scale
        y = (z * g).to(x.dtype)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx, dy):
        wide, weight, a, b, s, z, g, norm = ctx.saved_tensors
        dz = dy * g  # in the adapter's dtype
        dm = (dy * z).sum(0, dtype=torch.float32).div_(norm).to(a.dtype)
        ds = (dz @ b).mul_(ctx.scale)
        da, db = ds.t() @ wide, (dz.t() @ s).mul_(ctx.scale)
        dx = (dz.to(dy.dtype) @ weight).addmm_(ds.to(dy.dtype), a.to(dy.dtype))
        return dx, None, None, None, da, db, dm, None


def addmm_dora(d):
    squares = d.weight.float().square().sum(1)
    return lambda x: AddmmDoRA.apply(x, d.weight, squares, d.bias, d.a, d.b, d.magnitude, d.scale)


class AugmentedLoRA(torch.autograd.Function):
    """[x | S] [W | sB]ᵀ and [dY | dS] [W ; A]: the low-rank terms as R more columns of the vendor's GEMMs, without dropout.

    `big` [N + R, K + R] holds [[W, sB], [A, 0]]; `wide_x` [T, K + R] and `wide_dy` [T, N + R] are buffers whose first
    columns are filled here, or already hold x and dY (`filled`), as if the layers before and behind wrote there.
    """

    @staticmethod
    def forward(ctx, x, bias, a, b, scale, big, wide_x, wide_dy, filled):
        k, n = x.shape[1], b.shape[0]
        big[:n, k:] = scale * b
        big[n:, :k] = a
        s = x @ a.t().to(x.dtype)
        if not filled:
            wide_x[:, :k] = x
        wide_x[:, k:] = s
        ctx.save_for_backward(x, a, b, s)
        ctx.rest = scale, big, wide_dy, filled
        return nn.functional.linear(wide_x, big[:n], bias)

    @staticmethod
    def backward(ctx, dy):
        x, a, b, s = ctx.saved_tensors
        scale, big, wide_dy, filled = ctx.rest
        n = b.shape[0]
        ds = (dy @ b.to(dy.dtype)).mul_(scale)
        if not filled:
            wide_dy[:, :n] = dy
        wide_dy[:, n:] = ds
        da, db = ds.t() @ x, (dy.t() @ s).mul_(scale)
        return wide_dy @ big[:, : x.shape[1]], None, da.to(a.dtype), db.to(b.dtype), *(None,) * 5


def augmented(d, filled=False):
    t, (n, k), r = d.x.shape[0], d.weight.shape, d.a.shape[0]
    big = d.weight.new_zeros(n + r, k + r)
    big[:n, :k] = d.weight
    wide_x, wide_dy = d.x.new_empty(t, k + r), d.x.new_empty(t, n + r)
    wide_x[:, :k], wide_dy[:, :n] = d.x.detach(), d.dy

    def layer(x):
        return AugmentedLoRA.apply(x, d.bias, d.a, d.b, d.scale, big, wide_x, wide_dy, filled)

    return layer


def augmented_filled(d):
    """The augmented form's best case: whoever makes x and dY writes them into its buffers."""
    return augmented(d, filled=True)


def peft_missing() -> str | None:
    return None if importlib.util.find_spec("peft") else "peft is not installed (pip install peft)"


def peft(d, **options):
    """PEFT's LoRA layer over the frozen linear, holding the inputs' adapters. `options` go to LoraConfig."""
    from peft import LoraConfig, inject_adapter_in_model

    rank = d.a.shape[0]
    config = LoraConfig(r=rank, lora_alpha=d.scale * rank, lora_dropout=d.p, target_modules=["linear"], **options)
    layer = inject_adapter_in_model(config, nn.ModuleDict({"linear": frozen_linear(d)}))["linear"]
    layer.lora_A["default"].weight = d.a
    layer.lora_B["default"].weight = d.b
    return layer.train()


def compiled_peft(d):
    return torch.compile(peft(d))


# name -> (builder of a module or function of x, why it can't be had here or None)
LORA = {
    "peft": (peft, peft_missing),
    "addmm": (addmm, lambda: None),
    "peft-compile": (compiled_peft, peft_missing),
    "augmented": (augmented, lambda: None),
    "augmented-filled": (augmented_filled, lambda: None),
}
LORA_DEFAULT = ("peft", "addmm", "unsloth")
# The mask belongs to one of the two terms that the augmented form adds up in one product.
WITHOUT_DROPOUT = ("augmented", "augmented-filled")
