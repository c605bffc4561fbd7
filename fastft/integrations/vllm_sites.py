"""vLLM's LoRA stacks as the grouped ops read them (`ops.grouped`). Nothing here imports vLLM.

vLLM keeps the adapters of a layer in stacks that are padded to the largest rank allowed: A [E, 1, R, K], B [E, 1, N, R],
scale folded into B. A `Site` copies a slot's factors into a store of its own once, when the slot changes, B transposed, and
learns the adapter's true rank then: the rows behind it are named by no piece and so never read. What a step reads lies in
buffers whose addresses never change: CUDA graphs may keep them.

Three ops stand for vLLM's three calls in a graph of torch.compile. Their Python runs each time (for CUDA graphs, at capture
alone) and finds site and route by the addresses of the tensors that it is given:

    fastft_vllm::linear_   y += scale · x Aᵀ Bᵀ, all slices of a layer (q, k and v; gate and up) in one shrink and one expand
    fastft_vllm::shrink_   y = scale · x Aᵀ, 0 for rows without an adapter     (layers that communicate between the two)
    fastft_vllm::expand_   y += x[i] B_iᵀ, all slices
"""

import itertools
import math
import weakref

import torch

from ..ops.grouped import FIELDS, LOW_RANK, ROWS, grouped_expand_, grouped_shrink, scale_bits

COUNT = FIELDS.index("count")
LINE = 64  # bytes: every row of a store starts at a multiple


class Site:
    """The adapters of one layer, or of the slices packed into one.

    Args:
        a: stacks [E, 1, R, K] (or [E, R, K]), one a slice; empty where a layer only expands.
        b: stacks [E, 1, N, R], one a slice; empty where it only shrinks, of one slice then: S is written into R columns.
        columns: first output column and width of each slice.
        dtype: of the store, see `ops.grouped`.
    """

    @torch.inference_mode(False)  # its tensors could not be written outside of it
    def __init__(self, a, b, columns, dtype, scale=1.0):
        self.stacks = (*a, *b)
        slots, device = self.stacks[0].shape[0], self.stacks[0].device
        # What the store's rows are copies of, [slots, R, numbers]: each slice's A and B.
        factors = [_three(stack) for stack in a]
        factors += [_three(stack)[:, :width].transpose(1, 2) for stack, (_, width) in zip(b, columns)]
        size, shapes, tables = 0, [], []
        for factor in factors:
            _, rank, numbers = factor.shape
            pitch = math.ceil(numbers * dtype.itemsize / LINE) * LINE // dtype.itemsize
            shapes.append((factor.shape, (rank * pitch, pitch, 1), size))
            tables.append(size + pitch * torch.arange(slots * rank))
            size += slots * rank * pitch
        if not b:
            tables.append(torch.arange(a[0].shape[-2]).repeat(slots))  # channels of the ROWS form: S's own columns
        starts = [0, *itertools.accumulate(map(len, tables))]
        pieces = torch.zeros(slots, len(columns), len(FIELDS), dtype=torch.int64)
        for at, (piece, (first, width)) in enumerate(zip(pieces.unbind(1), columns)):
            rank, own = factors[at].shape[1], torch.arange(slots)
            fields = {
                "kind": LOW_RANK if b else ROWS,
                "left": starts[at] + rank * own,
                "right": starts[at + len(a)] + rank * own,
                "x_width": a[at].shape[-1] if a else 0,
                "y_first": first,
                "y_width": width,
                "s_first": at * rank,
                "scale": scale_bits(scale),
            }
            for name, value in fields.items():
                piece[:, FIELDS.index(name)] = value
        self.width = sum(factor.shape[1] for factor in factors[: len(columns)])
        self.store = torch.zeros(size, dtype=dtype, device=device)
        self.offsets = torch.cat(tables).to(device)
        self.columns = torch.zeros(0, dtype=torch.int16, device=device)
        # The expand reads no x, so it can be given any; for ROWS no row of the store either, whose dtype need not suit y.
        self._pieces = torch.stack([pieces, pieces]).to(device)
        self.pieces, self.expand_pieces = self._pieces
        self.expand_pieces[..., FIELDS.index("x_width")] = 0
        self.expand_store = self.store if b else self.store.new_zeros(0, dtype=torch.float32)
        copies = [(factor, self.store.as_strided(*shape)) for factor, shape in zip(factors, shapes)]
        halves = [half for half in (copies[: len(a)], copies[len(a) :]) if half]
        self.copies = list(zip(*halves))  # of each slice, its factors and their rows in the store
        self.versions = None
        self.learn(slice(None))

    def changed(self) -> bool:
        return self.versions != self._versions()

    def _versions(self):
        return [0 if stack.is_inference() else stack._version for stack in self.stacks]

    @torch.inference_mode(False)
    @torch.no_grad()
    def learn(self, slots) -> None:
        """Take the factors of these slots (a slice). No synchronization with a device."""
        for at, pairs in enumerate(self.copies):
            ranks = []
            for factor, rows in pairs:
                given = factor[slots]
                rows[slots] = given.to(rows.dtype)
                numbers = torch.arange(1, given.shape[1] + 1, device=given.device)
                ranks.append(((given != 0).any(-1) * numbers).amax(-1))
            self._pieces[:, slots, at, COUNT] = torch.stack(ranks).amin(0)
        self.versions = self._versions()

    def shrink(self, x, segments, assignments):
        return grouped_shrink(x, self.store, self.offsets, self.pieces, segments, assignments, 1, self.width)

    def expand_(self, y, s, segments, assignments) -> None:
        batch = self.expand_pieces, segments, assignments
        grouped_expand_(y, y, s, self.expand_store, self.offsets, self.columns, *batch, None, 1)


def _three(stack):
    return stack.squeeze(1) if stack.dim() == 4 else stack


class Sites:
    """The sites of one wrapper. A layer's site is made when it is called first, be it without adapters: in vLLM's profiling
    run, so that its memory is counted, and before graphs are captured."""

    def __init__(self):
        self._sites: dict[tuple, Site] = {}

    def __iter__(self):
        return iter(self._sites.values())

    def get(self, key) -> Site | None:
        return self._sites.get(key)

    def add(self, key, *what) -> Site:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a layer with LoRA is called for the first time while a CUDA graph is captured, though vLLM's profiling run "
                "calls all of them: start vLLM with --enforce-eager, and report this to fastft with the model's name"
            )
        site = self._sites[key] = Site(*what)
        return site

    def refresh(self, slots=slice(None)) -> None:
        """Take what changed in vLLM's stacks, in these slots. Without changes it looks at numbers of the host only."""
        for site in self:
            if site.changed():
                site.learn(slots)


_ROUTES: "weakref.WeakValueDictionary[int, Route]" = weakref.WeakValueDictionary()


class Route:
    """Which slot each row has, in static buffers. `segments` [slots, 3] also names the route in compiled graphs."""

    def __init__(self, sites: Sites, slots: int, capacity: int, device):
        self.sites, self.slots, self.capacity, self.device = sites, slots, capacity, torch.device(device)
        with torch.inference_mode(False):
            self._buffer = torch.zeros(3 * slots + capacity, dtype=torch.int32, device=device)
            self.segments = self._buffer[: 3 * slots].view(slots, 3)
            self.assignments = self._buffer[3 * slots :]
        self.active, self._ids = False, torch.empty(0, dtype=torch.int64)
        _ROUTES[self.segments.data_ptr()] = self

    def fill(self, adapters, slot_of: dict[int, int]) -> None:
        """adapters: for each row vLLM's number of its adapter, 0 or less for none; slot_of: where those lie."""
        if len(adapters) > self.capacity:
            raise ValueError(f"{len(adapters)} rows, but vLLM promised at most {self.capacity} (max_num_batched_tokens)")
        given = torch.tensor([int(a) for a in adapters], dtype=torch.int64)
        known, inverse = given.unique(return_inverse=True)
        slots = torch.tensor([slot_of[a] if a > 0 else -1 for a in known.tolist()], dtype=torch.int64)
        self._ids = slots[inverse] if len(known) else given
        plan = self._plan(self._ids)
        self.active = bool((self._ids >= 0).any())
        if self.device.type == "cuda":
            plan = plan.pin_memory()
        with torch.inference_mode(False):
            self._buffer.copy_(plan, non_blocking=True)

    def _plan(self, slot_by_row):
        """`segments` and `assignments` one after the other. Assignments outside of all segments are 0, a row that exists."""
        plan = torch.zeros(3 * self.slots + self.capacity, dtype=torch.int32)
        counts = torch.bincount(slot_by_row[slot_by_row >= 0], minlength=self.slots)
        ends = counts.cumsum(0)
        plan[: 3 * self.slots] = torch.stack([torch.arange(self.slots), ends - counts, ends], 1).flatten()
        order = slot_by_row.argsort(stable=True)[len(slot_by_row) - int(ends[-1]) :]  # rows without an adapter come first
        plan[3 * self.slots :][: len(order)] = order
        return plan

    def of(self, rows: int):
        """(segments, assignments) for a layer that sees so many rows: those of the batch and what pads it, or its first."""
        if rows >= len(self._ids):
            return self.segments, self.assignments[:rows]
        plan = self._plan(self._ids[:rows]).to(self.device)
        return plan[: 3 * self.slots].view(self.slots, 3), plan[3 * self.slots :][:rows]


def _store_dtype(x, y, *stacks) -> torch.dtype:
    return x.dtype if x.dtype == y.dtype == stacks[0].dtype else torch.float32


def _columns(b, slices, first, y):
    """Of each slice. Rows of B beyond y's last column are padding of the vocabulary."""
    found = []
    for stack, width in zip(b, slices):
        found.append((first, max(0, min(stack.shape[-2], width, y.shape[1] - first))))
        first += width
    return found


def linear_(y, x, a, b, slices, scale: float, add: bool, route: Route) -> None:
    if not add:
        y[:, : sum(slices)].zero_()
    key = (a[0].data_ptr(), y.dtype, y.shape[1], scale)
    site = route.sites.get(key)
    if site is None:
        site = route.sites.add(key, a, b, _columns(b, slices, 0, y), _store_dtype(x, y, *a), scale)
    if route.active and len(x):
        batch = route.of(len(x))
        site.expand_(y, site.shrink(x, *batch), *batch)


def shrink_(y, x, a, scale: float, route: Route) -> None:
    y.zero_()
    key = (a.data_ptr(), x.dtype, scale)
    site = route.sites.get(key)
    if site is None:
        site = route.sites.add(key, (a,), (), [(0, a.shape[-2])], _store_dtype(x, x, a), scale)
    if route.active and len(x):
        batch = route.of(len(x))
        site.expand_(y, site.shrink(x, *batch), *batch)


def expand_(y, x, b, slices, first: int, add: bool, route: Route) -> None:
    if not add:
        y[:, first : first + sum(slices)].zero_()
    key = (b[0].data_ptr(), y.dtype, y.shape[1], first)
    site = route.sites.get(key)
    if site is None:
        site = route.sites.add(key, (), b, _columns(b, slices, first, y), _store_dtype(y, y, *b))
    if route.active and len(y):
        segments, assignments = route.of(len(y))
        s = torch.cat([part.index_select(0, assignments) for part in x], 1).float()
        site.expand_(y, s, segments, assignments)


_LIBRARY = torch.library.Library("fastft_vllm", "DEF")


def _define(schema: str, function) -> None:
    def run(*args):
        function(*args[:-1], _ROUTES[args[-1].data_ptr()])

    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastft_vllm::{name}", lambda *args: None, lib=_LIBRARY)


_define(
    "linear_(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, int[] slices, float scale, bool add, Tensor route) -> ()",
    linear_,
)
_define("shrink_(Tensor(a!) y, Tensor x, Tensor a, float scale, Tensor route) -> ()", shrink_)
_define("expand_(Tensor(a!) y, Tensor[] x, Tensor[] b, int[] slices, int first, bool add, Tensor route) -> ()", expand_)
