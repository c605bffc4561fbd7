"""AdapterPool as on a GPU, without one: copies are done when an event is waited for, no earlier."""

import contextlib
import threading
import types

import pytest
import torch

from fastft import _native
from fastft.serving import pool as module
from fastft.serving.pool import AdapterPool
from tests.serving import made_up
from tests.serving.made_up import PAGE, check_content, write

pytestmark = pytest.mark.skipif(_native.runtime()[0] is None, reason=str(_native.runtime()[1]))


class Device:
    """A tensor whose asynchronous copies wait in `issued`."""

    def __init__(self, tensor, issued):
        self.tensor, self.issued = tensor, issued

    def __getitem__(self, span):
        to, issued = self.tensor[span], self.issued
        return types.SimpleNamespace(copy_=lambda source, non_blocking: issued.append((to, source)))


@pytest.fixture
def gpu(monkeypatch):
    """gpu(pool) makes it one of a GPU."""
    issued = []

    class Event:
        before = 0

        def record(self, stream):
            self.before = len(issued)

        def synchronize(self):
            for i in range(self.before):
                if issued[i] is not None:
                    to, source = issued[i]
                    to.copy_(source)
                    issued[i] = None

    monkeypatch.setattr(module, "_pinned", lambda size: torch.zeros(size, dtype=torch.uint8))
    monkeypatch.setattr(module, "_STAGE", 2 * PAGE)
    monkeypatch.setattr(torch.Tensor, "pin_memory", None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())

    def make(pool):
        pool._gpu = module._Gpu(pool.device, PAGE)
        pool.bytes = Device(pool.bytes, issued)
        return pool

    return make


def pool_of(pages):
    return AdapterPool({"q": 1, "o": 2}, device="cpu", dtype=torch.float32, slots=2, pages=pages, page_bytes=PAGE)


def packed(root, name, pages):
    return made_up.Packer().pack(write(root, name, pages=pages), name)


def test_adapters_go_to_a_gpu_through_two_stages_that_are_filled_when_they_are_free(gpu, tmp_path):
    pool = gpu(pool_of(16))
    copies = {name: pool.host_copy(packed(tmp_path, name, 7)) for name in ("a", "b")}
    places = torch.randperm(14, generator=torch.Generator().manual_seed(0)).tolist()
    for pages in (places, [*range(3, 10), *range(3), *range(10, 14)]):
        for slot, name in enumerate(copies):
            pool.write(slot, pages[7 * slot : 7 * slot + 7], copies[name])
        for slot, name in enumerate(copies):
            check_content(pool, slot, name, 0, 7)
    assert pool._gpu._stages[0][0].numel() == 2 * PAGE  # less than an adapter


def test_memory_is_freed_after_the_work_that_reads_it(gpu, monkeypatch):
    pool, readers = gpu(pool_of(16)), []

    def wait_for_readers():
        assert pool._gpu.lock.locked() and pool.bytes is not None
        readers.append("waited for")

    monkeypatch.setattr(pool._gpu, "wait_for_readers", wait_for_readers)
    pool.free()
    pool.clear([0])
    assert readers == ["waited for"] and pool.bytes is None and pool.store is None and not pool.pieces


def test_host_memory_takes_what_is_counted(gpu, tmp_path):
    """Not pinned: torch would round each up to a power of two and keep what is freed."""
    pool, adapter = gpu(pool_of(16)), packed(tmp_path, "a", 3)
    assert pool.host_copy(adapter).blob.data_ptr() == adapter.blob.data_ptr()


def test_widths_of_a_gpu_are_powers_of_two(gpu, tmp_path):
    """So that graphs are captured anew a few times, not for each new largest rank."""
    pool, seen = gpu(pool_of(16)), []
    for rank in (0, 1, 5, 8, 12, 9, 64):
        adapter = packed(tmp_path, "a", 1)
        adapter.widths = {"q": rank}
        pool.write(0, [0], pool.host_copy(adapter))
        seen.append(pool.widths["q"])
    assert seen == [0, 1, 8, 8, 16, 16, 64] and pool.widths["o"] is None


def test_widths_do_not_change_while_a_graph_is_captured(gpu, tmp_path):
    pool = gpu(pool_of(16))
    copy = pool.host_copy(packed(tmp_path, "a", 1))
    reading, go = threading.Event(), threading.Event()

    class Slow(dict):
        def items(self):
            reading.set()
            go.wait(20)
            return super().items()

    copy.widths = Slow(q=64, o=64)
    loader = threading.Thread(target=pool.write, args=(0, [0], copy))
    loader.start()
    assert reading.wait(20)
    quiet = pool._gpu.lock.acquire(blocking=False)
    go.set()
    loader.join(20)
    assert not quiet and pool.widths == {"q": 64, "o": 64}
