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
