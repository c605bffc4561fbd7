"""Where an adapter's rows, blocks of entries and tables come to lie in pages, and the bytes and pieces that follow.

Two passes: everything is asked for first, then placed by falling size, so that what a page has left takes smaller things,
then written. Addresses are virtual (`packed.PackedAdapter`).
"""

from bisect import insort

import numpy
import torch

from ..ops.grouped import BLOCK, COLUMNS, ENTRIES, LOW_RANK, ROWS, scale_bits

ALIGNMENT = 64
# Entries a block: more blocks divide one adapter's work among more threads; a block costs 32 bytes and its alignment.
BLOCK_ENTRIES = 8192
_UINT16 = 65535


class Pages:
    """Places for units of memory, none of which crosses a page's boundary."""

    def __init__(self, page_bytes: int):
        self.page_bytes, self.count = page_bytes, 0
        self._sizes: list[int] = []
        self._counts: list[int] = []
        self.runs: list[list[tuple[int, int]]] = []

    def ask(self, size: int, count: int = 1) -> int:
        """The number of a request for `count` units of `size` bytes."""
        if size > self.page_bytes:
            raise ValueError(
                f"{size:,} bytes must lie together, but a page has {self.page_bytes:,}: serve with larger pages"
            )
        self._sizes.append(-(-size // ALIGNMENT) * ALIGNMENT)
        self._counts.append(count)
        return len(self._sizes) - 1

    def place(self) -> None:
        """From now on `runs` and `addresses` tell where each request's units lie."""
        self.runs = [[] for _ in self._sizes]
        room_left: list[tuple[int, int]] = []  # (bytes, address), ascending
        for request in sorted(range(len(self._sizes)), key=lambda r: -self._sizes[r]):
            size, left = self._sizes[request], self._counts[request]
            while left:
                if room_left and room_left[-1][0] >= size:
                    room, at = room_left.pop()
                else:
                    room, at = self.page_bytes, self.count * self.page_bytes
                    self.count += 1
                taken = min(left, room // size)
                self.runs[request].append((at, taken))
                left -= taken
                if room > taken * size:
                    insort(room_left, (room - taken * size, at + taken * size))

    def stride(self, request: int) -> int:
        return self._sizes[request]

    def addresses(self, request: int) -> numpy.ndarray:
        """Of each unit, in bytes."""
        parts = [at + self._sizes[request] * numpy.arange(n, dtype=numpy.int64) for at, n in self.runs[request]]
        return numpy.concatenate(parts) if parts else numpy.zeros(0, numpy.int64)


class Layout:
    """Collects deltas of linears; `build` makes the blob, the pieces, the relocations and the widths."""

    def __init__(self, dtype: torch.dtype, page_bytes: int):
        self.dtype, self.page_bytes, self.pages = dtype, page_bytes, Pages(page_bytes)
        self._rows: list[tuple[int, torch.Tensor]] = []  # (request, [count, width])
        self._columns: list[tuple[int, numpy.ndarray]] = []  # (request, uint16)
        # (request, parts): numbers as they are, or the request whose rows' addresses stand there
        self._tables: list[tuple[int, list]] = []
        self._blocks: list[tuple[int, list]] = []  # (request, [(first row, rows, request of values, request of columns)])
        self._pieces: dict[str, list[list[int]]] = {}  # left is a request, right what is added to its place
        self.widths: dict[str, int] = {}

    def windows(self, width: int, unit: int | None = None) -> list[tuple[int, int]]:
        """(first, width) of the parts of a row of `width` elements that fit into pages."""
        most = self.page_bytes // (self.dtype.itemsize if unit is None else unit)
        return [(first, min(most, width - first)) for first in range(0, width, most)]

    # ---- what adapters add; `site` is a name, `y_first` the linear's first column there

    def low_rank(self, site, y_first, a, b, scale) -> None:
        """scale · B A, A [R, K], B [N, R]. If a row of Bᵀ exceeds a page, its parts each shrink anew."""
        left, count = self._ask_rows(a), len(a)
        for first, width in self.windows(len(b)):
            right = self._ask_rows(b[first : first + width].t())
            table = self._ask_table([left, right])
            self._piece(site, LOW_RANK, count, table, count, a.shape[1], y_first + first, width, scale)

    def columns(self, site, y_first, index, values, features) -> None:
        """values [C, N]: the delta's columns at in-features `index` [C] of `features`."""
        for first, width in self.windows(values.shape[1]):
            right = self._ask_rows(values[:, first : first + width])
            table = self._ask_table([index.numpy(), right])
            self._piece(site, COLUMNS, len(index), table, len(index), features, y_first + first, width, 1.0)

    def rows(self, site, y_first, index, values, features) -> None:
        """values [C, K]: the delta's rows at out-features `index` [C], ascending, of `features`. No piece's window of y
        overlaps another's."""
        most = self.page_bytes // (2 * 8)
        for first in range(0, len(index), most):
            own = index[first : first + most].numpy().astype(numpy.int64)
            begin = 0 if first == 0 else int(own[0])
            end = features if first + most >= len(index) else int(index[first + most])
            table = self._ask_table([self._ask_rows(values[first : first + most]), own - begin])
            self._piece(site, ROWS, len(own), table, len(own), values.shape[1], y_first + begin, end - begin, 1.0)

    def entries(self, site, y_first, starts, columns, values, features) -> None:
        """Single entries of the delta [N, `features`], row-compressed: starts [N + 1], columns [E], values [E]."""
        if features > _UINT16:
            raise ValueError(f"entries of a weight with {features} in-features; their columns have 16 bits")
        starts, columns = starts.numpy(), columns.numpy().astype(numpy.uint16)
        # Rows that fit into one block whatever they hold: (starts + columns) of 2 bytes, values of itemsize.
        most = min(BLOCK_ENTRIES, self.page_bytes // self.dtype.itemsize, self.page_bytes // 2 - 2)
        blocks, row, n = [], 0, len(starts) - 1
        while row < n:
            end = int(numpy.searchsorted(starts, starts[row] + most, side="right")) - 1
            end = min(max(end, row + 1), n)
            while end > row + 1 and (end - row + 1 + starts[end] - starts[row]) * 2 > self.page_bytes:
                end = row + (end - row) // 2
            if begun := int(starts[end] - starts[row]):
                own = slice(int(starts[row]), int(starts[end]))
                table = numpy.concatenate([(starts[row : end + 1] - starts[row]).astype(numpy.uint16), columns[own]])
                blocks.append((row, end - row, self._ask_rows(values[own][None]), self._ask_columns(table), begun))
            row = end
        if blocks:
            request = self.pages.ask(len(blocks) * BLOCK * 8)
            self._blocks.append((request, blocks))
            self._piece(site, ENTRIES, len(blocks), request, None, features, y_first, n, 1.0)

    # ----

    def _ask_rows(self, matrix) -> int:
        request = self.pages.ask(matrix.shape[1] * self.dtype.itemsize, matrix.shape[0])
        self._rows.append((request, matrix))
        return request

    def _ask_columns(self, numbers) -> int:
        request = self.pages.ask(2 * len(numbers))
        self._columns.append((request, numbers))
        return request

    def _ask_table(self, parts) -> int:
        counts = [len(part) if isinstance(part, numpy.ndarray) else self.pages._counts[part] for part in parts]
        request = self.pages.ask(8 * sum(counts))
        self._tables.append((request, parts))
        return request

    def _piece(self, site, kind, count, left, right, x_width, y_first, y_width, scale) -> None:
        s_first = self.widths.setdefault(site, 0)
        if kind in (LOW_RANK, ROWS):
            self.widths[site] += count
        fields = [kind, count, left, right, 0, x_width, y_first, y_width, s_first, scale_bits(scale)]
        self._pieces.setdefault(site, []).append(fields)

    def build(self):
        """(blob uint8, pieces by site, relocations)."""
        self.pages.place()
        blob = torch.zeros(self.pages.count * self.page_bytes, dtype=torch.uint8)
        self._write_rows(blob.view(self.dtype))
        bytes_ = blob.numpy()
        for request, numbers in self._columns:
            ((at, _),) = self.pages.runs[request]
            bytes_[at : at + 2 * len(numbers)] = numbers.view(numpy.uint8)
        relocations = self._write_tables(bytes_.view(numpy.int64))
        pieces = {}
        for site, listed in self._pieces.items():
            pieces[site] = numpy.array([self._placed(fields) for fields in listed], dtype=numpy.int64)
        return blob, pieces, relocations

    def _write_rows(self, store) -> None:
        size = self.dtype.itemsize
        for request, matrix in self._rows:
            stride, width, row = self.pages.stride(request) // size, matrix.shape[1], 0
            for at, count in self.pages.runs[request]:
                placed = store.as_strided((count, width), (stride, 1), at // size)
                placed.copy_(matrix[row : row + count])
                if matrix.dtype != self.dtype and not placed.isfinite().all():
                    raise ValueError(f"it has values beyond what {self.dtype} holds; serve with float32 adapters")
                row += count

    def _write_tables(self, ints) -> list[tuple[int, int, int, int]]:
        relocations, size = [], self.dtype.itemsize
        for request, parts in self._tables:
            at = self.pages.runs[request][0][0] // 8
            for part in parts:
                if isinstance(part, numpy.ndarray):
                    numbers = part
                else:
                    numbers = self.pages.addresses(part) // size
                    relocations.append((at, len(numbers), 1, size))
                ints[at : at + len(numbers)] = numbers
                at += len(numbers)
        for request, blocks in self._blocks:
            at = self.pages.runs[request][0][0] // 8
            for i, (row, count, values, columns, _) in enumerate(blocks):
                place, index = (self.pages.runs[r][0][0] for r in (values, columns))
                ints[at + BLOCK * i : at + BLOCK * (i + 1)] = (row, count, place // size, index // 2)
            relocations += [(at + 2, len(blocks), BLOCK, size), (at + 3, len(blocks), BLOCK, 2)]
        return relocations

    def _placed(self, fields) -> list[int]:
        kind, count, left, right, *rest = fields
        left = self.pages.runs[left][0][0] // 8
        return [kind, count, left, 0 if right is None else left + right, *rest]
