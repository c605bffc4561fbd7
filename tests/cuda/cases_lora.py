"""Run by `test_host_low_rank.py` in a process with AddressSanitizer: the LoRA kernels on the backend `cuda_host`.

The tests of the family's matrix (`tests/ops/test_lora.py`) run here unchanged, on more shapes.
"""

import os

import pytest
import torch

from fastft.ops import lora, lora_linear
from fastft.ops._philox import dropout_mask
from tests.cuda import host
from tests.ops import test_lora as matrix
from tests.ops.test_lora import (  # noqa: F401 (pytest collects them from here, with the fixture `backend` below)
    test_bitwise_repeatable,
    test_expand,
    test_grad_a,
    test_grad_sb,
    test_grad_x,
    test_nan_propagates_and_a_dropped_nan_does_not,
    test_rows_do_not_depend_on_their_neighbours,
    test_shrink,
    test_sixteen_bit_extremes_round_as_torch_does,
    test_wrong_arguments_are_refused_by_the_kernels,
)

host.register()
backend = host.backend

# T, K, N, R: with the matrix's own, every size of 0, 1, 63, 100, 257 in every place and ranks on both sides of the rank
# tiles 16, 32, 64; then sizes that split K, T and N into several parts and chunks.
matrix.SHAPES += [
    (1, 257, 100, 8),
    (257, 1, 63, 1),
    (100, 63, 257, 64),
    (63, 100, 1, 130),
    (257, 63, 1, 0),
    (3, 1160, 16, 5),
    (300, 24, 136, 33),
    (2, 8, 2300, 3),
]


def every_op(v, p, ranks=None):
    """The outputs of all five ops."""
    ranks = ranks or [v["a"].shape[0]]
    s, mask = lora.lora_shrink(v["x"], v["a"], ranks, p, v["seed"] if p else None)
    y, dx = v["y"].clone(), v["x"].clone()
    lora.lora_expand_(y, s, v["b"], 0.7)
    ds, db = lora.lora_grad_sb(v["y"], s, v["b"], 0.7)
    lora.lora_grad_x_(dx, ds, v["a"], ranks, mask, p)
    return s, mask, y, ds, db, lora.lora_grad_a(ds, v["x"], v["a"], ranks, mask, p), dx


@pytest.mark.parametrize("shape", [(100, 257, 63, 17), (300, 1160, 40, 33), (2, 8, 2300, 3)])
def test_no_bit_depends_on_the_order_of_threads_and_blocks(backend, shape, monkeypatch):
    v = matrix.inputs(shape, matrix.BF16, matrix.F32, backend)
    results = []
    for seed in range(3):
        monkeypatch.setitem(os.environ, "FASTFT_HOSTCUDA_SEED", str(seed))
        results.append(every_op(v, 0.3))
    for other in results[1:]:
        assert all(torch.equal(g, w) for g, w in zip(other, results[0], strict=True))


@pytest.mark.parametrize("offset", [0, 1])
def test_unaligned_pointers_give_the_same_bits(backend, offset):
    """A matrix that starts off a 16-byte boundary takes the element-wise path."""
    v = matrix.inputs((40, 136, 64, 8), matrix.F16, matrix.F16, backend)
    want = every_op(v, 0.3)

    def moved(t):
        shifted = torch.empty(t.numel() + offset, dtype=t.dtype)[offset:].view(t.shape)
        return shifted.copy_(t)

    got = every_op({name: moved(t) if t.is_floating_point() else t for name, t in v.items()}, 0.3)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_masks_equal_the_reference_at_large_indices_and_extreme_p(backend):
    x, a = torch.randn(3, 523), torch.randn(2, 523)
    for value in (0, 1, -1, 2**62, -(2**63)):
        seed = torch.tensor([value])
        for p in (2.0**-17, 2.0**-16, 0.5, 1 - 2.0**-17, 1.0):
            assert torch.equal(lora.lora_shrink(x, a, [2], p, seed)[1][0], dropout_mask(seed, 3, 523, p))


def test_a_seed_without_dropout_is_refused(backend):
    x, a = torch.randn(3, 8), torch.randn(2, 8)
    with pytest.raises(RuntimeError, match="seed"):
        lora.lora_shrink(x, a, [2], 0.0, torch.tensor([1]))
    with pytest.raises(RuntimeError, match="seed"):
        lora.lora_shrink(x, a, [2], 0.5, None)
    with pytest.raises(RuntimeError, match="mask"):
        lora.lora_grad_a(torch.randn(3, 2), x, a, [2], torch.empty(1, 3, 2, dtype=torch.uint8), 0.5)


def test_the_public_layer_trains(backend):
    x = torch.randn(7, 20, requires_grad=True)
    weight, a, b = torch.randn(12, 20), torch.randn(4, 20, requires_grad=True), torch.randn(12, 4, requires_grad=True)
    lora_linear.lora_linear(x, weight, None, a, b, 0.5).square().sum().backward()
    got = [t.grad.clone() for t in (x, a, b)]
    for t in (x, a, b):
        t.grad = None
    (x @ weight.t() + 0.5 * (x @ a.t()) @ b.t()).square().sum().backward()
    for g, t in zip(got, (x, a, b), strict=True):
        torch.testing.assert_close(g, t.grad, rtol=1e-4, atol=1e-3)
