"""The device's memory of adapters: pages of numbers and tables, and the pieces of every slot, as `fastft.ops.grouped` reads
them. Which page and slot is whose is not decided here."""

import threading
from contextlib import contextmanager
from dataclasses import dataclass

import numpy
import torch

from .. import _native
from ..modules import huge_pages
from ..ops.grouped import FIELDS
from .packed import PackedAdapter

_STAGE = 4 << 20  # bytes of pinned memory that the host fills while the GPU copies from as many others


@dataclass
class HostCopy:
    """An adapter in host memory, ready to be copied to pages that lie anywhere."""

    digest: str
    blob: torch.Tensor  # uint8, in pageable memory; its addresses are those of the last copy
    runs: numpy.ndarray  # int64 [n, 4], the blob's relocations
    addresses: numpy.ndarray  # int64, the virtual ones
    rows: numpy.ndarray  # int64 [sum of P, 10], pieces of all sites with virtual tables
    widths: dict[str, int]


class AdapterPool:
    """The tensors, and copies into them.

    Args:
        pieces: P by site name, the most pieces that an adapter can have there.
        slots, pages, page_bytes: sizes. dtype: of the numbers.

    Attributes:
        bytes: uint8 [pages · page_bytes], which `store` (dtype), `offsets` (int64) and `columns` (int16) are views of.
        pieces: int64 [slots, P, 10] by site name. widths: by site name the most columns of S that an adapter needed so far,
            None before one had the site. It never shrinks: what was sized by it, a CUDA graph too, stays large enough. On a
            GPU it is a power of two, since graphs are captured anew whenever it changes.
    """

    def __init__(self, pieces: dict[str, int], *, device, dtype, slots: int, pages: int, page_bytes: int):
        self.runtime, reason = _native.runtime()
        if self.runtime is None:
            raise RuntimeError(f"adapters can't be held in memory: {reason}")
        self.device, self.page_bytes = torch.device(device), page_bytes
        self.bytes = huge_pages.zeros(pages * page_bytes, dtype=torch.uint8, device=self.device)
        self.store, self.offsets, self.columns = map(self.bytes.view, (dtype, torch.int64, torch.int16))
        self.per_site = dict(pieces)
        counts = numpy.array([*pieces.values()], dtype=numpy.int64)
        self._rows = torch.zeros((int(counts.sum()) * slots, len(FIELDS)), dtype=torch.int64, device=self.device)
        firsts = numpy.concatenate([[0], counts.cumsum()])
        self.pieces = {
            site: self._rows[first * slots : (first + p) * slots].view(slots, p, len(FIELDS))
            for (site, p), first in zip(pieces.items(), firsts.tolist())
        }
        self.widths: dict[str, int | None] = dict.fromkeys(pieces)
        # The row of piece p of a site in a slot, as one table has all of them, is first + slot * step.
        self._first = numpy.concatenate([first * slots + numpy.arange(p) for p, first in zip(counts, firsts)])
        self._step = counts.repeat(counts)
        self._gpu = _Gpu(self.device, page_bytes) if self.device.type == "cuda" else None

    def host_copy(self, packed: PackedAdapter) -> HostCopy:
        """Checks and takes over a packed adapter. Raises ValueError where it does not fit this pool."""
        blob = packed.blob
        if blob.dtype != torch.uint8 or blob.dim() != 1 or blob.numel() % self.page_bytes or blob.device.type != "cpu":
            raise ValueError(
                f"a blob of {tuple(blob.shape)} {blob.dtype} is no whole number of pages of {self.page_bytes} bytes"
            )
        rows, first = numpy.zeros((len(self._first), len(FIELDS)), dtype=numpy.int64), 0
        unknown = (packed.pieces.keys() | packed.widths.keys()) - self.per_site.keys()
        if unknown:
            raise ValueError(f"adapter {packed.name!r} has pieces of sites that are not served: {sorted(unknown)[:5]}")
        for site, most in self.per_site.items():
            its = packed.pieces.get(site, rows[:0])
            if len(its) > most:
                raise ValueError(
                    f"adapter {packed.name!r} has {len(its)} pieces at site {site!r}, at most {most} are served"
                )
            rows[first : first + len(its)] = its
            first += most
        blob = blob.contiguous()
        runs = numpy.array(packed.relocations, dtype=numpy.int64).reshape(-1, 4)
        addresses = numpy.empty(int(runs[:, 1].sum()), dtype=numpy.int64)
        self.runtime.read_addresses(blob.view(torch.int64).numpy(), runs, addresses)
        return HostCopy(packed.digest, blob, runs, addresses, rows, dict(packed.widths))

    def write(self, slot: int, pages: list[int], copy: HostCopy) -> None:
        """Copy an adapter to a slot and pages that nobody uses. When this returns, all of it is there for every stream."""
        rows = copy.rows.copy()
        self.runtime.relocate_pieces(rows, pages, self.page_bytes)
        # In place: the blob is copied from by this thread alone, and the virtual addresses are kept beside it.
        self.runtime.relocate(copy.blob.view(torch.int64).numpy(), copy.runs, copy.addresses, pages, self.page_bytes)
        where = self._first + slot * self._step
        if self._gpu is None:
            self.runtime.copy_pages(self.bytes.numpy(), copy.blob.numpy(), pages, self.page_bytes)
            self._rows.numpy()[where] = rows
            self._widen(copy.widths)
        else:
            with self._gpu.copying() as done:
                self._gpu.copy_pages(self.bytes, copy.blob, pages)
                self._rows.index_copy_(0, *(torch.from_numpy(part).to(self.device) for part in (where, rows)))
                done()
                self._widen(copy.widths)  # in here: while a graph is captured, all its kernels see the same

    def _widen(self, widths: dict[str, int]) -> None:
        for site, width in widths.items():
            if self._gpu and width:
                width = 1 << (width - 1).bit_length()
            self.widths[site] = max(self.widths[site] or 0, width)

    def clear(self, slots: list[int]) -> None:
        """Empty slots that nobody uses any more: their pieces become nothing. On a GPU, what is written to their pages from
        now on waits for all work that was issued on the streams of `read_on`."""
        if self._rows is None:
            return
        where = (self._first + numpy.array(slots)[:, None] * self._step).ravel()
        if self._gpu is None:
            self._rows.numpy()[where] = 0
        else:
            with self._gpu.copying() as done:
                self._gpu.wait_for_readers()
                self._rows.index_fill_(0, torch.from_numpy(where).to(self.device), 0)
                done()

    def free(self) -> None:
        """Let go of the tensors, after all work on them; nothing can be written any more."""
        try:
            if self._gpu:
                with self._gpu.copying() as done:
                    self._gpu.wait_for_readers()
                    done()
        finally:
            self.bytes = self.store = self.offsets = self.columns = self._rows = None
            self.pieces.clear()

    def read_on(self, stream=None) -> None:
        """This stream of the GPU (default: the calling thread's current one) reads the pool."""
        if self._gpu:
            self._gpu.add_reader(stream or torch.cuda.current_stream(self.device))

    @contextmanager
    def quiet(self):
        """Nothing is copied inside, and no CUDA call made: what captures a CUDA graph needs that."""
        with self._gpu.lock if self._gpu else threading.Lock():
            yield


class _Gpu:
    """Copies on a stream of their own, in order after what reads the same memory."""

    def __init__(self, device, page_bytes: int):
        self.device, self.lock, self._page_bytes = device, threading.Lock(), page_bytes
        self._stream = torch.cuda.Stream(device)
        # Adapters wait in pageable memory: torch rounds pinned blocks up to powers of two, and never gives them back.
        self._pages = max(1, _STAGE // page_bytes)
        self._stages = [(_pinned(self._pages * page_bytes), torch.cuda.Event()) for _ in range(2)]
        self._readers: dict[int, torch.cuda.Stream] = {}

    def add_reader(self, stream):
        if stream.cuda_stream not in self._readers:
            self._readers = {**self._readers, stream.cuda_stream: stream}

    def wait_for_readers(self):
        for stream in self._readers.values():
            self._stream.wait_stream(stream)

    @contextmanager
    def copying(self):
        with self.lock, torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield self._done

    def copy_pages(self, to, blob, pages: list[int]) -> None:
        """Issue the copies of a blob to these pages of `to`, inside `copying`."""
        for at in range(0, len(pages), self._pages):
            (stage, copied), part = self._stages[at // self._pages % 2], pages[at : at + self._pages]
            copied.synchronize()  # what was copied from it before, also by another call
            own = blob[at * self._page_bytes : (at + len(part)) * self._page_bytes]
            stage[: len(own)].copy_(own)
            for page, first, count in _adjacent(part):
                source = stage[first * self._page_bytes : (first + count) * self._page_bytes]
                to[page * self._page_bytes : (page + count) * self._page_bytes].copy_(source, non_blocking=True)
            copied.record(self._stream)

    def _done(self):
        """Wait until all copies are done: the host does, not the streams of readers, where everybody's tokens would too."""
        event = torch.cuda.Event()
        event.record(self._stream)
        event.synchronize()


def _pinned(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _adjacent(pages: list[int]):
    """(page, position in the list, how many) of each run of pages that lie side by side."""
    first = 0
    for i in range(1, len(pages) + 1):
        if i == len(pages) or pages[i] != pages[i - 1] + 1:
            yield pages[first], first, i - first
            first = i
