"""Run by `test_emulator.py` in a process with AddressSanitizer: kernels of csrc/hostcuda/selftest.cpp."""

import os

import pytest
import torch

from tests.cuda import host

host.register()
ops = torch.ops.fastft_hostcuda


def seeded(monkeypatch, seed):
    monkeypatch.setitem(os.environ, "FASTFT_HOSTCUDA_SEED", str(seed))


def test_barrier_and_shared_memory(monkeypatch):
    x = torch.randn(1024)
    for seed in range(4):
        seeded(monkeypatch, seed)
        assert torch.equal(ops.reverse(x, True), x.flip(0))


def test_a_missing_barrier_gives_a_wrong_result(monkeypatch):
    x = torch.randn(96)
    for seed in range(4):
        seeded(monkeypatch, seed)
        wrong = ops.reverse(x, False)
        assert not torch.equal(wrong, x.flip(0)) and wrong.isnan().any(), "shared memory is NaN before it is written"


def test_warp_functions(monkeypatch):
    lane = torch.arange(32)
    expected = [
        lane // 16 * 16 + 5,
        lane ^ 3,
        torch.where(lane % 8 < 6, lane + 2, lane),
        (lane - 1).clamp(min=0),
        torch.ones(32),
        torch.tensor([[3], [1]]),  # only the first warp has the thread that `any` looks for
    ]
    for seed in range(4):
        seeded(monkeypatch, seed)
        # Two warps: neither waits for the other nor sees its values.
        got = ops.warp(torch.arange(64).float() % 32)
        for row, want in zip(got.view(6, 2, 32).unbind(), expected, strict=True):
            assert torch.equal(row, want.expand(2, 32).float())


@pytest.mark.parametrize(
    "kind, message",
    [
        (0, "divergent barrier.* has exited"),
        (1, "divergent barrier.*selftest.cpp:.*selftest.cpp:"),
        (2, "divergent barrier.* has exited"),
        (3, "does not name it"),
        (4, "bytes of shared memory"),
        (9, "divergent barrier.* has exited"),
        (10, "divergent barrier.*selftest.cpp:.*selftest.cpp:"),
        (11, "not 16-byte aligned"),
    ],
)
def test_misuse_is_reported_and_the_emulator_survives(kind, message, monkeypatch):
    for seed in range(2):
        seeded(monkeypatch, seed)
        with pytest.raises(RuntimeError, match=message):
            ops.misuse(torch.zeros(4), kind)
        x = torch.randn(32)
        assert torch.equal(ops.reverse(x, True), x.flip(0))


def test_unwritten_shared_memory_is_nan():
    x = torch.zeros(1)
    ops.misuse(x, 8)
    assert x.isnan().all()


def test_seeds_shuffle_blocks(monkeypatch):
    seeded(monkeypatch, 0)
    assert torch.equal(ops.block_order(torch.empty(0), 50), torch.arange(50.0))
    seeded(monkeypatch, 1)
    shuffled = ops.block_order(torch.empty(0), 50)
    assert not torch.equal(shuffled, torch.arange(50.0)) and torch.equal(shuffled.sort().values, torch.arange(50.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)])
def test_fragments_of_a_product(dtype, transposed, monkeypatch):
    """Every element of a product of 16 x 16 matrices: integers, so that any wrong place shows and nothing is rounded."""
    a, b = torch.randint(-8, 9, (2, 16, 16), generator=torch.Generator().manual_seed(0)).to(dtype)
    for seed in range(3):
        seeded(monkeypatch, seed)
        assert torch.equal(ops.mma(a, b, *transposed), a.float() @ b.float())
    one = torch.zeros(16, 16, dtype=dtype)
    one[3, 12] = 1.0
    assert torch.equal(ops.mma(one, b, *transposed)[3], b[12].float())


def test_sums_of_tensor_cores_are_cut_off():
    a, b = torch.zeros(16, 16, dtype=torch.bfloat16), torch.ones(16, 16, dtype=torch.bfloat16)
    a[:, 0], a[:, 1] = torch.tensor([1.0, -1.0]).repeat(8), torch.tensor([1.0, -1.0]).repeat(8) * 1.5 * 2.0**-23
    exact = a.double().sum(1)
    assert torch.equal(ops.mma(a, b, False, False)[:, 0].double(), exact.sign() * (1 + 2.0**-23))


def test_three_parts_hold_a_float32():
    x = torch.randn(500) * 2.0 ** torch.randint(-100, 100, (500,)).float()
    x = torch.cat([x, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1 + 2.0**-23, 2 - 2.0**-23])])
    parts = ops.split(x)
    assert torch.equal(parts.nan_to_num(7.0), parts.bfloat16().float().nan_to_num(7.0))
    finite = x.isfinite()
    assert torch.equal(parts.double().sum(0)[finite], x[finite].double())
    assert torch.equal(parts.sum(0)[~finite].nan_to_num(7.0), x[~finite].nan_to_num(7.0))
    hidden = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)  # a NaN by its last bit only
    assert ops.split(hidden).sum().isnan()
