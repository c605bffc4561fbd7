"""What the linears of one site share: the packed weights, the product, its columns."""

import gc
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils import prune

import fastft
from fastft.serving.sites import install
from tests.modules.routing import Block, X, one_adapter, route, same


@pytest.fixture(autouse=True)
def reference():
    with torch.no_grad(), fastft.testing.use("reference"):
        yield


def products(monkeypatch):
    """Out-features of every product by `F.linear` from now on."""
    calls, linear = [], torch.nn.functional.linear

    def counted(x, weight, bias=None):
        calls.append(len(weight))
        return linear(x, weight, bias)

    monkeypatch.setattr("fastft.modules.routed.F.linear", counted)
    return calls


@pytest.fixture
def block(monkeypatch):
    """(a block of four layers, its routing, an unrouted twin, the GEMMs that ran)."""
    model = Block()
    routed = install(model)
    route(routed.tokens, [-1] * 3)
    return model, routed, Block(), products(monkeypatch)


def members(model):
    return model.q_proj, model.k_proj, model.v_proj


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("shape", [(3, 8), (1, 3, 8), (3, 1, 8)])
def test_one_gemm_for_all_members_in_any_order(block, order, shape):
    model, routed, twin, calls = block
    x = X.view(shape).clone()
    for i in order:
        same(members(model)[i](x), members(twin)[i](x))
    assert calls[0] == 14 and calls.count(14) == 1
    assert [s.name for s in routed.sites] == ["q_proj+k_proj+v_proj", "o_proj"]
    reference = weakref.ref(x)
    del x
    gc.collect()
    assert reference() is None  # nobody keeps the input, nor the columns


@pytest.mark.parametrize("active", [False, True])
def test_members_of_large_float32_weights_are_multiplied_apart(monkeypatch, tmp_path, active):
    """Into the columns of one output, with the bits of the layers alone; not in 16 bits, nor under autocast."""
    monkeypatch.setattr("fastft.modules.routed.APART_WEIGHTS", 0)
    model, twin = Block(), Block()
    routed = one_adapter(model, tmp_path, fastft.LoRA(r=2, target_modules=["q_proj", "k_proj"]))
    route(routed.tokens, [-1, 0, -1] if active else [-1] * 3)
    adapted = twin.q_proj(X)
    if active:
        handle = fastft.load(twin, tmp_path)
        adapted = twin.q_proj(X)
        handle.detach()
    calls = products(monkeypatch)
    for shape in ((3, 8), (1, 3, 8)):
        x = X.view(shape).clone()
        got = [layer(x).view(3, -1) for layer in members(model)]
        for mine, other in zip(got, members(twin)):
            for row in (0, 2):
                assert torch.equal(mine[row], other(X)[row])
        same(got[0][1], adapted[1])
    assert 14 not in calls
    with torch.autocast("cpu", torch.bfloat16):
        assert model.q_proj(X).dtype == torch.bfloat16
    assert calls.count(14) == 1
    routed.uninstall()
    install(model.bfloat16())
    model.q_proj(X.bfloat16())
    assert calls.count(14) == 2


def test_moving_a_model_frees_the_packed_weights(monkeypatch):
    monkeypatch.setattr("fastft.modules.routed.APART_WEIGHTS", 0)
    model = Block()
    install(model)
    buffer = weakref.ref(model.q_proj._site.weight)
    model.double()
    gc.collect()
    assert buffer() is None


def test_members_that_are_called_otherwise_compute_again(block):
    model, routed, twin, calls = block
    x = X.clone()
    model.q_proj(x)
    x += 1  # in place
    same(model.k_proj(x), twin.k_proj(x))
    model.q_proj(x)
    same(model.q_proj(x), twin.q_proj(x))  # called twice
    routed.tokens.set(None, None, False, 3)  # another batch in the same static tensor
    same(model.v_proj(x), twin.v_proj(x))
    with pytest.warns(UserWarning, match="q_proj.k_proj.v_proj got another input while 2 of its members"):
        same(model.k_proj(X.flip(0)), twin.k_proj(X.flip(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(model.v_proj(x), twin.v_proj(x))  # once is enough
    assert calls.count(14) == 6


def test_columns_can_be_changed_in_place(block):
    model, _, twin, _ = block
    q = model.q_proj(X)
    q.mul_(0)
    same(model.k_proj(X), twin.k_proj(X))


def test_inference_only(block):
    model, _, twin, _ = block
    with torch.enable_grad():
        for layer in (model.q_proj, model.o_proj):
            with pytest.raises(RuntimeError, match=r"run it under torch.no_grad"):
                layer(torch.randn(3, layer.in_features))
    with torch.inference_mode(), pytest.warns(UserWarning, match="run the model under torch.no_grad instead"):
        x = X.clone()
        for mine, other in zip(members(model), members(twin)):
            same(mine(x), other(x))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_linear_whose_weight_or_bias_is_no_parameter(block, name):
    """Pruning keeps what is left of them as plain attributes."""
    model, routed, twin, _ = block
    route(routed.tokens, [0] * 3)
    for layer in (model.o_proj, twin.o_proj):
        prune.l1_unstructured(layer, name, amount=3)
    x = torch.randn(3, 6)
    assert torch.equal(model.o_proj(x), twin.o_proj(x))


def test_moving_and_loading_packs_again(block):
    model, routed, twin, _ = block
    for change in (
        lambda m: m.double(),
        lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
        lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}, assign=True),
        lambda m: m.float(),
    ):
        change(model)
        change(twin)
        x = X.to(model.q_proj.weight.dtype)
        for mine, other in zip(members(model), members(twin)):
            same(mine(x), other(x))
        assert routed.intact()
    for own in ("weight", "bias"):
        for layer in (model.q_proj, twin.q_proj):
            parameter = getattr(layer, own)
            parameter.data = parameter.data * 2 + 1
        assert not routed.intact()
        routed.repack()
        same(model.q_proj(X), twin.q_proj(X))
        assert routed.intact()
    bias = {"q_proj.bias": twin.q_proj.bias.detach() + 3}
    for changed in (model, twin):
        changed.load_state_dict(bias, strict=False, assign=True)
    same(model.q_proj(X), twin.q_proj(X))


def test_sites_without_any_adapter_in_memory(block):
    """`widths` says so; nothing but the base runs there, whatever the pieces hold."""
    model, routed, twin, _ = block
    wrong = torch.full((1, 1, 10), 99)
    memory = SimpleNamespace(store=torch.zeros(1), offsets=torch.zeros(1, dtype=torch.int64), columns=None)
    memory.pieces, memory.widths = {site.name: wrong for site in routed.sites}, {"o_proj": None}
    routed.bind(memory)
    route(routed.tokens, [0, 0, 0])
    for mine, other in zip(members(model), members(twin)):
        same(mine(X), other(X))
    same(model.o_proj(X[:, :6]), twin.o_proj(X[:, :6]))
