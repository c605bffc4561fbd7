"""The public functions inside PyTorch's machinery: autograd's corners, checkpointing, torch.compile, autocast."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fastft
from fastft.ops.lora_linear import lora_linear, lora_update
from tests.ops.layers import BF16, F16, F32, F64, composition, grads, layer


def test_second_derivative_is_refused():
    x, w, bias, a, b = layer()
    (g,) = torch.autograd.grad(lora_linear(x, w, bias, a, b).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_replays_the_mask(use_reentrant):
    x, w, bias, a, b = layer((30,))

    def run(wrap):
        torch.manual_seed(5)
        inputs = [i.detach().clone().requires_grad_(i.requires_grad) for i in (x, w, bias, a, b)]

        def block(*i):
            return lora_linear(F.gelu(lora_linear(*i, 1.0, 0.3)) @ w, *i[1:], 1.0, 0.3)

        out = wrap(block, inputs)
        out.square().sum().backward()
        return [out.detach(), *(i.grad for i in inputs if i.requires_grad)]

    plain = run(lambda f, i: f(*i))
    again = run(lambda f, i: checkpoint(f, *i, use_reentrant=use_reentrant))
    assert all(torch.equal(g, e) for g, e in zip(again, plain))


def test_one_layer_used_twice_accumulates():
    x, w, bias, a, b = layer(k=24)

    def twice(f):
        return lambda x, a, b: f(f(x, w, bias, a, b), w, bias, a, b)

    got = grads(twice(lora_linear), (x, a, b), torch.ones(6, 24))
    want = grads(twice(composition), (x, a, b), torch.ones(6, 24))
    for g, e in zip(got, want):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(backend, p):
    x, w, bias, a, b = layer((4, 5))

    def loss(x, a, b):
        y = lora_linear(F.gelu(x), w, bias, a, b, 0.5, p)
        return lora_update(y, x, a, b, 0.5, p).square().mean()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    got = grads(lambda *i: compiled(*i), (x, a, b), None)
    assert all(torch.isfinite(g).all() for g in got)
    if p == 0:  # under compile the seed comes from another stream of the generator
        for g, e in zip(got, grads(loss, (x, a, b), None)):
            torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)


def test_the_output_can_be_changed_in_place():
    for t in ((6,), (2, 3)):
        x, w, bias, a, b = layer(t)
        dy = torch.ones(*t, 24)
        got = grads(lambda *i: F.relu(lora_linear(*i), inplace=True), (x, w, bias, a, b), dy)
        want = grads(lambda *i: F.relu(lora_linear(*i)), (x, w, bias, a, b), dy)
        assert all(torch.equal(g, e) for g, e in zip(got, want))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast(dtype):
    x, w, bias, a, b = layer((8,))
    with torch.autocast("cpu", dtype):
        y = lora_linear(x, w, bias, a, b, 0.5)
        plain = composition(x, w, bias, a, b, 0.5)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == a.grad.dtype == b.grad.dtype == F32, "gradients have their parameters' dtypes"
    exact = composition(*(i.double() for i in (x, w, bias, a, b)), 0.5)
    assert (y - exact).norm() <= 1.5 * (plain - exact).norm()


def test_autocast_leaves_float64_and_integers_as_linear_does():
    with torch.autocast("cpu", BF16), fastft.testing.use("reference"):
        x, w, bias, a, b = layer(act=F64, adapter=F64)
        assert lora_linear(x, w, bias, a, b).dtype == F64 == F.linear(x, w, bias).dtype
        x, w, bias, a, b = layer()
        with pytest.raises(TypeError, match="x is|adapters|both must"):
            lora_linear(torch.ones(6, 40, dtype=torch.int64), w, bias, a, b)
