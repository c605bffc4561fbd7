"""The options of the public functions: a middle between A and B, a bias on B, a known base, Conv1D's layout, offsets."""

import pytest
import torch
import torch.nn.functional as F

import fastft
from fastft.ops.lora_linear import SharedInput, lora_linear, lora_update
from tests.ops.layers import BF16, F32, F64, composition, grads, layer, saved_bytes, seeded


def diagonal(s, d):
    return s * d


def dense(s, m):
    return s @ m.t()


def activation(s, c):
    return F.silu(s + c)


def blocks(s, gates):
    """A scale per token of each rank block: gates [T, E], s [T, E R]."""
    return s * gates.repeat_interleave(s.shape[1] // gates.shape[1], 1)


R, T = 4, 6
# name -> the function and its own tensor's shape
MIDDLES = {
    "diagonal": (diagonal, (R,)),
    "dense": (dense, (R, R)),
    "wider": (dense, (7, R)),
    "activation": (activation, (R,)),
    "blocks": (blocks, (T, 2)),
}


def drawn(*shape, dtype=F32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(dtype).requires_grad_()


def case(name, dtype=F32, **sizes):
    """The middle, its tensor, and x, w, bias, A, B that fit it."""
    middle, shape = MIDDLES[name]
    x, w, bias, a, b = layer((2, 3), r=R, act=dtype, adapter=dtype, **sizes)
    return middle, drawn(*shape, dtype=dtype), x, w, bias, a, drawn(w.shape[0], 7, dtype=dtype) if name == "wider" else b


@pytest.mark.parametrize("name", MIDDLES)
def test_middle_beside_the_formula(name):
    middle, m, *inputs = case(name)

    def ours(m, x, w, bias, a, b):
        return lora_linear(x, w, bias, a, b, 0.5, middle=lambda s: middle(s, m))

    def formula(m, x, w, bias, a, b):
        return F.linear(x, w, bias) + 0.5 * (middle((x @ a.t()).flatten(0, 1), m) @ b.t()).view(2, 3, -1)

    def update(m, x, w, bias, a, b):
        return lora_update(F.linear(x, w, bias), x, a, b, 0.5, middle=lambda s: middle(s, m))

    want = grads(formula, (m, *inputs), torch.ones(2, 3, 24))
    for f in (ours, update):
        for g, w in zip(grads(f, (m, *inputs), torch.ones(2, 3, 24)), want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("name", MIDDLES)
def test_gradcheck_of_middle_and_lora_bias(name, p):
    middle, m, x, w, bias, a, b = case(name, F64, k=8, n=5)
    extra = drawn(5, dtype=F64)

    def f(m, x, bias, a, b, extra):
        return lora_linear(x, w, bias, a, b, 0.7, p, lora_bias=extra, middle=lambda s: middle(s, m))

    with fastft.testing.use("reference"):
        assert torch.autograd.gradcheck(seeded(f), (m, x, bias.requires_grad_(), a, b, extra))
        if name == "dense":
            y = drawn(2, 3, 5, dtype=F64)
            f = seeded(lambda *i: lora_update(*i[:4], 0.7, p, lora_bias=i[4], middle=lambda s: middle(s, i[5])))
            assert torch.autograd.gradcheck(f, (y, x, a, b, extra, m))


def test_mixture_of_experts_is_one_adapter_of_their_ranks():
    """A dense mixture of E adapters with gates per token: A's and B's stacked, gates on the blocks of S."""
    experts, rank, k, n = 3, 2, 16, 8
    x, w, bias, a, b = layer((2, 3), k=k, n=n, r=experts * rank)
    router = drawn(experts, k)

    def ours(x, router, a, b):
        gates = F.softmax(x @ router.t(), -1).flatten(0, 1)
        return lora_linear(x, w, bias, a, b, 0.5, middle=lambda s: blocks(s, gates))

    def mixture(x, router, a, b):
        gates, y = F.softmax(x @ router.t(), -1), F.linear(x, w, bias)
        for e, (a_e, b_e) in enumerate(zip(a.split(rank), b.split(rank, 1))):
            y = y + gates[..., e : e + 1] * 0.5 * (x @ a_e.t() @ b_e.t())
        return y

    inputs, dy = (x, router, a, b), torch.randn(2, 3, n)
    for g, w_ in zip(grads(ours, inputs, dy), grads(mixture, inputs, dy), strict=True):
        torch.testing.assert_close(g, w_, rtol=1e-5, atol=1e-4)


def test_a_frozen_offset_stacked_or_in_the_base():
    """B A - B₀ A₀ (PiSSA's and others' residual) without changing W: stacked to rank 2R, or with the base replaced."""
    x, w, bias, a, b = layer((2, 3))
    a0, b0 = a.detach() + 0.1, b.detach() - 0.1

    def stacked(x, a, b):
        return lora_linear(x, w, bias, torch.cat([a, a0]), torch.cat([b, -b0], 1), 0.5)

    def replaced(x, a, b):
        return lora_linear(x, w - 0.5 * b0 @ a0, bias, a, b, 0.5)

    def formula(x, a, b):
        return F.linear(x, w, bias) + 0.5 * (x @ a.t() @ b.t() - x @ a0.t() @ b0.t())

    dy = torch.randn(2, 3, 24)
    want = grads(formula, (x, a, b), dy)
    for f in (stacked, replaced):
        for g, w_ in zip(grads(f, (x, a, b), dy), want, strict=True):
            torch.testing.assert_close(g, w_, rtol=1e-5, atol=1e-4)


def test_lora_bias_beside_the_formula():
    for bias_there in (True, False):
        x, w, bias, a, b = layer((2, 3))
        bias, extra = bias.requires_grad_() if bias_there else None, drawn(24)
        inputs = [i for i in (x, a, b, extra, bias) if i is not None]

        def ours(x, a, b, extra, bias=None, w=w):
            return lora_linear(x, w, bias, a, b, 0.5, lora_bias=extra)

        def formula(x, a, b, extra, bias=None, w=w):
            return F.linear(x, w, bias) + 0.5 * (x @ a.t() @ b.t() + extra)

        dy = torch.randn(2, 3, 24)
        for g, w_ in zip(grads(ours, inputs, dy), grads(formula, inputs, dy), strict=True):
            torch.testing.assert_close(g, w_, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("act", [F32, BF16])
@pytest.mark.parametrize("t", [(6,), (2, 3), (), (0,)])
def test_base_is_the_columns_of_a_packed_gemm(act, t):
    """The same bits as with the GEMM inside, gradients too; outputs may be changed in place."""
    x, *first = layer(t, act=act)
    _, *second = layer(t, n=17, r=3, act=act, seed=1)
    members = [first, second]

    def run(packed, inplace, x, a0, b0, a1, b1):
        shared, ys = SharedInput(x, [a0, a1]), []
        with torch.no_grad():
            wide = torch.cat([F.linear(shared.x, w, bias) for w, bias, *_ in members], 1)
        for i, (b, column) in enumerate(zip((b0, b1), wide.split([24, 17], 1))):
            w, bias, *_ = members[i]
            y = shared.project(i, w, bias, b, 0.5, base=column if packed else None)
            ys.append(F.relu(y, inplace=inplace))
        return torch.cat(ys, -1)

    inputs, dy = (x, *first[2:], *second[2:]), torch.ones(*t, 41, dtype=act)
    want = grads(lambda *i: run(False, False, *i), inputs, dy)
    for inplace in (False, True):
        got = grads(lambda *i: run(True, inplace, *i), inputs, dy)  # noqa: B023
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_conv1d_layout_is_a_transposed_weight(p):
    x, w, bias, a, b = layer((2, 3))
    stored = w.t().contiguous().requires_grad_()
    got = grads(
        seeded(lambda *i: lora_linear(*i, 0.5, p, fan_in_fan_out=True)), (x, stored, bias, a, b), torch.ones(2, 3, 24)
    )
    want = grads(seeded(lambda *i: lora_linear(*i, 0.5, p)), (x, w.requires_grad_(), bias, a, b), torch.ones(2, 3, 24))
    got[2] = got[2].t()
    for g, w_ in zip(got, want, strict=True):
        torch.testing.assert_close(g, w_, rtol=1e-5, atol=1e-4)


def test_factors_of_any_strides():
    x, w, bias, a, b = layer()
    want = grads(lora_linear, (x, w, bias, a, b), torch.ones(6, 24))
    turned = [t.detach().t().contiguous().requires_grad_() for t in (a, b)]
    got = grads(lambda x, w, bias, a, b: lora_linear(x, w, bias, a.t(), b.t()), (x, w, bias, *turned), torch.ones(6, 24))
    assert all(torch.equal(g.t() if i > 1 else g, e) for i, (g, e) in enumerate(zip(got, want, strict=True)))


def test_factors_of_two_dtypes_on_one_input():
    x, w, bias, a, b = layer(act=BF16, adapter=BF16)
    _, _, _, a32, b32 = layer(act=BF16, adapter=F32, seed=1)
    shared = SharedInput(x, [a, a32])
    y = shared.project(0, w, bias, b, 0.5) + shared.project(1, w, None, b32, 0.5)
    y.sum().backward()
    assert a.grad.dtype == b.grad.dtype == BF16 and a32.grad.dtype == b32.grad.dtype == F32
    x1, x2 = (x.detach().clone().requires_grad_() for _ in range(2))
    alone = lora_linear(x1, w, bias, a.detach(), b.detach(), 0.5) + lora_linear(x2, w, None, a32.detach(), b32, 0.5)
    torch.testing.assert_close(y, alone, rtol=2e-2, atol=0.5)


def test_a_middle_adds_what_it_keeps_alone():
    x, w, bias, a, b = layer((64,), k=256, r=8)
    parameters = (x, w, a, b)
    plain, _ = saved_bytes(lambda: lora_linear(x, w, bias, a, b), *parameters)
    d = torch.ones(8, requires_grad=True)
    size, _ = saved_bytes(lambda: lora_linear(x, w, bias, a, b, middle=lambda s: s * d), *parameters, d)
    assert size == 2 * plain == 2 * 4 * 64 * 8, "S and middle(S)"


def test_under_autocast_a_middle_stays_float32():
    middle, m, x, w, bias, a, b = case("dense")
    seen = []

    def watched(s):
        seen.append((s.dtype, middle(s, m).dtype))
        return middle(s, m)

    with torch.autocast("cpu", BF16):
        y = lora_linear(x, w, bias, a, b, 0.5, lora_bias=drawn(24), middle=watched)
    assert seen == [(F32, F32)] and y.dtype == BF16
    y.sum().backward()
    assert {t.grad.dtype for t in (x, a, b, m)} == {F32}
    exact = composition(*(t.double() for t in (x, w, bias)), m.double() @ a.double(), b.double(), 0.5) + 0.5 * drawn(24)
    torch.testing.assert_close(y.double(), exact, rtol=2e-2, atol=0.3)


@pytest.mark.parametrize("name", [*MIDDLES, "base", "conv1d", "offset"])
def test_compiles_into_one_graph(name):
    """`test_autograd` has the rest, and Inductor."""
    middle, m, x, w, bias, a, b = case(name if name in MIDDLES else "dense")

    def f(m, x, a, b):
        if name == "base":
            shared = SharedInput(x, [a, m @ a])
            wide = F.linear(shared.x.detach(), torch.cat([w, w]))
            y = shared.project(0, w, None, b, base=wide[:, :24])
            return y + shared.project(1, w, None, b, base=wide[:, 24:])
        if name == "conv1d":
            return lora_linear(x, w.t(), bias, a, b, fan_in_fan_out=True) + m.sum()
        if name == "offset":
            return lora_linear(x, w, bias, torch.cat([a, m @ a.detach()]), torch.cat([b, -b.detach()], 1))
        return lora_linear(x, w, bias, a, b, middle=lambda s: middle(s, m))

    torch._dynamo.reset()
    got = grads(torch.compile(f, fullgraph=True, backend="aot_eager"), (m, x, a, b), torch.ones(2, 3, 24))
    for g, w_ in zip(got, grads(f, (m, x, a, b), torch.ones(2, 3, 24)), strict=True):
        torch.testing.assert_close(g, w_, rtol=1e-5, atol=1e-4)


def test_wrong_options_are_refused():
    x, w, bias, a, b = layer()
    m = torch.ones(24)
    for match, options in (
        ("middle turned S", {"middle": lambda s: s.bfloat16()}),
        ("middle turned S", {"middle": lambda s: s[:3]}),
        (r"lora_B \[24, 4\] \(want \[24, 3\]", {"middle": lambda s: s[:, :3]}),
        (r"lora_bias is \[23\], must be \[24\]", {"lora_bias": torch.ones(23)}),
        (r"magnitude is \[1\], must be \[24\]", {"magnitude": m[:1], "weight_norm": m}),
        (r"weight_norm is \[24, 1\]", {"magnitude": m, "weight_norm": m[:, None]}),
        ("belong together", {"magnitude": m}),
        ("belong together", {"weight_norm": m}),
    ):
        with pytest.raises(ValueError, match=match):
            lora_linear(x, w, bias, a, b, **options)
    with pytest.raises(ValueError, match=r"bias is \[1\]"):
        lora_linear(x, w, bias[:1], a, b)
    for base in (torch.zeros(6, 23), torch.zeros(6, 24, dtype=BF16), torch.zeros(6, 24, requires_grad=True)):
        with pytest.raises(ValueError, match="base is"):
            SharedInput(x, [a]).project(0, w, bias, b, base=base)


def test_meta_tensors_have_shapes():
    _, m, x, w, bias, a, b = (t if callable(t) else t.to("meta") for t in case("dense"))
    assert lora_linear(x, w, bias, a, b, middle=lambda s: s @ m).shape == (2, 3, 24)
    norm = torch.ones(24, device="meta")
    assert lora_linear(x, w, bias, a, b, magnitude=norm, weight_norm=norm).shape == (2, 3, 24)
