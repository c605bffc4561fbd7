"""What the tests of accelerated PEFT models share: single layers and small models with random adapters."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import fastft
from tests.methods.models import llama, tokens

peft = pytest.importorskip("peft")

K, N, R = 24, 40, 5


def layer(base=None, dtype=torch.float32, adapters=("default",), keep_fp32=True, configs=None, seed=0, **config):
    """One LoRA layer of PEFT's with random adapters, all active, as a model of one module `lin`."""
    torch.manual_seed(seed)
    model = nn.Sequential(OrderedDict(lin=base or nn.Linear(K, N))).to(dtype)
    whole = None
    for i, name in enumerate(adapters):
        options = {"r": R, "lora_alpha": 7, "target_modules": ["lin"], **config, **((configs or {}).get(name, {}))}
        options = peft.LoraConfig(**options)
        if i == 0:
            whole = peft.get_peft_model(model, options, name, autocast_adapter_dtype=keep_fp32)
        else:
            whole.add_adapter(name, options, autocast_adapter_dtype=keep_fp32)
    randomize(whole)
    if len(adapters) > 1:
        whole.base_model.set_adapter(list(adapters))
    whole.requires_grad_(False)
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return whole


def one(model):
    """The LoRA layer of what `layer` made."""
    return model.base_model.model.lin


def randomize(model, seed=3, std=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter) * std)
            elif "lora_magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator).to(parameter))
    return model


def peft_llama(adapters=("default",), dtype=torch.float32, **config):
    model = llama().to(dtype)
    options = {"r": 4, "target_modules": "all-linear", **config}
    whole = peft.get_peft_model(model, peft.LoraConfig(**options), adapters[0])
    for name in adapters[1:]:
        whole.add_adapter(name, peft.LoraConfig(**{**options, "target_modules": ["q_proj", "up_proj"]}))
    return randomize(whole)


def step(model, ids=None):
    """Loss and gradients by name of one training step."""
    ids = tokens() if ids is None else ids
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, want, tolerance=2e-5):
    """Rounding of large gradients is left in small ones that come of their differences, as those of q and k do."""
    assert got.keys() == want.keys()
    largest = max(gradient.norm() for gradient in want.values())
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= tolerance * (gradient.norm() + 0.01 * largest), name


def assert_same_step(got, want, tolerance=2e-5):
    torch.testing.assert_close(got[0], want[0], rtol=tolerance, atol=0)
    assert_same_gradients(got[1], want[1], tolerance)


def accelerated(model):
    return fastft.accelerate(copy.deepcopy(model))


def paths(model):
    """path -> calls, of those that were taken."""
    return {path: count for path, count in fastft.report(model).calls.items() if count}
