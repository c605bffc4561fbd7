"""Random adapters of every kind in one store, and the float64 definition that every backend is held to."""

from dataclasses import dataclass, replace

import torch

from fastft.ops import grouped
from fastft.ops.grouped import COLUMNS, ENTRIES, LOW_RANK, NONE, ROWS

NAN = float("nan")


@dataclass
class Case:
    """The arguments of the grouped ops; of every slot the dense float64 delta [y columns, x columns], its scale included,
    and the sum of the absolute values of the terms that make each of its elements up."""

    store: torch.Tensor
    offsets: torch.Tensor
    columns: torch.Tensor
    pieces: torch.Tensor
    deltas: list[torch.Tensor]
    magnitudes: list[torch.Tensor]
    width: int

    def to(self, device):
        moved = {name: getattr(self, name).to(device) for name in ("store", "offsets", "columns", "pieces")}
        return replace(self, **moved)


class Builder:
    """Lays rows, tables and blocks of entries out in a random order, with gaps of NaN between them."""

    def __init__(self, dtype, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.parts, self.elements = dtype, [], 0
        self.offsets: list[int] = [-(2**40)]  # what nobody may read
        self.columns: list[int] = [65535]

    def random(self, limit):
        return int(torch.randint(limit, (), generator=self.generator))

    def put(self, row):
        """A row's element offset; 16-byte aligned, as pools align them. Before it lies a gap of NaN."""
        unit = 16 // self.dtype.itemsize
        gap = unit * self.random(4) + (-self.elements) % unit
        self.parts += [torch.full((gap,), NAN), row.float()]
        self.elements += gap + len(row)
        return self.elements - len(row)

    def rows(self, matrix):
        """Index of the table of a matrix's rows, put in a random order."""
        places = [0] * len(matrix)
        for r in torch.randperm(len(matrix), generator=self.generator).tolist():
            places[r] = self.put(matrix[r])
        return self.table(places)

    def table(self, numbers):
        self.offsets += [-(2**40)] * self.random(3)
        self.offsets += numbers
        return len(self.offsets) - len(numbers)

    def draw(self, *size, factor=1.0):
        return (factor * torch.randn(*size, generator=self.generator)).to(self.dtype)

    def choose(self, size, count):
        return torch.randperm(size, generator=self.generator)[:count].tolist()

    def piece(self, kind, count, x_first, k, y_first, n, s_first, scale):
        """(fields, dense float64 delta [n, k], its magnitude)."""
        left = right = 0
        delta, magnitude = torch.zeros(n, k, dtype=torch.float64), None
        if kind == LOW_RANK:
            a, b = self.draw(count, k, factor=k**-0.5), self.draw(count, n)
            left, right, delta = self.rows(a), self.rows(b), b.double().t() @ a.double()
            magnitude = b.double().abs().t() @ a.double().abs()
        elif kind == COLUMNS:
            count = min(count, k)
            channels, values = self.choose(k, count), self.draw(count, n)
            left, right = self.table(channels), self.rows(values)
            delta[:, channels] = values.double().t()
        elif kind == ROWS:
            count = min(count, n)
            channels, values = self.choose(n, count), self.draw(count, k, factor=k**-0.5)
            left, right = self.rows(values), self.table(channels)
            delta[channels] = values.double()
        elif kind == ENTRIES:
            count, left = self.entries(delta, count)
        fields = [kind, count, left, right, x_first, k, y_first, n, s_first, grouped.scale_bits(scale)]
        factor = torch.tensor(scale, dtype=torch.float32).double()
        return fields, delta * factor, (delta.abs() if magnitude is None else magnitude) * factor.abs()

    def entries(self, delta, density):
        """`density` per cent of the entries (at least one where there are any), in blocks of a few rows; fills delta."""
        n, k = delta.shape
        chosen = torch.rand(n, k, generator=self.generator) < density / 100
        if n and k:
            chosen[self.random(n), self.random(k)] = True
        blocks, row = [], 0
        while row < n:
            rows = min(1 + self.random(max(1, n // 3)), n - row)
            part = chosen[row : row + rows]
            values = self.draw(int(part.sum()))
            delta[row : row + rows][part] = values.double()
            starts = [0, *part.sum(1).cumsum(0).tolist()]
            blocks += [row, rows, self.put(values), len(self.columns)]
            self.columns += starts + part.nonzero()[:, 1].tolist()
            self.columns += [65535] * (-len(self.columns) % 8)
            row += rows
        return len(blocks) // grouped.BLOCK, self.table(blocks)

    def store(self):
        return torch.cat([*self.parts, torch.full((8,), NAN)]).to(self.dtype)


def make(adapters, k, outputs, dtype=torch.float32, seed=0, scale=0.5):
    """A site of in-features k and these output widths.

    adapters: per slot, per output, (kind, count) - a rank, a number of channels, a density in per cent - or None.
    """
    builder = Builder(dtype, seed)
    pieces, deltas, magnitudes, width = [], [], [], 0
    for own in adapters:
        rows, s_first = [], 0
        dense, absolute = torch.zeros(2, sum(outputs), k, dtype=torch.float64)
        for i, n in enumerate(outputs):
            kind, count = own[i] or (NONE, 0)
            y_first = sum(outputs[:i])
            fields, delta, magnitude = builder.piece(kind, count, 0, k, y_first, n, s_first, scale * (1 + i))
            rows.append(fields)
            dense[y_first : y_first + n] += delta
            absolute[y_first : y_first + n] += magnitude
            s_first += fields[1] if kind in (LOW_RANK, COLUMNS, ROWS) else 0  # COLUMNS: for backward
        pieces.append(rows)
        deltas.append(dense)
        magnitudes.append(absolute)
        width = max(width, s_first)
    columns = torch.tensor(builder.columns, dtype=torch.int32).to(torch.int16)
    tables = torch.tensor(builder.offsets, dtype=torch.int64)
    return Case(builder.store(), tables, columns, torch.tensor(pieces, dtype=torch.int64), deltas, magnitudes, width)


def route(slots, empty=0):
    """(segments, assignments, k) of slots: per token a slot or -1, or a list of k. `empty` segments stand in between."""
    table = torch.tensor(slots, dtype=torch.int64)
    k = table.shape[1] if table.dim() == 2 else 1
    flat = table.reshape(-1)
    order = [a for slot in sorted(set(flat.tolist()) - {-1}) for a in (flat == slot).nonzero()[:, 0].tolist()]
    segments, begin = [[0, 0, 0]] * empty, 0
    for slot in sorted(set(flat.tolist()) - {-1}):
        end = begin + int((flat == slot).sum())
        segments += [[slot, begin, end]] + [[slot, end, end]] * empty
        begin = end
    order += [0] * (len(flat) - len(order))  # capacity that no segment names
    return torch.tensor(segments or [[0, 0, 0]], dtype=torch.int32), torch.tensor(order, dtype=torch.int32), k


def expected(y, x, case, slots, weights=None):
    """(y + what the adapters add, the sum of its terms' absolute values), float64 [T, ΣN]."""
    out, magnitude = y.double().cpu().clone(), y.double().cpu().abs()
    for t, own in enumerate(slots):
        for j, slot in enumerate(own if isinstance(own, (list, tuple)) else [own]):
            if slot >= 0:
                w, row = 1.0 if weights is None else float(weights[t, j]), x[t].double().cpu()
                out[t] += w * (case.deltas[slot] @ row)
                magnitude[t] += abs(w) * (case.magnitudes[slot] @ row.abs())
    return out, magnitude


def defined(case, segments, assignments):
    """bool [M, width]: what pieces define of S."""
    mask = torch.zeros(len(assignments), case.width, dtype=torch.bool)
    for slot, begin, end in segments.tolist():
        for kind, count, *_, s_first, _ in case.pieces[slot].tolist():
            if kind in (LOW_RANK, ROWS):
                mask[begin:end, s_first : s_first + count] = True
    return mask
