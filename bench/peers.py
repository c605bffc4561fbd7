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
        da, db = ds.t() @ dropped, (wide.t() @ s).mul_(ctx.scale)
        dx = dy @ weight
        if keep is None:
            dx.addmm_(ds.to(dx.dtype), a.to(dx.dtype))
        else:
            dx.addcmul_((ds @ a).to(dx.dtype), keep)
        return dx, None, None, da, db, None, None


def addmm(d):
    return lambda x: AddmmLoRA.apply(x, d.weight, d.bias, d.a, d.b, d.scale, d.p)


def peft_missing() -> str | None:
    return None if importlib.util.find_spec("peft") else "peft is not installed (pip install peft)"


def peft(d):
    """PEFT's LoRA layer over the frozen linear, holding the inputs' adapters."""
    from peft import LoraConfig, inject_adapter_in_model

    rank = d.a.shape[0]
    config = LoraConfig(r=rank, lora_alpha=d.scale * rank, lora_dropout=d.p, target_modules=["linear"])
    layer = inject_adapter_in_model(config, nn.ModuleDict({"linear": frozen_linear(d)}))["linear"]
    layer.lora_A["default"].weight = d.a
    layer.lora_B["default"].weight = d.b
    return layer.train()


def compiled_peft(d):
    return torch.compile(peft(d))


# name -> (builder of a module or function of x, why it can't be had here or None); "peft" and "addmm" run by default
LORA = {
    "peft": (peft, peft_missing),
    "addmm": (addmm, lambda: None),
    "peft-compile": (compiled_peft, peft_missing),
}
LORA_DEFAULT = ("peft", "addmm")
