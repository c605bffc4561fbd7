"""Accelerated PEFT layers compute what PEFT computes: outputs and gradients against PEFT's own in float64."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastft
from tests.golden import assert_close
from tests.integrations.peft_models import K, N, accelerated, assert_same_step, layer, one, paths, peft_llama, step

conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def run(lin, x, dy, context=None):
    """Output and gradients of a layer, x's if it wants one."""
    lin.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_(x.requires_grad)
    with context or nullcontext():
        y = lin(x)
    y.backward(dy.to(y.dtype))
    gradients = {name: p.grad for name, p in lin.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **({"x": x.grad} if x.requires_grad else {}), **gradients}


def magnitudes(lin, x, dy):
    """Sums of the absolute values of the terms of each result; a magnitude's factor scales them."""
    lin = copy.deepcopy(lin).double()
    with torch.no_grad():
        for parameter in lin.parameters():
            parameter.abs_()
        scaling = {name: scale * 1.0 for name, scale in lin.scaling.items()}
        lin.scaling.update({name: abs(scale) for name, scale in scaling.items()})
    return {name: t.abs() * 2 for name, t in run(lin, x.double().abs().requires_grad_(x.requires_grad), dy.abs()).items()}


def check(model, x, path="fused", context=None, dy_seed=1, factor=1):
    """Ours beside PEFT's own layer, both measured against PEFT's in float64."""
    lin = one(model)
    dy = torch.randn(*x.shape[:-1], lin.out_features, generator=torch.Generator().manual_seed(dy_seed)).to(x.dtype)
    wide = copy.deepcopy(lin).double()
    wide.scaling.update({name: scale * 1.0 for name, scale in wide.scaling.items()})
    want = run(wide, x.double().requires_grad_(x.requires_grad), dy.double())
    plain = run(lin, x, dy, context)
    sizes = magnitudes(lin, x, dy)
    fast = accelerated(model)
    got = run(one(fast), x, dy, context)
    assert paths(fast) == {path: 1}, str(fastft.report(fast))
    assert got.keys() == plain.keys() == want.keys()
    for name, value in got.items():
        assert value.dtype == plain[name].dtype, name
        assert_close(value, want[name], plain[name], sizes[name] * factor, name)


def inputs(*lead, dtype=FP32, grad=True):
    return torch.randn(*lead, K, generator=torch.Generator().manual_seed(5)).to(dtype).requires_grad_(grad)


CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "dropout in evaluation": {"lora_dropout": 0.5},
    "two": {"adapters": ("default", "b")},
    "three of several kinds": {
        "adapters": ("default", "b", "c"),
        "configs": {"b": {"use_dora": True, "r": 2}, "c": {"lora_bias": True, "r": 9}},
    },
}


@pytest.mark.parametrize("conv", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_options(config, conv):
    options = {**CONFIGS[config], **({"fan_in_fan_out": True} if conv else {})}
    base = None
    if conv:
        torch.manual_seed(0)
        base = conv1d(N, K)
        nn.init.normal_(base.bias)
    check(layer(base, **options).eval(), inputs(3, 7))


def test_the_short_way_and_the_general_one(monkeypatch):
    """The commonest case is decided on a way of its own; the general one must give the same."""
    model, x = layer(lora_dropout=0.5), inputs(5)
    lin = one(accelerated(model))
    assert lin._commonest(x) is not None
    torch.manual_seed(0)
    short = lin(x)
    monkeypatch.setattr(type(lin), "_commonest", lambda self, x: None)
    torch.manual_seed(0)
    assert torch.equal(lin(x), short)
    for p in (0.0, 0.5):
        check(layer(lora_dropout=p).eval(), x)
        check(layer(lora_dropout=p, dtype=BF16).eval(), inputs(5, dtype=BF16))


@pytest.mark.parametrize("kind", [BF16, FP16], ids=str)
@pytest.mark.parametrize("keep_fp32", [True, False], ids=["float32 adapters", "16-bit adapters"])
@pytest.mark.parametrize("config", [{}, {"lora_bias": True}, {"adapters": ("default", "b")}], ids=str)
def test_16_bit(kind, keep_fp32, config):
    check(layer(dtype=kind, keep_fp32=keep_fp32, **config), inputs(3, 7, dtype=kind))


def test_16_bit_dora():
    check(layer(dtype=BF16, use_dora=True), inputs(3, 7, dtype=BF16), factor=4)


def test_no_float32_copy_of_x():
    """What backward keeps, with float32 adapters on a bfloat16 base: PEFT keeps x a second time, in float32."""
    model = layer(nn.Linear(K, N), dtype=BF16)
    x = inputs(50, dtype=BF16)
    kept = {}
    for name, lin in (("peft", one(model)), ("ours", one(accelerated(model)))):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            lin(x)
        held = {p.data_ptr() for p in (x, *lin.parameters())}
        kept[name] = sum(t.nbytes for t in {t.data_ptr(): t for t in saved}.values() if t.data_ptr() not in held)
    assert kept["peft"] - kept["ours"] >= x.numel() * 4


@pytest.mark.parametrize("base_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("input_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("config", [{}, {"lora_bias": True}], ids=str)
def test_autocast(base_dtype, input_dtype, config):
    context = torch.autocast("cpu", BF16)
    check(layer(dtype=base_dtype, **config), inputs(3, 7, dtype=input_dtype), context=context)


@pytest.mark.parametrize("lead", [(), (1,), (0,), (0, 5), (2, 3, 4), (1, 1, 2, 3)], ids=str)
def test_leading_dimensions(lead):
    check(layer(), inputs(*lead))


def test_strides_and_inputs_without_gradient():
    model = layer()
    check(model, inputs(7, 3).transpose(0, 1).detach().requires_grad_())
    check(model, inputs(6)[::2].detach().requires_grad_())
    check(model, inputs(1).expand(4, K).detach().requires_grad_())
    check(model, inputs(3, grad=False))


def test_parameters_held_as_attributes():
    """As DataParallel's replicas and FSDP do."""
    model, x = layer(lora_bias=True), inputs(3)
    lin = one(fastft.accelerate(copy.deepcopy(model)))
    for part in (lin.base_layer, lin.lora_A["default"], lin.lora_B["default"]):
        held = dict(part._parameters)
        part._parameters.clear()
        part.__dict__.update({name: t if t is None else t.data for name, t in held.items()})
    torch.testing.assert_close(lin(x), one(model)(x))
    assert lin._fastft.fused == 1


def test_what_trains_decides():
    """Frozen factors, a trained base bias (PEFT's bias="lora_only") and a trained base weight."""
    for names in (["lora_B"], ["lora_A"], ["lora_", "base_layer.bias"], ["lora_", "base_layer"]):
        model = layer()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in names))
        check(model, inputs(5))
    for config in ({}, {"adapters": ("default", "b")}):
        model = layer(**config)
        with torch.no_grad():
            x, fast = inputs(5), accelerated(model)
            torch.testing.assert_close(one(fast)(x), one(model)(x))
        assert paths(fast) == {"fused": 1}


def test_scaling_tensors():
    model = layer(lora_bias=True, adapters=("default", "b"))
    one(model).scaling.update(default=torch.tensor(0.75), b=torch.tensor(-2.0, dtype=torch.float64))
    check(model, inputs(4))
    model = layer(dtype=BF16, keep_fp32=False)
    one(model).scaling["default"] = torch.tensor(0.7)
    check(model, inputs(4, dtype=BF16))
    model = layer()
    one(model).scaling["default"] = torch.tensor(0.7)
    fast, x, zero = accelerated(model), inputs(4), torch.tensor(0.0)
    one(fast).scaling["default"] = zero  # read at every call
    assert torch.equal(one(fast)(x), one(fast).base_layer(x))
    zero.fill_(0.7)
    torch.testing.assert_close(one(fast)(x), one(model)(x))


def test_adapters_narrower_than_the_input():
    model = layer()
    one(model).lora_A.to(BF16)
    one(model).lora_B.to(BF16)
    check(model, inputs(5))


# ---- dropout


def test_dropout():
    """A mask of its own in every call, as often as asked, repeatable by the seed; none in evaluation."""
    model = layer(lora_dropout=0.25)
    fast = accelerated(model).train()
    lin, x = one(fast), torch.ones(4000, K)
    with torch.no_grad():  # each column of A sees one feature, so that masks can be read off
        lin.lora_A["default"].weight.copy_(torch.eye(5, K))
        lin.lora_B["default"].weight.copy_(torch.eye(N, 5))

    def mask():
        return ((lin(x) - lin.base_layer(x))[:, :5] / lin.scaling["default"]).detach()

    torch.manual_seed(1)
    first, second = mask(), mask()
    torch.manual_seed(1)
    assert torch.equal(first, mask())
    assert not torch.equal(first, second)
    kept = first.abs() > 0.5
    torch.testing.assert_close(first[kept], torch.full_like(first[kept], 1 / 0.75), rtol=1e-4, atol=0)
    assert abs(kept.double().mean() - 0.75) < 5 * (0.25 * 0.75 / kept.numel()) ** 0.5
    assert paths(fast) == {"fused": 3}
    fast.eval()
    torch.testing.assert_close(mask(), torch.ones(4000, 5), rtol=1e-4, atol=1e-5)
    fast.train()
    lin.lora_dropout["default"].p = 1.0
    assert torch.equal(lin(x), lin.base_layer(x))


def test_dropout_in_backward():
    """dX holds 1 / (1 - p) where x was kept and nothing where it was dropped."""
    lin = one(fastft.accelerate(layer(lora_dropout=0.5).train()))
    with torch.no_grad():
        lin.base_layer.weight.zero_()
        lin.lora_A["default"].weight.copy_(torch.eye(5, K))
    x = torch.ones(300, K, requires_grad=True)
    y = lin(x)
    y.sum().backward()
    column = lin.lora_B["default"].weight.sum(0) * lin.scaling["default"]
    pattern = x.grad[:, :5] / column
    kept = pattern.abs() > 1
    torch.testing.assert_close(pattern, torch.where(kept, 2.0, 0.0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y - lin.base_layer.bias, pattern * lin.scaling["default"] @ lin.lora_B["default"].weight.T)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("config", [{}, {"lora_dropout": 0.3}, {"use_dora": True}], ids=str)
def test_checkpointing(reentrant, config):
    model = peft_llama(**config).train()
    plain = fastft.accelerate(model)
    torch.manual_seed(0)
    want = step(plain)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(0)
    assert_same_step(step(model), want, 1e-6)
    assert paths(model).keys() == {"fused"}
    lin, x = one(fastft.accelerate(layer())), inputs(3)
    torch.testing.assert_close(checkpoint(lin, x, use_reentrant=reentrant), lin(x))


def test_whole_models():
    for config in (
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}},
        {"use_dora": True},
    ):
        model = peft_llama(**config)
        want = step(model)
        assert_same_step(step(fastft.accelerate(model)), want)
        assert paths(model) == {"fused": 14}


def test_compiled():
    model, x = layer(lora_bias=True, lora_dropout=0.5).eval(), inputs(3, grad=False)
    want = one(model)(x)
    lin = one(fastft.accelerate(model))
    compiled = torch.compile(lin, backend="aot_eager", fullgraph=True)
    with fastft.testing.record() as calls:
        torch.testing.assert_close(compiled(x), want)
    assert {call.op for call in calls} >= {"lora_shrink", "lora_expand_"}
    compiled(x).sum().backward()
    assert lin.lora_A["default"].weight.grad.abs().sum() > 0
    lin.enable_adapters(False)  # the graph is made anew
    torch.testing.assert_close(compiled(x), lin.base_layer(x))
    lin.enable_adapters(True)
    lin.merge()
    torch.testing.assert_close(compiled(x), want)
