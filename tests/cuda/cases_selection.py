"""Run by `test_host_entries.py` in a process with AddressSanitizer: the selection kernels on the backend `cuda_host`."""

import os

import pytest
import torch

from fastft.ops import selection
from tests.cuda import host
from tests.ops import test_selection as matrix
from tests.ops.test_selection import (  # noqa: F401 (pytest collects them from here, with the fixture `backend` below)
    test_count_at_least,
    test_count_bins,
    test_counts_go_past_32_bits,
    test_equal_scores_are_all_counted,
    test_of_equal_scores_the_first_are_taken,
    test_take_at_least,
    test_the_k_largest_of_blocks_of_rows,
    test_the_same_bits_every_time,
    test_wrong_arguments_are_refused_by_the_kernels,
)

host.register()
backend = host.backend

# Several steps of a block along a row, several tiles of a histogram's block.
matrix.SHAPES += [(2, 4104), (3, 2049), (70, 1032)]


@pytest.mark.parametrize("dtype", matrix.DTYPES)
def test_no_bit_depends_on_the_order_of_threads_and_blocks(backend, dtype, monkeypatch):
    scores, results = matrix.draw(9, 2100, dtype, "cpu"), []
    for seed in range(4):
        monkeypatch.setitem(os.environ, "FASTFT_HOSTCUDA_SEED", str(seed))
        counts = torch.zeros(selection.BINS, dtype=torch.int64)
        selection.count_bins_(counts, scores)
        results.append((counts, *matrix.taken(scores, scores, 0x7E00, 1)[0]))
    for other in results[1:]:
        assert all(torch.equal(g, w) for g, w in zip(other, results[0], strict=True))


@pytest.mark.parametrize("dtype", (matrix.F32, matrix.BF16))
def test_scores_outside_of_the_window_are_counted(backend, dtype):
    """A block counts 2⁻⁸⁰ to 2¹⁶ and zeros for itself: what is around both ends, and far away from it."""
    value = torch.tensor([2.0**p * f for p in (-126, -81, -80, -79, 15, 16, 17, 127) for f in (1, 1.003, 1.5, 1.998)])
    scores = torch.cat([value, -value, torch.zeros(5)]).to(dtype).repeat(7)[None]
    counts = torch.zeros(selection.BINS, dtype=torch.int64)
    selection.count_bins_(counts, scores)
    want = torch.bincount((matrix.keys(scores) >> 15).flatten(), minlength=selection.BINS)
    assert torch.equal(counts, want) and counts[0] == 35
