"""The simplest adapter memory: packed adapters in one pool, whose pages lie in random order among pages of garbage."""

from dataclasses import dataclass
from itertools import pairwise

import numpy
import torch

from fastft.ops.grouped import ENTRIES, NONE


@dataclass
class Pool:
    """What `RoutedModel.bind` takes."""

    store: torch.Tensor
    offsets: torch.Tensor
    columns: torch.Tensor
    pieces: dict[str, torch.Tensor]
    widths: dict[str, int]


def pool(sites, adapters, dtype, page_bytes, seed=0, device="cpu") -> Pool:
    """Slot e holds the e-th of `adapters`."""
    for adapter in adapters:
        check(adapter, dtype, page_bytes)
    generator = numpy.random.default_rng(seed)
    counts = [adapter.bytes // page_bytes for adapter in adapters]
    total = sum(counts) + 3
    order = generator.permutation(total)
    memory = generator.integers(0, 256, total * page_bytes, dtype=numpy.uint8)
    pieces = {site.name: [] for site in sites}
    for adapter, first in zip(adapters, numpy.cumsum([0, *counts])):
        pages = order[first : first + adapter.bytes // page_bytes]
        for page, own in zip(pages, relocated(adapter, pages, page_bytes).reshape(-1, page_bytes)):
            memory[page * page_bytes : (page + 1) * page_bytes] = own
        for site in sites:
            rows = adapter.pieces.get(site.name, numpy.zeros((0, 10), numpy.int64)).copy()
            for column in (2, 3):
                used = rows[:, 0] != NONE if column == 2 else rows[:, 0] != ENTRIES
                rows[used, column] = physical(rows[used, column], 8, pages, page_bytes)
            pieces[site.name].append(torch.from_numpy(rows))
    most = max((len(rows) for listed in pieces.values() for rows in listed), default=0)
    padded = {
        name: torch.stack([torch.cat([rows, rows.new_zeros(most - len(rows), 10)]) for rows in listed]).to(device)
        for name, listed in pieces.items()
    }
    widths = {site.name: max(adapter.widths.get(site.name, 0) for adapter in adapters) for site in sites}
    data = torch.from_numpy(memory).to(device)
    return Pool(data.view(dtype), data.view(torch.int64), data.view(torch.int16), padded, widths)


def physical(addresses, unit, pages, page_bytes):
    virtual = addresses * unit
    return (pages[virtual // page_bytes] * page_bytes + virtual % page_bytes) // unit


def relocated(adapter, pages, page_bytes):
    blob = adapter.blob.numpy().copy()
    ints = blob.view(numpy.int64)
    for first, count, stride, unit in adapter.relocations:
        run = slice(first, first + count * stride, stride)
        ints[run] = physical(ints[run], unit, pages, page_bytes)
    return blob


def check(adapter, dtype, page_bytes) -> None:
    """What pages ask of a packed adapter: whole ones, everything on 64 bytes and within one page, windows apart."""
    assert adapter.blob.dtype == torch.uint8 and adapter.bytes % page_bytes == 0 and adapter.pieces
    ints = adapter.blob.numpy().view(numpy.int64)
    taken = numpy.zeros(adapter.bytes, bool)

    def unit(at, size):
        assert at % 64 == 0 and at // page_bytes == (at + size - 1) // page_bytes, (at, size)
        taken[at : at + size] = True

    for rows in adapter.pieces.values():
        assert rows.dtype == numpy.int64 and rows.shape[1] == 10
        windows = sorted((row[6], row[6] + row[7]) for row in rows)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(windows))
        for kind, count, left, right, _, x_width, _, y_width, _, _ in rows:
            if kind == ENTRIES:
                unit(left * 8, 32 * count)
                for _, n, value, column in ints[left : left + 4 * count].reshape(-1, 4):
                    total = int(adapter.blob.numpy().view(numpy.uint16)[column + n])
                    unit(value * dtype.itemsize, total * dtype.itemsize)
                    unit(column * 2, 2 * (n + 1 + total))
                continue
            assert right == left + count  # one table after the other
            unit(left * 8, 16 * count)
            for table, width in ((left, x_width), (right, y_width)):
                for at in ints[table : table + count] if _are_rows(kind, table == left) else ():
                    unit(at * dtype.itemsize, width * dtype.itemsize)
    assert not adapter.blob.numpy()[~taken].any()  # nothing but what is pointed at


def _are_rows(kind, left):
    return kind == 1 or (kind == 2 and not left) or (kind == 3 and left)
