"""The counted bytes of the CUDA kernels by hand; `tests/cuda/cases_traffic.py` counts those that the host build moves."""

import pytest

from fastft.bench.traffic_cuda import traffic


def test_totals_by_hand():
    """Shrink of [64, 512] at rank 16: two tiles of tokens read all of A each, one part of K."""
    moved = traffic("lora_shrink", T=64, features=512, ranks=[16])
    assert moved.total() == 2 * 64 * 512 + 2 * (2 * 16 * 512) + 3 * (4 * 64 * 16)
    assert moved.kernels == 2
    dropped = traffic("lora_shrink", T=64, features=512, ranks=[8, 8], p=0.1)
    assert dropped.total() == moved.total() + 2 * 64 * 512 // 8


def test_groups_add_nothing_to_the_reads_of_x():
    for op, name in (("lora_shrink", "x"), ("lora_grad_a", "x"), ("lora_grad_x_", "dx")):
        for p in (0.0, 0.1):
            moved = traffic(op, T=4096, features=4096, ranks=[16, 16, 16], p=p)
            assert moved.loads[name] == (2 * 4096 * 4096, 1), (op, p)


def test_dora_moves_its_activations_once():
    size = 2 * 4096 * 4096
    forward, backward = (traffic(op, T=4096, features=4096, ranks=[16]) for op in ("dora_expand_", "dora_grad_y"))
    assert (forward.loads["u"], forward.stores["u"], forward.stores["y"]) == ((size, 1),) * 3
    assert (backward.loads["dy"], backward.loads["u"], backward.stores["dyg"]) == ((size, 1),) * 3


def test_an_empty_problem_has_no_traffic():
    with pytest.raises(ValueError, match="nothing is launched"):
        traffic("lora_expand_", T=0, features=8, ranks=[4])
