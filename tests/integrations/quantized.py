"""Small models whose linear layers are quantised, one way a library."""

import warnings

import pytest
import torch
from torch import nn


def _bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    # Else CPUs that have AVX512-BF16 rearrange weights in evaluation and lose bits that these tests compare.
    bnb.nn.modules.has_avx512bf16 = lambda: False
    return bnb


def nf4(layer):
    dtype = layer.weight.dtype
    new = _bitsandbytes().nn.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, quant_type="nf4"
    )
    return _filled(new, layer)


def int8(layer):
    new = _bitsandbytes().nn.Linear8bitLt(
        layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False
    )
    return _filled(new, layer)


def _filled(new, layer):
    new.weight.data = layer.weight.data.clone()
    if layer.bias is not None:
        new.bias.data = layer.bias.data.clone()
    return new.requires_grad_(False).to("cpu")


def torchao(layer):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(layer, Int8WeightOnlyConfig())
    return layer.requires_grad_(False)


def gptq(layer):
    return QuantLinear(layer)


KINDS = {"nf4": nf4, "int8": int8, "torchao": torchao, "gptq": gptq}


class QuantLinear(nn.Module):
    """Stands in for gptqmodel's TorchLinear (a BaseQuantLinear), which asks for another torch: the same names and layouts,
    4-bit codes packed along K in int32, a scale and a zero for each group, a bias that is a buffer, a `weight` that is no
    tensor."""

    def __init__(self, layer, group=8):
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group_size = layer.in_features, layer.out_features, 4, group
        weight = layer.weight.detach().t().float().reshape(-1, group, layer.out_features)
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        scales = (high - low) / 15
        codes = ((weight - low) / scales).round().to(torch.int32).reshape(self.in_features // 8, 8, -1)
        shifts = 4 * torch.arange(8, dtype=torch.int32)
        self.register_buffer("shifts", shifts, persistent=False)
        self.register_buffer("qweight", (codes << shifts[:, None]).sum(1, dtype=torch.int32))
        self.register_buffer("scales", scales[:, 0].to(layer.weight.dtype))
        self.register_buffer("zeros", low[:, 0].to(layer.weight.dtype))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    weight = property(lambda self: "no tensor")

    def dequantize_weight(self):
        codes = (self.qweight[:, None] >> self.shifts[:, None]) & 15
        codes = codes.reshape(-1, self.group_size, self.out_features)
        return (codes * self.scales[:, None] + self.zeros[:, None]).flatten(0, 1)

    def forward(self, x):
        y = x @ self.dequantize_weight().to(x.dtype)
        return y if self.bias is None else y + self.bias


def quantized(kind, model, skip=("lm_head",)):
    """`model` with its linear layers quantised, but for those whose name ends with one of `skip`."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and not name.endswith(skip):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.set_submodule(name, KINDS[kind](layer))
    return model


def bits(model):
    """The state dict, of torchao's tensors what they consist of."""
    return {key: getattr(value, "qdata", value).clone() for key, value in model.state_dict().items()}
