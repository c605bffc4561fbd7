"""AdapterMemory: from folders to slots, with made-up adapters."""

import dataclasses
import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch

from fastft import _native
from fastft.checkpoint.files import AdapterFileError
from fastft.serving import UnknownAdapter
from fastft.serving.memory import AdapterMemory, AdapterMemoryFull
from fastft.serving.requests import AdaptersUnavailable
from tests.serving import made_up
from tests.serving.made_up import PAGE, check_content, digest_of, write

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]
NAMES = ["a0", "a1", "a2", "a3", "a4", "a5"]


def pages_of(name):
    return 1 + int(name[1:]) % 3


@pytest.fixture
def root(tmp_path):
    for name in NAMES:
        write(tmp_path, name, pages=pages_of(name))
    return tmp_path


def memory_of(root, packer=None, *, slots=3, pages=6, host_pages=8, device="cpu", **options):
    return AdapterMemory(
        made_up.sites(),
        device=device,
        dtype=torch.float32,
        adapter_dir=root,
        packer=packer or made_up.Packer(),
        slots=slots,
        device_bytes=pages * PAGE,
        host_bytes=host_pages * PAGE,
        page_bytes=PAGE,
        **options,
    )


@pytest.fixture
def memory(root):
    with memory_of(root) as memory:
        yield memory
        memory._table.check()


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("device", DEVICES)
def test_every_adapter_is_what_it_is_wherever_it_comes_to_lie(root, device):
    """Round and round through a pool that holds half of them, some of them held meanwhile."""
    with memory_of(root, device=device) as memory:
        held = []
        for name in NAMES * 3:
            assert memory.load(name, 20) == digest_of(name, 0)
            lease = memory.acquire(name)
            assert (lease.name, lease.digest) == (name, digest_of(name, 0))
            held.append(lease)
            for one in held:
                check_content(memory, one.slot, one.name, 0, pages_of(one.name))
            if len(held) == 2 or sum(pages_of(one.name) for one in held) > 3:
                for one in held:
                    memory.release(one)
                held.clear()
        for one in held:
            memory.release(one)
        stats = memory.stats()
        assert stats["evictions_total"] > 6 and stats["host_hits_total"] > 0 and stats["leases"] == 0
        assert memory.widths == {"q": made_up.Packer.ROWS, "o": 0}


def test_a_miss_loads_in_the_background_and_tells(memory):
    told = threading.Event()
    memory.on_change(told.set)
    assert memory.acquire("a1") is None and memory.state("a1") in ("loading", "on_device")
    assert told.wait(20)
    wait_for(lambda: memory.state("a1") == "on_device")
    lease = memory.acquire("a1")
    check_content(memory, lease.slot, "a1", 0, pages_of("a1"))
    memory.release(lease)


def test_what_was_read_needs_no_folder(root):
    """It may be unmounted for a while: what lies in memory is served, of the rest nobody says that it does not exist."""
    with memory_of(root, slots=1) as memory:
        memory.load("a1", 20)
        memory.load("a0", 20)
        root.rename(root.parent / "away")
        try:
            memory.prefetch("a0")
            memory.release(memory.acquire("a0"))
            assert memory.state("a1") == "in_host"
            assert memory.pin("a1", 20) == digest_of("a1", 0)
            for refused in (memory.prefetch, memory.load, memory.update):
                with pytest.raises(AdaptersUnavailable, match="can't be read"):
                    refused("a2")
        finally:
            (root.parent / "away").rename(root)
        memory.prefetch("a2")


def test_others_are_served_while_one_loads(root):
    packer, go = made_up.Packer(), threading.Event()
    packer.hook = lambda name: name == "a0" and go.wait(20)
    with memory_of(root, packer) as memory:
        memory.load("a1", 20)
        assert memory.acquire("a0") is None
        for _ in range(100):
            memory.release(memory.acquire("a1"))
        assert memory.acquire("a0") is None and memory.state("a0") == "loading"
        go.set()
        memory.load("a0", 20)
        memory.release(memory.acquire("a0"))


def test_prefetch_brings_it_before_it_is_asked_for(memory):
    memory.prefetch("a0")
    wait_for(lambda: memory.state("a0") == "on_device")
    memory.release(memory.acquire("a0"))
    assert memory.stats()["misses_total"] == 0


def test_unknown_names_leave_nothing_behind(memory):
    calls = (memory.look, memory.prefetch, memory.load, memory.update, memory.unload, memory.pin)
    for name in ("nothing", "../a0", "", "x" * 1000, *(f"n{i}" for i in range(100))):
        for call in calls:
            with pytest.raises(UnknownAdapter):
                call(name)
        memory.forget(name)
        memory.unpin(name)
        assert not memory.evict(name) and memory.error(name) is None and memory.state(name) == "on_disk"
    stats = memory.stats()
    assert stats["known"] == stats["queued"] == stats["host_copies"] == 0 and not memory._loader.copies


def test_a_new_folder_is_found_and_a_removed_one_is_served_until_it_is_forgotten(memory, root):
    assert memory.names() == NAMES and "b0" not in memory
    write(root, "b0")
    assert memory.names() == [*NAMES, "b0"] and "b0" in memory
    memory.load("b0", 20)
    (root / "b0" / "adapter_config.json").unlink()
    assert "b0" not in memory
    memory.release(memory.acquire("b0"))
    memory.forget("b0")
    assert memory.acquire("b0") is None
    wait_for(lambda: memory.failure("b0") is not None)
    assert type(memory.failure("b0")) is UnknownAdapter


def test_a_removed_adapter_does_not_answer_for_the_next_one_of_its_name(memory, root, monkeypatch):
    monkeypatch.setattr("fastft.serving.memory._SEEN", 0)
    memory.load("a1", 20)
    lease = memory.acquire("a1")
    (root / "a1").rename(root.parent / "away")
    with pytest.raises(UnknownAdapter):
        memory.prefetch("a1")
    write(root, "a1", version=1)
    memory.prefetch("a1")
    assert memory.load("a1", 20) == digest_of("a1", 1)
    check_content(memory, lease.slot, "a1", 0, pages_of("a1"))  # whose request began before
    memory.release(lease)


def test_a_pin_lasts_while_the_folder_is_exchanged(memory, root, monkeypatch):
    monkeypatch.setattr("fastft.serving.memory._SEEN", 0)

    def exchange(version, between=lambda: None):
        (root / "a1").rename(root / f"old{version}")
        for _ in range(2):
            with pytest.raises(UnknownAdapter):
                memory.prefetch("a1")
        between()
        write(root, "a1", version=version)
        assert memory.load("a1", 20) == digest_of("a1", version)
        return {one.name for one in memory.residents() if one.pinned}

    memory.load("a1", 20)
    assert exchange(1) == set()
    memory.pin("a1", 20)
    assert exchange(2) == {"a1"}
    assert exchange(3, lambda: memory.unpin("a1")) == set()


def test_whoever_waits_does_not_look_at_the_folder(memory, root, monkeypatch):
    """Which may take seconds, and the engine waits with it."""
    find = memory._folder.path

    def path(name):
        assert threading.current_thread() is not threading.main_thread()
        return find(name)

    monkeypatch.setattr(memory._folder, "path", path)
    memory.prefetch("a0", looked=True)
    assert memory.acquire("a1") is None and memory.acquire("nobody") is None
    wait_for(lambda: memory.state("a0") == memory.state("a1") == "on_device" and memory.failure("nobody"))
    assert type(memory.failure("nobody")) is UnknownAdapter
    away = root.rename(root.with_name(f"{root.name}-away"))
    try:
        assert memory.acquire("a2") is None
        wait_for(lambda: memory.failure("a2"))
    finally:
        away.rename(root)
    assert type(memory.failure("a2")) is AdaptersUnavailable and memory.failure("a0") is None


def test_many_requests_at_a_time_look_at_the_folder_once(memory, monkeypatch):
    looks, find = [], memory._folder.path

    def path(name):
        if threading.current_thread() is threading.main_thread():  # not the loader's
            looks.append(name)
        return find(name)

    monkeypatch.setattr(memory._folder, "path", path)
    monkeypatch.setattr("fastft.serving.memory._SEEN", 60)
    for name in ("a0", "a1", "a0", "a0", "a1"):
        memory.prefetch(name)
    assert looks == ["a0", "a1"]


def test_files_that_are_wrong(root):
    packer = made_up.Packer()
    packer.fail["a0"] = AdapterFileError("a0 is damaged")
    told = threading.Event()
    with memory_of(root, packer, retry_seconds=60) as memory:
        memory.on_change(told.set)
        with pytest.raises(AdapterFileError, match="a0 is damaged"):
            memory.load("a0", 20)
        assert told.wait(20) and memory.error("a0") == "a0 is damaged" and memory.acquire("a0") is None
        assert packer.reads == ["a0"]  # not again for every look
        del packer.fail["a0"]
        memory.load("a0", 20)
        assert memory.error("a0") is None
        memory.release(memory.acquire("a0"))
        packer.fail["a1"] = ZeroDivisionError("a mistake of ours")
        with pytest.raises(RuntimeError, match="ZeroDivisionError: a mistake of ours"):
            memory.load("a1", 20)
        memory.load("a2", 20)  # the thread lives


def test_a_packed_adapter_that_does_not_fit_the_sites_is_refused(root):
    packer = made_up.Packer()
    whole = packer.pack

    def pack(folder, name):
        packed = whole(folder, name)
        if name == "a0":
            packed.pieces["elsewhere"] = packed.pieces["q"]
        elif name == "a1":
            packed.pieces["q"] = packed.pieces["o"]
        elif name == "a2":
            packed.blob = packed.blob[:-8]
        else:
            packed.relocations.append((10**9, 1, 1, 4))
        return packed

    packer.pack = pack
    with memory_of(root, packer) as memory:
        for name, message in (
            ("a0", "sites that are not served: \\['elsewhere'\\]"),
            ("a1", "2 pieces at site 'q', at most 1"),
            ("a2", "no whole number of pages"),
            ("a3", "don't lie in a blob"),
        ):
            with pytest.raises(RuntimeError, match=message):
                memory.load(name, 20)
        assert memory.stats()["pages_used"] == 0


def test_what_never_fits_is_told(root):
    write(root, "big", pages=7)
    with memory_of(root) as memory, pytest.raises(AdapterMemoryFull, match="needs 7 pages of 4096 bytes"):
        memory.load("big", 20)


def test_pinned_adapters_stay(root):
    with memory_of(root, slots=2, pages=6) as memory:
        memory.pin("a0", 20)
        for name in NAMES[1:]:
            memory.load(name, 20)
        assert memory.state("a0") == "on_device" and not memory.evict("a0")
        memory.pin("a3", 20)
        with pytest.raises(AdapterMemoryFull, match="pinned adapters hold all 2"):
            memory.pin("a1", 20)
        memory.unpin("a0")
        memory.pin("a1", 20)
        assert memory.state("a0") != "on_device" and {r.name for r in memory.residents() if r.pinned} == {"a1", "a3"}


def test_what_is_pinned_stays_so_when_it_can_not_be_read_again(root):
    packer = made_up.Packer()
    with memory_of(root, packer, slots=2) as memory:
        memory.pin("a0", 20)
        packer.fail.update(a0=AdapterFileError("half written"), a1=AdapterFileError("half written"))
        for again in (memory.update, memory.pin, memory.pin):
            with pytest.raises(AdapterFileError, match="half written"):
                again("a0", 20)
        with pytest.raises(AdapterFileError, match="half written"):
            memory.pin("a1", 20)
        memory.load("a2", 20)
        memory.load("a3", 20)
        assert {r.name: r.pinned for r in memory.residents()} == {"a0": True, "a3": False}


def test_a_load_that_will_never_have_room_is_told_at_once(root):
    """Also one whose folder was read before, and that waited for room until its users' adapters were pinned."""
    with memory_of(root, slots=1, start=False) as memory:
        memory.acquire("a1")
        while memory.step():
            pass
        lease = memory.acquire("a1")
        assert memory.acquire("a0") is None
        while memory.step():
            pass
        assert memory.waits_for_room("a0")
        told = []
        memory.on_change(lambda: told.append(memory.error("a0")))
        memory._table.pin("a1", True)
        assert memory.step() and "pinned adapters hold all 1" in told[-1]
        memory.release(lease)


def test_an_error_is_told_to_who_waited_for_it_and_others_try_again(root):
    """Also in an engine whose steps take longer than errors are remembered."""
    packer = made_up.Packer()
    packer.fail["a0"] = AdapterFileError("a0 is damaged")
    with memory_of(root, packer, start=False, retry_seconds=0.2) as memory:
        for reads in (1, 2):
            assert memory.acquire("a0") is None and memory.error("a0") is None
            assert memory.step() and not memory.step()
            time.sleep(0.25)
            for _ in range(3):  # so many wait for it
                assert memory.acquire("a0", 0.3) is None and memory.error("a0", 0.3) == "a0 is damaged"
            assert len(packer.reads) == reads
            time.sleep(0.25)
        packer.fail.clear()
        assert memory.acquire("a0") is None
        while memory.step():
            pass
        lease = memory.acquire("a0")
        memory.release(lease)


def test_update_in_place(memory, root):
    memory.load("a1", 20)
    old = memory.acquire("a1")
    write(root, "a1", version=1, pages=1)
    assert memory.acquire("a1").digest == old.digest  # until it is told
    assert memory.update("a1", 20) == digest_of("a1", 1)
    new = memory.acquire("a1")
    assert new.generation > old.generation and new.slot != old.slot
    check_content(memory, old.slot, "a1", 0, pages_of("a1"))
    check_content(memory, new.slot, "a1", 1, 1)
    used = memory.stats()["pages_used"]
    for lease in [old, new]:
        memory.release(lease)
    memory._table.check()
    assert used == 3


def test_a_failed_update_leaves_the_old_version(root):
    packer = made_up.Packer()
    with memory_of(root, packer) as memory:
        memory.load("a0", 20)
        packer.fail["a0"] = AdapterFileError("half written")
        with pytest.raises(AdapterFileError, match="half written"):
            memory.update("a0", 20)
        lease = memory.acquire("a0")
        check_content(memory, lease.slot, "a0", 0, 1)
        memory.release(lease)


def test_unload_waits_frees_and_tells_bytes(memory):
    memory.load("a2", 20)
    lease = memory.acquire("a2")
    with pytest.raises(TimeoutError, match="still used after 0.05 s"):
        memory.unload("a2", 0.05)
    check_content(memory, lease.slot, "a2", 0, 3)
    memory.release(memory.acquire("a2"))  # it was given up, so new users are let in
    admitted = []
    timer = threading.Timer(0.2, lambda: (admitted.append(memory.acquire("a2")), memory.release(lease)))
    timer.start()
    assert memory.unload("a2", 20) == 6 * PAGE  # 3 pages on the device and the host copy
    assert admitted == [None]
    stats = memory.stats()
    assert stats["pages_used"] == stats["slots_used"] == stats["host_bytes"] == 0
    assert not memory.pieces["q"].any() and not memory.pieces["o"].any()
    assert memory.unload("a2", 20) == 0


def test_a_freed_slot_has_no_pieces(memory):
    memory.load("a0", 20)
    lease = memory.acquire("a0")
    memory.forget("a0")
    check_content(memory, lease.slot, "a0", 0, 1)
    assert memory.pieces["q"][lease.slot].any()
    memory.release(lease)
    wait_for(lambda: memory.stats()["slots_used"] == 0)
    assert not memory.pieces["q"].any()


def test_a_lease_is_given_back_once(memory):
    memory.load("a0", 20)
    first, second = memory.acquire("a0"), memory.acquire("a0")
    memory.release(first)
    with pytest.raises(ValueError, match="was released before"):
        memory.release(first)
    assert memory.holds(second) and not memory.holds(first)
    memory.release(second)


def test_waiting_ends_in_time_and_by_closing(root):
    packer, go = made_up.Packer(), threading.Event()
    packer.hook = lambda name: go.wait(20)
    memory = memory_of(root, packer)
    with pytest.raises(TimeoutError, match="not loaded after 0.05 s"):
        memory.load("a0", 0.05)
    threading.Timer(0.1, lambda: (go.set(), memory.close())).start()
    with pytest.raises(RuntimeError, match="closed"):
        memory.load("a1")
    for call in (memory.acquire, memory.load):
        with pytest.raises(RuntimeError, match="closed"):
            call("a2")
    memory.close()


def test_a_callback_that_fails_does_no_harm(memory):
    def fail():
        raise ValueError("a callback's mistake")

    memory.on_change(fail)
    memory.load("a0", 20)
    memory.load("a1", 20)


def test_a_memory_that_nobody_holds_ends_its_thread(root):
    memory = memory_of(root)
    memory.load("a0", 20)
    threads = [thread for thread in threading.enumerate() if thread.name == "fastft-adapters"]
    gone = weakref.ref(memory)
    del memory
    gc.collect()
    assert gone() is None
    wait_for(lambda: not any(thread.is_alive() for thread in threads))


def test_the_interpreter_ends_with_an_open_memory(root):
    code = (
        "import sys, pathlib; from tests.serving.test_memory import memory_of\n"
        "memory = memory_of(pathlib.Path(sys.argv[1])); memory.load('a0'); lease = memory.acquire('a0'); print('there')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "there\n", done.stderr


def test_without_the_runtime_it_says_what_to_do(root, monkeypatch):
    monkeypatch.setattr(_native, "runtime", lambda: (None, "fastft._runtime is not built for Python 3.11 (pip install ...)"))
    with pytest.raises(RuntimeError, match="adapters can't be served: fastft._runtime is not built.*pip install"):
        memory_of(root)


def test_sizes_that_are_none():
    with pytest.raises(FileNotFoundError, match="no adapter folder"):
        memory_of("/nowhere")
    with pytest.raises(ValueError, match="less than one page"):
        memory_of(None, pages=0)


def test_stats_are_numbers_for_metrics(memory):
    memory.load("a0", 20)
    stats = memory.stats()
    assert all(isinstance(value, int) for value in stats.values())
    assert stats["device_bytes"] == 6 * PAGE and stats["device_bytes_used"] == PAGE and stats["loads_total"] == 1


def test_a_device_that_is_broken_ends_the_memory_and_is_told(root, monkeypatch):
    def broken(slots):
        raise ArithmeticError("the device is lost")

    with memory_of(root) as memory:
        memory.load("a0", 20)
        monkeypatch.setattr(memory.pool, "clear", broken)
        with pytest.raises(ArithmeticError):
            memory.evict("a0")
        for call in (memory.load, memory.update, memory.acquire):
            with pytest.raises(RuntimeError, match="the adapter memory failed: ArithmeticError: the device is lost"):
                call("a1")
        assert "the device is lost" in memory.closed


def test_an_unload_tells_those_who_were_not_let_in_meanwhile(root):
    with memory_of(root, start=False) as memory:
        memory.prefetch("a0")
        while memory.step():
            pass
        lease, told = memory.acquire("a0"), []
        memory.on_change(lambda: told.append(memory.state("a0")))
        with pytest.raises(TimeoutError):
            memory.unload("a0", 0)
        assert told == ["on_device"]
        memory.release(lease)
        memory.unload("a0", 20)
        assert told == ["on_device", "on_disk"]


def test_widths_only_grow(root):
    """A step that runs, and a graph that was captured, may use the larger one."""
    packer, widths = made_up.Packer(), {"a0": 8, "a1": 2, "a2": 9}
    pack = packer.pack
    packer.pack = lambda folder, name: dataclasses.replace(pack(folder, name), widths={"q": widths[name]})
    with memory_of(root, packer) as memory:
        assert memory.widths == {"q": None, "o": None}
        for name, width in (("a0", 8), ("a1", 8), ("a2", 9)):
            memory.load(name, 20)
            assert memory.widths == {"q": width, "o": None}


def test_many_threads_use_update_unload_and_evict(root):
    """Each thread checks every byte of what it leases, while others load, update and unload."""
    versions = dict.fromkeys(NAMES, 0)
    digests = {digest_of(name, 0): 0 for name in NAMES}
    failures, over = [], threading.Event()
    with memory_of(root, slots=3, pages=7, host_pages=6, reserve_seconds=0.05) as memory:

        def use(seed):
            random = torch.Generator().manual_seed(seed)
            held = []
            while not over.is_set():
                name = NAMES[int(torch.randint(len(NAMES), (), generator=random))]
                lease = memory.acquire(name)
                if lease is not None:
                    held.append(lease)
                for one in held:
                    check_content(memory, one.slot, one.name, digests[one.digest], pages_of(one.name))
                while len(held) > int(torch.randint(3, (), generator=random)):
                    memory.release(held.pop())
            for one in held:
                memory.release(one)

        def administer():
            random = torch.Generator().manual_seed(99)
            while not over.is_set():
                name = NAMES[int(torch.randint(len(NAMES), (), generator=random))]
                what = int(torch.randint(5, (), generator=random))
                try:
                    if what == 0:
                        versions[name] += 1
                        digests[digest_of(name, versions[name])] = versions[name]
                        write(root, name, version=versions[name], pages=pages_of(name))
                        memory.update(name, 0.2)
                    elif what == 1:
                        memory.unload(name, 0.1)
                    elif what == 2:
                        memory.evict(name)
                    elif what == 3:
                        memory.prefetch(name)
                    else:
                        memory.forget(name)
                except TimeoutError:
                    pass
                except RuntimeError as error:  # forgotten or unloaded by nobody else: only this thread does that
                    failures.append(error)
                memory._table.check()

        def guarded(work, *arguments):
            try:
                work(*arguments)
            except BaseException as error:
                failures.append(error)
                over.set()

        threads = [threading.Thread(target=guarded, args=(use, seed)) for seed in range(3)]
        threads.append(threading.Thread(target=guarded, args=(administer,)))
        for thread in threads:
            thread.start()
        over.wait(4)
        over.set()
        for thread in threads:
            thread.join(60)
        assert not failures, failures
        stats = memory.stats()
        assert stats["leases"] == 0 and stats["hits_total"] > 50 and stats["loads_total"] > 20, stats
        for name in NAMES:
            memory.unload(name, 20)
        stats = memory.stats()
        assert stats["pages_used"] == stats["slots_used"] == stats["host_bytes"] == stats["known"] == 0
