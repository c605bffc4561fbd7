"""The thread that loads adapters: it does what the table hands out (csrc/runtime/adapter_table.h), and reports back."""

import logging
import threading
import traceback
from collections.abc import Callable

from ..checkpoint.files import AdapterFileError
from .pool import HostCopy
from .requests import UnknownAdapter
from .teams import work_alone

_log = logging.getLogger("fastft.serving")


class Loader:
    """Reads folders into host copies and copies those to the device. It holds all host copies.

    Args:
        runtime: the module fastft._runtime. table, folder, packer, pool: of the memory.
        changed: called after every load that finished or failed.
    """

    def __init__(self, runtime, table, folder, packer, pool, changed: Callable[[], None]):
        self._table, self._folder, self._packer, self._pool, self._changed = table, folder, packer, pool, changed
        self._kinds, self._failures = runtime.TaskKind, runtime.Failure
        self.copies: dict[int, HostCopy] = {}
        self.absent: dict[str, UnknownAdapter] = {}  # what the last load of these found: they were in the folder before
        self.closed: str | None = None  # why there are no more loads
        self._collecting = threading.Lock()

    def run(self) -> None:
        work_alone()
        while self.closed is None:
            try:
                self.step(60.0)
            except Exception as error:
                _log.exception("adapters can't be loaded any more")
                self.close(f"the adapter memory failed: {type(error).__name__}: {error}")

    def step(self, seconds: float) -> bool:
        """Do one thing that is to be done, waiting for it for at most `seconds`; whether there was one."""
        task = self._table.next_task(seconds)
        if task is None:
            return False
        if task.kind is self._kinds.collect:
            self.collect()
            self._changed()  # a load may have failed because there will never be room
            return True
        try:
            if task.kind is self._kinds.read:
                self._read(task)
            else:
                self._pool.write(task.slot, task.pages, self.copies[task.copy])
                self._table.placed(task)
        except (AdapterFileError, FileNotFoundError, UnknownAdapter) as error:
            self._table.failed(task, self._failures.files, str(error))
        except Exception as error:
            _log.error("adapter %r could not be loaded:\n%s", task.name, traceback.format_exc())
            self._table.failed(task, self._failures.other, f"{type(error).__name__}: {error}")
        self.collect()
        self._changed()
        return True

    def _read(self, task) -> None:
        self.absent.pop(task.name, None)
        try:
            folder = self._folder.path(task.name)
        except UnknownAdapter as error:
            self.absent[task.name] = error
            raise
        copy = self._pool.host_copy(self._packer.pack(folder, task.name))
        self.copies[task.copy] = copy
        size = copy.blob.numel()
        if not self._table.read_done(task, size, size // self._pool.page_bytes, copy.digest):
            del self.copies[task.copy]

    def collect(self) -> None:
        """Empty slots that were given up, and let go of host copies. Whoever gave them up may call it, in any thread."""
        with self._collecting:
            garbage = self._table.take_garbage()
            for copy in garbage.copies:
                self.copies.pop(copy, None)
            if not garbage.slots:
                return
            try:
                self._pool.clear(garbage.slots)
            except Exception as error:  # the device is broken, and what lies in these slots unknown
                self.close(f"the adapter memory failed: {type(error).__name__}: {error}")
                raise
            self._table.reclaimed(garbage.slots)

    def free(self) -> None:
        """Let go of all host copies and of the device's memory, after `close`."""
        with self._collecting:
            self.copies.clear()
            self._pool.free()

    def close(self, why: str) -> None:
        """No more loads; whoever waits for one is told why. Can be repeated."""
        self.closed = self.closed or why
        self._table.close()
        self._changed()
