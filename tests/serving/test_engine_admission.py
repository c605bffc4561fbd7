"""Who may run: order, fairness and its bound, on a memory and a clock that tests move by hand."""

import threading
from collections import OrderedDict, namedtuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.serving.admission import Admission
from fastft.serving.requests import QueueFull, Request, Sampling, UnknownAdapter
from tests.serving.tiny import waits_until

Lease = namedtuple("Lease", "slot generation digest name")


class Memory:
    """`slots` adapters; one load at a time, `load` ticks long, in the order asked for; the least used that is free goes.
    What was loaded is kept until it is acquired."""

    def __init__(self, names, slots, load=0):
        self.known, self.slots, self.ticks = set(names), slots, load
        self.here: OrderedDict[str, int] = OrderedDict()  # name -> leases
        self.kept: set[str] = set()
        self.queue: OrderedDict[str, int] = OrderedDict()  # name -> ticks left
        self.failures: dict[str, Exception] = {}

    def acquire(self, name, waited=0.0):
        if name not in self.known:
            self.failures[name] = UnknownAdapter(f"no adapter {name!r}")
            return None
        if name not in self.here:
            self.queue.setdefault(name, self.ticks)
            return None
        self.here[name] += 1
        self.kept.discard(name)
        self.here.move_to_end(name)
        return Lease(0, 0, "d", name)

    def release(self, lease):
        self.here[lease.name] -= 1

    def failure(self, name, waited=0.0):
        return self.failures.get(name)

    def state(self, name):
        return "on_device" if name in self.here else "on_disk"

    def waits_for_room(self, name):
        return name in self.queue and len(self.here) >= self.slots and self._evictable() is None

    def _evictable(self):
        return next((name for name, leases in self.here.items() if leases == 0 and name not in self.kept), None)

    def tick(self):
        for name in list(self.queue)[:1]:
            if len(self.here) >= self.slots:
                free = self._evictable()
                if free is None:
                    return
                del self.here[free]
            self.queue[name] -= 1
            if self.queue[name] < 0:
                del self.queue[name]
                self.here[name] = 0
                self.kept.add(name)


class World:
    def __init__(self, names="abcdef", slots=2, load=0, **options):
        self.now, self.memory = 0, Memory(names, slots, load)
        options = {"max_running": 8, "max_waiting": 100, "patience": 5, **options}
        self.admission = Admission(self.memory, slots=slots, clock=lambda: self.now, **options)
        self.made, self.ends = 0, {}

    def submit(self, adapter, ticks=3):
        request = Request(f"r{self.made}", [1], adapter, Sampling(ticks), None)
        request.submitted = self.now
        self.made += 1
        self.admission.add(request)
        return request

    def step(self):
        """One step of the engine: the loads, then who may run, then those at their end leave."""
        before = set(self.memory.here)
        self.memory.tick()
        if set(self.memory.here) != before:
            self.admission.look_again()
        for request in self.admission.admit():
            self.ends[request.id] = self.now + request.sampling.max_tokens
        self.now += 1
        for request in list(self.admission.running.values()):
            if self.ends[request.id] <= self.now:
                request._finish("length")
                self.admission.left(request)

    def until(self, condition, limit=1000):
        while not condition():
            assert self.now < limit, "never happened"
            self.step()


def test_first_come_first_served_and_those_whose_adapter_loads_are_passed():
    world = World(load=4)
    a, none, second = world.submit("a"), world.submit(None), world.submit("a")
    world.step()
    assert none.admitted is not None and a.admitted is None and second.admitted is None
    world.until(lambda: a.admitted is not None)
    assert second.admitted == a.admitted and a.lease.name == "a" and none.lease is None


def test_no_request_runs_without_a_lease_and_every_lease_is_given_back():
    world = World()
    requests = [world.submit(name) for name in ("a", "b", None, "a", "c")]
    while any(r.finish_reason is None for r in requests):
        world.step()
        running = world.admission.running.values()
        assert all((r.lease is None) == (r.adapter is None) for r in running)
        held = {name: leases for name, leases in world.memory.here.items() if leases}
        assert sum(held.values()) == sum(r.adapter is not None for r in running)
        assert world.now < 100


def _stream(world, patience):
    """Newer requests for a and b come all the time and hold both slots; one for c waits. When is it admitted?"""
    world.admission.patience = patience
    for name in "ab":
        world.submit(name, 4)
        world.step()
        world.step()
    waits = world.submit("c", 2)
    for _ in range(200):
        for name in "ab":
            world.submit(name, 4)
        world.step()
        if waits.admitted is not None:
            return waits.admitted - waits.submitted
    return None


def test_newer_requests_dont_keep_the_slots_for_ever():
    # At the latest: patience, the running ones (4 ticks) end, one load (1 tick), and a step to notice each.
    assert _stream(World(max_running=1000, max_waiting=1000), 10) <= 10 + 4 + 1 + 2
    assert _stream(World(max_running=1000, max_waiting=1000), float("inf")) is None  # without it, it never is


def test_requests_without_adapter_go_on_while_slots_drain():
    world = World(patience=0)
    world.submit("a", 6), world.submit("b", 6)
    world.step(), world.step(), world.step()
    late, same, base = world.submit("c"), world.submit("a"), world.submit(None)
    world.step()
    assert base.admitted is not None and late.admitted is None and same.admitted is None
    world.until(lambda: same.admitted is not None)
    assert late.admitted <= same.admitted


def test_a_slow_disk_stops_nobody():
    world = World(slots=4, load=1000, patience=2)
    world.memory.here["a"] = 0
    stuck = world.submit("b")
    for _ in range(10):
        world.step()
    quick = world.submit("a")
    world.step()
    assert quick.admitted is not None and stuck.admitted is None


def test_at_most_so_many_run_and_wait():
    world = World(max_running=2, max_waiting=3)
    for _ in range(3):
        world.submit(None)
    with pytest.raises(QueueFull, match="3 requests wait"):
        world.submit(None)
    world.step()
    assert len(world.admission.running) == 2 and len(world.admission) == 1


def test_loads_dont_push_each_other_out():
    """Many adapters wait for one slot: each load that ends lets a request in, in their order."""
    world = World(slots=1, load=1, patience=100)
    requests = [world.submit(name, 1) for name in "abcdef"]
    world.until(lambda: all(r.finish_reason for r in requests))
    assert [r.admitted for r in requests] == sorted(r.admitted for r in requests)
    assert len(world.memory.queue) == 0 and world.now < 40


def test_a_failed_load_and_a_forgotten_adapter_end_their_requests_alone():
    world = World()
    broken, gone, fine = world.submit("a"), world.submit("f"), world.submit("b")
    closed = world.submit("c")
    world.memory.failures["a"], world.memory.ticks = ValueError("damaged"), 1
    world.memory.acquire = unless_closed(world.memory.acquire)
    world.memory.known.discard("f")
    world.until(lambda: fine.finish_reason is not None)
    assert broken.finish_reason == gone.finish_reason == "error" and fine.finish_reason == "length"
    assert broken.error is world.memory.failures["a"] and isinstance(gone.error, UnknownAdapter)
    assert closed.finish_reason == "error" and "closed" in str(closed.error)


def unless_closed(acquire):
    def of(name, waited=0.0):
        if name == "c":
            raise RuntimeError("the adapter memory was closed")
        return acquire(name, waited)

    return of


def test_withdrawn_requests_are_not_admitted():
    world = World()
    first, second = world.submit(None), world.submit(None)
    assert world.admission.withdraw(first) and not world.admission.withdraw(first)
    world.step()
    assert first.admitted is None and second.admitted is not None
    assert not world.admission.wait_empty(0)
    world.until(lambda: second.finish_reason is not None)
    assert world.admission.wait_empty(0)


def test_an_adapter_that_was_kept_for_somebody_is_used_once_while_slots_drain():
    world = World(slots=1, patience=0)
    left = world.submit("d")
    world.step()
    assert world.admission.withdraw(left)
    world.step()
    assert world.memory.kept == {"d"}
    waits, once = world.submit("c"), world.submit("d", 4)
    newer = []
    for _ in range(12):
        world.step()
        newer.append(world.submit("d", 4))
    assert waits.admitted is not None and once.admitted < waits.admitted
    assert all(one.admitted is None or one.admitted > waits.admitted for one in newer)


class RoomForOne(Memory):
    """One of its adapters, c, needs the memory of all slots."""

    def waits_for_room(self, name):
        return name in self.queue and (any(self.here.values()) if name == "c" else super().waits_for_room(name))

    def tick(self):
        if next(iter(self.queue), None) == "c":
            if any(self.here.values()):
                return
            self.here.clear()
        super().tick()


def test_slots_that_are_free_again_stay_so_until_there_is_room_for_a_large_adapter():
    world = World(slots=2, patience=0)
    world.memory = world.admission.memory = RoomForOne("abc", 2)
    first = [world.submit("a", 5), world.submit("b", 8)]
    world.until(lambda: all(one.admitted is not None for one in first))
    waits = world.submit("c", 1)
    for _ in range(20):
        world.submit("a", 6), world.submit("b", 6)
        world.step()
    assert waits.admitted is not None and waits.admitted - first[1].admitted <= 8 + 2


def test_no_more_is_loaded_than_there_are_slots_for():
    world = World(slots=2, load=5)
    for name in "abcd":
        world.submit(name)
    world.step()
    assert list(world.memory.queue) == ["a", "b"]


def test_a_load_that_ends_while_one_looks_is_not_missed():
    world = World()
    request, acquire = world.submit("a"), world.memory.acquire

    def too_early(name, waited=0.0):
        world.memory.acquire = acquire
        world.memory.here["a"] = 0
        world.admission.look_again()  # the loading thread, when this one was told that it is not there

    world.memory.acquire = too_early
    assert world.admission.admit() == [] and world.admission.admit() == [request]


def test_who_waits_behind_a_withdrawn_request_is_looked_at_again():
    world = World(patience=0)
    world.submit("a", 50), world.submit("b", 50)
    world.step(), world.step(), world.step()
    late, same = world.submit("c"), world.submit("a")
    world.step()
    assert same.admitted is None
    assert world.admission.withdraw(late)
    world.step()
    assert same.admitted is not None


@pytest.mark.parametrize("how", ["admit", "withdraw", "end_all"])
def test_who_waits_for_room_or_for_the_end_is_told(how):
    world = World(max_waiting=1)
    request, admission = world.submit(None), world.admission
    waits = admission.wait_for_room if how == "admit" else lambda: admission.wait_empty(None)
    thread = threading.Thread(target=waits, daemon=True)
    thread.start()
    waits_until(lambda: admission.idle._waiters)
    ways = {
        "admit": admission.admit,
        "withdraw": lambda: admission.withdraw(request),
        "end_all": lambda: admission.end_all(id),
    }
    ways[how]()
    thread.join(20)
    assert not thread.is_alive()


def test_leases_are_given_back_once_also_at_the_engines_end():
    world = World()
    requests = [world.submit("a", 50), world.submit("b", 50)]
    world.until(lambda: len(world.admission.running) == 2)
    world.admission.left(requests[0])
    world.admission.left(requests[0])
    assert world.memory.here == {"a": 0, "b": 1}
    waiting, ended = world.submit("c"), []
    world.admission.end_all(ended.append)
    assert ended == [waiting, requests[1]] and world.memory.here == {"a": 0, "b": 0}
    assert world.admission.wait_empty(0) and world.admission.admit() == []


@settings(max_examples=150, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 3), st.sampled_from([*"aabbcdef", None]), st.integers(1, 9)), max_size=40),
    slots=st.integers(1, 3),
    load=st.integers(0, 3),
    patience=st.integers(0, 12),
    max_running=st.integers(1, 6),
)
def test_the_first_in_the_queue_is_admitted_within_the_bound(arrivals, slots, load, patience, max_running):
    world = World(slots=slots, load=load, patience=patience, max_running=max_running)
    longest = max((ticks for *_, ticks in arrivals), default=0)
    requests, first_since, pending = [], {}, list(arrivals)
    while pending or any(r.finish_reason is None for r in requests):
        while pending and pending[0][0] == 0:
            _, adapter, ticks = pending.pop(0)
            requests.append(world.submit(adapter, ticks))
        if pending:
            pending[0] = (pending[0][0] - 1, *pending[0][1:])
        waiting = [r for r in requests if r.admitted is None]
        if waiting:
            first_since.setdefault(waiting[0].id, world.now)
        world.step()
        assert world.now < 5000
    for request in requests:
        if request.id in first_since:
            # And steps to notice each change.
            bound = patience + 2 * longest + (slots + 1) * (load + 1) + 4
            assert request.admitted - first_since[request.id] <= bound
