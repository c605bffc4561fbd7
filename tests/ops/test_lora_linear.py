"""The public functions `lora_linear` and `lora_update`: values, gradients, memory, compile, autocast, checkpointing."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastft
from fastft.ops import lora
from fastft.ops.entries import Entries
from fastft.ops.grouped_linear import Routing, grouped_lora
from fastft.ops.lora_linear import lora_linear, lora_update
from fastft.ops.partial_linear import Part, delta_linear, delta_update, partial_linear
from fastft.ops.sparse_linear import sparse_linear, sparse_update
from tests.golden import assert_close, backends, run_on
from tests.ops.layers import BF16, F16, F32, F64, composition, grads, layer, saved_bytes, seeded


@pytest.fixture(params=backends("amx"))
def device(request):
    with run_on(request.param) as device:
        yield device


@pytest.mark.parametrize("act,adapter", [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)])
def test_outputs_and_gradients_beside_the_plain_composition(device, act, adapter):
    for t in ((7,), (2, 3), (2, 2, 2), (), (0,), (2, 0)):
        inputs = layer(t, act=act, adapter=adapter, device=device)
        dy = torch.randn(*t, 24, generator=torch.Generator().manual_seed(1)).to(act).to(device)
        got = grads(lambda *i: lora_linear(*i, 0.5), inputs, dy)
        plain = grads(lambda *i: composition(*i, 0.5), inputs, dy)
        exact = [i.detach().double().requires_grad_(i.requires_grad) for i in inputs]
        want = grads(lambda *i: composition(*i, 0.5), exact, dy.double())
        terms = grads(
            lambda *i: composition(*i, 0.5),
            [e.detach().abs().requires_grad_(e.requires_grad) for e in exact],
            dy.double().abs(),
        )
        for name, g, e, p, m, i in zip(
            ("y", "dx", "da", "db"), got, want, plain, terms, (inputs[0], inputs[0], *inputs[3:])
        ):
            assert g.dtype == i.dtype
            assert_close(g, e, p, m, f"{name} {t} {act} {adapter}")


def test_gradcheck():
    with fastft.testing.use("reference"):
        x, w, bias, a, b = layer((2, 3), k=10, n=6, r=3, act=F64, adapter=F64)
        w.requires_grad_(), bias.requires_grad_()

        for p in (0.0, 0.4):
            assert torch.autograd.gradcheck(seeded(lora_linear, 0.7, p), (x, w, bias, a, b))
            y = torch.randn(2, 3, 6, dtype=F64, requires_grad=True)
            assert torch.autograd.gradcheck(seeded(lora_update, 0.7, p), (y, x, a, b))
        wt = w.detach().t().contiguous()
        f = seeded(lambda x, a, b: lora_linear(x, wt, None, a, b, 0.7, fan_in_fan_out=True))
        assert torch.autograd.gradcheck(f, (x, a, b))
        torch.testing.assert_close(f(x, a, b), seeded(lora_linear)(x, w, None, a, b, 0.7))


def test_frozen_parts_get_no_gradient_and_keep_no_memory():
    for frozen_a, frozen_b in ((True, False), (False, True), (True, True)):
        x, w, bias, a, b = layer()
        a.requires_grad_(not frozen_a), b.requires_grad_(not frozen_b)
        y = lora_linear(x, w, bias, a, b)
        y.sum().backward()
        assert (a.grad is None) == frozen_a and (b.grad is None) == frozen_b and x.grad is not None
    x, w, bias, a, b = layer()
    y = lora_linear(x.detach(), w, bias, a, b)
    y.sum().backward()
    assert a.grad is not None and b.grad is not None


@pytest.mark.parametrize("act", [F32, BF16])
def test_saved_for_backward_is_x_and_s_and_the_packed_mask(act):
    t, k, r = 64, 256, 8
    x, w, bias, a, b = layer((t,), k=k, n=128, r=r, act=act)
    x = x.detach().requires_grad_()
    size, _ = saved_bytes(lambda: lora_linear(x, w, bias, a, b, 1.0, 0.0), x, w, a, b)
    assert size == 4 * t * r
    size, _ = saved_bytes(lambda: lora_linear(x, w, bias, a, b, 1.0, 0.1), x, w, a, b)
    assert size == 4 * t * r + t * k // 8
    size, _ = saved_bytes(lambda: lora_linear(x, w, bias, a.detach(), b, 1.0, 0.0), w, a, b)
    assert size == 4 * t * r, "with A frozen x is not kept"


def test_noncontiguous_inputs_and_gradients(device):
    x, w, bias, a, b = layer((4, 6), device=device)
    dy = torch.randn(24, 6, 4, device=device).permute(2, 1, 0)
    for view in (x.detach().transpose(0, 1).contiguous().transpose(0, 1), x.detach()[:, :1].expand(4, 6, 40)):
        got = grads(lambda *i: lora_linear(*i), (view.requires_grad_(), w, bias, a, b), dy)
        want = grads(
            lambda *i: lora_linear(*i), (view.detach().contiguous().requires_grad_(), w, bias, a, b), dy.contiguous()
        )
        assert all(torch.equal(g, e) for g, e in zip(got, want))


def test_rank_zero_is_the_frozen_linear(device):
    x, w, bias, a, b = layer(r=0, device=device)
    got = grads(lambda *i: lora_linear(*i), (x, w, bias, a, b), torch.ones(6, 24, device=device))
    want = grads(lambda *i: F.linear(*i[:3]), (x, w, bias), torch.ones(6, 24, device=device))
    assert (
        torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and got[2].shape == (0, 40) and got[3].shape == (24, 0)
    )


def test_zero_b_is_the_base_bit_for_bit(device):
    for act in (F32, BF16, F16):
        x, w, bias, a, b = layer(act=act, device=device)
        assert torch.equal(lora_linear(x, w, bias, a, torch.zeros_like(b)), F.linear(x, w, bias))


def test_dropout_is_reproducible_and_the_same_in_backward(device):
    x, w, bias, a, b = layer((50,), device=device)
    torch.manual_seed(3)
    first = lora_linear(x, w, bias, a, b, 1.0, 0.4)
    second = lora_linear(x, w, bias, a, b, 1.0, 0.4)
    torch.manual_seed(3)
    assert torch.equal(lora_linear(x, w, bias, a, b, 1.0, 0.4), first) and not torch.equal(first, second)
    # The low-rank term is linear in x: its dX must use the forward's mask.
    v = torch.randn_like(x)
    torch.manual_seed(3)
    (dx,) = torch.autograd.grad(lora_linear(x, torch.zeros_like(w), None, a, b, 1.0, 0.4), x, v @ w.t())
    torch.manual_seed(3)
    image = lora_linear(v, torch.zeros_like(w), None, a, b, 1.0, 0.4)
    torch.manual_seed(3)
    torch.testing.assert_close((dx * v).sum(), (image * (v @ w.t())).sum(), rtol=1e-4, atol=1e-2)


def test_update_equals_linear(device):
    for p in (0.0, 0.3):
        x, w, bias, a, b = layer((3, 5), device=device)
        dy = torch.randn(3, 5, 24, device=device)

        def linear(x, a, b, p=p, w=w, bias=bias):
            torch.manual_seed(0)
            return lora_linear(x, w, bias, a, b, 0.5, p)

        def update(x, a, b, p=p, w=w, bias=bias):
            torch.manual_seed(0)
            return lora_update(F.linear(x, w, bias), x, a, b, 0.5, p)

        for g, e in zip(grads(update, (x, a, b), dy), grads(linear, (x, a, b), dy)):
            torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5)


def test_activations_that_start_between_two_pairs():
    x, w, bias, a, b = layer(act=BF16, adapter=BF16)
    moved = torch.empty(x.numel() + 1, dtype=BF16)[1:].view(x.shape).copy_(x.detach())
    assert torch.equal(lora_linear(moved, w, bias, a, b), lora_linear(x.detach().clone(), w, bias, a, b))


def test_meta_tensors_have_shapes():
    x, w, bias, a, b = (t.to("meta") for t in layer((2, 3)))
    assert lora_linear(x, w, bias, a, b).shape == (2, 3, 24)


def test_opcheck():
    x, _, _, a, b = (t.detach() for t in layer())
    y, seed, ranks = torch.randn(6, 24), torch.tensor([5, 6]), [3, 1]
    s, mask = lora.lora_shrink(x, a, ranks, 0.2, seed)
    no_mask = torch.empty(0, dtype=torch.uint8)
    columns, s_columns = torch.randn(6, 30)[:, 3:27], torch.randn(6, 9)[:, 2:6]
    ops = torch.ops.fastft
    for op, args in (
        (ops.lora_shrink, (x, a, ranks, 0.2, seed)),
        (ops.lora_shrink, (x, a, ranks, 0.0, None)),
        (ops.lora_expand_, (y, s, b, 0.5)),
        (ops.lora_expand_, (columns, s_columns, b, 0.5)),
        (ops.lora_grad_sb, (y, s, b, 0.5)),
        (ops.lora_grad_sb, (y, s_columns, b, 0.5)),
        (ops.lora_grad_a, (s, x, a, ranks, mask, 0.2)),
        (ops.lora_grad_a, (s, x, a, ranks, no_mask, 0.0)),
        (ops.lora_grad_x_, (x.clone(), s, a, ranks, mask, 0.2)),
        (ops.lora_grad_x_, (x.clone(), s, a, ranks, no_mask, 0.0)),
    ):
        torch.library.opcheck(op.default, args)


def test_wrong_inputs_are_refused():
    x, w, bias, a, b = layer()
    with pytest.raises(ValueError, match=r"x \[6, 39\] \(want \[\.\.\., 40\]\)"):
        lora_linear(x[:, 1:], w, bias, a, b)
    with pytest.raises(ValueError, match=r"lora_B \[24, 3\]"):
        lora_linear(x, w, bias, a, b[:, :3])
    with pytest.raises(TypeError, match=r"lora_A is torch\.bfloat16"):
        lora_linear(x, w, bias, a.to(BF16), b)
    with pytest.raises(TypeError, match=r"x is torch\.float32 but weight is torch\.bfloat16"):
        lora_linear(x, w.to(BF16), None, a, b)
    with pytest.raises(RuntimeError, match="lora_A on meta"):
        lora_linear(x, w, bias, a.to("meta"), b)
    with pytest.raises(ValueError, match="p is 1.5"):
        lora_linear(x, w, bias, a, b, 1.0, 1.5)
    with pytest.raises(ValueError, match="must share dtype and leading dimensions"):
        lora_update(torch.zeros(5, 24), x, a, b)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.int64])
def test_activations_of_other_kinds_are_refused(dtype):
    """Of complex ones the imaginary part would be dropped, of integers what follows the point."""
    x, w, bias, a, b = (t.detach().to(dtype) for t in layer())
    adapter = (a, b) if dtype.is_complex else (a.float(), b.float())
    rows, chosen, routing = Part.of("rows", [1, 4], 24), Entries.of_mask(w.real > 0), Routing.of(torch.zeros(6).long(), 1)
    delta, values = (torch.ones(n, dtype=torch.promote_types(dtype, F32)) for n in ((2, 40), (len(chosen),)))
    one = [[factor] for factor in adapter]
    for f in (
        lambda: lora_linear(x, w, bias, *adapter),
        lambda: lora_linear(x, w, bias, *adapter, lora_bias=bias),
        lambda: lora_update(F.linear(x, w), x, *adapter),
        lambda: partial_linear(x, w, bias, rows, delta),
        lambda: delta_linear(x, w, bias, rows, delta),
        lambda: delta_update(F.linear(x, w), x, rows, delta),
        lambda: sparse_linear(x, w, bias, chosen, values),
        lambda: sparse_update(F.linear(x, w), x, chosen, values),
        lambda: grouped_lora(x, w, bias, *one, routing),
    ):
        with pytest.raises(TypeError, match=f"x is {dtype}; it must be"):
            f()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 9), max_size=3), st.integers(0, 70), st.integers(0, 70), st.integers(0, 40),
    st.sampled_from([(F32, F32), (BF16, BF16), (BF16, F32), (F16, F32)]), st.booleans(), st.sampled_from([0.0, 0.5]),
)  # fmt: skip
def test_any_shape(t, k, n, r, dtypes, transposed, p):
    """Kernels and reference agree on any shape, rank, strides and dtype pair, with the same mask."""
    x, w, bias, a, b = layer(tuple(t), k, n, r, *dtypes)
    if transposed and x.dim() > 1:
        x = x.detach().transpose(0, -2).contiguous().transpose(0, -2).requires_grad_()
    results = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        with fastft.testing.use(backend):
            results.append(grads(lambda *i: lora_linear(*i, 0.5, p), (x, w, bias, a, b), torch.ones(*t, n, dtype=dtypes[0])))
    for g, e in zip(*results):
        tolerance = 1e-5 if g.dtype == F32 else 2e-2
        torch.testing.assert_close(
            g, e, rtol=tolerance, atol=tolerance * max(1.0, float(e.abs().max()) if e.numel() else 1.0)
        )
