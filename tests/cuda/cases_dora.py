"""Run by `test_host_low_rank.py` in a process with AddressSanitizer: the DoRA kernels on the backend `cuda_host`."""

import os

import pytest
import torch

import fastft
from fastft.ops import dora
from tests.cuda import host
from tests.ops import test_dora as matrix
from tests.ops.test_dora import (  # noqa: F401 (pytest collects them from here, with the fixture `backend` below)
    test_bitwise_repeatable,
    test_columns_of_a_wider_matrix,
    test_expand,
    test_grad_y,
    test_nan_and_infinity_stay_in_their_row_and_column,
    test_wrong_arguments_are_refused_by_the_kernels,
    test_y_is_made_of_the_unrounded_sum,
)

host.register()
backend = host.backend

# T, N, R: several tiles of 64 tokens and of 128 columns, several parts of T in the sums over tokens, the last one small.
matrix.SHAPES += [(300, 136, 5), (65, 257, 33), (1025, 8, 1), (257, 64, 0)]


@pytest.mark.parametrize("shape", [(300, 257, 17), (1025, 8, 3)])
def test_no_bit_depends_on_the_order_of_threads_and_blocks(backend, shape, monkeypatch):
    v = matrix.inputs(shape, matrix.BF16, matrix.F32, backend)
    results = []
    for seed in range(4):
        monkeypatch.setitem(os.environ, "FASTFT_HOSTCUDA_SEED", str(seed))
        u = v["u"].clone()
        y = dora.dora_expand_(u, v["s"], v["b"], v["g"], v["bias"], 0.7)
        results.append((u, y, *dora.dora_grad_y(v["dy"], u, v["g"])))
    for other in results[1:]:
        assert all(torch.equal(g, w) for g, w in zip(other, results[0], strict=True))


@pytest.mark.parametrize("offset", [0, 1])
def test_unaligned_pointers_give_the_same_bits(backend, offset):
    """A matrix or vector that starts off a 16-byte boundary takes the element-wise path."""
    v = matrix.inputs((40, 136, 8), matrix.F16, matrix.F16, backend)

    def moved(t):
        return torch.empty(t.numel() + offset, dtype=t.dtype)[offset:].view(t.shape).copy_(t)

    def both(v):
        u = v["u"]
        return dora.dora_expand_(u, v["s"], v["b"], v["g"], v["bias"], 0.7), u, *dora.dora_grad_y(v["dy"], u, v["g"])

    want = both({name: t.clone() for name, t in v.items()})
    assert all(torch.equal(g, w) for g, w in zip(both({name: moved(t) for name, t in v.items()}), want, strict=True))


def test_no_tokens_sum_to_zero(backend):
    with fastft.testing.record() as calls:
        dyg, dots = dora.dora_grad_y(torch.empty(0, 40), torch.empty(0, 40), torch.randn(40))
    assert calls and dyg.shape == (0, 40) and torch.equal(dots, torch.zeros(40))
