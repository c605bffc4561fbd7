"""Adapters on disk, in host memory and on the device: loaded while others are served, held while they are used.

`fastft._runtime.AdapterTable` (csrc/runtime) keeps the books: who uses which slot, what is loaded next, what must go for it.
The thread of `loading` does that work, `pool` has the device's tensors.
"""

import logging
import threading
import time
import weakref
from collections.abc import Callable

import torch

from .. import _native
from ..checkpoint.files import AdapterFileError
from .folder import AdapterFolder
from .loading import Loader
from .pool import AdapterPool
from .requests import AdaptersUnavailable, UnknownAdapter

_log = logging.getLogger("fastft.serving")
_SLICE = 0.2  # seconds that C++ waits at a time, so that Python can react to signals
_SEEN = 0.1  # seconds that a folder counts as there: many requests come at a time, and each look takes a network's answers
_TOTALS = ("hits", "misses", "host_hits", "reads", "loads", "failures", "evictions", "host_evictions")
_GIB = 1 << 30


class AdapterMemoryFull(RuntimeError):
    """An adapter that can't get a place, however long one waits."""


class AdapterMemory:
    """The adapters of one served model. All methods can be called from any thread; close it, or use ``with``.

    Args:
        sites: of the model. adapter_dir: the folder whose folders are the adapters.
        model: whose adapters `packing.Packer` packs. packer: instead of that, has ``pack(folder, name)``, which returns a
            PackedAdapter, and ``max_pieces``, a number by site name.
        dtype: of the adapters' numbers in memory. slots: adapters on the device at a time.
        device_bytes: for adapters on the device; default a tenth of a GPU's memory, 1 GiB on a CPU.
        host_bytes: for adapters kept in host memory; default 4 GiB beside a GPU, 1 GiB on a CPU. The one adapter that is
            just being loaded may exceed it, and beside a GPU 8 MiB are pinned, through which all are copied.
        page_bytes: memory is given out in pages of this size.
        reserve_seconds: how long what was loaded for `acquire` waits to be acquired before it can be evicted again.
        retry_seconds: how long a failed load is remembered; until then `acquire` does not try again.
        start: without the thread, tests call `step`.

    Raises:
        RuntimeError: fastft._runtime is not built. FileNotFoundError: no such folder.
    """

    def __init__(
        self,
        sites,
        *,
        device,
        dtype,
        adapter_dir,
        model=None,
        packer=None,
        slots: int = 64,
        device_bytes: int | None = None,
        host_bytes: int | None = None,
        page_bytes: int = 262144,
        reserve_seconds: float = 5.0,
        retry_seconds: float = 1.0,
        start: bool = True,
    ):
        self._runtime, reason = _native.runtime()
        if self._runtime is None:
            raise RuntimeError(f"adapters can't be served: {reason}")
        self._folder = AdapterFolder(adapter_dir)
        if packer is None:
            from .packing import Packer

            packer = Packer(model, sites, dtype=dtype, page_bytes=page_bytes)
        on_gpu = torch.device(device).type == "cuda"
        if device_bytes is None:
            device_bytes = torch.cuda.get_device_properties(device).total_memory // 10 if on_gpu else _GIB
        if host_bytes is None:
            host_bytes = 4 * _GIB if on_gpu else _GIB
        pages = device_bytes // page_bytes
        if pages < 1:
            raise ValueError(f"device_bytes={device_bytes} is less than one page of {page_bytes} bytes")
        pieces = {site.name: packer.max_pieces[site.name] for site in sites}
        self.pool = AdapterPool(pieces, device=device, dtype=dtype, slots=slots, pages=pages, page_bytes=page_bytes)
        self.store, self.offsets, self.columns = self.pool.store, self.pool.offsets, self.pool.columns
        self.pieces, self.widths = self.pool.pieces, self.pool.widths
        self.quiet, self.read_on = self.pool.quiet, self.pool.read_on
        self._table = self._runtime.AdapterTable(
            slots=slots,
            pages=pages,
            page_bytes=page_bytes,
            host_bytes=host_bytes,
            reserve_seconds=reserve_seconds,
            retry_seconds=retry_seconds,
        )
        self._callbacks: list[Callable] = []
        self._seen: dict[str, float] = {}  # when the adapters were last seen in the folder
        # The thread holds no reference to the memory, so that one nobody uses any more ends.
        own = weakref.ref(self)
        self._loader = Loader(
            self._runtime, self._table, self._folder, packer, self.pool, lambda: (memory := own()) and memory._changed()
        )
        thread = threading.Thread(target=self._loader.run, name="fastft-adapters", daemon=True)
        # Also before the interpreter ends, which a thread that waits in C++ would not survive.
        self._end = weakref.finalize(self, _stop, self._loader, thread)
        if start:
            thread.start()

    # What is there

    def names(self) -> list[str]:
        """All adapters of the folder, sorted: it is listed anew. ``name in memory`` is quicker for one."""
        return self._folder.names()

    def __contains__(self, name: str) -> bool:
        return name in self._folder

    def state(self, name: str) -> str:
        """ "on_disk", "in_host", "loading", "on_device" or "draining" (being unloaded)."""
        return self._table.state(name).name

    def error(self, name: str, waited: float = 0.0) -> str | None:
        """Why its last load failed, for `retry_seconds`, or for as long as one who asks has `waited` for it."""
        return self._table.error(name, waited)

    def failure(self, name: str, waited: float = 0.0) -> Exception | None:
        """The same as an exception: UnknownAdapter, AdaptersUnavailable, or else AdapterFileError."""
        error = self.error(name, waited)
        if error is None:
            return None
        absent = self._loader.absent.get(name)
        return absent if absent is not None and str(absent) == error else AdapterFileError(error)

    def waits_for_room(self, name: str) -> bool:
        """Whether its load waits for nothing but that users of other adapters leave."""
        return self._table.waits_for_room(name)

    def residents(self) -> list:
        """What is on the device: objects with name, digest, state, generation, slot, bytes, leases, pinned."""
        return self._table.residents()

    def stats(self) -> dict[str, int]:
        """Numbers of now, and since the start (``..._total``)."""
        counts = self._table.stats()
        counts["device_bytes"] = counts["pages"] * counts["page_bytes"]
        counts["device_bytes_used"] = counts["pages_used"] * counts["page_bytes"]
        return {f"{key}_total" if key in _TOTALS else key: value for key, value in counts.items()}

    # Use

    def acquire(self, name: str, waited: float = 0.0):
        """The right to use an adapter, or None: not on the device yet. Then its load is queued, and `on_change` tells.

        The lease's slot keeps its content until `release`, also if the adapter is updated or forgotten. `widths` are large
        enough for it from now on. On a GPU, call this under the stream that will read the memory, or tell `read_on` of it.

        Args:
            waited: for how many seconds already: a failure since then is told, however seldom one looks.
        Returns:
            Lease(slot, generation, digest, name), or None; after a failure None and no new try while `error` tells it.
            One that isn't in the folder (any more) is such a failure: the folder, which may be slow, isn't looked at here.
        """
        found = self._table.acquire(name, waited)
        if isinstance(found, self._runtime.Lease):
            self.pool.read_on()
            return found
        self._open()
        if found is self._runtime.Miss.absent:
            # Whoever waits holds the engine's lock: the thread that loads looks whether it is still in the folder.
            self._table.want(name, self._runtime.Urgency.demand)
        return None

    def release(self, lease) -> None:
        """Give a lease back, after the last work that reads its slot was issued. Raises ValueError if it was given back."""
        self._table.release(lease)

    def holds(self, lease) -> bool:
        """Whether a lease was not given back."""
        return self._table.holds(lease)

    def prefetch(self, name: str, looked: bool = False) -> None:
        """It will be needed: load it when nothing urgent is to be loaded, for nothing that is in use or was asked for.

        looked: `look` was called just now. Raises UnknownAdapter.
        """
        if not looked:
            self.look(name)
        self._table.want(name, self._runtime.Urgency.prefetch)

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback`, in whatever thread, whenever a load finished or failed. It must be quick and wait for no load."""
        self._callbacks.append(callback)

    # Administration

    def load(self, name: str, timeout: float | None = None) -> str:
        """Bring an adapter to the device, if it is not there, and return its digest.

        Raises:
            UnknownAdapter. AdapterFileError: its files are wrong. AdapterMemoryFull: there will be no room. TimeoutError.
            RuntimeError: it was unloaded or the memory closed meanwhile, or what else went wrong in loading.
        """
        self.look(name)
        return self._wait(self._table.want(name, self._runtime.Urgency.load), name, timeout)

    def update(self, name: str, timeout: float | None = None) -> str:
        """Read an adapter's folder again, bring it to the device, and return its new digest.

        Requests with a lease finish on the old content. New ones get it too until the new one is there; if that fails, also
        after. Raises what `load` does.
        """
        self._folder.path(name)
        return self._wait(self._table.update(name), name, timeout)

    def unload(self, name: str, timeout: float | None = None) -> int:
        """Hand out no more leases, wait for those that are held, free device and host memory; the bytes freed of both.

        The adapter is unpinned, and loaded again when it is asked for. TimeoutError after `timeout` seconds: nothing was
        freed, and leases are handed out again. Raises UnknownAdapter.
        """
        if self.state(name) == "on_disk":
            self._folder.path(name)
        self._table.start_unload(name)
        freed, deadline = None, _deadline(timeout)
        try:
            while freed is None:
                freed = self._table.finish_unload(name, min(_SLICE, max(deadline - time.monotonic(), 0)))
                if freed is None:
                    self._open()
                    if time.monotonic() >= deadline:
                        raise TimeoutError(f"adapter {name!r} is still used after {timeout} s; it stays loaded")
        finally:
            if freed is None:
                self._table.cancel_unload(name)
            self._loader.collect()
            self._changed()
        return freed

    def evict(self, name: str) -> bool:
        """Free its device memory now if nobody uses it and it is not pinned; whether that was done."""
        done = self._table.evict(name)
        self._loader.collect()
        return done

    def forget(self, name: str) -> None:
        """Let go of all that is known about an adapter, without waiting: its memory goes with its last user."""
        self._seen.pop(name, None)
        self._table.forget(name)
        self._loader.collect()
        self._changed()

    def pin(self, name: str, timeout: float | None = None) -> str:
        """Load an adapter and keep it on the device; its digest. Raises what `load` does, and pins nothing then: what was
        pinned before stays so, with the content that it has."""
        self.look(name)
        before = self._pinned(name)
        self._table.pin(name, True)
        try:
            return self.load(name, timeout)
        except BaseException:
            if not before:
                self._table.pin(name, False)
            raise

    def unpin(self, name: str) -> None:
        self._table.pin(name, False)

    def close(self) -> None:
        """End the thread and all waiting for loads; free the memory, which nobody may read then. Leases can be returned."""
        self._end()
        self._loader.free()
        self.store = self.offsets = self.columns = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def step(self, seconds: float = 0.0) -> bool:
        """Where there is no thread: do one thing that is to be done. Whether there was one."""
        return self._loader.step(seconds)

    def _pinned(self, name: str) -> bool:
        return any(one.pinned for one in self.residents() if one.name == name)

    def look(self, name: str) -> None:
        """Raises UnknownAdapter. What was read needs no folder any more: it may be unmounted for a while.

        But what is gone from the folder is forgotten, or another adapter of its name would be answered for by this one.
        A pin stays: whoever puts a new version in its place may take the old one away first.

        It takes as long as the folder's file system, which may be a network's.
        """
        now = time.monotonic()
        if now - self._seen.get(name, -_SEEN) < _SEEN:
            return
        try:
            self._folder.path(name)
        except AdaptersUnavailable:
            if self.state(name) == "on_disk":
                raise
        except UnknownAdapter:
            if self.state(name) != "on_disk":
                pinned = self._pinned(name)
                self.forget(name)
                if pinned:
                    self._table.pin(name, True)
                    _log.warning("the pinned adapter %r is gone from its folder: the next one of this name is pinned", name)
            raise
        else:
            self._seen[name] = now

    def _changed(self) -> None:
        for callback in list(self._callbacks):
            try:
                callback()
            except Exception:
                _log.exception("a callback of the adapter memory failed")

    @property
    def closed(self) -> str | None:
        """Why there are no more loads, or None."""
        return self._loader.closed

    def _open(self) -> None:
        if self._loader.closed:
            raise RuntimeError(self._loader.closed)

    def _wait(self, ticket, name, timeout) -> str:
        deadline, failures = _deadline(timeout), self._runtime.Failure
        while (outcome := self._table.wait(ticket, min(_SLICE, max(deadline - time.monotonic(), 0)))) is None:
            if time.monotonic() >= deadline:
                raise TimeoutError(f"adapter {name!r} is not loaded after {timeout} s; its load goes on")
        if outcome.failure is failures.none:
            return outcome.digest
        kind = {failures.files: AdapterFileError, failures.room: AdapterMemoryFull}.get(outcome.failure, RuntimeError)
        raise kind(self._loader.closed or outcome.error)


def _deadline(timeout: float | None) -> float:
    return float("inf") if timeout is None else time.monotonic() + timeout


def _stop(loader, thread) -> None:
    loader.close("the adapter memory was closed")
    if thread.is_alive() and thread is not threading.current_thread():
        thread.join(30)
