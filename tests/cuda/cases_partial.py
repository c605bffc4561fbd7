"""Run by `test_host_entries.py` in a process with AddressSanitizer: the partial kernels on the backend `cuda_host`."""

import os

import pytest
import torch

import fastft
from fastft.ops import partial
from tests.cuda import host
from tests.ops import test_partial as matrix
from tests.ops.test_partial import (  # noqa: F401 (pytest collects them from here, with the fixture `backend` below)
    test_adamw,
    test_adamw_is_pytorchs,
    test_gather,
    test_nan_and_infinity_stay_where_they_are,
    test_scatter_add,
    test_write,
    test_wrong_arguments_are_refused_by_the_kernels,
)

host.register()
backend = host.backend

# Several blocks and tiles of 8 rows x 32 columns; rows of a slice that are whole packs, that packs cross, many in one pack.
matrix.SHAPES += [(70, 2056, 33), (33, 301, 3), (9, 1100, 1000), (40, 2, 2)]


def everything(shape, dtype, move=lambda t: t):
    """Results of every op on one problem; `move` says where a tensor lies."""
    rows, cols, count = shape
    v = {n: matrix.draw(rows, cols, dtype=dtype, device="cpu", seed=i) for i, n in enumerate("xyw")}
    index, results = move(matrix.choose(cols, count, "cpu")), []
    for z_dtype in (dtype, matrix.F32):
        y = move(v["y"])
        partial.scatter_add_columns_(y, index, move(matrix.draw(rows, count, dtype=z_dtype, device="cpu", seed=4)))
        results.append(y)
    results.append(partial.gather_columns(move(v["x"]), index))
    for dim in (0, 1):
        index = move(matrix.choose((rows, cols)[dim], min(count, (rows, cols)[dim]), "cpu"))
        size = (len(index), cols) if dim == 0 else (rows, len(index))
        base = move(matrix.draw(*size, dtype=dtype, device="cpu", seed=5))
        delta, grad, mean, square = (move(matrix.draw(*size, dtype=matrix.F32, device="cpu", seed=i)) for i in (6, 7, 8, 9))
        for change in (delta, None):
            weight = move(v["w"])
            partial.write_slice_(weight, index, dim, base, change)
            results.append(weight)
        weight = move(v["w"])
        partial.slice_adamw_(weight, index, dim, base, delta, grad, mean, square.abs_(), *matrix.HYPER.values(), 3)
        results += [weight, delta, mean, square]
    return results


def same(results, wanted):
    return all(torch.equal(matrix.bits(g), matrix.bits(w)) for g, w in zip(results, wanted, strict=True))


@pytest.mark.parametrize("dtype", matrix.DTYPES)
def test_no_bit_depends_on_the_order_of_threads_and_blocks(backend, dtype, monkeypatch):
    results = []
    for seed in range(4):
        monkeypatch.setitem(os.environ, "FASTFT_HOSTCUDA_SEED", str(seed))
        results.append(everything((70, 260, 45), dtype, torch.clone))
    assert all(same(other, results[0]) for other in results[1:])


@pytest.mark.parametrize("offset", [1, 4])
@pytest.mark.parametrize("shape", [(24, 136, 16), (5, 67, 9)])
@pytest.mark.parametrize("dtype", matrix.DTYPES)
def test_unaligned_pointers_give_the_same_bits(backend, dtype, shape, offset):
    """An array that starts off a 16-byte boundary takes the element-wise path, of all arrays and of each alone."""

    def moved(t):
        return torch.empty(t.numel() + offset, dtype=t.dtype)[offset:].view(t.shape).copy_(t)

    want = everything(shape, dtype, torch.clone)
    assert same(everything(shape, dtype, moved), want)
    for alone in range(24):
        calls = iter(range(100))
        assert same(everything(shape, dtype, lambda t: moved(t) if next(calls) == alone else t.clone()), want), alone  # noqa: B023


@pytest.mark.parametrize("stride", [136, 140, 144])
@pytest.mark.parametrize("dtype", matrix.DTYPES)
def test_rows_of_a_wider_weight(backend, dtype, stride):
    """Rows of the weight on 16-byte boundaries or off them: the same bits, and the neighbours' untouched."""
    index, base = matrix.choose(12, 5, "cpu"), matrix.draw(5, 136, dtype=dtype, device="cpu")
    for delta in (None, matrix.draw(5, 136, dtype=matrix.F32, device="cpu", seed=2)):
        wide = torch.full((12, stride), float("nan"), dtype=dtype)
        weight = wide[:, :136].zero_()
        partial.write_slice_(weight, index, 0, base, delta)
        value = base if delta is None else (base.float() + delta).to(dtype)
        assert same([weight], [torch.zeros(12, 136, dtype=dtype).index_copy(0, index.long(), value)])
        assert wide[:, 136:].isnan().all()


def test_a_first_step_is_asked_for(backend):
    """Step 0 would divide by zero."""
    w, part = torch.zeros(4, 8), torch.zeros(4, 2)
    index = torch.tensor([1, 5], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="slice_adamw_: step is 0, the first is 1"):
        partial.slice_adamw_(w, index, 1, part, *(part.clone() for _ in range(4)), *matrix.HYPER.values(), 0)
    with pytest.raises(RuntimeError, match="write_slice_: dim is -1, must be 0 or 1"):
        partial.write_slice_(w, index, -1, part, None)
    with pytest.raises(RuntimeError, match="gather_columns: index is int64, must be int32"):
        partial.gather_columns(w, index.long())


def test_nothing_named_changes_nothing(backend):
    with fastft.testing.record() as calls:
        none = torch.empty(0, dtype=torch.int32)
        w = torch.randn(3, 8)
        want = w.clone()
        assert partial.gather_columns(w, none).shape == (3, 0)
        partial.scatter_add_columns_(w, none, torch.empty(3, 0))
        partial.write_slice_(w, none, 0, torch.empty(0, 8), None)
        partial.write_slice_(w, none, 1, torch.empty(3, 0), torch.empty(3, 0))
    assert len(calls) == 4 and torch.equal(w, want)
