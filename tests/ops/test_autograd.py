"""The public functions inside PyTorch's machinery: autograd's corners, checkpointing, torch.compile, autocast."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fastft
from fastft.ops.dora import dora_norm, squared_row_norm
from fastft.ops.entries import Entries
from fastft.ops.grouped_linear import Routing, grouped_lora
from fastft.ops.lora_linear import SharedInput, lora_linear, lora_update
from fastft.ops.partial_linear import Part, delta_linear, partial_linear
from fastft.ops.sparse_linear import sparse_linear
from tests.ops.layers import BF16, F16, F32, F64, composition, grads, layer, seeded


def tensors():
    """Of a block that uses everything: x, A and B of three adapters, a dense middle, a magnitude, a bias on B."""
    x, w, bias, a0, b0 = layer((4, 5))
    _, w1, _, a1, b1 = layer(n=17, r=3, seed=1)
    _, w2, bias2, a2, b2 = layer(n=8, r=2, seed=2)
    own = {"m": torch.eye(4), "magnitude": 2 * w1.norm(dim=1), "extra": torch.ones(8)}
    trained = [x, a0, b0, a1, b1, a2, b2, *(t.requires_grad_() for t in own.values())]
    return trained, (w, bias, w1, w2, bias2)


def block(frozen, p=0.0, plain=False):
    """A function of the trained tensors: a layer with a middle, a DoRA layer and one with a bias on B, on one input."""
    w, bias, w1, w2, bias2 = frozen

    def ours(x, a0, b0, a1, b1, a2, b2, m, magnitude, extra):
        shared = SharedInput(F.gelu(x), [a0, a1, a2], p)
        norm = dora_norm(w1, squared_row_norm(w1), a1, b1, 0.5)
        y0 = shared.project(0, w, bias, b0, 0.5, middle=lambda s: F.silu(s @ m))
        y1 = shared.project(1, w1, None, b1, 0.5, magnitude=magnitude, weight_norm=norm)
        return torch.cat([y0, y1, shared.project(2, w2, bias2, b2, 0.5, lora_bias=extra)], -1)

    def composed(x, a0, b0, a1, b1, a2, b2, m, magnitude, extra):
        x = F.gelu(x)
        y0 = F.linear(x, w, bias) + 0.5 * F.silu(x @ a0.t() @ m) @ b0.t()
        norm = (w1 + 0.5 * b1 @ a1).norm(dim=1).detach()
        y1 = magnitude / norm * (F.linear(x, w1) + 0.5 * x @ a1.t() @ b1.t())
        return torch.cat([y0, y1, F.linear(x, w2, bias2) + 0.5 * F.linear(x @ a2.t(), b2, extra)], -1)

    return composed if plain else ours


def assert_all_close(got, want):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_second_derivatives(p):
    """Gradient penalties and products with the Hessian, of a layer, of a layer that computes itself, and of several."""
    inputs = [t.double().detach().requires_grad_() for t in layer((3,), 7, 5, 2)]
    y = torch.randn(3, 5, dtype=F64, requires_grad=True)
    _, _, extra, a, b = (t.double().detach().requires_grad_() for t in layer(k=7, n=5, r=3, seed=1))
    x, w, *_ = inputs
    frozen = w.detach()

    def several(x, a0, b0, a1, b1, magnitude):
        shared = SharedInput(x, [a0, a1], p)
        y = shared.project(0, frozen, None, b0, 0.5)
        return y, shared.project(1, frozen, extra, b1, 2.0, magnitude=magnitude, weight_norm=frozen.norm(dim=1))

    update = seeded(lambda y, x, a, b, extra: lora_update(y, x, a, b, 0.5, p, lora_bias=extra))
    both = [x, inputs[3], inputs[4], a, b, extra]
    bias = inputs[2].requires_grad_()
    cases = [
        (seeded(lora_linear, 0.5, p), [x, w.requires_grad_(), bias, *inputs[3:]]),
        (seeded(lora_linear, 0.5, p), [x, frozen, None, *inputs[3:]]),
        (update, [y, x, a, b, extra]),
        (seeded(several), both),
        # Factors that depend on x: what goes through them is not counted twice.
        (lambda x, a: lora_linear(x, frozen, None, a * x.sum(), b), [x, a]),
    ]
    with fastft.testing.use("reference"):
        assert all(torch.autograd.gradgradcheck(f, tensors) for f, tensors in cases)


@pytest.mark.parametrize("autocast", [False, True])
def test_second_derivatives_on_kernels(autocast):
    """Autocast around backward rounds nothing that it did not round in forward."""
    inputs = layer((6,))
    ours, theirs = lora_linear(*inputs), composition(*inputs)
    with torch.autocast("cpu", enabled=autocast):
        (got,) = torch.autograd.grad(ours.tanh().sum(), inputs[0], create_graph=True)
    (want,) = torch.autograd.grad(theirs.tanh().sum(), inputs[0], create_graph=True)
    wanted = [inputs[0], *inputs[3:]]
    for one, other in zip(*(torch.autograd.grad(g.square().sum(), wanted) for g in (got, want)), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_second_derivative_that_would_need_what_is_not_kept_is_refused():
    x, w, bias, a, b = layer()
    with pytest.raises(RuntimeError, match="lora_A is frozen and lora_B trains"):
        torch.autograd.grad(lora_linear(x, w, bias, a.detach(), b).sum(), x, create_graph=True)


def test_many_gradients_at_once():
    inputs = layer((6,))
    jacobians = [torch.autograd.functional.jacobian(f, inputs[0], vectorize=True) for f in _of_x(inputs)]
    assert_all_close(jacobians[:1], jacobians[1:])


def test_transforms_and_forward_mode():
    """Gradients of each sample, Jacobians, directional derivatives: as of the composition, also with a magnitude."""
    x, w, bias, a, b = (t.double().detach() for t in layer((6,), 7, 5, 2))
    magnitude, norm = bias + 2, w.norm(dim=1)

    def dora(x, w, bias, a, b, f=lora_linear):
        if f is composition:
            return magnitude / norm * f(x, w, None, a, b) + bias
        return f(x, w, bias, a, b, magnitude=magnitude, weight_norm=norm)

    def update(x, w, bias, a, b):
        return lora_update(F.linear(x, w, bias), x, a, b)

    for ours, theirs in (
        (lora_linear, composition),
        (update, composition),
        (dora, functools.partial(dora, f=composition)),
    ):
        found = []
        for f in (ours, theirs):
            own = lambda a, x, f=f: f(x, w, bias, a, b).tanh().sum()  # noqa: E731
            found.append(
                [
                    torch.func.vmap(torch.func.grad(own), (None, 0))(a, x),
                    torch.func.jacrev(lambda x, f=f: f(x, w, bias, a, b))(x),
                    torch.func.jvp(lambda x, f=f: f(x, w, bias, a, b), (x,), (x.cos(),))[1],
                    torch.autograd.functional.jacobian(
                        lambda x, f=f: f(x, w, bias, a, b), x, strategy="forward-mode", vectorize=True
                    ),
                ]
            )
        assert_all_close(*found)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("tokens", [5, 40])
def test_deltas_beside_and_in_the_weight_refuse_forward_mode(tokens, enabled):
    """Without gradients, too, where no node is needed: in our ops the tangents would end, in part or all of them."""
    x, w, *_ = (t.detach() for t in layer((tokens,), 7, 5, 2))
    chosen, rows, columns = Entries.of_mask(w > 0), Part.of("rows", [1, 4], 5), Part.of("columns", [0, 3], 7)
    for f, delta in (
        (lambda x, d: sparse_linear(x, w, None, chosen, d), torch.ones(len(chosen))),
        (lambda x, d: delta_linear(x, w, None, rows, d), torch.ones(2, 7)),
        (lambda x, d: delta_linear(x, w, None, columns, d), torch.ones(5, 2)),
        (lambda x, d: partial_linear(x, w, None, rows, d), torch.ones(2, 7)),
    ):
        for one, t in ((lambda x, f=f, d=delta: f(x, d)), x), ((lambda d, f=f: f(x, d)), delta):
            with torch.set_grad_enabled(enabled), forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
                one(forward_ad.make_dual(t, t))
            with torch.set_grad_enabled(enabled), pytest.raises(RuntimeError, match="functorch transforms"):
                torch.func.jvp(one, (t,), (t,))


def _of_x(inputs):
    return [lambda x, f=f: f(x, *inputs[1:]) for f in (lora_linear, composition)]


def selective(f, ops, *inputs):
    """f under a checkpointing that keeps what these ops return."""
    contexts = functools.partial(create_selective_checkpoint_contexts, ops)
    return checkpoint(f, *inputs, use_reentrant=False, context_fn=contexts)


KEPT = [torch.ops.aten.addmm.default, torch.ops.aten.mm.default]


def test_selective_checkpointing_keeps_products_as_they_were():
    """It keeps them by reference, so that nothing may be added to them in place."""
    trained, frozen = tensors()
    entries = Entries.of_mask(torch.rand(24, 40, generator=torch.Generator().manual_seed(0)) < 0.1)
    x, w, bias, a, b = layer()
    delta, rows = torch.randn(len(entries)).requires_grad_(), Part.of("rows", [1, 5], 24)
    routing = Routing.of(torch.zeros(len(x), dtype=torch.int32), 1)
    cases = [
        (block(frozen), trained),
        (lora_linear, (x, w, bias, a, b)),
        (lambda x, y, a, b: lora_update(y.relu(), x, a, b), (x, F.linear(x, w).detach().requires_grad_(), a, b)),
        (lambda x, delta: sparse_linear(x, w, bias, entries, delta), (x, delta)),
        (lambda x, delta: delta_linear(x, w, bias, rows, delta), (x, torch.randn(2, 40).requires_grad_())),
        (lambda x, a, b: grouped_lora(x, w, bias, [a], [b], routing, 0.5), (x, a, b)),
    ]
    for f, inputs in cases:
        want = torch.autograd.grad(f(*inputs).square().sum(), [t for t in inputs if t.requires_grad])
        got = torch.autograd.grad(selective(f, KEPT, *inputs).square().sum(), [t for t in inputs if t.requires_grad])
        assert_all_close(got, want)


def test_selective_checkpointing_that_keeps_our_copies_says_so():
    inputs = layer()
    with pytest.raises(RuntimeError, match="has been mutated"):
        selective(lora_linear, [torch.ops.aten.clone.default], *inputs).sum().backward()


def test_anomaly_mode_finds_nothing():
    trained, frozen = tensors()
    dy = torch.ones(4, 5, 49)
    with torch.autograd.detect_anomaly(check_nan=True):
        got = grads(block(frozen), trained, dy)
    assert_all_close(got, grads(block(frozen, plain=True), trained, dy))


def test_gradients_accumulate_and_are_clipped():
    trained, frozen = tensors()
    f, losses = block(frozen), []
    for _ in range(3):
        f(*trained).square().mean().backward()
        losses.append([t.grad.clone() for t in trained])
    assert_all_close(losses[2], [3 * t for t in losses[0]])
    norm = torch.nn.utils.clip_grad_norm_(trained, 1e-3)
    torch.testing.assert_close(norm, torch.stack([3 * t.norm() for t in losses[0]]).norm())
    assert all((t.grad.norm() <= 1.1e-3) for t in trained)


def test_one_group_used_twice_in_a_graph():
    trained, frozen = tensors()
    widen = torch.randn(49, 40, generator=torch.Generator().manual_seed(4)) / 7

    def twice(f):
        return lambda x, *rest: f(f(x, *rest) @ widen, *rest)

    dy = torch.ones(4, 5, 49)
    assert_all_close(grads(twice(block(frozen)), trained, dy), grads(twice(block(frozen, plain=True)), trained, dy))


def test_a_failing_backward_leaves_nothing_behind():
    trained, frozen = tensors()
    dy = torch.randn(4, 5, 49)
    want = grads(block(frozen), trained, dy)[1:]
    with fastft.testing.use("reference"):
        y = block(frozen)(*trained)

    def fail(dx):
        raise RuntimeError("stop here")

    # Fails at several depths: at the outputs' sum, between the projections, at the input.
    for tensor in (y, trained[5], trained[3], trained[0]):
        handle = tensor.register_hook(fail)
        with fastft.testing.record() as calls, pytest.raises(RuntimeError, match="stop here"):
            torch.autograd.grad(y, trained, dy, retain_graph=True)
        handle.remove()
        assert not calls, "backward was recorded where forward was, not here"
        with fastft.testing.record() as calls:
            lora_linear(*layer())
        assert {c.backend for c in calls} == {"cpu"}, "the forced backend of the failed backward is gone"
        assert_all_close(torch.autograd.grad(y, trained, dy, retain_graph=True), want)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradient_checkpointing_of_a_group(use_reentrant, p):
    trained, frozen = tensors()

    def run(wrap):
        torch.manual_seed(5)
        return grads(lambda *i: wrap(block(frozen, p), i), trained, torch.ones(4, 5, 49))

    plain = run(lambda f, i: f(*i))
    again = run(lambda f, i: checkpoint(f, *i, use_reentrant=use_reentrant))
    assert all(torch.equal(g, e) for g, e in zip(again, plain, strict=True))


@pytest.mark.parametrize("backend,p", [("aot_eager", 0.0), ("inductor", 0.0), ("inductor", 0.2)])
def test_a_group_compiles_into_one_graph(backend, p):
    trained, frozen = tensors()
    torch._dynamo.reset()
    compiled = torch.compile(block(frozen, p), fullgraph=True, backend=backend)
    dy = torch.ones(4, 5, 49)
    got = grads(compiled, trained, dy)
    assert all(torch.isfinite(g).all() for g in got)
    if p == 0:  # under compile the seed comes from another stream of the generator
        assert_all_close(got, grads(block(frozen, plain=True), trained, dy))


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_of_a_group(inside):
    """Backward inside of autocast too, which PyTorch advises against but many loops do."""
    trained, frozen = tensors()
    dy = torch.randn(4, 5, 49, generator=torch.Generator().manual_seed(2))
    exact = grads(
        block([t.double() for t in frozen], plain=True), [t.detach().double().requires_grad_() for t in trained], dy
    )

    def run(f):
        inputs = [t.detach().clone().requires_grad_() for t in trained]
        with torch.autocast("cpu", BF16):
            y = f(*inputs)
            if inside:
                y.backward(dy.to(y.dtype))
        if not inside:
            y.backward(dy.to(y.dtype))
        return [y.detach(), *(t.grad for t in inputs)]

    rows = zip(run(block(frozen)), run(block(frozen, plain=True)), exact, strict=True)
    for got, plain, want in rows:
        assert got.dtype in (F32, BF16)
        assert (got - want).norm() <= 1.5 * (plain - want).norm()


def test_backward_under_autocast_of_a_forward_without():
    trained, frozen = tensors()
    y = block(frozen)(*trained)
    want = torch.autograd.grad(y.sum(), trained, retain_graph=True)
    with torch.autocast("cpu", BF16):
        got = torch.autograd.grad(y.sum(), trained)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == F32 and (g - w).norm() <= 2e-2 * w.norm()


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
def test_compiles_into_one_graph(p):
    x, w, bias, a, b = layer((4, 5))

    def loss(x, a, b):
        y = lora_linear(F.gelu(x), w, bias, a, b, 0.5, p)
        return lora_update(y, x, a, b, 0.5, p).square().mean()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
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
