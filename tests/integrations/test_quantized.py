"""Adapters on quantised bases: the base computes itself, and its output and gradients stay; PEFT's QLoRA gives the same."""

import copy

import pytest
import torch
from torch import nn

import fastft
from fastft.modules.adapted_quantized import AdaptedQuantized
from fastft.modules.quantized import dequantized, quantization
from tests import golden
from tests.methods.models import attached, gpt2, llama, logits, randomize, tokens, transformers

from .quantized import KINDS, QuantLinear, bits, quantized

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:lora_bias"),
    pytest.mark.filterwarnings("ignore:.*get_apply_tensor_subclass"),
]
OPS = {"lora_shrink", "lora_expand_", "lora_grad_sb", "lora_grad_a", "lora_grad_x_"}
each_kind = pytest.mark.parametrize("kind", KINDS)
ids = tokens()


def loss_and_gradients(model):
    """Of the trainable parameters, by name."""
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# ---- one layer


def formula(s, x, a, b, c, y0, dx0, dy):
    """What a layer gives with an adapter, and the gradients, from what its base gives: y0 and dx0."""
    h, g = x @ a.t(), dy @ b
    y, dx = y0 + s * (h @ b.t() + c), dx0 + s * (g @ a)
    return {"y": y, "dX": dx, "dA": s * (g.t() @ x), "dB": s * (dy.t() @ h), "dc": s * dy.sum(0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_kind
def test_a_layer_is_its_base_plus_the_formula(kind, dtype):
    torch.manual_seed(1)
    model = quantized(kind, nn.Sequential(nn.Linear(64, 96)).to(dtype))
    x, dy = torch.randn(15, 64).to(dtype).requires_grad_(), torch.randn(15, 96).to(dtype)
    y0 = model(x)
    (dx0,) = torch.autograd.grad(y0, x, dy)
    handle = fastft.attach(model, fastft.LoRA(r=3, lora_alpha=4, target_modules=["0"], lora_bias=True))
    randomize(handle)
    factors = list(handle.parameters())
    assert {factor.dtype for factor in factors} == {torch.float32}
    with fastft.testing.record() as calls:
        y = model(x)
        got = dict(zip(("y", "dX", "dA", "dB", "dc"), (y, *torch.autograd.grad(y, (x, *factors), dy))))
    assert {call.op for call in calls} == OPS and {call.backend for call in calls} == {"cpu"}
    operands = [t.detach() for t in (x, *factors, y0, dx0, dy)]
    plain = formula(4 / 3, *(t.float() for t in operands))
    want = formula(4 / 3, *(t.double() for t in operands))
    size = formula(4 / 3, *(t.double().abs() for t in operands))
    for what, value in got.items():
        golden.assert_close(value, want[what], plain[what].to(value.dtype), size[what], what)
    handle.detach()
    assert torch.equal(model(x), y0)


def test_the_dtype_of_the_output_is_the_bases(monkeypatch):
    """Also under autocast, where bitsandbytes returns what it was given."""
    model = quantized("nf4", nn.Sequential(nn.Linear(64, 64)))
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        handle = fastft.attach(model, fastft.LoRA(target_modules=["0"]))
        assert torch.equal(model(x), before) and model(x).dtype == before.dtype
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: before.half())
    monkeypatch.setattr(model[0].plain, "forward", lambda self, x: before.half())
    assert model(x).dtype == torch.float16
    randomize(handle)
    assert model(x).dtype == torch.float16


# ---- a model


@each_kind
def test_the_handle(kind):
    model = quantized(kind, llama())
    base, state = loss_and_gradients(model)[0], bits(model)  # bitsandbytes' int8 arranges its state in the first forward
    classes = {name: type(module) for name, module in model.named_modules()}
    plain = logits(model)
    one = fastft.attach(model, fastft.LoRA(r=4, target_modules="all-linear"))
    assert len(one.targets) == 14 and all(isinstance(module, AdaptedQuantized) for module in one.targets.values())
    row = fastft.report(model)["model.layers.0.self_attn.o_proj"]
    what = quantization(one.targets[row.name])
    assert (row.path, row.reason) == ("low-rank part", f"the base layer is quantised ({what})")
    assert torch.equal(logits(model), plain)
    randomize(one)
    with fastft.testing.record() as calls:
        trained, gradients = loss_and_gradients(model)
    assert trained != base and len(gradients) == 28
    # q, k and v share one read of their input, and gate and up; the first group's input needs no gradient
    ran = [call.op for call in calls]
    assert ran.count("lora_shrink") == 8 and ran.count("lora_expand_") == 14 and ran.count("lora_grad_x_") == 7
    assert all(group.grouped for group in one.groups)

    apart = copy.deepcopy(model)
    for group in fastft.methods.handles(apart)["default"]._groups:
        group.reason = "in this test"
    for key, value in loss_and_gradients(apart)[1].items():
        torch.testing.assert_close(value, gradients[key])

    only_one = logits(model)
    two = attached(model, "two", seed=4, target_modules=["q_proj", "up_proj"])
    both = logits(model)
    assert not torch.equal(both, only_one)
    with two.disabled():
        assert torch.equal(logits(model), only_one)
        with one.disabled():
            assert torch.equal(logits(model), plain)
    copied = copy.deepcopy(model)
    one.set_active(False)
    alone = logits(model)
    one.set_active(True)
    assert torch.equal(logits(model), both) and torch.equal(logits(copied), both) and not torch.equal(alone, both)
    assert {key for key in bits(model) if "lora_" not in key} == set(state)
    two.detach()
    assert torch.equal(logits(model), only_one)
    one.detach()
    assert same(bits(model), state) and torch.equal(logits(model), plain)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    fastft.methods.handles(copied)["two"].detach()
    assert torch.equal(logits(copied), only_one)


def test_trained_biases_and_checkpointing():
    model = quantized("nf4", llama())
    handle = attached(model, bias="lora_only")
    loss, gradients = loss_and_gradients(model)
    assert sum(name.endswith("bias") for name in gradients) == 14
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    again, recomputed = loss_and_gradients(model)
    assert loss == again and same(gradients, recomputed)
    with handle.disabled():
        unchanged = logits(model)
    handle.detach()
    assert torch.equal(logits(model), unchanged)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao"])  # PEFT asks for gptqmodel itself
def test_equal_to_peft(kind, tmp_path):
    peft = pytest.importorskip("peft")
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}
    torch.manual_seed(2)
    theirs = peft.get_peft_model(quantized(kind, llama()), peft.LoraConfig(**options)).train()
    torch.manual_seed(2)
    same_start = fastft.attach(quantized(kind, llama()), fastft.LoRA(**options))
    start = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    for (_, ours), (name, value) in zip(sorted(same_start.named_parameters()), sorted(start.items())):
        assert torch.equal(ours, value), name
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in start.values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = quantized(kind, llama()).train()
    handle = fastft.load(ours, tmp_path / "theirs")
    optimizers = handle.optimizer(lr=1e-2), torch.optim.AdamW(start.values(), lr=1e-2, weight_decay=0)
    for _ in range(3):
        losses = [loss_and_gradients(model)[0] for model in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
        for optimizer in optimizers:
            optimizer.step()
    handle.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(quantized(kind, llama()), tmp_path / "ours").train()  # see the next test
    torch.testing.assert_close(logits(again), logits(ours), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-5)


# ---- merging


@each_kind
def test_merging_needs_a_target(kind):
    model = quantized(kind, llama())
    before = bits(model)
    handle = attached(model, target_modules=["q_proj", "lm_head"], lora_bias=True, exclude_modules=["lm_head"])
    other = attached(model, "other", seed=5, target_modules=["v_proj", "q_proj"])
    model.train()  # in evaluation bitsandbytes' int8 rounds the activations too
    want, what = logits(model), quantization(model.model.layers[0].self_attn.q_proj)
    for merge in (handle.merge, handle.merge_and_unload):
        with pytest.raises(ValueError, match=rf"into 'model.layers.0.self_attn.q_proj': its weight is quantised \({what}\)"):
            merge()
        with pytest.raises(ValueError, match=r"target=\"dequantized\".*unquantised checkpoint.*fastft merge"):
            merge()
    for target in ("int8", "nf4", torch.int8, True):
        with pytest.raises(ValueError, match='it must be "dequantized" or one of'):
            handle.merge_and_unload(target=target)
    assert same(before, {key: value for key, value in bits(model).items() if "lora_" not in key})
    assert torch.equal(logits(model), want)

    q = model.model.layers[1].self_attn.q_proj
    scale, a, b = handle.method.scale(""), q.lora_A["default"].detach(), q.lora_B["default"].detach()
    summed, bias = torch.addmm(dequantized(q), b, a, alpha=scale), q.bias + scale * q.lora_bias["default"]
    assert handle.merge_and_unload(target="dequantized") is model
    assert not [name for name, module in model.named_modules() if quantization(module) is not None]
    assert torch.equal(q.weight, summed) and torch.equal(q.bias, bias.detach())
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    other.merge()  # which works on what is plain now
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    other.merge_and_unload(target=torch.bfloat16)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert set(model.state_dict()) == set(llama().state_dict())
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "proj.weight" in name)


@pytest.mark.parametrize("target", ["dequantized", torch.float16])
def test_a_delta_is_rounded_once(target):
    model = quantized("nf4", llama().bfloat16())
    handle = attached(model, target_modules=["q_proj"])
    q = model.model.layers[0].self_attn.q_proj
    a, b = q.lora_A["default"].detach(), q.lora_B["default"].detach()
    want = torch.addmm(dequantized(q), b, a, alpha=handle.method.scale("")).to(
        torch.bfloat16 if target == "dequantized" else target
    )
    kept = dequantized(model.model.layers[0].self_attn.k_proj)
    handle.merge_and_unload(target=target)
    assert torch.equal(q.weight, want)
    assert torch.equal(model.model.layers[0].self_attn.k_proj.weight, kept.to(want.dtype))


@pytest.mark.parametrize("four", [True, False], ids=["nf4", "int8"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_what_transformers_quantised_becomes_a_plain_checkpoint(make, four, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    size = {"n_embd": 32} if make is gpt2 else {"hidden_size": 32, "intermediate_size": 48}
    make(**size).save_pretrained(tmp_path / "base")
    config = transformers.BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=not four, bnb_4bit_quant_type="nf4")
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "base", quantization_config=config, dtype=torch.float32, device_map="cpu")
    handle = attached(model)
    loss_and_gradients(model.train())
    model.eval()
    for module in handle.targets.values():
        assert quantization(module) == f"bitsandbytes {4 if four else 8}-bit"
    handle.merge_and_unload(target="dequantized").save_pretrained(tmp_path / "merged")
    plain = auto.from_pretrained(tmp_path / "merged")
    assert not hasattr(model.config, "quantization_config") and not getattr(plain, "is_quantized", False)
    assert same(plain.state_dict(), model.state_dict())
    assert {type(m).__name__ for m in plain.modules()} == {type(m).__name__ for m in make(**size).modules()}


# ---- refusals


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (fastft.LoRA(target_modules=["q_proj"], use_dora=True), "use_dora: .*quantised.*norms of its rows"),
        (fastft.LoRA(target_modules="all-linear", pack_weights=True), "pack_weights: .* quantised"),
        (
            fastft.LoRA(target_modules=["q_proj"], modules_to_save=["up_proj"]),
            "modules_to_save matches .*codes can't be trained",
        ),
        (fastft.S2FT(), "the weight of .* is quantised .*train where they stand"),
    ],
)
@each_kind
def test_what_needs_weights_is_refused(kind, method, message):
    model = quantized(kind, llama())
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        fastft.attach(model, method)
    assert same(bits(model), before) and not fastft.methods.handles(model)


def test_an_adapter_of_slices_is_not_loaded(tmp_path):
    fastft.attach(llama(), fastft.S2FT(down_ratio=0.5)).save(tmp_path)
    with pytest.raises(ValueError, match="down_proj' is quantised .*: S2FT trains the weight where it stands"):
        fastft.load(quantized("gptq", llama()), tmp_path)


def test_a_kernel_without_a_backward_is_refused_when_it_would_be_needed(monkeypatch):
    model = quantized("gptq", llama())
    attached(model)
    forward = QuantLinear.forward
    monkeypatch.setattr(QuantLinear, "forward", lambda self, x: forward(self, x.detach()))
    with torch.no_grad():
        model(ids)
    with pytest.raises(RuntimeError, match="has no backward"):
        model(ids, labels=ids)


def test_a_layer_that_cannot_be_dequantised(monkeypatch):
    model = quantized("gptq", llama())
    handle = attached(model, target_modules=["q_proj"])
    monkeypatch.delattr(QuantLinear, "dequantize_weight")
    with pytest.raises(ValueError, match="can't be dequantised: .* has no dequantize_weight"):
        handle.merge_and_unload(target="dequantized")
    assert handle.attached


def test_evaluation_does_not_rearrange_what_trains(monkeypatch):
    """bitsandbytes does on CPUs that have AVX512-BF16, with 16-bit scales and without a backward."""
    model = quantized("nf4", nn.Sequential(nn.Linear(64, 64)))
    model[0].support_avx512bf16_for_cpu = True
    before = bits(model)
    handle = fastft.attach(model, fastft.LoRA(target_modules=["0"]))
    x = torch.randn(3, 64)
    model.eval()(x)
    model.train()(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    handle.detach()
    assert same(bits(model), before) and model[0].support_avx512bf16_for_cpu
