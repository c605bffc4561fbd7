"""Batches that name an adapter for each sample (PEFT's ``adapter_names=``), without hooks on the modules.

PEFT hands the names to its layers by hooks that it hangs on the modules for the time of a call; so two threads get each
other's names, and a call that fails leaves its hooks behind. Here they travel in a context variable: a table from module to
names. Checkpointing runs forwards again during backward, maybe on another thread, when the call and its context are long
over; so each region that is being checkpointed remembers the table that its forward saw (`_remember`). Threads that a model
starts within its own forward see no names, unless it runs them in a copy of its context (`contextvars.copy_context`).
"""

import functools
import inspect
import sys
import threading
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.utils import checkpoint

from ..ops.registry import conditions
from .peft_eligible import autocasting, watched
from .swapping import Swapped

_table: ContextVar[dict | None] = ContextVar("fastft_adapter_names", default=None)
_lock, _running = threading.Lock(), 0
_any_running = False  # in any thread; a plain global, which compiled graphs guard on, as they can't read the context
_REENTRANT = checkpoint.CheckpointFunction.forward.__code__
_NOT_REENTRANT = inspect.unwrap(checkpoint.checkpoint).__code__
_REMEMBERED = "remembered"  # beside the modules in a table: may parts of this forward be run again?


class Index(list):
    """The adapter's name of every sample; ``__base__`` stands for none."""

    def __init__(self, names, prepare=None):
        super().__init__(names)
        self._rows, self._routes = {}, {}
        self._prepare, self._banks, self._slots = prepare, None, {}
        self.conditions = None  # of the choice of backends
        self.usual = False  # on a CPU, where nothing follows or changes the calls of layers
        self.last = None, None, None  # length, segments, assignments of the last layer

    def bank_of(self, layer):
        """The layer's adapters laid out for the grouped ops, or None."""
        if self._banks is None:
            named = [name for name in dict.fromkeys(self) if name != "__base__"]
            self.conditions = conditions()
            self.usual = self.conditions is not None and not (watched() or autocasting("cpu"))
            self._banks, self._slots = self._prepare(named) if self._prepare and named else ({}, {})
        return self._banks.get(layer)

    def routing(self, device, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(segments, assignments) of `ops.grouped`, where each sample is so many tokens long; after `bank_of`."""
        found = self._routes.get((device, length))
        if found is None:
            places: dict[int, list[int]] = {}
            for position, name in enumerate(self):
                if name != "__base__":
                    places.setdefault(self._slots[name], []).append(position)
            segments, assignments = [], []
            for slot, samples in places.items():
                begin = len(assignments)
                assignments += [sample * length + t for sample in samples for t in range(length)]
                segments.append([slot, begin, len(assignments)])
            kind = {"dtype": torch.int32, "device": device}
            found = self._routes[device, length] = torch.tensor(segments, **kind), torch.tensor(assignments, **kind)
        return found

    def rows(self, device) -> list[tuple[str, torch.Tensor]]:
        """(adapter, positions of its samples), each adapter once, the base left out."""
        if device not in self._rows:
            places: dict[str, list[int]] = {}
            for position, name in enumerate(self):
                places.setdefault(name, []).append(position)
            places.pop("__base__", None)
            self._rows[device] = [(name, torch.tensor(rows, device=device)) for name, rows in places.items()]
        return self._rows[device]


@contextmanager
def using(table: dict):
    """Layers called inside find their names in `table`, module -> Index; those not in it where they found them before."""
    outer = _table.get() or {}
    # Under no_grad nothing is run again, so that nothing has to be remembered.
    token = _table.set({**outer, **table, _REMEMBERED: torch.is_grad_enabled() or outer.get(_REMEMBERED, False)})
    _count(1)
    try:
        yield
    finally:
        _count(-1)
        _table.reset(token)


def _count(change: int) -> None:
    global _running, _any_running
    with _lock:
        _running += change
        _any_running = _running > 0


def index_of(module) -> Index | None:
    """The names for this call of `module`; None outside of mixed batches."""
    if not _any_running:
        return None
    return _look_up_apart(module) if compiled_around() else _look_up(module)


def compiled_around() -> bool:
    """Is torch.compile at work around this call? `torch.compiler.disable` keeps it out, at 10 us a call of a cold cache."""
    return torch.compiler.is_compiling() or get_eval_frame_callback() is not None


def _look_up(module):
    table = _table.get()
    index = None if table is None else table.get(module)
    if index is not None and (table[_REMEMBERED] or torch.is_grad_enabled()):
        _remember(table)
    return index


_look_up_apart = torch.compiler.disable(_look_up)


def _remember(table) -> None:
    """Give the table to every checkpointed region that is being run, for when it runs again.

    Both kinds of checkpointing keep the function to run again in a place of their own, which only the frames of this
    forward know.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _REENTRANT:
            _wrap(frame.f_locals["ctx"], "run_function", table)
        elif frame.f_code is _NOT_REENTRANT and (generator := frame.f_locals.get("gen")) is not None:
            _wrap(generator.gi_frame.f_locals["new_frame"], "recompute_fn", table)
        frame = frame.f_back


def _wrap(owner, name, table) -> None:
    function = getattr(owner, name)
    if getattr(function, "fastft_table", None) is table:
        return

    @functools.wraps(function, updated=())
    def run(*args, **kwargs):
        with using(table):
            return function(*args, **kwargs)

    run.fastft_table = table
    setattr(owner, name, run)


class Routed(Swapped):
    """Mixed into the classes of adapted modules that PEFT computes; gives them their names."""

    def forward(self, *args, **kwargs):
        index = index_of(self)
        if index is None:
            return super().forward(*args, **kwargs)
        return _with_names(self, index, args, kwargs)


@torch.compiler.disable
def _with_names(module, index, args, kwargs):
    return module.plain.forward(module, *args, **{**kwargs, "adapter_names": index})
