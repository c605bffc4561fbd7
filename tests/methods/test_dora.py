"""DoRA and a bias on B: PEFT's numbers, dropout, autocast, what is kept of the norm, copies, compiling."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastft
from fastft.modules import norms
from fastft.ops.lora import lora_shrink

from .layers import PAIRS, Layers, adapted, into_peft, merged_weight
from .models import gpt2, llama, logits, tokens

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")

KINDS = [{"use_dora": True}, {"lora_bias": True}]


@pytest.mark.filterwarnings("ignore:lora_bias", "ignore:`lora_bias=True`")
@pytest.mark.parametrize("options", KINDS)
def test_loss_and_gradients_are_pefts(options):
    model, handle = adapted(**options)
    theirs, twins = into_peft([handle])
    x, dy = torch.randn(2, 5, 12), torch.randn(2, 5, 10)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    got, want = model(inputs[0]), theirs(inputs[1])
    torch.testing.assert_close(got, want)
    (got * dy).sum().backward()
    (want * dy).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    part = "lora_magnitude" if "use_dora" in options else "lora_bias"
    assert {name.split(".")[1] for name in twins} == {"lora_A", "lora_B", part} and len(twins) == 9
    for name, value in handle.named_parameters():
        assert value.grad.abs().sum() > 0
        torch.testing.assert_close(value.grad, twins[name].grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("init", [True, False])
def test_the_same_seed_gives_pefts_start(make, options, init):
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": init, **options}
    mine, theirs = make(), make()
    torch.manual_seed(7)
    handle = fastft.attach(mine, fastft.LoRA(**options))
    torch.manual_seed(7)
    state = peft.get_peft_model_state_dict(peft.get_peft_model(theirs, peft.LoraConfig(**options)))
    seen = 0
    for name, value in handle.named_parameters():
        path, part, _ = name.rsplit(".", 2)
        expected = state[handle.method.target_key(path, part)]
        if part == "lora_magnitude":
            torch.testing.assert_close(value.data, expected, rtol=1e-6, atol=0)
        else:
            assert torch.equal(value, expected), name
        seen += part in ("lora_magnitude", "lora_bias")
    assert seen == len(handle.targets) and len(state) == 3 * seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_training_gives_pefts_losses(make, dtype):
    options = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "use_dora": True}
    mine, theirs = make().to(dtype), make().to(dtype)
    torch.manual_seed(7)
    handle = fastft.attach(mine, fastft.LoRA(**options))
    torch.manual_seed(7)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**options))
    trained = [p for p in theirs.parameters() if p.requires_grad]
    both = [
        (mine, handle.optimizer(lr=1e-2)),
        (theirs, torch.optim.AdamW(trained, lr=1e-2, weight_decay=0, fused=True)),
    ]
    losses = []
    for model, optimizer in both:
        model.train()
        losses.append([])
        for step in range(5):
            x = tokens(4, 12, seed=step)
            loss = model(input_ids=x, labels=x).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    one, two = torch.tensor(losses, dtype=torch.float64)
    assert one[-1] != one[0]
    assert (one - two).abs().max() <= (1e-5 if dtype == torch.float32 else 2**-6), losses


def test_starts_as_the_base():
    for make in (llama, lambda: llama().bfloat16(), gpt2):
        model = make()
        plain = logits(model)
        fastft.attach(model, fastft.LoRA(target_modules="all-linear", use_dora=True))
        torch.testing.assert_close(logits(model), plain, rtol=0, atol=2**-5 if plain.dtype == torch.bfloat16 else 1e-5)


def test_the_magnitude_stays_float32_beside_16_bit_factors():
    handle = adapted(torch.bfloat16, use_dora=True, adapter_dtype=torch.bfloat16)[1]
    dtypes = {name.split(".")[1]: value.dtype for name, value in handle.named_parameters()}
    assert dtypes == {"lora_A": torch.bfloat16, "lora_B": torch.bfloat16, "lora_magnitude": torch.float32}


@pytest.mark.filterwarnings("ignore:lora_bias", "ignore:`lora_bias=True`", "ignore:Already found")
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_active_adapters_are_pefts(first, second):
    model, one = adapted(**first)
    model, two = adapted(seed=5, model=model, name="two", **second)
    theirs, twins = into_peft([one, two])
    x, dy = torch.randn(2, 5, 12), torch.randn(2, 5, 10)
    got, want = model(x), theirs(x)
    torch.testing.assert_close(got, want)
    (got * dy).sum().backward()
    (want * dy).sum().backward()
    for handle in (one, two):
        for name, value in handle.named_parameters():
            assert value.grad.abs().sum() > 0
            torch.testing.assert_close(value.grad, twins[name].grad, msg=lambda text, name=name: f"{name}: {text}")


def test_dropout_acts_on_the_low_rank_term_alone():
    model = adapted(use_dora=True, lora_dropout=0.4)[0]
    for layer in (model.a, model.c):
        x = torch.randn(6, layer.weight.shape[0 if layer.fan_in_fan_out else 1])
        torch.manual_seed(5)
        y = layer(x)
        torch.manual_seed(5)
        seed = torch.randint(2**62, (1,))
        a, b, m = (getattr(layer, part)["default"].detach() for part in ("lora_A", "lora_B", "lora_magnitude"))
        s = lora_shrink(x, a, [4], 0.4, seed)[0]
        assert not torch.allclose(s, x @ a.t())
        w = layer.weight.t() if layer.fan_in_fan_out else layer.weight
        g = m / (w + 1.5 * b @ a).norm(dim=1)
        torch.testing.assert_close(y, g * (x @ w.t() + 1.5 * s @ b.t()) + layer.bias)
        layer.eval()
        torch.testing.assert_close(layer(x), g * (x @ w.t() + 1.5 * x @ a.t() @ b.t()) + layer.bias)


def test_autocast_keeps_the_norm_in_float32():
    model, handle = adapted(use_dora=True)
    x = torch.randn(4, 12)
    want = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
        merged = copy.deepcopy(model)
        fastft.methods.handles(merged)["default"].merge()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.1)
    got.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in handle.parameters())
    handle.merge()
    assert torch.equal(merged.a.weight, model.a.weight)


def test_the_norm_of_the_frozen_weight_is_computed_once_and_never_stale(monkeypatch):
    computed, real = [], norms.squared_row_norm
    monkeypatch.setattr(norms, "squared_row_norm", lambda *args: computed.append(args) or real(*args))
    model, handle = adapted(use_dora=True, target_modules=["a"])
    x, optimizer = torch.randn(3, 12), handle.optimizer(lr=0.1)
    computed.clear()

    def fresh():
        y, layer = model(x), model.a
        w, base = merged_weight(layer), nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(
            model.c(torch.tanh(model.b(torch.tanh(x @ w.float().t() + layer.bias)))), y, rtol=1e-4, atol=1e-4
        )
        return base

    for _ in range(3):  # A, B and m change without their versions: the optimizer is fused
        fresh()
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(computed) == 1
    with torch.no_grad():
        model.a.weight.mul_(2)
    fresh()
    model.a.weight.data = model.a.weight.data * 3
    fresh()
    model.a.weight = nn.Parameter(model.a.weight.data.clone() * 2, requires_grad=False)
    fresh()
    assert len(computed) == 4
    with torch.no_grad():
        model.a.weight.mul_(0.5)
    with torch.inference_mode():  # what is kept from here must do in training
        fresh()
    model(x).sum().backward()
    model.a.weight.requires_grad_()  # whoever trains it may use a fused optimizer too
    other = torch.optim.AdamW([model.a.weight], lr=0.1, fused=True)
    for _ in range(2):
        fresh()
        model(x).sum().backward()
        other.step()
    model.a.weight.requires_grad_(False)
    fresh()
    assert not [key for key in model.state_dict() if "norm" in key]


def test_copies_moves_and_pickles():
    model = adapted(use_dora=True)[0]
    x = torch.randn(3, 12)
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
        with torch.no_grad():
            twin.a.weight.add_(1)
        assert not torch.allclose(twin(x), y) and torch.equal(model(x), y)
    half = copy.deepcopy(model).to(torch.bfloat16)
    torch.testing.assert_close(half(x.bfloat16()).float(), y, rtol=0.1, atol=0.3)
    torch.testing.assert_close(half.float()(x), y, rtol=0.1, atol=0.3)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.filterwarnings("ignore:lora_bias")
def test_compiles_in_one_graph(backend, options):
    model, handle = adapted(**options)
    x, dy = torch.randn(3, 12, requires_grad=True), torch.randn(3, 10)
    inputs = [x, *handle.parameters()]
    want = model(x)
    gradients = torch.autograd.grad(want, inputs, dy)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    got = compiled(x)
    torch.testing.assert_close(got, want)
    for one, two in zip(torch.autograd.grad(got, inputs, dy), gradients):
        torch.testing.assert_close(one, two)
    with torch.no_grad():  # no value is baked into the graph
        for tensor in (model.a.weight, *handle.parameters()):
            tensor.mul_(1.5)
    torch.testing.assert_close(compiled(x), model(x))


def test_two_adapters_compile_in_one_graph():
    model, one = adapted()
    model, two = adapted(seed=5, model=model, name="two", use_dora=True, lora_dropout=0.3)
    x = torch.randn(3, 12)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert not torch.allclose(compiled(x), compiled(x))  # dropout
    model.eval()
    for handle in (one, two):
        torch.testing.assert_close(compiled(x), model(x))
        with handle.disabled():
            torch.testing.assert_close(compiled(x), model(x))
        handle.merge()
        torch.testing.assert_close(compiled(x), model(x))


def test_a_row_of_zeros_stays_zero():
    model = Layers()
    with torch.no_grad():
        model.a.weight[3] = 0
    handle = fastft.attach(model, fastft.LoRA(target_modules=["a"], use_dora=True))
    x = torch.randn(3, 12)
    y = model.a(x)
    assert y.isfinite().all() and torch.equal(y[:, 3], model.a.bias[3].expand(3))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in handle.parameters())
    handle.merge()
    assert torch.equal(model.a.weight[3], torch.zeros(12))
