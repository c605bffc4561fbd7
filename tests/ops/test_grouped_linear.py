"""The public functions on the grouped ops: gradients by gradcheck and against a loop over adapters."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import fastft
from fastft.ops.grouped import COLUMNS, ENTRIES, LOW_RANK, ROWS
from fastft.ops.grouped_linear import Routing, Tables, grouped_lora, grouped_update
from tests.golden import assert_close, backends, run_on
from tests.ops.grouped_cases import make
from tests.ops.test_grouped import drawn

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
RANKS, SCALES = (3, 1, 8, 0, 5), (0.5, 2.0, 1.0, 1.0, 0.25)
ADAPTERS = torch.tensor([[0, 1], [2, 2], [-1, 4], [3, 0], [-1, -1], [1, 2], [2, 0]])


@pytest.fixture(params=backends("amx"))
def backend(request):
    with run_on(request.param) as device:
        yield device


def layer(dtype, adapter_dtype, device="cpu", k=24, n=17):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *size, of=dtype: torch.randn(*size, generator=generator).to(of).to(device)  # noqa: E731
    a = [draw(r, k, of=adapter_dtype) * k**-0.5 for r in RANKS]
    b = [draw(n, r, of=adapter_dtype) for r in RANKS]
    gates = draw(*ADAPTERS.shape, of=F64 if dtype == F64 else F32)
    return draw(len(ADAPTERS), k), draw(n, k) * k**-0.5, draw(n), a, b, gates


def loop(x, weight, bias, a, b, gates, adapters=ADAPTERS):
    """One adapter after the other, on all tokens, in the widest of the dtypes."""
    y = F.linear(x, weight, bias)
    for j in range(adapters.shape[1]):
        for e, scale in enumerate(SCALES):
            named = (adapters[:, j] == e).to(x.device)
            wide = torch.promote_types(x.dtype, a[e].dtype)
            factor = scale * (named * (1.0 if gates is None else gates[:, j]))[:, None]
            y = y + (factor * (x.to(wide) @ a[e].to(wide).t() @ b[e].to(wide).t())).to(y.dtype)
    return y


def trained(tensors):
    x, weight, bias, a, b, gates = tensors
    return [x, weight, bias, *a, *b, gates]


def with_gradients(function, tensors, dtype=None):
    x, weight, bias, a, b, gates = (
        [t.detach().to(dtype or t.dtype).requires_grad_() for t in part]
        if isinstance(part, list)
        else part.detach().to(dtype or part.dtype).requires_grad_()
        for part in tensors
    )
    y = function(x, weight, bias, a, b, gates)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype).to(y.device)
    y.backward(dy)
    return [y.detach(), *(t.grad for t in trained((x, weight, bias, a, b, gates)))]


def ours(x, weight, bias, a, b, gates):
    adapters = ADAPTERS.to(x.device)
    return grouped_lora(x, weight, bias, a, b, Routing.of(adapters, len(a), gates), SCALES)


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
def test_against_a_loop_over_adapters(backend, dtypes):
    tensors = layer(*dtypes, backend)
    got, plain = with_gradients(ours, tensors), with_gradients(loop, tensors)
    cpu = [[t.cpu() for t in part] if isinstance(part, list) else part.cpu() for part in tensors]
    want = with_gradients(loop, cpu, F64)
    names = ["y", "x", "weight", "bias", *(f"A{i}" for i in range(5)), *(f"B{i}" for i in range(5)), "gates"]
    for name, g, w, p in zip(names, got, want, plain, strict=True):
        # Terms are as large as the largest results are: of up to 24 terms, most of one size.
        magnitude = torch.full_like(w, 4 * w.abs().amax() if w.numel() else 0)
        assert_close(g.cpu(), w, p.cpu(), magnitude, f"{name} {dtypes}")


def test_gradcheck():
    x, weight, bias, a, b, gates = layer(F64, F64, k=5, n=4)
    tensors = [t.requires_grad_() for t in trained((x, weight, bias, a, b, gates))]
    count = len(RANKS)

    def function(x, weight, bias, *rest):
        return ours(x, weight, bias, rest[:count], rest[count : 2 * count], rest[-1])

    with fastft.testing.use("reference"):
        assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck_of_every_kind(weighted):
    adapters = [[(LOW_RANK, 2), (COLUMNS, 3)], [(ROWS, 2), (ENTRIES, 20)], [(COLUMNS, 2), (ROWS, 2)]]
    case = make(adapters, 6, (4, 5), F64)
    tables = Tables(case.offsets, case.columns, case.pieces, case.width, has_entries=True)
    choices = torch.tensor([[0, 2], [1, 1], [-1, 0], [2, 1]]) if weighted else torch.tensor([0, -1, 2, 1])
    gates = torch.rand(4, 2, dtype=F64, requires_grad=True) if weighted else None
    holes = case.store.isnan()
    x, y = torch.randn(4, 6, dtype=F64, requires_grad=True), torch.randn(4, 9, dtype=F64, requires_grad=True)
    numbers = case.store[~holes].clone().requires_grad_()

    def function(y, x, numbers, *gates):
        store = torch.full_like(case.store, float("nan")).masked_scatter(~holes, numbers)
        return grouped_update(y, x, store, tables, Routing.of(choices, 3, gates[0] if gates else None))

    with fastft.testing.use("reference"):
        assert torch.autograd.gradcheck(function, (y, x, numbers, *([gates] if weighted else [])))


def test_single_entries_train_on_kernels(backend):
    case = make([[(ENTRIES, 10)], [(ENTRIES, 20)], [(LOW_RANK, 3)]], 40, (24,)).to(backend)
    tables = Tables(case.offsets, case.columns, case.pieces, case.width, has_entries=True)
    routing = Routing.of(torch.tensor([0, 1, 1, -1, 2, 0]).to(backend), 3)
    x, y = drawn(6, 40, F32, backend, 1)[0], drawn(6, 24, F32, backend, 2)[0]

    def gradients(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (y, x, case.store)]
        grouped_update(leaves[0], leaves[1], leaves[2], tables, routing).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    got = gradients(F32)
    with fastft.testing.use("reference"), fastft.testing.record():  # beside the backend's launches
        want = gradients(F64)
    for g, w in zip(got, want):
        assert torch.allclose(g.double(), w, rtol=1e-4, atol=1e-4 * float(w.abs().max()))


@pytest.mark.parametrize("count", [1, 3, 40])
def test_routing_lists_each_assignment_once(count):
    adapters = torch.randint(-1, count, (50, 2), generator=torch.Generator().manual_seed(count))
    routing = Routing.of(adapters, count)
    seen = {}
    for slot, begin, end in routing.segments.tolist():
        for a in routing.assignments[begin:end].tolist():
            assert a not in seen
            seen[a] = slot
        assert routing.assignments[begin:end].tolist() == sorted(routing.assignments[begin:end].tolist()), "stable"
    assert seen == {a: slot for a, slot in enumerate(adapters.flatten().tolist()) if slot >= 0}


def test_wrong_arguments_are_refused():
    x, weight, bias, a, b, gates = layer(F32, F32)
    routing = Routing.of(ADAPTERS, len(a), gates)
    with pytest.raises(ValueError, match="lora_B"):
        grouped_lora(x, weight, bias, a, [b[0], *b[:-1]], routing)
    with pytest.raises(TypeError, match="bfloat16"):
        grouped_lora(x, weight, bias, [t.to(BF16) for t in a], b, routing)
    with pytest.raises(ValueError, match="weights"):
        Routing.of(ADAPTERS, len(a), gates[:, :1])
    with pytest.raises(TypeError, match="integers"):
        Routing.of(ADAPTERS.float(), len(a))
    for rows in (x[:2], torch.cat([x, x])):  # as of a batch of samples whose adapters are named one a sample
        with pytest.raises(ValueError, match="each token"):
            grouped_lora(rows, weight, bias, a, b, routing)
    for wrong in (len(a), len(a) + 1):  # the first was taken for none
        with pytest.raises(ValueError, match=f"number {wrong}, there are {len(a)}"):
            Routing.of(torch.tensor([0, wrong]), len(a))


def test_meta_tensors_have_shapes():
    x, weight, bias, a, b, gates = [
        [t.to("meta") for t in part] if isinstance(part, list) else part.to("meta") for part in layer(F32, F32)
    ]
    routing = Routing.of(ADAPTERS.to("meta"), len(a), gates)
    with torch.no_grad():
        assert grouped_lora(x, weight, bias, a, b, routing, SCALES).shape == (*x.shape[:-1], len(weight))


def test_compiles_without_a_break():
    x, weight, bias, a, b, _ = layer(F32, F32)
    routing = Routing.of(ADAPTERS[:, 0], len(a))
    with fastft.testing.use("reference"):
        plain = grouped_lora(x, weight, bias, a, b, routing, SCALES)
        compiled = torch.compile(grouped_lora, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x, weight, bias, a, b, routing, SCALES), plain)


def test_fake_and_real_tensors_share_no_tables():
    for mode in (FakeTensorMode(), nullcontext(), FakeTensorMode()):
        with mode, torch.no_grad():
            x, weight, bias, a, b, _ = layer(F32, F32, k=23)  # sizes that no other test has
            y = grouped_lora(x, weight, bias, a, b, Routing.of(torch.zeros(7, dtype=torch.int64), len(a)), SCALES)
            assert y.shape == (7, 17)
