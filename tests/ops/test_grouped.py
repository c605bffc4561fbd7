"""The grouped family: every op on every backend against dense float64 deltas. Tolerance: `tests/golden.py`."""

import pytest
import torch

import fastft
from fastft import _native
from fastft.ops import grouped
from fastft.ops.grouped import COLUMNS, ENTRIES, LOW_RANK, ROWS
from tests.golden import assert_close, backends, poisoned, run_on
from tests.ops.grouped_cases import defined, expected, make, route

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]
ALL_KINDS = [
    [(LOW_RANK, 3), (LOW_RANK, 16), None],
    [(COLUMNS, 5), None, (ROWS, 4)],
    [(ENTRIES, 10), (ENTRIES, 2), (LOW_RANK, 1)],
    [None, (ROWS, 7), (COLUMNS, 2)],
    [None, None, None],
    [(LOW_RANK, 8), (ENTRIES, 30), (COLUMNS, 9)],
]
LORAS = [[(LOW_RANK, r), (LOW_RANK, r)] for r in (1, 8, 16, 33)]
# adapters, in-features, out-features of each output, slot of each token
SMALL = [
    (ALL_KINDS, 24, (16, 9, 40), [0, -1, 2, 1, 5, 3, -1, 1, 4, 0]),
    (ALL_KINDS, 63, (1, 100, 33), [5] * 7 + [-1] * 3 + [3, 2, 3]),
    (LORAS, 100, (64, 23), [3, 2, 1, 0, -1]),
    (LORAS, 1, (1, 1), [2, 3]),
    (LORAS, 32, (16, 16), []),
    (LORAS, 32, (16, 16), [-1, -1, -1]),
    ([[(LOW_RANK, 150)]], 40, (24,), [0, 0, -1]),
]
LARGE = [
    (ALL_KINDS, 1023, (300, 129, 511), [max(-1, t * 7 % 8 - 2) for t in range(45)]),
    (LORAS, 512, (512, 256), [t % 5 - 1 for t in range(32)]),
    (LORAS, 1408, (512, 130), [1] * 100 + [-1] * 20 + [3] * 57 + [0]),
    ([[(COLUMNS, 430)], [(ROWS, 430)], [(ENTRIES, 1)], [(LOW_RANK, 64)]], 512, (1408,), [0, 1, 2, 3] * 9 + [2] * 40),
    ([[(LOW_RANK, 512)]], 40, (24,), [0, 0, -1]),
    # Prompts: many neighbouring tokens of one adapter, and as many that are no neighbours or have another kind besides.
    (LORAS, 41, (1, 37), [3] * 70 + [0] * 64 + [-1] * 3 + [2] * 131 + [1] * 63),
    (LORAS, 1030, (300, 64), [3, 2] * 70 + [1] * 200),
    ([[(LOW_RANK, 150)], [(LOW_RANK, 16)], [(ENTRIES, 5)]], 72, (48,), [1] * 64 + [0] * 99 + [2] * 80),
    ([[(LOW_RANK, 8), (ENTRIES, 3)], [(LOW_RANK, 8), None]], 72, (48, 16), [0] * 70 + [1] * 70),
]


@pytest.fixture(params=backends("amx"))
def backend(request):
    with run_on(request.param) as device:
        yield device


def sites(device, dtypes):
    """Triton's interpreter takes a second or two for each: every other one in each dtype but float32 there."""
    forced = fastft.ops.registry._forced.get()
    slow = forced in ("triton", "cuda_host") and device == "cpu"
    start = DTYPES.index(dtypes)
    step = 2 if forced == "triton" and slow and start else 1
    yield from SMALL[start % step :: step] if slow else SMALL + LARGE


def drawn(rows, columns, dtype, device, seed, apart=False):
    """(the matrix, the wider matrix of NaN that holds it)."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.full((rows, columns + (16 if apart else 0)), float("nan"))
    wide[:, 8 * apart : 8 * apart + columns] = torch.randn(rows, columns, generator=generator)
    wide = wide.to(dtype).to(device)
    return wide[:, 8 * apart : 8 * apart + columns], wide


def bits(t):
    return t.contiguous().view(torch.int16 if t.element_size() == 2 else torch.int32)


def update(y, x, case, routing, weights=None):
    """y with all that the adapters add, in place; returns S."""
    segments, assignments, k = routing
    with poisoned():
        s = grouped.grouped_shrink(x, case.store, case.offsets, case.pieces, segments, assignments, k, case.width)
    grouped.grouped_expand_(y, x, s, case.store, case.offsets, case.columns, case.pieces, segments, assignments, weights, k)
    return s


def reference(*tensors_and_more):
    with fastft.testing.use("reference"), fastft.testing.record():  # beside those of the backend
        return update(*tensors_and_more)


def routed(slots, device, empty=0):
    segments, assignments, k = route(slots, empty)
    return segments.to(device), assignments.to(device), k


@pytest.mark.sanitize
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_update(backend, dtypes):
    for i, (adapters, k, outputs, slots) in enumerate(sites(backend, dtypes)):
        apart = i % 2 == 1
        case = make(adapters, k, outputs, dtypes[1], seed=i).to(backend)
        x, _ = drawn(len(slots), k, dtypes[0], backend, 1, apart)
        y, wide = drawn(len(slots), sum(outputs), dtypes[0], backend, 2, apart)
        before, plain = y.clone(), y.clone()
        want, magnitude = expected(before, x, case, slots)
        routing = routed(slots, backend, empty=i % 3)
        s = update(y, x, case, routing)
        plain_s = reference(plain, x, case, routing)
        what = f"{k} -> {outputs}, {dtypes}, slots {slots[:8]}"
        assert_close(y.cpu(), want, plain.cpu(), magnitude, what)
        mask = defined(case, routing[0], routing[1])
        assert s.shape == mask.shape and torch.allclose(s.cpu()[mask], plain_s.cpu()[mask], rtol=1e-4, atol=1e-4), what
        none = [t for t, slot in enumerate(slots) if slot < 0 or not any(adapters[slot])]
        assert torch.equal(bits(y[none]), bits(before[none])), f"{what}: rows without an adapter keep their bits"
        if apart:
            assert wide[:, :8].isnan().all() and wide[:, -8:].isnan().all(), what


@pytest.mark.sanitize
@pytest.mark.parametrize("k", [1, 2])
def test_segments_come_in_any_order(backend, k):
    slots = [[0, 1], [2, 0], [1, 2], [0, 2]] if k == 2 else [0, 2, 1, 0]
    case = make(ALL_KINDS, 24, (16, 9, 40)).to(backend)
    x, y = drawn(4, 24, torch.float32, backend, 1)[0], drawn(4, 65, torch.float32, backend, 2)[0]
    ascending, results = routed(slots, backend), []
    for order in ([0, 1, 2], [2, 0, 1], [2, 1, 0]):
        results.append(y.clone())
        update(results[-1], x, case, (ascending[0][order].contiguous(), *ascending[1:]))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
def test_both_in_one_are_the_two(dtypes):
    """grouped_add_ adds what grouped_shrink and grouped_expand_ add, to the bit, on any number of threads."""
    before = torch.get_num_threads()
    for i, (adapters, k, outputs, slots) in enumerate(SMALL + LARGE):
        case, routing = make(adapters, k, outputs, dtypes[1], seed=i), routed(slots, "cpu", empty=i % 3)
        x, y = drawn(len(slots), k, dtypes[0], "cpu", 1)[0], drawn(len(slots), sum(outputs), dtypes[0], "cpu", 2)[0]
        want = y.clone()
        segments, assignments, choices = routing
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                with run_on(f"cpu_{_native.supported_isas()[0]}"):
                    update(want.copy_(y), x, case, routing)
                    got, where = y.clone(), (case.store, case.offsets, case.columns, case.pieces, segments, assignments)
                    grouped.grouped_add_(got, x, *where, None, choices, case.width)
                assert torch.equal(bits(got), bits(want)), f"{k} -> {outputs}"
        finally:
            torch.set_num_threads(before)


@pytest.mark.sanitize
@pytest.mark.parametrize("which", ["cpu", "reference"])
def test_both_in_one_with_leading_dimensions(which):
    """grouped_add_ takes x and y as a model has them, and says what it does not take."""
    adapters, k, outputs, slots = SMALL[0]
    slots = (list(slots) * 6)[:6]
    case, (segments, assignments, _) = make(adapters, k, outputs, torch.float32, seed=1), routed(slots, "cpu")
    x, y = drawn(6, k, torch.float32, "cpu", 1)[0], drawn(6, sum(outputs), torch.float32, "cpu", 2)[0]
    where = case.store, case.offsets, case.columns, case.pieces, segments, assignments, None, 1, case.width
    with run_on(f"cpu_{_native.supported_isas()[0]}" if which == "cpu" else which):
        want, got = y.clone(), y.clone()
        grouped.grouped_add_(want, x, *where)
        for shape in (2, 3), (6, 1), (1, 2, 3):
            grouped.grouped_add_(got.copy_(y).view(*shape, -1), x.view(*shape, -1), *where)
            assert torch.equal(bits(got), bits(want)), shape
        assert not torch.equal(got, y)
        if which == "cpu":
            apart = torch.zeros(2, 3, 2 * k)[..., ::2]
            for wrong in (apart, x[0], x[:5].view(5, 1, k)):
                with pytest.raises(RuntimeError, match="contiguous with more dimensions|y has 6 rows, x 5"):
                    grouped.grouped_add_(got.view(2, 3, -1), wrong, *where)


@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
def test_several_weighted_assignments(backend, dtypes):
    """Two adapters a token, of them one twice, or none; on any backend without a race: twice the same bits."""
    slots = [[0, 1], [1, 1], [-1, 2], [2, 0], [-1, -1], [3, 5], [5, 0], [5, 5]]
    case = make(ALL_KINDS, 40, (24, 16, 33), dtypes[1], seed=4).to(backend)
    x, y = drawn(8, 40, dtypes[0], backend, 1)[0], drawn(8, 73, dtypes[0], backend, 2)[0]
    weights = torch.rand(8, 2, generator=torch.Generator().manual_seed(3)).to(backend) - 0.3
    want, magnitude = expected(y, x, case, slots, weights)
    routing = routed(slots, backend)
    first, second, plain = y.clone(), y.clone(), y.clone()
    for out in (first, second):
        update(out, x, case, routing, weights)
    reference(plain, x, case, routing, weights)
    # Each assignment rounds y once, the reference once in all: the sums on the way are as large as their terms.
    if dtypes[0] != F32:
        plain = torch.where(plain.double().cpu() == want, plain.cpu(), (want + 2**-8 * magnitude).to(dtypes[0]))
    assert_close(first.cpu(), want, plain.cpu(), magnitude, f"{dtypes}")
    assert torch.equal(bits(first), bits(second))
    assert torch.equal(bits(first[4]), bits(y[4]))


def test_other_segments_change_no_bit(backend):
    """Also where another adapter is NaN, and where the last slot, which -1 would be in Python, holds huge values."""
    huge = [*ALL_KINDS, [(LOW_RANK, 4)] * 3]
    slots = [0, 6, 2, -1, 5, 1, 6, 3, 0, 2, 5, 5]
    case = make(huge, 48, (16, 24, 40), seed=5).to(backend)
    x, y = drawn(12, 48, F32, backend, 1)[0], drawn(12, 80, F32, backend, 2)[0]
    alone, mixed = y.clone(), y.clone()
    for piece in case.pieces[6].tolist():
        for r in range(piece[1]):
            for table, width in ((piece[2], piece[5]), (piece[3], piece[7])):
                at = int(case.offsets[table + r])
                case.store[at : at + width] = float("nan") if r % 2 else 1e38
    update(mixed, x, case, routed(slots, backend))
    update(alone, x, case, routed([slot if slot != 6 else -1 for slot in slots], backend))
    others = [t for t, slot in enumerate(slots) if slot != 6]
    assert torch.equal(bits(mixed[others]), bits(alone[others]))
    assert mixed[others].isfinite().all() and mixed[[1, 6]].isnan().any(1).all()


@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
def test_outer(backend, dtypes):
    """Gradients of the rows, forward and transposed, against dense float64 products; other rows are left alone."""
    for i, (adapters, k, outputs, slots) in enumerate(sites(backend, dtypes)):
        case = make(adapters, k, outputs, dtypes[1], seed=i).to(backend)
        x, dy = drawn(len(slots), k, dtypes[0], backend, 1)[0], drawn(len(slots), sum(outputs), dtypes[0], backend, 2)[0]
        segments, assignments, k_slots = routed(slots, backend, empty=i % 2)
        for pieces, values, other in ((case.pieces, x, dy), (grouped.transposed(case.pieces), dy, x)):
            s = torch.randn(len(assignments), case.width, generator=torch.Generator().manual_seed(7)).to(backend)
            got = torch.full_like(case.store, float("nan"))
            arguments = values, other, s, case.offsets, pieces, segments, assignments, None, k_slots
            grouped.grouped_outer_(got, *arguments)
            want, plain = torch.full_like(case.store, float("nan"), dtype=torch.float64), torch.full_like(got, float("nan"))
            with fastft.testing.use("reference"), fastft.testing.record():  # beside those of the backend
                grouped.grouped_outer_(plain, *arguments)
                grouped.grouped_outer_(want, values.double(), other.double(), s.double(), *arguments[3:])
                magnitude = torch.full_like(want, float("nan"))
                grouped.grouped_outer_(
                    magnitude, values.double().abs(), other.double().abs(), s.double().abs(), *arguments[3:]
                )
            assert torch.equal(got.isnan(), want.isnan())
            there = ~want.isnan()
            assert_close(got[there], want[there], plain[there], magnitude[there].abs(), f"{k} -> {outputs} {dtypes}")


def test_results_do_not_depend_on_threads():
    adapters, k, outputs, slots = LARGE[0]
    case, found = make(adapters, k, outputs), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = drawn(len(slots), sum(outputs), F32, "cpu", 2)[0]
            update(y, drawn(len(slots), k, F32, "cpu", 1)[0], case, route(slots))
            found.append(y)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("fault", ["slot", "assignments", "window", "width", "dtype", "table"])
def test_what_does_not_fit_is_refused_on_cpus(fault):
    case = make(LORAS, 32, (16, 16))
    (segments, assignments, k), x, y = route([0, 1, 2]), torch.randn(3, 32), torch.randn(3, 32)
    width = case.width
    if fault == "slot":
        segments[0, 0] = 4
    elif fault == "assignments":
        segments[-1, 2] = 4
    elif fault == "window":
        case.pieces[0, 0, 5] = 33
    elif fault == "width":
        width = 3
    elif fault == "table":
        case.pieces[1, 1, 2] = len(case.offsets) - 3
    else:
        segments = segments.long()
    with pytest.raises(RuntimeError, match="grouped_shrink"), fastft.testing.use("cpu"):
        grouped.grouped_shrink(x, case.store, case.offsets, case.pieces, segments, assignments, k, width)
    assert y.isfinite().all()


def test_opcheck():
    case, (segments, assignments, k) = make(ALL_KINDS, 24, (16, 9, 40)), route([0, 1, -1, 2])
    x, y = torch.randn(4, 24), torch.randn(4, 65)
    s = torch.zeros(4, case.width)
    tables = (case.pieces, segments, assignments)
    for op, arguments in (
        (torch.ops.fastft.grouped_shrink, (x, case.store, case.offsets, *tables, k, case.width)),
        (torch.ops.fastft.grouped_expand_, (y, x, s, case.store, case.offsets, case.columns, *tables, None, k)),
        (
            torch.ops.fastft.grouped_add_,
            (y, x, case.store, case.offsets, case.columns, *tables, None, k, case.width),
        ),
        (torch.ops.fastft.grouped_outer_, (torch.zeros_like(case.store), x, y, s, case.offsets, *tables, None, k)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))
