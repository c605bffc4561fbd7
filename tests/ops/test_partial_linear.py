"""Linears of which a part trains: gradients against autograd's full dW, what is kept, and PyTorch's machinery."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fastft
from fastft.ops.entries import Entries
from fastft.ops.partial_linear import KINDS, Part, delta_linear, delta_update, partial_linear
from tests.golden import assert_close, backends, plain_product, run_on

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
N, K = 33, 48


@pytest.fixture(params=backends())
def backend(request):
    with run_on(request.param) as device:
        yield device


def part(kind, device="cpu", n=N, k=K, transposed=False):
    size = {"rows": n, "columns": k, "entries": n * k}.get(kind)
    if size is None:
        return Part(kind)
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(4))[: max(1, size // 4)]
    if kind == "entries":
        return Part(kind, Entries.of_flat(chosen, (k, n) if transposed else (n, k)).to(device))
    return Part.of(kind, chosen, size, device)


def layer(tokens, dtype, device="cpu", transposed=False, n=N, k=K):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, k, generator=g).to(dtype).to(device).requires_grad_()
    weight = (torch.randn(k, n, generator=g) if transposed else torch.randn(n, k, generator=g)).to(dtype).to(device)
    bias, dy = torch.randn(n, generator=g).to(dtype).to(device), torch.randn(tokens, n, generator=g).to(dtype).to(device)
    return x, weight, bias, dy


def take(full, part, transposed):
    """The part of a full [N, K] gradient, in the orientation of the stored weight."""
    stored = full.t() if transposed else full
    if part.kind == "entries":
        return stored.flatten()[part.index.flat()]
    if part.kind == "all":
        return stored
    return stored.index_select(part.dim(transposed), part.index)


def wide(weight):
    return torch.promote_types(weight.dtype, F32)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "nothing"])
@pytest.mark.parametrize("tokens", [7, 0, 300])
def test_gradients_are_the_part_of_the_full_ones(backend, kind, tokens, transposed):
    for dtype in (F64,) if fastft.ops.registry._forced.get() == "reference" else (F32, BF16, F16):
        if tokens == 300 and fastft.ops.registry._forced.get() == "triton" and backend == "cpu":
            continue  # slow in the interpreter, and the same tiles
        x, weight, bias, dy = layer(tokens, dtype, backend, transposed)
        chosen = part(kind, backend, transposed=transposed)
        trained = torch.full(chosen.shape(weight, transposed), float("nan"), dtype=wide(weight), device=backend)
        y = partial_linear(x, weight, bias, chosen, trained.requires_grad_(), fan_in_fan_out=transposed)
        logical = weight.t() if transposed else weight
        assert torch.equal(y, F.linear(x, logical, bias)), "forward is the frozen layer's"
        dx, got = torch.autograd.grad(y, (x, trained), dy)
        assert torch.equal(dx, dy @ logical)
        exact, plain = dy.double().t() @ x.detach().double(), plain_product(dy.t(), x.detach())
        magnitude = dy.double().abs().t() @ x.detach().double().abs()
        assert got.dtype == wide(weight)
        wanted = [take(t, chosen, transposed) for t in (exact, plain, magnitude)]
        # A 16-bit GEMM rounds its result, so the part errs as the full gradient does.
        assert_close(got.to(dtype), *wanted, f"{kind} {dtype} {tokens}")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["rows", "columns", "all"])
def test_slices_that_are_padded_for_tensor_cores(monkeypatch, kind, transposed):
    from fastft.ops import partial_linear as module

    x, weight, bias, dy = layer(100, F32, transposed=transposed, n=37, k=51)
    chosen = part(kind, n=37, k=51)
    trained = torch.zeros(chosen.shape(weight, transposed), requires_grad=True)

    def gradient():
        y = partial_linear(x, weight, bias, chosen, trained, fan_in_fan_out=transposed)
        return torch.autograd.grad(y, trained, dy)[0]

    monkeypatch.setattr(module, "_NARROW", 0)
    want = gradient()
    monkeypatch.setattr(module, "_TENSOR_CORES", ("cpu",))
    got = gradient()
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def standing(x, weight, bias, chosen, trained, transposed):
    """The trained values stand in the weight, which autograd doesn't know of; numerical derivatives need them there."""
    w = weight.clone()
    if chosen.kind == "entries":
        w.view(-1)[chosen.index.flat()] += trained.detach()
    elif chosen.kind == "all":
        w += trained.detach()
    elif chosen.kind != "nothing":
        w.index_add_(chosen.dim(transposed), chosen.index, trained.detach())
    return partial_linear(x, w, bias, chosen, trained, fan_in_fan_out=transposed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(kind, transposed):
    x, weight, bias, _ = layer(5, F64, transposed=transposed, n=6, k=9)
    chosen, bias = part(kind, n=6, k=9, transposed=transposed), bias.requires_grad_()
    trained = torch.zeros(chosen.shape(weight, transposed), dtype=F64, requires_grad=True)

    def with_values(x, bias, trained):
        return standing(x, weight, bias, chosen, trained, transposed)

    with fastft.testing.use("reference"):
        assert torch.autograd.gradcheck(with_values, (x, bias, trained))


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck_of_a_delta_beside_the_weight(kind, transposed):
    x, weight, bias, _ = layer(5, F64, transposed=transposed, n=6, k=9)
    chosen = part(kind, n=6, k=9)
    delta = torch.randn(chosen.shape(weight, transposed), dtype=F64, requires_grad=True)
    y, option = torch.randn(5, 6, dtype=F64, requires_grad=True), {"fan_in_fan_out": transposed}
    with fastft.testing.use("reference"):
        assert torch.autograd.gradcheck(
            lambda x, b, d: delta_linear(x, weight, b, chosen, d, **option), (x, bias.requires_grad_(), delta)
        )
        assert torch.autograd.gradcheck(lambda y, x, d: delta_update(y, x, chosen, d, **option), (y, x, delta))


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_a_delta_beside_the_weight_is_one_in_it(kind, transposed, dtype):
    x, weight, bias, _ = layer(40, dtype, transposed=transposed)
    chosen = part(kind)
    delta = torch.randn(chosen.shape(weight, transposed))
    merged = weight.double().index_add(chosen.dim(transposed), chosen.index, delta.double())
    want = F.linear(x.detach().double(), merged.t() if transposed else merged, bias.double())
    got = delta_linear(x, weight, bias, chosen, delta, fan_in_fan_out=transposed)
    base = F.linear(x, weight.t() if transposed else weight, bias)
    other = delta_update(base, x, chosen, delta, fan_in_fan_out=transposed)
    with torch.no_grad():
        inference = delta_linear(x, weight, bias, chosen, delta, fan_in_fan_out=transposed)
    tolerance = {F32: 1e-6, BF16: 8e-3, F16: 1e-3}[dtype]  # two roundings of y and one of the delta
    for one in (got, other, inference):
        assert one.dtype == dtype and (one.double() - want).norm() <= tolerance * want.norm()
    assert torch.equal(base, F.linear(x, weight.t() if transposed else weight, bias)), "what was given is not changed"


def saved(f):
    """Elements of the distinct storages that f keeps for backward."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = f()
    return kept, y


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_for_backward(kind):
    t = 100
    x, weight, bias, _ = layer(t, F32)
    chosen = part(kind)
    trained = torch.zeros(chosen.shape(weight), requires_grad=True)
    kept, _y = saved(lambda: partial_linear(x, weight, bias, chosen, trained))
    kept.pop(weight.data_ptr())
    whole = kept.pop(x.data_ptr(), None) is not None
    assert whole == (kind in ("rows", "entries", "all"))
    assert sum(s.nbytes() for s in kept.values()) == (4 * t * len(chosen.index) if kind == "columns" else 0)
    # What needs no gradient keeps nothing, and without gradients to the input not even the weight.
    kept, _y = saved(lambda: partial_linear(x.detach(), weight, bias, chosen, trained.detach()))
    assert not kept
    kept, _y = saved(lambda: partial_linear(x.detach(), weight, bias, chosen, trained))
    assert weight.data_ptr() not in kept


def test_parts_side_by_side():
    """Several adapters on one weight: each gets its part's gradient of one backward."""
    x, weight, bias, dy = layer(20, F32)
    parts = [part("columns"), part("rows"), part("all")]
    trained = [torch.zeros(p.shape(weight), requires_grad=True) for p in parts]
    y = partial_linear(x, weight, bias, parts, trained)
    got = torch.autograd.grad(y, trained, dy)
    for g, p in zip(got, parts, strict=True):
        torch.testing.assert_close(g, take(dy.t() @ x.detach(), p, False), rtol=1e-4, atol=1e-4)


def test_entries_never_make_a_dense_gradient(monkeypatch):
    from fastft.ops import sparse_linear as module

    sizes = []
    real = module.product
    monkeypatch.setattr(module, "product", lambda *a: sizes.append((r := real(*a)).numel()) or r)
    x, weight, _, dy = layer(8, F32, n=2000, k=64)
    chosen = part("entries", n=2000, k=64)
    trained = torch.zeros(chosen.shape(weight), requires_grad=True)
    (got,) = torch.autograd.grad(partial_linear(x, weight, None, chosen, trained), trained, dy)
    assert max(sizes) <= 256 * 64 and len(sizes) == 8
    torch.testing.assert_close(got, (dy.t() @ x.detach()).flatten()[chosen.index.flat()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_checkpointing_and_accumulation(reentrant, kind):
    x, weight, bias, dy = layer(20, F32)
    chosen = part(kind)
    trained = torch.zeros(chosen.shape(weight), requires_grad=True)
    partial_linear(x, weight, bias, chosen, trained).backward(dy)
    want, trained.grad = trained.grad, None
    for half in (slice(0, 10), slice(10, 20)):
        y = checkpoint(partial_linear, x[half], weight, bias, chosen, trained, use_reentrant=reentrant)
        y.backward(dy[half])
    torch.testing.assert_close(trained.grad, want, rtol=1e-5, atol=1e-5)


# How the gradient of entries is computed is read from the device, which no graph can hold.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "entries"])
def test_compiles_into_one_graph(kind):
    x, weight, bias, dy = layer(20, F32)
    chosen = part(kind)
    trained = torch.zeros(chosen.shape(weight), requires_grad=True)
    eager = partial_linear(x, weight, bias, chosen, trained)
    compiled = torch.compile(partial_linear, fullgraph=True, backend="aot_eager")(x, weight, bias, chosen, trained)
    assert torch.equal(eager, compiled)
    for one, two in zip(*(torch.autograd.grad(y, (x, trained), dy) for y in (eager, compiled)), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_parts_compiles_where_nothing_trains(count):
    """Dynamo runs forward alone then, and binds its arguments by their number."""
    x, weight, bias, _ = (t.detach() for t in layer(20, F32))
    parts = [part(kind) for kind in ("rows", "columns", "all")[:count]]
    trained = [torch.zeros(p.shape(weight)) for p in parts]
    compiled = torch.compile(partial_linear, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, weight, bias, parts, trained), F.linear(x, weight, bias))


def test_under_autocast_as_f_linear():
    x, weight, bias, _ = layer(20, F32)
    chosen = part("columns")
    trained = torch.zeros(chosen.shape(weight), requires_grad=True)
    full = weight.clone().requires_grad_()
    with torch.autocast("cpu", BF16):
        y, plain = partial_linear(x, weight, bias, chosen, trained), F.linear(x, full, bias)
    assert y.dtype == BF16 and torch.equal(y, plain)
    y.float().square().sum().backward()
    plain.float().square().sum().backward()
    assert trained.grad.dtype == F32
    torch.testing.assert_close(trained.grad, take(full.grad, chosen, False), rtol=2e-2, atol=0.5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind, transposed):
    x, weight, bias, _ = layer(5, F64, transposed=transposed, n=6, k=9)
    chosen, bias = part(kind, n=6, k=9, transposed=transposed), bias.requires_grad_()
    trained = torch.zeros(chosen.shape(weight, transposed), dtype=F64, requires_grad=True)

    def with_values(x, bias, trained):
        return standing(x, weight, bias, chosen, trained, transposed)

    cases = [
        (lambda bias, trained: with_values(x.detach(), bias, trained), [bias, trained]),
        (lambda x: with_values(x, bias.detach(), trained.detach()), [x]),
    ]
    if kind != "columns":
        cases.append((with_values, [x, bias, trained]))
    if kind in ("rows", "columns"):
        option, y = {"fan_in_fan_out": transposed}, torch.randn(5, 6, dtype=F64, requires_grad=True)
        delta = torch.randn_like(trained, requires_grad=True)
        cases += [
            (lambda b, d: delta_linear(x.detach(), weight, b, chosen, d, **option), [bias, delta]),
            (lambda x, b: delta_linear(x, weight, b, chosen, delta.detach(), **option), [x, bias]),
            (lambda y, d: delta_update(y, x.detach(), chosen, d, **option), [y, delta]),
        ]
    if kind == "rows":
        cases.append((lambda x, b, d: delta_linear(x, weight, b, chosen, d, **option), [x, bias, delta]))
        cases.append((lambda y, x, d: delta_update(y, x, chosen, d, **option), [y, x, delta]))
    with fastft.testing.use("reference"):
        assert all(torch.autograd.gradgradcheck(f, tensors) for f, tensors in cases)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_many_gradients_at_once(kind, transposed):
    x, weight, bias, dy = layer(5, F32, transposed=transposed)
    chosen, bias = part(kind, transposed=transposed), bias.requires_grad_()
    trained = torch.zeros(chosen.shape(weight, transposed), requires_grad=True)
    layers = [partial_linear(x, weight, bias, chosen, trained, fan_in_fan_out=transposed)]
    if kind in ("rows", "columns"):
        layers.append(delta_linear(x, weight, bias, chosen, trained, fan_in_fan_out=transposed))
        layers.append(
            delta_update(F.linear(bias, torch.ones(N, N)).expand(5, N), x, chosen, trained, fan_in_fan_out=transposed)
        )
    for y in layers:
        both = torch.stack([dy, 2 * dy])
        got = torch.autograd.grad(y, (x, bias, trained), both, is_grads_batched=True, retain_graph=True)
        want = [torch.autograd.grad(y, (x, bias, trained), one, retain_graph=True) for one in both]
        for g, w in zip(got, zip(*want, strict=True), strict=True):
            torch.testing.assert_close(g, torch.stack(w), rtol=1e-4, atol=1e-4)


def test_a_part_made_in_inference_mode_is_differentiated_twice():
    x, weight, bias, _ = layer(5, F32)
    with torch.inference_mode():
        chosen = Part.of("rows", [1, 4], N)
    delta = torch.ones(2, K, requires_grad=True)
    for f in (partial_linear, delta_linear):
        (first,) = torch.autograd.grad(f(x, weight, bias, chosen, delta).square().sum(), delta, create_graph=True)
        assert torch.autograd.grad(first.sum(), x)[0].any()


def test_second_derivative_that_would_need_what_is_not_kept_is_refused():
    x, weight, bias, _ = layer(5, F32)
    trained = torch.zeros(part("columns").shape(weight), requires_grad=True)
    for f in (partial_linear, delta_linear):
        with pytest.raises(RuntimeError, match="of x only those columns were kept"):
            torch.autograd.grad(f(x, weight, bias, part("columns"), trained).sum(), x, create_graph=True)


def test_wrong_arguments_say_what_is_wrong():
    x, weight, bias, _ = layer(5, F32)
    rows = part("rows")
    good = torch.zeros(rows.shape(weight))
    for error, message, call in (
        (ValueError, "known: all, rows", lambda: Part("channels")),
        (ValueError, "needs an index", lambda: Part("rows")),
        (ValueError, "has no index", lambda: Part("all", torch.zeros(1, dtype=torch.int32))),
        (ValueError, "rows 0 to 33 of a weight that has 33", lambda: Part.of("rows", [0, 33], 33)),
        (ValueError, "-1", lambda: Part.of("rows", [-1, 3], 33)),
        (ValueError, "rows 3 is given twice", lambda: Part.of("rows", [3, 1, 3], 33)),
        (ValueError, "48 in-features", lambda: partial_linear(x[:, 1:], weight, bias, rows, good)),
        (TypeError, "one dtype", lambda: partial_linear(x.bfloat16(), weight, bias, rows, good)),
        (ValueError, r"is \[8, 48\], not \[7, 48\]", lambda: partial_linear(x, weight, bias, rows, good[1:])),
        (TypeError, "float16", lambda: partial_linear(x, weight, bias, rows, good.half())),
        (ValueError, "2 parts and 1 trained", lambda: partial_linear(x, weight, bias, [rows, rows], [good])),
        (ValueError, "not of entries", lambda: delta_linear(x, weight, bias, part("entries"), torch.zeros(396))),
        (ValueError, "share dtype", lambda: delta_update(torch.zeros(4, N), x, rows, good)),
    ):
        with pytest.raises(error, match=message):
            call()
