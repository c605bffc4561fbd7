"""fastft._runtime without memory behind it: pages, plans of batches, addresses, and the books of the adapter table."""

import threading
import time

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft import _native
from fastft.ops.grouped import COLUMNS, ENTRIES, FIELDS, LOW_RANK, NONE

runtime, REASON = _native.runtime()
assert runtime, REASON
Urgency, Kind, Miss, Failure, State = runtime.Urgency, runtime.TaskKind, runtime.Miss, runtime.Failure, runtime.State


# Pages


@given(st.integers(0, 200), st.lists(st.tuples(st.booleans(), st.integers(0, 80)), max_size=30))
@settings(max_examples=50, deadline=None)
def test_pages_are_given_out_once_and_the_lowest_first(capacity, steps):
    pages, held = runtime.PageAllocator(capacity), []
    for take, number in steps:
        if take or not held:
            free = sorted(set(range(capacity)) - {page for group in held for page in group})
            got = pages.allocate(number)
            assert got == (free[:number] if number <= len(free) else None)
            held += [got] if got else []
        else:
            pages.free(held.pop(number % len(held)))
        assert pages.available == capacity - sum(map(len, held))


def test_pages_that_are_not_in_use_are_not_freed():
    pages = runtime.PageAllocator(65)
    taken = pages.allocate(65)
    pages.free([64])
    for wrong in (64, 65, -1):
        with pytest.raises(RuntimeError, match=f"page {wrong} of 65 is not in use"):
            pages.free([wrong])
    assert pages.available == 1 and len(taken) == 65


# Plans


def planned(slots, token_slots, room, segments):
    assignments = numpy.full(room, 77, dtype=numpy.int32)
    rows = numpy.full((segments, 3), 77, dtype=numpy.int32)
    counts = runtime.BatchPlanner(slots).plan(numpy.array(token_slots, dtype=numpy.int32), assignments, rows)
    return counts, assignments.tolist(), rows.tolist()


@given(st.integers(1, 9), st.lists(st.integers(-1, 8), max_size=40), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_plans(slots, token_slots, more_room, more_segments):
    token_slots = [min(slot, slots - 1) for slot in token_slots]
    present = sorted({slot for slot in token_slots if slot >= 0})
    counts, assignments, rows = planned(slots, token_slots, len(token_slots) + more_room, len(present) + more_segments)
    active = sum(slot >= 0 for slot in token_slots)
    assert counts == (len(present), active)
    # Python's sort is stable.
    order = sorted(range(len(token_slots)), key=lambda t: token_slots[t] if token_slots[t] >= 0 else slots)
    assert assignments == order + [-1] * more_room
    assert [slot for slot, _, _ in rows[: len(present)]] == present
    for slot, begin, end in rows[: len(present)]:
        assert [t for t in range(len(token_slots)) if token_slots[t] == slot] == assignments[begin:end]
    assert rows[len(present) :] == [[0, active, active]] * more_segments


def test_one_planner_plans_many_batches():
    planner = runtime.BatchPlanner(3)
    assignments, rows = numpy.zeros(4, dtype=numpy.int32), numpy.zeros((3, 3), dtype=numpy.int32)
    for token_slots, wanted in (([2, 0, 2, -1], [1, 0, 2, 3]), ([1, 1], [0, 1, -1, -1]), ([], [-1] * 4)):
        planner.plan(numpy.array(token_slots, dtype=numpy.int32), assignments, rows)
        assert assignments.tolist() == wanted


@pytest.mark.parametrize(
    ("slots", "room", "segments", "message"),
    [
        ([0, 3], 2, 2, "a token has slot 3; there are slots 0 to 2"),
        ([0, -2], 2, 2, "a token has slot -2"),
        ([0, 1], 2, 1, "2 distinct adapters and room for 1 segments"),
        ([0, 1], 1, 2, "2 tokens and room for 1 assignments"),
    ],
)
def test_plans_that_do_not_fit_are_refused_and_nothing_is_written(slots, room, segments, message):
    assignments = numpy.full(room, 77, dtype=numpy.int32)
    rows = numpy.full((segments, 3), 77, dtype=numpy.int32)
    with pytest.raises(ValueError, match=message):
        runtime.BatchPlanner(3).plan(numpy.array(slots, dtype=numpy.int32), assignments, rows)
    assert (assignments == 77).all() and (rows == 77).all()


def test_buffers_of_the_wrong_kind_are_refused():
    planner, good = runtime.BatchPlanner(3), numpy.zeros(6, dtype=numpy.int32)
    for wrong, message in (
        (numpy.zeros(6, dtype=numpy.int64), "must be int32"),
        (numpy.zeros(6, dtype=numpy.float32), "must be int32"),
        (numpy.zeros((6, 2), dtype=numpy.int32)[:, 0], "must be contiguous"),
    ):
        for arguments in ((wrong, good, good), (good, wrong, good), (good, good, wrong)):
            with pytest.raises(ValueError, match=message):
                planner.plan(*arguments)
    good.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        planner.plan(numpy.zeros(2, dtype=numpy.int32), good, numpy.zeros(6, dtype=numpy.int32))


# Addresses and pages


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_relocated_addresses_lead_to_the_same_bytes(data):
    """Whatever pages a blob gets, once or again: each address leads to what it led to in the blob."""
    page_bytes, pool_pages = 128, 12
    count = data.draw(st.integers(1, 5))
    rng = numpy.random.default_rng(data.draw(st.integers(0, 99)))
    blob = rng.integers(0, 256, count * page_bytes, dtype=numpy.uint8)
    numbers = blob.view(numpy.int64)
    # In each page a table of 4 addresses of unit 4 with stride 2, and behind it what they lead to.
    runs = numpy.array([[page * 16, 4, 2, 4] for page in range(count)], dtype=numpy.int64)
    targets = rng.integers(0, count, (count, 4)) * (page_bytes // 4) + rng.integers(16, 32, (count, 4))
    for page in range(count):
        numbers[page * 16 : page * 16 + 8 : 2] = targets[page]
    original = blob.copy()
    virtual = numpy.empty(count * 4, dtype=numpy.int64)
    runtime.read_addresses(numbers, runs, virtual)
    assert (virtual == targets.ravel()).all()
    for _ in range(2):
        pages = rng.permutation(pool_pages)[:count].tolist()
        pool = numpy.zeros(pool_pages * page_bytes, dtype=numpy.uint8)
        runtime.relocate(numbers, runs, virtual, pages, page_bytes)
        runtime.copy_pages(pool, blob, pages, page_bytes)
        for page in range(count):
            for i in range(4):
                at = pool.view(numpy.int64)[pages[page] * 16 + 2 * i]
                found = pool.view(numpy.int32)[at]
                assert found == original.view(numpy.int32)[targets[page, i]]
        rest = numpy.delete(pool.reshape(pool_pages, page_bytes), pages, axis=0)
        assert not rest.any()


def test_relocated_pieces():
    pieces = numpy.arange(40, dtype=numpy.int64).reshape(4, len(FIELDS))
    pieces[:, 0] = [LOW_RANK, NONE, COLUMNS, ENTRIES]
    pieces[:, 2] = [0, 1, 17, 31]
    pieces[:, 3] = [16, 1, 2, 99999]  # ENTRIES have no table on the right
    before = pieces.copy()
    runtime.relocate_pieces(pieces, [7, 3], 128)  # 16 int64 a page
    assert pieces[:, 2].tolist() == [112, 1, 49, 63]
    assert pieces[:, 3].tolist() == [48, 1, 114, 99999]
    others = [0, 1, 4, 5, 6, 7, 8, 9]
    assert (pieces[:, others] == before[:, others]).all()


def test_addresses_outside_of_the_blob_are_refused():
    blob, out = numpy.zeros(32, dtype=numpy.int64), numpy.zeros(4, dtype=numpy.int64)
    for run in ([30, 4, 1, 4], [-1, 4, 1, 4], [0, 4, 11, 4], [0, 4, 0, 4], [0, 4, 1, 0], [32, 4, 1, 4], [0, 4, 2**62, 4]):
        with pytest.raises(ValueError, match="don't lie in a blob of 32 int64s"):
            runtime.read_addresses(blob, numpy.array([run]), out)
    with pytest.raises(ValueError, match="runs of 3 addresses for 4"):
        runtime.read_addresses(blob, numpy.array([[0, 3, 1, 4]]), out)
    for wrong in (-1, 64, 2**62):
        with pytest.raises(ValueError, match="is not one of a blob of 256 bytes"):
            runtime.relocate(blob, numpy.array([[0, 1, 1, 4]]), numpy.array([wrong]), [0, 1], 128)
    for pages, size in (([0], 256), ([0, 2], 256), ([-1, 0], 256)):
        with pytest.raises(ValueError, match=r"pages of 128|is not one of the pool"):
            runtime.copy_pages(numpy.zeros(size, dtype=numpy.uint8), numpy.zeros(256, dtype=numpy.uint8), pages, 128)


# The table's books


class Books:
    """A table whose loads are done at once by `run`, without bytes."""

    def __init__(self, slots=2, pages=8, host_pages=8, sizes=None, **limits):
        limits = {"reserve_seconds": 60.0, "retry_seconds": 60.0, **limits}
        self.table = runtime.AdapterTable(slots=slots, pages=pages, page_bytes=1, host_bytes=host_pages, **limits)
        self.sizes = sizes or {}
        self.done = []

    def one(self):
        task = self.table.next_task(0)
        if task is None:
            return None
        if task.kind is Kind.collect:
            garbage = self.table.take_garbage()
            if garbage.slots:
                self.table.reclaimed(garbage.slots)
        elif task.kind is Kind.read:
            size = self.sizes.get(task.name, 1)
            self.table.read_done(task, size, size, "digest of " + task.name)
        else:
            self.table.placed(task)
        self.table.check()
        self.done.append((task.kind.name, task.name))
        return task

    def run(self):
        self.done = []
        while self.one():
            pass
        return [name for kind, name in self.done if kind == "place"]

    def want(self, *names, urgency=Urgency.load):
        return [self.table.want(name, urgency) for name in names]


def test_urgent_loads_come_before_prefetches_and_first_come_first_served():
    books = Books(slots=8)
    books.want("p1", "p2", "p3", urgency=Urgency.prefetch)
    books.want("u1", "u2")
    books.table.acquire("p3")  # who waits for a prefetched one makes it urgent
    assert books.run() == ["u1", "u2", "p3", "p1", "p2"]


def test_least_recently_used_goes_first_and_what_is_used_or_pinned_stays():
    books = Books(slots=3)
    books.want("a", "b", "c")
    books.run()
    books.table.release(books.table.acquire("a"))
    books.want("d")
    books.run()
    assert [books.table.state(name) for name in "abcd"] == [
        State.on_device,
        State.in_host,
        State.on_device,
        State.on_device,
    ]
    books.table.pin("c", True)
    lease = books.table.acquire("a")
    books.want("e")
    books.run()
    assert books.table.state("d") is State.in_host and books.table.state("e") is State.on_device
    assert books.table.stats()["evictions"] == 2
    books.table.release(lease)


def test_many_small_ones_go_for_one_of_many_pages():
    books = Books(slots=8, pages=6, sizes={"big": 5})
    books.want(*"abcdef")
    books.run()
    books.want("big")
    books.run()
    assert [r.name for r in sorted(books.table.residents(), key=lambda r: r.slot)] == ["big", "f"]
    assert books.table.stats()["pages_used"] == 6


def test_a_load_that_finds_no_room_waits_for_users_and_lets_others_be_read():
    books = Books(slots=1)
    books.want("a")
    books.run()
    lease = books.table.acquire("a")
    (ticket, _) = books.want("b", "c")
    assert books.run() == [] and ("read", "c") in books.done
    assert books.table.state("b") is State.loading and books.table.waits_for_room("b")
    assert books.table.wait(ticket, 0) is None and books.table.acquire("b") is Miss.pending
    books.table.release(lease)
    assert books.run()[0] == "b"
    assert books.table.wait(ticket, 0).digest == "digest of b" and not books.table.waits_for_room("b")


def test_what_was_asked_for_is_kept_until_it_was_used():
    """Two requests that wait for one slot: without this each load would push out the other's adapter, for ever."""
    books = Books(slots=1, reserve_seconds=60)
    for name in "ab":
        assert books.table.acquire(name) is Miss.absent
        books.want(name, urgency=Urgency.demand)
    assert books.run() == ["a"]
    lease = books.table.acquire("a")
    assert books.run() == []
    books.table.release(lease)
    assert books.run() == ["b"]


def test_what_was_asked_for_and_not_used_goes_after_a_while():
    books = Books(slots=1, reserve_seconds=0.05)
    books.want("a", "b", urgency=Urgency.demand)
    assert books.run() == ["a"]
    begun = time.monotonic()
    assert books.table.next_task(10).kind is Kind.collect and time.monotonic() - begun < 5
    assert books.run() == ["b"]


def test_prefetches_push_out_what_is_idle_but_neither_each_other_nor_what_was_asked_for():
    books = Books(slots=2)
    books.want("idle", "asked")
    books.run()
    books.table.release(books.table.acquire("asked"))
    books.want("p1", "p2", "p3", urgency=Urgency.prefetch)
    assert books.run() == ["p1", "p2"]
    assert books.table.state("p3") is State.in_host
    books.want("u", urgency=Urgency.demand)  # a demand takes a prefetched one's place
    assert books.run() == ["u"]
    books.want("p3", urgency=Urgency.prefetch)
    assert books.run() == [] and books.table.state("u") is State.on_device


def test_what_can_never_have_room_fails_at_once():
    books = Books(slots=2, pages=4, sizes={"huge": 5, "big": 4})
    (ticket,) = books.want("huge")
    books.run()
    assert "needs 5 pages" in books.table.wait(ticket, 0).error and "raise device_bytes" in books.table.error("huge")
    books.table.pin("a", True)
    books.want("a")
    books.run()
    (ticket,) = books.want("big")
    books.run()
    outcome = books.table.wait(ticket, 0)
    assert outcome.failure is Failure.room and "pinned adapters hold 1 of 4" in outcome.error
    books.table.pin("b", True)
    books.want("b")
    books.run()
    (ticket,) = books.want("c")
    books.run()
    assert "pinned adapters hold all 2" in books.table.wait(ticket, 0).error


def test_host_copies_stay_under_their_cap():
    books = Books(slots=1, host_pages=3)
    for name in "abcd":
        books.want(name)
        books.run()
    books.table.evict("d")
    books.run()
    assert [books.table.state(name) for name in "abcd"] == [State.in_host, State.in_host, State.on_disk, State.in_host]
    assert books.table.stats()["host_bytes"] == 3 and books.table.stats()["reads"] == 4
    books.want("b")
    books.run()
    assert books.table.stats()["reads"] == 4 and books.table.stats()["host_hits"] == 1


def test_what_lies_on_the_device_needs_no_host_copy():
    """The tiers together hold almost as many adapters as they have room for: copies of the least recently used would be none
    that is asked for again (15 reads)."""
    books = Books(slots=2, host_pages=3)
    for _ in range(3):
        for name in "abcde":
            books.want(name)
            books.run()
    assert books.table.stats()["reads"] == 9 and books.table.stats()["loads"] == 15


@pytest.mark.parametrize("host_pages", [0, 1, 2])
def test_a_small_cap_on_host_copies_still_loads_everything(host_pages):
    books = Books(slots=2, pages=8, host_pages=host_pages, sizes={"big": 4})
    books.want("big", "a", "b", "c")
    books.want("p", urgency=Urgency.prefetch)
    assert books.run() == ["big", "a", "b", "c", "p"]
    assert books.table.stats()["host_bytes"] <= host_pages


def test_a_failure_is_remembered_for_a_while_and_a_load_tries_at_once():
    books = Books(retry_seconds=0.05)
    (ticket,) = books.want("a")
    books.table.failed(books.table.next_task(0), Failure.files, "damaged")
    assert books.table.wait(ticket, 0).error == "damaged" == books.table.error("a")
    assert books.table.acquire("a") is Miss.failed
    time.sleep(0.06)
    assert books.table.error("a") is None and books.table.acquire("a") is Miss.absent
    books.want("b")
    books.table.failed(books.table.next_task(0), Failure.files, "damaged")
    assert books.table.stats()["known"] == 1  # only b: old failures are not kept
    books.want("b")
    assert books.run() == ["b"] and books.table.error("b") is None


def test_leases_are_of_a_generation():
    books = Books()
    books.want("a")
    books.run()
    old = books.table.acquire("a")
    books.table.update("a")
    books.run()
    new = books.table.acquire("a")
    assert new.generation > old.generation and new.slot != old.slot
    books.table.release(old)
    with pytest.raises(ValueError, match="generation 1\\) is not held"):
        books.table.release(old)
    books.run()
    books.want("b")
    books.run()
    other = books.table.acquire("b")
    assert other.slot == old.slot
    with pytest.raises(ValueError):
        books.table.release(old)
    assert books.table.holds(other) and books.table.holds(new) and not books.table.holds(old)


def test_an_update_needs_no_second_slot_if_nobody_uses_the_old_version():
    books = Books(slots=1)
    books.want("a")
    books.run()
    ticket = books.table.update("a")
    assert books.run() == ["a"] and books.table.wait(ticket, 0).generation == 2
    lease = books.table.acquire("a")
    ticket = books.table.update("a")
    assert books.run() == [] and books.table.wait(ticket, 0) is None
    assert books.table.acquire("a").generation == 2  # still served
    books.table.evict("a")
    books.table.forget("a")
    assert books.table.wait(ticket, 0).failure is Failure.unloaded
    assert books.table.residents()[0].state is State.draining and books.table.holds(lease)


@pytest.mark.parametrize("kind", [Kind.read, Kind.place])
@pytest.mark.parametrize("how", ["update", "forget"])
def test_a_load_that_is_overtaken_is_not_used(kind, how):
    books = Books()
    (ticket,) = books.want("a")
    while (task := books.table.next_task(0)).kind is not kind:
        books.table.read_done(task, 1, 1, "old")
    getattr(books.table, how)("a")
    if kind is Kind.read:
        assert not books.table.read_done(task, 1, 1, "old")
    else:
        books.table.placed(task)
    assert isinstance(books.table.acquire("a"), Miss)
    books.run()
    if how == "update":
        assert books.table.wait(ticket, 0).digest == "digest of a"
    else:
        assert books.table.wait(ticket, 0).failure is Failure.unloaded
        assert books.table.stats()["known"] == books.table.stats()["pages_used"] == 0


def test_unloading_stops_admission_waits_and_tells_the_bytes():
    books = Books(sizes={"a": 3})
    books.want("a")
    books.run()
    lease = books.table.acquire("a")
    books.table.start_unload("a")
    assert books.table.acquire("a") is Miss.pending and books.table.state("a") is State.draining
    assert books.table.finish_unload("a", 0.01) is None
    (ticket,) = books.want("a")  # waits until it is over
    assert books.run() == []
    threading.Timer(0.05, books.table.release, [lease]).start()
    assert books.table.finish_unload("a", 10) == 6  # 3 on the device, 3 in host memory
    assert books.run() == ["a"] and books.table.wait(ticket, 0).generation == 2


def test_an_unload_that_is_given_up_changes_nothing():
    books = Books()
    books.want("a")
    books.run()
    lease = books.table.acquire("a")
    books.table.start_unload("a")
    (ticket,) = books.want("a")
    assert books.table.finish_unload("a", 0) is None
    books.table.cancel_unload("a")
    assert books.table.wait(ticket, 0).generation == 1 and books.run() == []
    assert books.table.acquire("a").generation == lease.generation == 1


def test_closing_ends_all_waiting():
    books = Books()
    (ticket,) = books.want("a")
    threading.Timer(0.05, books.table.close).start()
    assert books.table.wait(ticket, 10).failure is Failure.closed
    assert books.table.next_task(10) is None
    assert books.table.wait(books.want("b")[0], 0).failure is Failure.closed
