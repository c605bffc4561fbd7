"""Who may run next. No request runs without a lease on its adapter, and none waits for ever."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable

from .requests import QueueFull, Request


class Admission:
    """The waiting requests, and what those that run hold.

    First come, first served, as far as adapters are there: a request whose adapter must be loaded first is passed by those
    behind it, which go on while it loads. A load may need a slot that running requests hold; newer requests for adapters
    that are there could keep the slots for ever. So, once a request has waited for `patience` seconds and its load for room,
    no request behind it that needs an adapter is admitted before it.

    The bound: the request that is first in the queue is admitted at the latest when
        patience + the time the running requests need to finish + one load
    have passed since it became the first (running requests have max_tokens: that time is finite; requests without adapter
    hold no slot and are never in the way of one). So the q-th request in the queue waits for at most q times that.

    Args:
        memory: AdapterMemory: acquire, release, prefetch, error, names.
        slots: its adapters at a time. max_running: requests that run at a time. max_waiting: that wait.
    """

    def __init__(self, memory, *, slots: int, max_running: int, max_waiting: int, patience: float, clock=time.monotonic):
        self.memory, self.slots, self.max_running = memory, slots, max_running
        self.max_waiting, self.patience, self.clock = max_waiting, patience, clock
        self.lock = threading.RLock()
        self.idle = threading.Condition(self.lock)  # told whenever a request leaves
        self.running: dict[str, Request] = {}
        self.longest_wait = 0.0
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self._leases: Counter[str] = Counter()
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
        admitted, absent, overdue = [], set(), False
        for request in list(self._waiting.values()):
            if len(self.running) >= self.max_running:
                break
            name = request.adapter
            if name is not None:
                if overdue or name in absent:
                    continue
                # More loads at a time than free slots would push each other out before anyone got to run.
                if len(absent) >= max(1, self.slots - len(self._leases)) and name not in self._leases:
                    continue
                request.lease = self._acquire(request, name)
                if request.lease is None:
                    if request.finish_reason is None:
                        absent.add(name)
                        late = self.clock() - request.submitted >= self.patience
                        overdue = late and self.memory.waits_for_room(name)
                    continue
                self._leases[name] += 1
            del self._waiting[request.id]
            request.admitted = self.clock()
            self.longest_wait = max(self.longest_wait, request.admitted - request.submitted)
            self.running[request.id] = request
            admitted.append(request)
        return admitted

    def _acquire(self, request: Request, name: str):
        try:
            lease = self.memory.acquire(name)
            reason = None if lease is not None else self.memory.error(name)
        except KeyError as error:  # forgotten, or its folder was removed, while the request waited
            lease, reason = None, error
        if reason is not None:
            self._waiting.pop(request.id, None)
            request._finish(
                "error", reason if isinstance(reason, Exception) else RuntimeError(f"adapter {name!r}: {reason}")
            )
            self.idle.notify_all()
        return lease

    def left(self, request: Request) -> None:
        """A running request ended, and nothing reads its adapter for it any more."""
        with self.lock:
            if self.running.pop(request.id, None) is None:
                return
            if request.lease is not None:
                self.memory.release(request.lease)
                self._leases[request.adapter] -= 1
                self._leases += Counter()  # drops what nobody holds
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

    def __len__(self):
        return len(self._waiting)
