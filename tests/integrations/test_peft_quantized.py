"""PEFT's LoRA layers on quantised weights, accelerated: the base layer computes itself, the numbers stay PEFT's."""

import copy

import pytest
import torch

import fastft
from fastft.integrations.peft import FallbackError
from tests.integrations.peft_models import accelerated, assert_same_step, paths, peft, randomize, step
from tests.integrations.quantized import QuantLinear, bits, quantized
from tests.methods.models import llama, tokens

CLASSES = {"nf4": "Linear4bit", "int8": "Linear8bitLt", "torchao": "TorchaoLoraLinear", "gptq": "GPTQLoraLinear"}
each_kind = pytest.mark.parametrize("kind", CLASSES)
LAYERS = 2


def model(kind, dtype=torch.float32, **config):
    """A small Llama as PEFT makes it of one that transformers loaded quantised."""
    base = quantized(kind, llama().to(dtype))
    base.is_loaded_in_4bit, base.is_loaded_in_8bit = kind == "nf4", kind == "int8"
    config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", **config})
    if kind == "gptq":
        _use_gptq_layers(base, config)
    else:
        base = peft.get_peft_model(base, config)
    found = {type(m).__name__ for m in base.modules() if hasattr(m, "lora_A")}
    assert found == {CLASSES[kind]}
    return randomize(base).train()  # in evaluation bitsandbytes' int8 rounds the activations too


class Quantized(QuantLinear):
    weight = None  # PEFT takes a weight that there is for a tensor


def _use_gptq_layers(base, config):
    """PEFT makes them of gptqmodel's own classes alone, which the stand-in's is not."""
    from peft.tuners.lora.gptq import GPTQLoraLinear

    for name, layer in list(base.named_modules()):
        if type(layer) is QuantLinear:
            layer.__class__ = Quantized
            own = {"r": config.r, "lora_alpha": config.lora_alpha}
            base.set_submodule(name, GPTQLoraLinear(layer, "default", config=config, **own))
    for name, parameter in base.named_parameters():
        parameter.requires_grad_("lora_" in name)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training(kind, dtype):
    plain = model(kind, dtype)
    fast = accelerated(plain)
    assert {row.path for row in fastft.report(fast)} == {"low-rank part"}, fastft.report(fast)
    before = bits(fast)
    with fastft.testing.record() as calls:
        got = step(fast)
    ops = [call.op for call in calls]
    assert ops.count("lora_shrink") == 4 * LAYERS  # q, k and v share, gate and up
    assert ops.count("lora_expand_") == 7 * LAYERS
    assert set(paths(fast)) == {"low-rank part"}
    want = step(plain)
    if dtype == torch.float32:
        assert_same_step(got, want)
    else:
        golden = step(copy.deepcopy(plain).float()) if kind == "gptq" else want
        assert got[0] == pytest.approx(golden[0].item(), rel=0.01)
        assert_alike(got[1], want[1])
    assert all(torch.equal(value, before[name]) for name, value in bits(fast).items())


def assert_alike(got, want):
    """Of 16-bit steps: as directions, since single small numbers differ by luck."""
    assert got.keys() == want.keys()
    a, b = (torch.cat([grads[name].flatten().float() for name in sorted(grads)]) for grads in (got, want))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.995


@each_kind
def test_dropout_options_and_what_is_left_to_peft(kind):
    fast = fastft.accelerate(model(kind, lora_dropout=0.5, use_rslora=True))
    torch.manual_seed(1)
    first = step(fast)[0]
    assert step(fast)[0] != first
    torch.manual_seed(1)
    assert step(fast)[0] == first
    if kind == "gptq":
        return  # has no other options
    plain = model(kind, use_dora=True)
    fast = accelerated(plain)
    (reason,) = {row.reason for row in fastft.report(fast)}
    assert "DoRA on a base layer that computes itself" in reason
    assert_same_step(step(fast), step(plain))
    with pytest.raises(FallbackError, match="DoRA"):
        step(fastft.accelerate(fast, strict=True))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_switching_merging_and_undoing(kind):
    plain = model(kind, target_modules=["q_proj", "v_proj"], lora_bias=False)
    plain.add_adapter("b", peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    randomize(plain)
    classes = [type(m) for m in plain.modules()]
    fast = accelerated(plain)
    for name in ("b", "default"):
        for m in (plain, fast):
            m.set_adapter(name)
        assert_same_step(step(fast), step(plain))
    with plain.disable_adapter(), fast.disable_adapter(), torch.no_grad():
        assert torch.equal(fast(input_ids=tokens()).logits, plain(input_ids=tokens()).logits)
    for m in (plain, fast):
        m.merge_adapter()
    with torch.no_grad():
        assert torch.equal(fast(input_ids=tokens()).logits, plain(input_ids=tokens()).logits)
    assert [type(m) for m in fastft.restore(fast).modules()] == classes


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao"])
def test_mixed_batches(kind):
    plain = model(kind)
    plain.add_adapter("b", peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    randomize(plain).eval()
    fast = accelerated(plain)
    names = ["default", "__base__", "b", "default"]
    with torch.no_grad(), fastft.testing.record() as calls:
        got = fast(input_ids=tokens(4), adapter_names=names).logits
    assert sum(call.op in ("grouped_add_", "grouped_expand_") for call in calls) == 7 * LAYERS
    with torch.no_grad():
        want = plain(input_ids=tokens(4), adapter_names=names).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
