"""`SharedInput`: several adapters on one x give what each alone gives, whatever reaches the loss, and keep x once."""

from itertools import chain, combinations, permutations

import pytest
import torch
import torch.nn.functional as F

import fastft
from fastft.ops.lora_linear import SharedInput, lora_linear
from tests.golden import assert_close, backends, run_on
from tests.ops.layers import BF16, F16, F32, F64, composition, saved_bytes, seeded

RANKS, OUT, SCALES = (4, 0, 3), (24, 8, 17), (0.5, 1.0, 2.0)


@pytest.fixture(params=backends("amx"))
def device(request):
    with run_on(request.param) as device:
        yield device


def group(t=(6,), k=40, act=F32, adapter=F32, device="cpu", ranks=RANKS, out=OUT):
    """x, and weight, bias, A, B of each adapter. The last bias is None."""
    g = torch.Generator().manual_seed(0)

    def draw(*size, dtype):
        return torch.randn(*size, generator=g).to(dtype).to(device)

    x, members = draw(*t, k, dtype=act).requires_grad_(), []
    for i, (r, n) in enumerate(zip(ranks, out)):
        base = draw(n, k, dtype=act), draw(n, dtype=act) if i < len(out) - 1 else None
        members.append((*base, draw(r, k, dtype=adapter).requires_grad_(), draw(n, r, dtype=adapter).requires_grad_()))
    return x, members


def shared(x, members, p=0.0, order=None):
    inputs, ys = SharedInput(x, [a for _, _, a, _ in members], p), {}
    for i in order or range(len(members)):
        w, bias, _, b = members[i]
        ys[i] = inputs.project(i, w, bias, b, SCALES[i])
    return [ys[i] for i in sorted(ys)]


def apart(x, members):
    return [lora_linear(x, w, bias, a, b, SCALES[i]) for i, (w, bias, a, b) in enumerate(members)]


def leaves(x, members):
    return [x, *(t for _, _, a, b in members for t in (a, b))]


def gradients(ys, dys, inputs):
    """Of those ys whose dy is not None."""
    used, seeds = zip(*((y, dy) for y, dy in zip(ys, dys) if dy is not None))
    return torch.autograd.grad(used, inputs, seeds, allow_unused=True)


@pytest.mark.parametrize("act,adapter", [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)])
def test_values_and_gradients_beside_three_plain_compositions(device, act, adapter):
    for t in ((7,), (2, 3), (), (0,)):
        x, members = group(t, act=act, adapter=adapter, device=device)
        g = torch.Generator().manual_seed(1)
        dys = [torch.randn(*t, n, generator=g).to(act).to(device) for n in OUT]

        def run(f, convert, x=x, members=members, dys=dys):
            def leaf(own):
                return None if own is None else convert(own.detach()).requires_grad_(own.requires_grad)

            x, members = leaf(x), [tuple(map(leaf, member)) for member in members]
            ys = f(x, members)
            return [y.detach() for y in ys] + list(gradients(ys, [convert(dy) for dy in dys], leaves(x, members)))

        def plain(x, members):
            return [composition(x, w, bias, a, b, SCALES[i]) for i, (w, bias, a, b) in enumerate(members)]

        rows = zip(
            run(shared, torch.clone),
            run(plain, torch.Tensor.double),
            run(plain, torch.clone),
            run(plain, lambda i: i.double().abs()),
            [act] * 3 + [act] + [adapter] * 6,
            strict=True,
        )
        for i, (got, want, beside, terms, dtype) in enumerate(rows):
            assert got.dtype == dtype
            assert_close(got, want, beside, terms, f"{i} of y0 y1 y2 dx da0 db0 ... {t} {act} {adapter}")


def test_every_subset_of_outputs_in_the_loss():
    """Outputs that don't reach the loss change nothing for those that do; nor does the order of the projections."""
    x, members = group()
    dys = [torch.randn(6, n, generator=torch.Generator().manual_seed(n)) for n in OUT]
    subsets = chain.from_iterable(combinations(range(3), n) for n in (1, 2, 3))
    for subset in subsets:
        used = [dy if i in subset else None for i, dy in enumerate(dys)]
        want = gradients(apart(x, members), used, leaves(x, members))
        for order in permutations(range(3)):
            got = gradients(shared(x, members, order=order), used, leaves(x, members))
            for i, (g, w) in enumerate(zip(got, want, strict=True)):
                # An adapter that is not used has no gradient, or one of zeros (it shares a node with those that are).
                w = torch.zeros_like(leaves(x, members)[i]) if w is None else w
                torch.testing.assert_close(torch.zeros_like(w) if g is None else g, w, rtol=1e-5, atol=1e-4)


def test_fewer_projections_than_adapters_and_none():
    x, members = group()
    for order in ((0,), (2,), (1, 2)):
        got = gradients(ys := shared(x, members, order=order), [torch.ones_like(y) for y in ys], leaves(x, members))
        want = apart(x, members)
        want = gradients([want[i] for i in order], [torch.ones_like(y) for y in ys], leaves(x, members))
        for g, w in zip(got, want, strict=True):
            w = torch.zeros_like(g) if w is None and g is not None else w
            assert (g is None and w is None) or torch.allclose(g, w, rtol=1e-5, atol=1e-4)
    SharedInput(x, [a for _, _, a, _ in members])  # nothing is projected
    (dx,) = torch.autograd.grad(x.square().sum(), x)
    assert torch.equal(dx, 2 * x)


def test_one_output_at_a_time_and_twice():
    """Two backward passes through one graph, and one pass per output, add up to the pass over all."""
    x, members = group()
    ys, dys = shared(x, members), [torch.randn(6, n) for n in OUT]
    inputs = leaves(x, members)
    once = torch.autograd.grad(ys, inputs, dys, retain_graph=True)
    again = torch.autograd.grad(ys, inputs, dys, retain_graph=True)
    assert all(torch.equal(g, w) for g, w in zip(again, once, strict=True)), "backward changes nothing that it keeps"
    for order in permutations(range(3)):
        total = [torch.zeros_like(i) for i in inputs]
        for i in order:
            parts = torch.autograd.grad(ys[i], inputs, dys[i], retain_graph=True, allow_unused=True)
            total = [t if part is None else t + part for t, part in zip(total, parts)]
        for g, w in zip(total, once, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-4)


def test_gradients_of_some_inputs_only():
    x, members = group()
    ys, inputs = shared(x, members), leaves(x, members)
    full = torch.autograd.grad(ys, inputs, [torch.ones_like(y) for y in ys], retain_graph=True)
    for i, leaf in enumerate(inputs):
        (one,) = torch.autograd.grad(ys, leaf, [torch.ones_like(y) for y in ys], retain_graph=True)
        assert torch.equal(one, full[i])
    stranger = torch.ones(3, requires_grad=True)
    assert torch.autograd.grad(ys[0].sum(), stranger, allow_unused=True) == (None,)


def test_incoming_gradients_are_not_changed():
    """dX is accumulated in place: in a buffer of ours, never in one that somebody else holds."""
    x, members = group()
    dys = [torch.randn(6, n) for n in OUT]
    before, seen = [dy.clone() for dy in dys], []
    ys = shared(x, members)
    for y in ys:
        y.register_hook(seen.append)
        y.retain_grad()
    x.register_hook(seen.append)
    torch.autograd.backward(ys, dys)
    assert all(torch.equal(g, w) for g, w in zip(dys, before, strict=True))
    assert all(torch.equal(y.grad, w) for y, w in zip(ys, before, strict=True))
    assert torch.equal(seen[-1], x.grad) and len(seen) == 4
    kept = x.grad.clone()
    torch.autograd.backward(shared(x, members), dys)
    torch.testing.assert_close(x.grad, 2 * kept)


def test_hooks_on_outputs_and_input_can_replace_gradients():
    x, members = group()

    def run(f):
        y0, y1, y2 = f(x, members)
        y1.register_hook(lambda dy: 2 * dy)
        y2.register_hook(torch.zeros_like)
        handle = x.register_hook(lambda dx: 3 * dx)
        got = torch.autograd.grad(y0.sum() + y1.sum() + y2.sum(), leaves(x, members))
        handle.remove()
        return got

    for g, w in zip(run(shared), run(apart), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("need_x", [True, False])
def test_frozen_parts_of_members(need_x):
    for frozen in ((), ("a0",), ("b0",), ("a0", "b0"), ("a0", "a1", "a2"), ("b0", "b1", "b2"), ("a0", "b2")):
        x, members = group()
        x.requires_grad_(need_x)
        for i, (_, _, a, b) in enumerate(members):
            a.requires_grad_(f"a{i}" not in frozen)
            b.requires_grad_(f"b{i}" not in frozen)
        trained = [t for t in leaves(x, members) if t.requires_grad]

        def run(f, x=x, members=members, trained=trained):
            ys = [y for y in f(x, members) if y.requires_grad]
            return torch.autograd.grad(ys, trained, [torch.ones_like(y) for y in ys], allow_unused=True)

        for g, w in zip(run(shared), run(apart), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-4)


def test_nothing_trained_makes_no_graph():
    x, members = group()
    with torch.no_grad():
        assert not any(y.requires_grad for y in shared(x, members))
    x, members = x.detach(), [tuple(t if t is None else t.detach() for t in member) for member in members]
    assert not any(y.requires_grad for y in shared(x, members))


@pytest.mark.parametrize("act", [F32, BF16])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_saved_is_x_once_and_s_and_the_masks(act, p):
    t, k, ranks = 64, 256, (8, 4, 16)
    x, members = group((t,), k=k, act=act, ranks=ranks)
    parameters = [t for member in members for t in member if t is not None]
    expected = 4 * t * sum(ranks) + (3 * t * k // 8 if p else 0)
    size, _ = saved_bytes(lambda: shared(x, members, p), *parameters)
    assert size == expected + x.nbytes, "x is kept once"
    for _, _, a, _ in members:
        a.requires_grad_(False)
    size, _ = saved_bytes(lambda: shared(x, members, p), *parameters)
    assert size == expected, "with every A frozen x is not kept"


def test_each_adapter_has_its_own_mask_and_each_input_new_ones():
    x, members = group((50,), ranks=(4, 4, 4))
    members = [(torch.zeros_like(w), None, members[0][2], torch.eye(w.shape[0], 4)) for w, *_ in members]
    first, second = seeded(shared)(x, members, 0.4), shared(x, members, 0.4)
    s = [y[:, :4] / scale for y, scale in zip(first, SCALES)]
    assert not torch.equal(s[0], s[1]) and not torch.equal(s[1], s[2]) and not torch.equal(first[0], second[0])
    assert all(torch.equal(g, w) for g, w in zip(seeded(shared)(x, members, 0.4), first))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_adapters_compiles_for_evaluation(count):
    """Without gradients Dynamo runs forward alone, and binds its arguments by their number."""
    x, members = group()
    with torch.no_grad():
        got = torch.compile(shared, fullgraph=True, backend="eager")(x, members[:count])
        assert all(torch.equal(y, want) for y, want in zip(got, shared(x, members[:count]), strict=True))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p):
    x, members = group((3,), k=9, act=F64, adapter=F64, ranks=(2, 0, 1), out=(4, 3, 5))
    weights = [members[0][0].requires_grad_(), members[0][1].requires_grad_()]

    def f(x, w, bias, *factors):
        rebuilt = [(*m[:2], a, b) for m, a, b in zip(members, factors[::2], factors[1::2])]
        rebuilt[0] = (w, bias, *rebuilt[0][2:])
        return tuple(shared(x, rebuilt, p))

    with fastft.testing.use("reference"):
        assert torch.autograd.gradcheck(seeded(f), (x, *weights, *leaves(x, members)[1:]))


def test_project_and_update_together():
    """A second adapter of the same layer updates what the first projected; bases that compute themselves update alone."""
    x, members = group(out=(24, 24, 17))

    def f(x, members):
        (w, bias, a0, b0), (_, _, a1, b1), (w2, _, a2, b2) = members
        inputs = SharedInput(x, [a0, a1, a2])
        y = inputs.update(1, inputs.project(0, w, bias, b0, 0.5), b1, 2.0)
        return [y, inputs.update(2, F.linear(x, w2), b2, 0.7)]

    def plain(x, members):
        (w, bias, a0, b0), (_, _, a1, b1), (w2, _, a2, b2) = members
        return [composition(x, w, bias, a0, b0, 0.5) + 2 * x @ a1.t() @ b1.t(), composition(x, w2, None, a2, b2, 0.7)]

    got, want = f(x, members), plain(x, members)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-4)
    dys = [torch.ones_like(y) for y in got]
    for g, w in zip(*(gradients(ys, dys, leaves(x, members)) for ys in (got, want)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-3)
