"""Run by `test_host_low_rank.py` in a process with AddressSanitizer: the grouped kernels on the backend `cuda_host`."""

import os

import pytest
import torch

import fastft
from fastft.ops import grouped
from fastft.ops.grouped import COLUMNS, ENTRIES, LOW_RANK, ROWS
from tests import golden
from tests.cuda import host
from tests.golden import assert_close
from tests.ops import test_grouped as matrix
from tests.ops.grouped_cases import expected, make, route
from tests.ops.test_grouped import (  # noqa: F401 (pytest collects them from here, with the fixture `backend` below)
    BF16,
    DTYPES,
    F16,
    F32,
    bits,
    drawn,
    test_other_segments_change_no_bit,
    test_outer,
    test_several_weighted_assignments,
    test_update,
    update,
)

host.register()


@pytest.fixture
def backend():
    """As in `host`, but the tests also ask for the reference, to compare with."""
    with fastft.testing.use("cuda_host"), fastft.testing.record() as calls:
        yield "cpu"
    assert {call.backend for call in calls} <= {"cuda_host", "reference"}, calls
    for call in calls:
        if call.backend == "cuda_host":
            golden.prove(call.op, "cuda", "tests of the host build under AddressSanitizer")


emulator = torch.ops.fastft_hostcuda

# Tiles of 32 tokens and what is left of one; several slots of 16 ranks, column tiles of y, parts of the inner axis.
matrix.SMALL += [
    ([[(LOW_RANK, 20), (LOW_RANK, 40)], [(COLUMNS, 19), (ROWS, 18)]], 40, (72, 300), [0] * 37 + [1] * 6 + [-1]),
    ([[(LOW_RANK, 5), (ENTRIES, 5), (LOW_RANK, 16)]], 1031, (24, 60, 8), [0] * 9),
]


def everything(case, x, y, slots, weights, empty=0):
    """Results of every op on one problem."""
    segments, assignments, k = route(slots, empty)
    out = y.clone()
    s = update(out, x, case, (segments, assignments, k), weights)
    grad, factors = torch.zeros_like(case.store), drawn(*s.shape, F32, "cpu", 5)[0]
    grouped.grouped_outer_(grad, x, y, factors, case.offsets, case.pieces, segments, assignments, weights, k)
    return [out, s, grad]


def same(results, wanted):
    return all(torch.equal(bits(g), bits(w)) for g, w in zip(results, wanted, strict=True))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_no_bit_depends_on_the_order_of_threads_and_blocks(backend, dtypes, monkeypatch):
    slots = [[0, 1], [1, 1], [-1, 2], [2, 0], [-1, -1], [3, 5], [5, 0], [5, 5], [0, 2], [0, 3], [0, 5]]
    case = make(matrix.ALL_KINDS, 40, (24, 16, 33), dtypes[1], seed=4)
    x, y = (drawn(len(slots), n, dtypes[0], backend, i)[0] for i, n in enumerate((40, 73)))
    weights, results = torch.rand(len(slots), 2), []
    for seed in range(3):
        monkeypatch.setitem(os.environ, "FASTFT_HOSTCUDA_SEED", str(seed))
        results.append(everything(case, x, y, slots, weights))
    assert all(same(other, results[0]) for other in results[1:])


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F32)], ids=str)
def test_empty_segments_between_change_no_bit(backend, dtypes):
    """More segments than a block has threads: the sum over them goes on from one round to the next."""
    slots = [2, 0, 0, -1, 5, 0, 1, 0, 0, 3, 0]
    case = make(matrix.ALL_KINDS, 24, (16, 9, 40), dtypes[1], seed=4)
    x, y = (drawn(len(slots), n, dtypes[0], backend, i)[0] for i, n in enumerate((24, 65)))
    want = everything(case, x, y, slots, None)
    for empty in (1, 300):
        assert same(everything(case, x, y, slots, None, empty), want), empty


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
def test_unaligned_rows_give_the_same_results(backend, dtypes):
    """Rows of a store that starts off a 16-byte boundary are read an element at a time."""
    slots = [0] * 7 + [1, 3]
    case = make(matrix.ALL_KINDS[:2] * 2, 64, (16, 24, 40), dtypes[1], seed=4)
    x, y = (drawn(len(slots), n, dtypes[0], backend, i)[0] for i, n in enumerate((64, 80)))
    want, magnitude = expected(y, x, case, slots)
    aligned = everything(case, x, y, slots, None)
    case.store = torch.cat([case.store[:1], case.store])[1:]
    assert case.store.data_ptr() % 16
    got = everything(case, x, y, slots, None)
    assert_close(got[0], want, aligned[0], magnitude, f"{dtypes}")
    assert same(got[2:], aligned[2:])


def loaded(tensor):
    return emulator.counted(tensor)[0]


@pytest.mark.parametrize("tokens", [1, 4, 16, 32])
def test_bytes_of_an_adapter_are_read_once(backend, tokens):
    """Of each adapter that a token names, with its own rank; of the others none. Entries: once for 8 tokens."""
    adapters = [
        [(LOW_RANK, 8), (LOW_RANK, 40)],
        [(LOW_RANK, 16), (COLUMNS, 11)],
        [(ROWS, 9), (LOW_RANK, 3)],
        [(LOW_RANK, 64), (LOW_RANK, 64)],
    ]
    case = make(adapters, 256, (256, 512), BF16)
    slots = [0] * tokens + [1] * tokens + [2] * tokens
    x, y = (drawn(len(slots), n, BF16, backend, i)[0] for i, n in enumerate((256, 768)))
    segments, assignments, k = route(slots, 3)
    emulator.count(True)
    s = grouped.grouped_shrink(x, case.store, case.offsets, case.pieces, segments, assignments, k, case.width)
    shrunk = loaded(case.store)
    grouped.grouped_expand_(y, x, s, case.store, case.offsets, case.columns, case.pieces, segments, assignments, None, k)
    expanded = loaded(case.store) - shrunk
    emulator.count(False)
    halves = 1 if tokens <= 16 else 2  # of a tile of 32 tokens, whose warps share the rows through L1
    assert shrunk == 2 * 256 * (8 + 40 + 16 + 9 + 3)
    assert expanded == halves * 2 * (256 * 8 + 512 * 40 + 256 * 16 + 512 * 11 + 512 * 3)


def test_nothing_is_read_without_adapters(backend):
    case = make([[(LOW_RANK, 8)]], 64, (64,), BF16)
    x, y = (drawn(5, 64, BF16, backend, i)[0] for i in range(2))
    emulator.count(True)
    everything(case, x, y, [-1] * 5, None, 4)
    moved = [emulator.counted(t) for t in (case.store, x, y, case.pieces)]
    emulator.count(False)
    assert not any(any(m) for m in moved)


@pytest.mark.parametrize("fault", ["dtype", "shape", "tokens", "k", "store"])
def test_wrong_arguments_are_refused(backend, fault):
    case, (segments, assignments, k) = make([[(ENTRIES, 10)], [(LOW_RANK, 2)]], 32, (16,)), route([0, 1, 1])
    x, y = torch.randn(3, 32), torch.randn(3, 16)
    if fault == "dtype":
        segments = segments.long()
    elif fault == "shape":
        case.pieces = case.pieces[..., :9].contiguous()
    elif fault == "tokens":
        x = x[:2]
    elif fault == "k":
        k = 0
    else:
        case.store = case.store.half()
    s = torch.zeros(3, case.width)
    with pytest.raises(RuntimeError, match="grouped_expand_"):
        grouped.grouped_expand_(y, x, s, case.store, case.offsets, case.columns, case.pieces, segments, assignments, None, k)
