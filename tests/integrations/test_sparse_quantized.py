"""Entries on quantised bases (qSpIEL): the delta stays beside the codes, and everything else is as on plain weights."""

import copy

import pytest
import torch
from torch import nn

import fastft
from tests import golden
from tests.methods.models import llama, logits, tokens

from .quantized import KINDS, bits, quantized

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
each_kind = pytest.mark.parametrize("kind", KINDS)
ids = tokens()
CYCLE = {"reselection_steps": 3, "selection_accumulation_steps": 2, "total_steps": 20}


def mask(n, k):
    return torch.rand(n, k, generator=torch.Generator().manual_seed(2)) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_kind
def test_a_layer_is_its_base_plus_the_delta(kind, dtype):
    torch.manual_seed(1)
    model = quantized(kind, nn.Sequential(nn.Linear(64, 96)).to(dtype))
    x, dy = torch.randn(15, 64).to(dtype).requires_grad_(), torch.randn(15, 96).to(dtype)
    y0 = model(x)
    (dx0,) = torch.autograd.grad(y0, x, dy)
    chosen = mask(96, 64)
    handle = fastft.attach(model, fastft.SparseMask(mask={"0": chosen}))
    (delta,) = handle.parameters()
    assert delta.dtype == torch.float32 and torch.equal(model(x), y0)
    with torch.no_grad():
        delta.normal_()
    with fastft.testing.record() as calls:
        y = model(x)
        got = dict(zip(("y", "dX", "ddelta"), (y, *torch.autograd.grad(y, (x, delta), dy))))
    assert {call.backend for call in calls} == {"cpu"}
    assert {call.op for call in calls} == {"add_sparse_product_", "sampled_product_"}

    def formula(x, values, y0, dx0, dy):
        dense = values.new_zeros(96, 64)
        dense[chosen] = values
        return {"y": y0 + x @ dense.t(), "dX": dx0 + dy @ dense, "ddelta": (dy.t() @ x)[chosen]}

    operands = [t.detach() for t in (x, delta, y0, dx0, dy)]
    plain = formula(*(t.float() for t in operands))
    want = formula(*(t.double() for t in operands))
    size = formula(*(t.double().abs() for t in operands))
    for what, value in got.items():
        golden.assert_close(value, want[what], plain[what].to(value.dtype), size[what], what)
    with pytest.raises(ValueError, match="quantised"):
        handle.merge()
    handle.detach()
    assert torch.equal(model(x), y0)


@pytest.mark.parametrize("selection", ["accumulated", "momentum"])
@pytest.mark.parametrize("kind", ["nf4", "gptq"])
def test_spiel_trains_beside_the_codes(kind, selection, tmp_path):
    model = quantized(kind, llama())
    model(ids, labels=ids)
    state = bits(model)
    handle = fastft.attach(model, fastft.SpIEL(density=0.05, selection=selection, **CYCLE))
    optimizer, losses = handle.optimizer(lr=1e-1), []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        handle.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert len(handle.method.history) == 4 and handle.method.history[0]["changed"] > 0
    assert {name: len(m.sparse["default"].columns) for name, m in handle.targets.items()} == {
        name: count.entries for name, count in handle.method.counts.items()
    }
    trained = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), trained)
    with handle.disabled():
        assert not torch.equal(logits(model), trained)
    handle.save(tmp_path)
    other = quantized(kind, llama())
    fastft.load(other, tmp_path)
    assert torch.equal(logits(other), trained)
    with pytest.raises(ValueError, match="no absolute values"):
        handle.save(tmp_path, absolute=True)
    handle.detach()
    assert all(torch.equal(value, state[key]) for key, value in bits(model).items())


def test_dequantised_layers_take_the_delta_up():
    model = quantized("nf4", llama())
    handle = fastft.attach(model, fastft.SpIEL(density=0.02, **CYCLE))
    with torch.no_grad():
        for delta in handle.parameters():
            delta.normal_(std=0.1)
    want = logits(model)
    plain = handle.merge_and_unload(target=torch.float32)
    assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear
    torch.testing.assert_close(logits(plain), want, rtol=1e-3, atol=1e-3)


def test_lift_needs_weights():
    with pytest.raises(ValueError, match="quantised"):
        fastft.attach(quantized("nf4", llama()), fastft.LIFT(density=0.1, filter_rank=4))
