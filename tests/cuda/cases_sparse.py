"""Run by `test_host_entries.py` in a process with AddressSanitizer: the sparse kernels on the backend `cuda_host`."""

import os

import pytest
import torch

from fastft.ops import sparse
from tests.cuda import host
from tests.ops import test_sparse as matrix
from tests.ops.test_partial import BF16, DTYPES, F16, F32, bits, draw
from tests.ops.test_sparse import (  # noqa: F401 (pytest collects them from here, with the fixture `backend` below)
    test_adamw,
    test_adamw_is_pytorchs,
    test_add_product,
    test_gather,
    test_match,
    test_moments_that_are_not_finite_stay_so,
    test_sampled_product,
    test_sampled_product_of_many_tokens,
    test_sm3,
    test_stochastic_rounding_adds_the_hash,
    test_stochastic_rounding_is_unbiased,
    test_without_a_delta_bits_are_copied,
    test_write,
    test_wrong_arguments_are_refused_by_the_kernels,
)

host.register()
backend = host.backend

# Several blocks of entries; rows that go on from a warp to the next; two tiles of a product down and across.
matrix.SHAPES += [(3, 2056, 5000), (130, 136, 700)]


def same(results, wanted):
    return all(torch.equal(bits(g), bits(w)) for g, w in zip(results, wanted, strict=True))


def everything(shape, dtype, moments, move=lambda t: t):
    """Results of every op on one problem; `move` says where a tensor lies."""
    a, b, e = shape
    index = [move(t) for t in matrix.choose(a, b, e, "cpu")]
    base, values = (move(draw(e, dtype=d, device="cpu", seed=s)) for d, s in ((dtype, 5), (F32, 6)))
    weight = move(draw(a, b, dtype=dtype, device="cpu"))
    results = [sparse.gather_entries(weight, *index)]
    for change in (None, values):
        target = move(weight)
        sparse.write_entries_(target, *index, base, change)
        results.append(target)
    age, table = move(torch.arange(e, dtype=torch.int32) % 5), move(draw(7, 2, dtype=F32, device="cpu").abs_() + 1)
    for ages in ((age, table), (None, None)):
        target, delta, grad = move(weight), move(values), move(draw(e, dtype=F32, device="cpu", seed=8))
        m, v = (move(draw(e, dtype=moments, device="cpu", seed=s).abs_()) for s in (9, 10))
        sparse.sparse_adamw_(target, *index, base, delta, grad, m, v, *ages, *matrix.HYPER.values(), 3, 77)
        results += [target, delta, m, v]
    target, delta, row, column = move(weight), move(values), move(torch.zeros(a)), move(torch.zeros(b))
    sparse.sparse_sm3_(
        target, *index, base, delta, move(draw(e, dtype=F32, device="cpu", seed=8)), row, column, 0.1, 1e-8, 0.1
    )
    results += [target, delta, row, column, age]
    left, right = (move(draw(40, n, dtype=dtype, device="cpu", seed=s)) for n, s in ((a, 2), (b, 3)))
    for add in (False, True):
        out = move(values)
        sparse.sampled_product_(out, left, right, *index, add)
        results.append(out)
    for tokens in (3, 40):
        y = move(left[:tokens])
        sparse.add_sparse_product_(y, move(right[:tokens]), *index, values)
        results.append(y)
    return results


@pytest.mark.parametrize("dtype, moments", [(F32, F32), (BF16, BF16), (F16, F32)])
def test_no_bit_depends_on_the_order_of_threads_and_blocks(backend, dtype, moments, monkeypatch):
    results = []
    for seed in range(4):
        monkeypatch.setitem(os.environ, "FASTFT_HOSTCUDA_SEED", str(seed))
        results.append(everything((70, 60, 1300), dtype, moments, torch.clone))
    assert all(same(other, results[0]) for other in results[1:])


@pytest.mark.parametrize("offset", [1, 4])
@pytest.mark.parametrize("dtype, moments", [(F32, F32), (BF16, BF16), (F16, BF16)])
def test_unaligned_pointers_give_the_same_bits(backend, dtype, moments, offset):
    """An array that starts off a 16-byte boundary takes the element-wise path, of all arrays and of each alone."""

    def moved(t):
        return torch.empty(t.numel() + offset, dtype=t.dtype)[offset:].view(t.shape).copy_(t)

    shape = (16, 24, 67)
    want = everything(shape, dtype, moments, torch.clone)
    assert same(everything(shape, dtype, moments, moved), want)
    count = 0

    def counted(t):
        nonlocal count
        count += 1
        return t.clone()

    everything(shape, dtype, moments, counted)
    for alone in range(count):
        calls = iter(range(count))
        one = everything(shape, dtype, moments, lambda t: moved(t) if next(calls) == alone else t.clone())  # noqa: B023
        assert same(one, want), alone


# Entries in so large a weight that they are summed one by one (`by_tiles` in sampled.cu): tokens, (rows, columns, entries).
ONE_BY_ONE = [
    (1, (700, 900, 50), DTYPES),
    (300, (700, 900, 150), DTYPES),
    (2100, (640, 1000, 40), (BF16,)),  # three slabs of 1024 tokens
    (1030, (128, 600, 70), (F32,)),  # three of 512
    (40, (700, 700, 33), (F16,)),  # a single entry more than warps of 32 lanes
]


@pytest.mark.parametrize("tokens, shape, dtypes", ONE_BY_ONE)
def test_sampled_product_one_by_one(backend, tokens, shape, dtypes):
    for dtype in dtypes:
        for add in (False, True):
            matrix.check_product(backend, tokens, shape, dtype, add)
        matrix.check_product(backend, tokens, shape, dtype, False, apart=True)


# By tiles: parts of the tokens, folds of a float32 sum, several tiles in two groups of rows.
BY_TILES = [
    (600, (60, 140, 900), DTYPES),
    (70, (260, 1000, 5000), (BF16,)),
    (33, (2070, 130, 4000), (F16,)),
    (20, (2070, 70, 9000), (F32,)),
]


@pytest.mark.parametrize("tokens, shape, dtypes", BY_TILES)
def test_sampled_product_by_tiles(backend, tokens, shape, dtypes):
    for dtype in dtypes:
        for add in (False, True):
            matrix.check_product(backend, tokens, shape, dtype, add)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_stays_where_it_is(backend, dtype):
    """Tokens past the end, columns past the edge, entries that are not there: none of them spreads a NaN."""
    for tokens, (a, b, e) in ((37, (40, 50, 300)), (37, (700, 900, 60))):
        index = matrix.choose(a, b, e, "cpu")
        rows, columns = matrix.at(*index)
        left, right = (draw(tokens, n, dtype=dtype, device="cpu", seed=s) for n, s in ((a, 1), (b, 2)))
        left[5, rows[3]], right[7, columns[20]] = float("nan"), float("inf")
        out = torch.empty(e)
        sparse.sampled_product_(out, left, right, *index, False)
        broken = (rows == rows[3]) | (columns == columns[20])
        assert out[~broken].isfinite().all() and out[rows == rows[3]].isnan().all() and not out[broken].isfinite().any()
        for t in (3, tokens):
            y = torch.zeros(t, a, dtype=dtype)
            x = right[:t].clone()
            x[1, columns[20]] = float("inf")
            sparse.add_sparse_product_(y, x, *index, torch.ones(e))
            hit = torch.zeros(t, a, dtype=torch.bool)
            hit[1, rows[columns == columns[20]]] = True
            hit[7:8, rows[columns == columns[20]]] = True
            assert torch.equal(~y.isfinite(), hit)


def test_sm3_keeps_what_is_not_a_number(backend):
    starts, columns = torch.tensor([0, 3, 4]), torch.tensor([0, 1, 2, 1], dtype=torch.int32)
    grad = torch.tensor([1.0, float("nan"), -float("inf"), 2.0])
    weight, row, column = torch.zeros(2, 3), torch.zeros(2), torch.zeros(3)
    sparse.sparse_sm3_(weight, starts, columns, torch.zeros(4), torch.zeros(4), grad, row, column, 0.1, 1e-8, 0.0)
    assert row[0].isnan() and row[1] == 4 and column[0] == 1 and column[1].isnan() and column[2] == float("inf")
    sparse.sparse_sm3_(weight, starts, columns, torch.zeros(4), torch.zeros(4), torch.ones(4), row, column, 0.1, 1e-8, 0.0)
    assert row.isnan().all() and column[0].isnan(), "the smaller of NaN and anything is NaN"


def test_no_tokens(backend):
    index, out = matrix.choose(5, 8, 20, "cpu"), torch.full((20,), 3.0)
    sparse.sampled_product_(out, torch.empty(0, 5), torch.empty(0, 8), *index, True)
    assert (out == 3).all()
    sparse.sampled_product_(out, torch.empty(0, 5), torch.empty(0, 8), *index, False)
    assert not out.any()
    sparse.add_sparse_product_(torch.empty(0, 5), torch.empty(0, 8), *index, out)


def test_rows_without_entries(backend):
    """Two entries at the ends of a long list of rows, in one thread's pack."""
    starts = torch.ones(5001, dtype=torch.int64)
    starts[0], starts[-1] = 0, 2
    columns, weight = torch.tensor([3, 1], dtype=torch.int32), torch.zeros(5000, 4)
    sparse.write_entries_(weight, starts, columns, torch.tensor([5.0, 6.0]), None)
    assert weight[0, 3] == 5 and weight[-1, 1] == 6 and weight.count_nonzero() == 2
    assert sparse.gather_entries(weight, starts, columns).tolist() == [5, 6]
