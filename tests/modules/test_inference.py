"""Layers without gradients: they give what they give with them, by fewer calls, and what they keep is never stale."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastft
from fastft.modules import norms
from fastft.ops.lora import lora_add_
from tests.methods.models import randomize

K, N = 12, 10
SHORTEST = ["lora_add_"]


def attached(linear=None, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(linear or nn.Linear(K, N)).to(dtype)
    handle = fastft.attach(model, fastft.LoRA(**{"r": 3, "target_modules": ["0"], **options}))
    randomize(handle)
    return model, handle


def conv1d():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(N, K)


def ops_of(model, x):
    """(output without gradients, the ops that ran)."""
    with torch.no_grad(), fastft.testing.record() as calls:
        y = model(x)
    assert not y.requires_grad
    return y, [call.op for call in calls]


@pytest.fixture(autouse=True)
def native():
    if reason := lora_add_.missing("cpu", "cpu"):
        pytest.skip(reason)


@pytest.mark.parametrize("tokens", [(1,), (2, 3), (50,)], ids=str)
@pytest.mark.parametrize("make", [lambda: nn.Linear(K, N), lambda: nn.Linear(K, N, bias=False), conv1d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_op(make, tokens, dtype):
    model, _ = attached(make(), dtype)
    x = torch.randn(*tokens, K, dtype=dtype)
    want = model(x)
    got, ops = ops_of(model, x)
    assert ops == SHORTEST
    torch.testing.assert_close(got, want)


def second(model, handle):
    randomize(fastft.attach(model, fastft.LoRA(r=2, target_modules=["0"]), "second"))


def saved(model, handle):
    handle.detach()
    model.append(nn.Linear(N, N))
    fastft.attach(model, fastft.LoRA(r=2, target_modules=["0"]))
    randomize(fastft.attach(model, fastft.LoRA(r=2, target_modules=["1"], modules_to_save=["0"]), "saved"))


def delta(model, handle):
    randomize(fastft.attach(model, fastft.SpIEL(density=0.1, target_modules=["0"]), "delta"))


CHANGES = {
    "off": lambda model, handle: handle.set_active(False),
    "merged": lambda model, handle: handle.merge(),
    "two adapters": second,
    "modules_to_save": saved,
    "entries too": delta,
    "a weight that something else trains": lambda model, handle: model[0].weight.requires_grad_(),
    "parametrised": lambda model, handle: parametrizations.weight_norm(model[0]),
    "pruned": lambda model, handle: prune.l1_unstructured(model[0], "weight", amount=3),
    "hooked": lambda model, handle: model[0].register_forward_hook(lambda module, args, y: 2 * y),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=str)
@pytest.mark.filterwarnings("ignore:a weight requires a gradient")
def test_all_else_as_with_gradients(change, options):
    model, handle = attached(**options)
    if change == "entries too" and options.get("use_dora"):
        pytest.skip("attaching refuses that")
    x = torch.randn(4, K)
    model.eval()
    ops_of(model, x)  # what is kept now has to go
    CHANGES[change](model, handle)
    torch.testing.assert_close(ops_of(model, x)[0], model(x))


def test_dropout_that_is_on():
    model, _ = attached(lora_dropout=0.5)
    x = torch.randn(4, K)
    torch.manual_seed(1)
    want = model(x)
    torch.manual_seed(1)
    got, ops = ops_of(model, x)
    assert torch.equal(got, want) and ops != SHORTEST and ops_of(model.eval(), x)[1] == SHORTEST


def test_within_disabled():
    model, handle = attached()
    x = torch.randn(4, K)
    with handle.disabled():
        got, ops = ops_of(model, x)
        assert not ops and torch.equal(got, nn.functional.linear(x, model[0].weight, model[0].bias))


def layer():
    own = fastft.LoRALinear(K, N, r=3, use_dora=True)
    nn.init.normal_(own.lora_B)
    return own, own, own.lora_A, own.lora_B, own.lora_magnitude


def of_attached():
    model, _ = attached(use_dora=True)
    own = model[0]
    return model, own, own.lora_A["default"], own.lora_B["default"], own.lora_magnitude["default"]


def of_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=["0"], use_dora=True)
    model = fastft.accelerate(peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), config)).eval()
    own = model.base_model.model[0]
    nn.init.normal_(own.lora_B["default"].weight)
    factors = own.lora_A["default"].weight, own.lora_B["default"].weight, own.lora_magnitude_vector["default"].weight
    return model, own.base_layer, *factors


@pytest.mark.parametrize("make", [layer, of_attached, of_peft], ids=lambda f: f.__name__)
def test_dora_computes_norms_once_and_they_are_never_stale(make, monkeypatch):
    computed, real = [], norms.dora_norm
    monkeypatch.setattr(norms, "dora_norm", lambda *args: computed.append(args) or real(*args))
    model, own, a, b, magnitude = make()
    x = torch.randn(4, K)

    def check(expected):
        """`expected` norms are computed in two forwards without gradients."""
        computed.clear()
        outs = [ops_of(model, x) for _ in range(2)]
        assert len(computed) == expected, len(computed)
        assert all(ops[-2:] == ["lora_shrink", "dora_expand_"] for _, ops in outs)
        want = model(x)
        for y, _ in outs:
            torch.testing.assert_close(y, want)

    check(1)
    check(1)  # a forward with gradients lets go of them
    ops_of(model, x)
    for tensor, expected in ((a, 1), (b, 1), (magnitude, 0), (own.weight, 1)):
        ops_of(model, x)
        with torch.no_grad():
            tensor.mul_(1.5)
        check(expected)
    for tensor, expected in ((a, 1), (b, 1), (magnitude, 0)):
        ops_of(model, x)
        tensor.data[0] += 1  # counts no version
        check(expected)
        ops_of(model, x)
        tensor.data = tensor.data * 2
        check(expected)
    ops_of(model, x)
    with torch.inference_mode():
        model(x)
        a.data[0] += 1
        model(x)
    check(0)
    want = model(x)
    ops_of(model, x)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(ops_of(twin, x)[0], want)
    half = twin.to(torch.bfloat16)
    torch.testing.assert_close(ops_of(half, x.bfloat16())[0].float(), want, rtol=0.1, atol=0.3)
    with torch.no_grad():
        a.fill_(float("nan"))
    assert ops_of(model, x)[0].isnan().all()
    with torch.no_grad():
        a.fill_(1)
    assert ops_of(model, x)[0].isfinite().all()


@pytest.mark.parametrize("make", [layer, of_attached], ids=lambda f: f.__name__)
def test_graphs_keep_nothing(make):
    model, _, a, *_ = make()
    x = torch.randn(4, K)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        want = ops_of(model, x)[0]
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), want)
            a.mul_(1.5)
