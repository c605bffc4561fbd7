"""`fastft.LoRALinear`: an nn.Linear to the outside, frozen base, exact merge and unmerge, honest state dicts."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastft
from fastft.testing import record

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def trained(dtype=torch.float32, **options):
    torch.manual_seed(0)
    layer = fastft.LoRALinear(24, 16, dtype=dtype, **{"r": 4, "lora_alpha": 8, **options})
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer


def test_is_positionally_an_nn_linear():
    layer = fastft.LoRALinear(24, 16, False, "cpu", torch.bfloat16)
    assert isinstance(layer, nn.Linear) and layer.bias is None and layer.weight.dtype == torch.bfloat16
    assert layer.r == 8 and layer.lora_alpha == 8 and layer.scaling == 1.0
    assert layer.lora_A.shape == (8, 24) and layer.lora_B.shape == (16, 8)
    assert [n for n, p in fastft.LoRALinear(24, 16).named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert "r=8, lora_alpha=8, lora_dropout=0.0" in repr(layer)


def test_starts_as_the_base_and_runs_the_kernels():
    layer, x = fastft.LoRALinear(24, 16), torch.randn(2, 3, 24)
    with record() as calls:
        y = layer(x)
        y.sum().backward()
    assert torch.equal(y, nn.functional.linear(x, layer.weight, layer.bias))
    assert {c.backend for c in calls} == {"cpu"} and len(calls) == 4, "x needs no gradient, so lora_grad_x_ does not run"
    assert layer.lora_B.grad.abs().sum() > 0 and layer.weight.grad is None and layer.bias.grad is None


def test_scaling():
    assert fastft.LoRALinear(4, 4, r=4, lora_alpha=2).scaling == 0.5
    assert fastft.LoRALinear(4, 4, r=16, lora_alpha=8, use_rslora=True).scaling == 2.0
    layer = fastft.LoRALinear(4, 4, r=0)
    x = torch.randn(3, 4)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer(x).sum().backward()


@pytest.mark.parametrize(
    "options,message",
    [
        ({"r": -1}, "r is -1"),
        ({"r": 2.0}, "r is 2.0"),
        ({"lora_dropout": 2}, "lora_dropout is 2"),
        ({"use_dora": True, "lora_bias": True}, "can't be combined"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fastft.LoRALinear(4, 4, **options)


def test_dropout_acts_in_training_only():
    layer, x = trained(lora_dropout=0.5), torch.randn(4, 24)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_from_linear_shares_the_base():
    linear = nn.Linear(24, 16, dtype=torch.bfloat16).eval()
    layer = fastft.LoRALinear.from_linear(linear, r=2, lora_alpha=4)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert layer.lora_A.dtype == torch.bfloat16 and layer.lora_A.abs().sum() > 0 and layer.scaling == 2.0
    x = torch.randn(3, 24, dtype=torch.bfloat16)
    assert torch.equal(layer(x), linear(x)) and not linear.weight.requires_grad
    assert fastft.LoRALinear.from_linear(nn.Linear(3, 3, bias=False)).bias is None
    with pytest.raises(TypeError, match="Embedding"):
        fastft.LoRALinear.from_linear(nn.Embedding(3, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_is_rounded_once_and_unmerge_is_bit_exact(dtype):
    layer, x = trained(dtype), torch.randn(5, 24, dtype=dtype)
    base = layer.weight.detach().clone()
    exact = base.double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()
    for _ in range(2):
        layer.merge()
        layer.merge()  # twice does nothing
        assert layer.merged
        # One rounding to dtype (half an ulp), and float32's own rounding of the terms before it.
        terms = base.double().abs() + 2.0 * layer.lora_B.double().abs() @ layer.lora_A.double().abs()
        bound = 0.5 * torch.finfo(dtype).eps * exact.abs() + 4 * torch.finfo(torch.float32).eps * terms
        assert ((layer.weight.double() - exact).abs() <= bound + torch.finfo(dtype).smallest_normal).all()
        with record() as calls:
            y = layer(x)
        assert not calls and torch.equal(y, nn.functional.linear(x, layer.weight, layer.bias))
        layer.unmerge()
        layer.unmerge()
        assert torch.equal(layer.weight.view(torch.uint8), base.view(torch.uint8))


def test_merge_is_exact_under_autocast_and_in_float64():
    for dtype in (torch.float32, torch.float64):
        layer, other = trained(dtype), trained(dtype)
        exact = layer.weight.double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()
        with torch.autocast("cpu", torch.bfloat16):
            layer.merge()
        other.merge()
        assert torch.equal(layer.weight, other.weight)
        assert (layer.weight.double() - exact).abs().max() < (1e-14 if dtype == torch.float64 else 1e-5)


def test_from_linear_takes_only_what_a_linear_is():
    attention = nn.MultiheadAttention(8, 2)
    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    for module in (trained(), attention.out_proj, parametrised):
        with pytest.raises(TypeError, match="takes an nn.Linear itself, not"):
            fastft.LoRALinear.from_linear(module)


def test_merging_non_finite_adapters_is_refused():
    layer = trained()
    layer.lora_B.data[0, 0] = float("nan")
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="nothing was merged"):
        layer.merge()
    assert torch.equal(layer.weight, before) and not layer.merged


def test_state_dict_of_a_merged_layer_is_the_pristine_one():
    layer = trained()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.merge()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items()) and set(before) == set(layer.state_dict())
    twin = copy.deepcopy(layer).to(torch.bfloat16)
    twin.unmerge()
    assert torch.equal(twin.weight, before["weight"].to(torch.bfloat16))
    with pytest.raises(RuntimeError, match="unmerge\\(\\) it before"):
        layer.load_state_dict(before)


def test_loading_state_dicts():
    layer, linear = trained(), nn.Linear(24, 16)
    a = layer.lora_A.detach().clone()
    layer.load_state_dict(linear.state_dict())  # a plain Linear's: the adapter stays
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.lora_A, a)
    other = trained()
    nn.init.ones_(other.lora_A)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.lora_A, other.lora_A)
    half = other.state_dict()
    del half["lora_B"]
    with pytest.raises(RuntimeError, match="Missing key.*lora_B"):
        layer.load_state_dict(half)
    with pytest.raises(RuntimeError, match="size mismatch for lora_A"):
        fastft.LoRALinear(24, 16, r=3).load_state_dict(other.state_dict())


def test_nested_in_a_model_that_loads_a_plain_checkpoint():
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model = nn.Sequential(fastft.LoRALinear(8, 8), nn.ReLU(), fastft.LoRALinear(8, 4))
    model.load_state_dict(plain.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(model(x), plain(x))


def test_trains_to_a_target():
    torch.manual_seed(0)
    layer = fastft.LoRALinear(16, 16, r=4, lora_alpha=4)
    target = layer.weight.detach() + torch.randn(16, 2) @ torch.randn(2, 16)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0)
    x = torch.randn(64, 16)
    want = x @ target.t() + layer.bias
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = (layer(x) - want).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0], "a rank-2 target is within a rank-4 adapter's reach"


def test_meta_device_and_to_empty():
    layer = fastft.LoRALinear(8, 4, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(torch.randn(2, 8)).isfinite().all() and not layer.lora_B.any()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_compiles_as_a_module(options, backend):
    layer, x = trained(**options), torch.randn(4, 24)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for _ in range(2):
        got, want = compiled(x), layer(x)
        torch.testing.assert_close(got, want)
        for one, two in zip(torch.autograd.grad(got.sum(), parameters), torch.autograd.grad(want.sum(), parameters)):
            torch.testing.assert_close(one, two)
        with torch.no_grad():  # no value is baked into the graph
            for tensor in layer.parameters():
                tensor.mul_(1.5)


def adapted_weight(layer):
    v = layer.weight.detach().double() + layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    return v * (layer.lora_magnitude.detach().double() / v.norm(dim=1))[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dora(dtype):
    start, x = fastft.LoRALinear(24, 16, dtype=dtype, use_dora=True), torch.randn(5, 24, dtype=dtype)
    assert start.lora_magnitude.dtype == torch.float32 and "use_dora=True" in repr(start)
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 32 * torch.finfo(dtype).eps}
    torch.testing.assert_close(start(x), nn.functional.linear(x, start.weight, start.bias), **tolerance)
    layer = trained(dtype, use_dora=True)
    with torch.no_grad():
        layer.lora_magnitude.mul_(torch.rand(16) + 0.5)
    want, bits = adapted_weight(layer), layer.weight.detach().clone()
    y = layer(x)
    torch.testing.assert_close(y.double(), x.double() @ want.t() + layer.bias.double(), **tolerance)
    y.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude))
    layer.merge()
    assert ((layer.weight.double() - want).abs() <= 0.5 * torch.finfo(dtype).eps * want.abs() + 4e-6).all()
    torch.testing.assert_close(layer(x), y, **tolerance)
    assert torch.equal(layer.state_dict()["weight"], bits)
    layer.unmerge()
    assert torch.equal(layer.weight, bits) and torch.equal(layer(x), y)


def test_dora_of_rank_0_trains_magnitudes():
    layer, x = fastft.LoRALinear(24, 16, r=0, use_dora=True), torch.randn(5, 24)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer(x).sum().backward()
    assert layer.lora_magnitude.grad.all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_on_b(dtype):
    layer, x = trained(dtype, lora_bias=True), torch.randn(5, 24, dtype=dtype)
    assert not layer.lora_bias.any() and "lora_bias=True" in repr(layer)
    without = layer(x)
    nn.init.normal_(layer.lora_bias)
    y, bias = layer(x), layer.bias.detach().clone()
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 32 * torch.finfo(dtype).eps}
    torch.testing.assert_close(y, without + 2.0 * layer.lora_bias, **tolerance)
    y.sum().backward()
    torch.testing.assert_close(layer.lora_bias.grad, torch.full_like(bias, 2.0 * 5))
    layer.merge()
    torch.testing.assert_close(layer.bias, bias + 2.0 * layer.lora_bias.detach(), **tolerance)
    torch.testing.assert_close(layer(x), y, **tolerance)
    assert torch.equal(layer.state_dict()["bias"], bias)
    layer.unmerge()
    assert torch.equal(layer.bias, bias) and torch.equal(layer(x), y)
    bare = fastft.LoRALinear(24, 16, bias=False, lora_bias=True)
    bits = bare.weight.detach().clone()
    with pytest.raises(ValueError, match="no bias that lora_bias could be added to; nothing was merged"):
        bare.merge()
    assert not bare.merged and torch.equal(bare.weight, bits)


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_making_and_loading_with_what_else_is_trained(option):
    linear, x = nn.Linear(24, 16), torch.randn(3, 24)
    want, part = linear(x), "lora_magnitude" if option == "use_dora" else "lora_bias"
    wrapped = fastft.LoRALinear.from_linear(linear, **{option: True})
    made = fastft.LoRALinear(24, 16, **{option: True})
    assert not torch.allclose(made(x), want)
    made.load_state_dict(linear.state_dict())
    moved = fastft.LoRALinear(24, 16, device="meta", **{option: True}).to_empty(device="cpu")
    moved.reset_parameters()
    moved.load_state_dict(linear.state_dict())
    for layer in (wrapped, made, moved, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B", part]
        torch.testing.assert_close(layer(x), want)
    nn.init.ones_(getattr(made, part))
    wrapped.load_state_dict(made.state_dict())
    assert torch.equal(wrapped(x), made(x)) and not torch.allclose(made(x), want)
    half = made.state_dict()
    del half[part]
    with pytest.raises(RuntimeError, match=f"Missing key.*{part}"):
        made.load_state_dict(half)
    assigned = fastft.LoRALinear(24, 16, device="meta", **{option: True})
    assigned.load_state_dict(linear.state_dict(), assign=True)
    assert torch.equal(assigned.weight, linear.weight) and getattr(assigned, part).is_meta
