"""A model of three linear layers, one of each kind, and the same adapters in PEFT."""

import pytest
import torch
from torch import nn

import fastft

from .models import randomize

peft = pytest.importorskip("peft")
Conv1D = pytest.importorskip("transformers").pytorch_utils.Conv1D

NAMES = ["a", "b", "c"]
# Of two adapters on one layer.
PAIRS = [
    ({}, {"r": 3}),
    ({}, {"use_dora": True}),
    ({"use_dora": True}, {}),
    ({"use_dora": True}, {"use_dora": True, "r": 2}),
    ({"use_dora": True}, {"lora_bias": True}),
    ({"lora_bias": True}, {}),
    ({"lora_bias": True}, {"lora_bias": True}),
]


class Layers(nn.Module):
    """A linear layer with and one without a bias, and a Conv1D."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(12, 20), nn.Linear(20, 16, bias=False), Conv1D(10, 16)
        nn.init.normal_(self.c.weight)
        nn.init.normal_(self.c.bias)
        self.to(dtype)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def adapted(dtype=torch.float32, seed=3, model=None, name="default", **options):
    """The model (a new one, or this one) with a further adapter whose values matter."""
    model = Layers(dtype) if model is None else model
    options = {"r": 4, "lora_alpha": 6, "target_modules": NAMES, **options}
    handle = fastft.attach(model, fastft.LoRA(**options), name)
    randomize(handle, seed)
    return model, handle


def into_peft(handles):
    """A PEFT model with the same values, by PEFT's names."""
    model = None
    for handle in handles:
        method = handle.method
        config = peft.LoraConfig(
            r=method.r,
            lora_alpha=method.lora_alpha,
            lora_dropout=method.lora_dropout,
            target_modules=method.target_modules,
            use_dora=method.use_dora,
            lora_bias=method.lora_bias,
        )
        if model is None:
            model = peft.get_peft_model(Layers(), config, handle.name)
        else:
            model.add_adapter(handle.name, config)
    model.base_model.set_adapter([handle.name for handle in handles])
    twins = {}
    theirs = dict(model.named_parameters())
    for handle in handles:
        for name, value in handle.named_parameters():
            layer, part, _ = name.split(".")
            own = {"lora_A": f"lora_A.{handle.name}.weight", "lora_B": f"lora_B.{handle.name}.weight"}
            own["lora_bias"] = f"lora_B.{handle.name}.bias"
            own["lora_magnitude"] = f"lora_magnitude_vector.{handle.name}.weight"
            twin = theirs[f"base_model.model.{layer}.{own[part]}"]
            twin.data.copy_(value.data)
            twin.requires_grad_(True)
            twins[name] = twin
    return model, twins


def merged_weight(layer, name="default", weight=None):
    """The merged weight [N, K] in float64."""
    w = (layer.weight.detach() if weight is None else weight).double()
    w = w.t() if layer.fan_in_fan_out else w
    v = w + layer._settings[name].scale * layer.lora_B[name].detach().double() @ layer.lora_A[name].detach().double()
    return v * (layer.lora_magnitude[name].detach().double() / v.norm(dim=1))[:, None]
