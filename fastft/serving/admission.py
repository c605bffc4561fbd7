"""Who may run next. No request runs without a lease on its adapter, and none waits for ever."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from .requests import QueueFull, Request


class Admission:
    """The waiting requests, and what those that run hold.

    First come, first served, as far as adapters are there: a request whose adapter must be loaded first is passed by those
    behind it, which go on while it loads. A load may need a slot that running requests hold; newer requests for adapters
    that are there could keep the slots for ever. So, once a request has waited for `patience` seconds and its load for room,
    no request behind it gets an adapter that somebody has, or had since: the slots drain. (Adapters that were loaded for
    somebody who waits, before, may still be used once: their slots are kept for them anyway.)

    The bound: the request that is first in the queue is admitted at the latest when
        patience + twice the longest time that a request runs + the loads that were asked for before, at most one a slot
    have passed since it became the first. Requests have max_tokens, so that time is finite; those without adapter hold no
    slot and are never in the way of one. The q-th request in the queue waits for at most q times that.

    Args:
        memory: AdapterMemory: acquire, release, failure, state, waits_for_room. What it loads for an acquire it keeps until
            then, and it loads in the order of acquires. slots: its adapters at a time.
        max_running, max_waiting: requests that run, and that wait, at a time.
    """

    def __init__(self, memory, *, slots: int, max_running: int, max_waiting: int, patience: float, clock=time.monotonic):
        self.memory, self.slots, self.max_running = memory, slots, max_running
        self.max_waiting, self.patience, self.clock = max_waiting, patience, clock
        self.lock = threading.RLock()
        self.idle = threading.Condition(self.lock)  # told whenever a request leaves, or waits no more
        self.running: dict[str, Request] = {}
        self.longest_wait = 0.0
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self._drained: Request | None = None  # for whom
        self._used: set[str | None] = set()  # adapters that somebody had since then
        self._changed = False  # whether anything happened since the last look that could let a request in

    def add(self, request: Request) -> None:
        """Put it at the end of the queue. Raises QueueFull."""
        with self.lock:
            if len(self._waiting) >= self.max_waiting:
                raise QueueFull(
                    f"{len(self._waiting)} requests wait already, max_waiting is {self.max_waiting}: try again later"
                )
            self._waiting[request.id] = request
            self._changed = True

    def look_again(self) -> None:
        """Something happened elsewhere: an adapter was loaded, or could not be."""
        self._changed = True

    def admit(self) -> list[Request]:
        """The requests that may run from now on, each with its lease. Those that never will be are ended with an error."""
        if not self._changed or not self._waiting:
            return []
        with self.lock:
            self._changed = False
            return self._pass()

    def _pass(self) -> list[Request]:
        admitted, absent, overdue, taken = [], set(), None, set()
        # Loads that there is no room for yet would only stand before that of someone who becomes the first meanwhile.
        loads = max(1, self.slots - len({request.adapter for request in self.running.values()} - {None}))
        for request in list(self._waiting.values()):
            if len(self.running) >= self.max_running:
                break
            name = request.adapter
            if name is not None:
                if name in absent or (overdue and name in self._used):
                    continue
                if len(absent) >= loads and self.memory.state(name) != "on_device":
                    continue
                request.lease = self._acquire(request, name)
                if request.lease is None:
                    if request.finish_reason is None:
                        absent.add(name)
                        late = self.clock() - request.submitted >= self.patience
                        if late and overdue is None and self.memory.waits_for_room(name):
                            overdue = self._drain_for(request)
                    continue
                taken.add(name)
            del self._waiting[request.id]
            request.admitted = self.clock()
            self.longest_wait = max(self.longest_wait, request.admitted - request.submitted)
            self.running[request.id] = request
            admitted.append(request)
        if overdue is not None:
            self._used |= taken
        if admitted:
            self.idle.notify_all()
        return admitted

    def _drain_for(self, request: Request) -> Request:
        """From now on nobody behind it may take an adapter again that others have or had since."""
        if self._drained is not request:
            self._drained = request
            self._used = {other.adapter for other in self.running.values()}
        return request

    def _acquire(self, request: Request, name: str):
        waited = self.clock() - request.submitted
        try:
            lease = self.memory.acquire(name, waited)
            reason = None if lease is not None else self.memory.failure(name, waited)
        except RuntimeError as error:  # the memory was closed
            lease, reason = None, error
        if reason is not None:
            self._waiting.pop(request.id, None)
            request._finish("error", reason)
            self.idle.notify_all()
        return lease

    def left(self, request: Request) -> None:
        """A running request ended, and nothing reads its adapter for it any more."""
        with self.lock:
            if self.running.pop(request.id, None) is None:
                return
            if request.lease is not None:
                self.memory.release(request.lease)
            self._changed = True
            self.idle.notify_all()

    def withdraw(self, request: Request) -> bool:
        """Take a request out of the queue; False if it isn't there (any more)."""
        with self.lock:
            there = self._waiting.pop(request.id, None) is not None
            if there:
                self._changed = True
                self.idle.notify_all()
            return there

    def end_all(self, end: Callable[[Request], None]) -> None:
        """Empty the queue and let go of everything that runs: the engine is over."""
        with self.lock:
            for request in [*self._waiting.values(), *self.running.values()]:
                end(request)
            self._waiting.clear()
            for request in list(self.running.values()):
                self.left(request)
            self.idle.notify_all()

    def wait_empty(self, timeout: float | None) -> bool:
        """Whether nothing runs or waits any more, at the latest after `timeout` seconds."""
        with self.lock:
            return self.idle.wait_for(lambda: not self.running and not self._waiting, timeout)

    def wait_for_room(self) -> None:
        """Until fewer wait than may."""
        with self.lock:
            self.idle.wait_for(lambda: len(self._waiting) < self.max_waiting)

    def __len__(self):
        return len(self._waiting)
