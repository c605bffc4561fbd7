"""Adapters of many kinds in one batch, in which every token names its own (LoRA, Hu et al. 2021, arXiv:2106.09685; S²FT,
Yang et al. 2024, arXiv:2412.06289; SpIEL, Ansell et al. 2024, arXiv:2401.16405).

    y[t] += w · scale · (what adapter a(t) adds to a linear, for x[t])

Every kind is "(optional gather) small product (optional scatter)". A *piece* is what one adapter adds to one output of a
linear, ten int64 (`FIELDS`). Its numbers lie anywhere in one 1-D `store`; `offsets` (int64, 1-D) holds its tables, at the
indices `left` and `right`: `count` element offsets of rows in `store`, or `count` channels.

    LOW_RANK   y[y_first + n] += Σ_r s[s_first + r] · row(right, r)[n],  s[s_first + r] = Σ_k x[x_first + k] row(left, r)[k]
    COLUMNS    y[y_first + n] += Σ_i x[x_first + channel(left, i)] · row(right, i)[n]
    ROWS       y[y_first + channel(right, i)] += s[s_first + i],           s as above; channels distinct
    ENTRIES    y[y_first + n] += Σ_j value_j · x[x_first + column_j],      over the entries j of row n

with k < x_width and n < y_width. So A lies as it is, [R, K], and B transposed, [R, N]. ENTRIES: `left` is the index of
`count` blocks of four int64: first row, rows, element offset of the values in `store`, index into `columns`. There, in int16
that are read as uint16, lie the starts of the block's rows (rows + 1, the first 0), then the entries' columns. No two blocks
of a piece share a row. Transposed (`transposed`), LOW_RANK stays what it is, COLUMNS becomes ROWS and ROWS COLUMNS:
`grouped_shrink` and `grouped_expand_` are also the backward of each other.

Routing: token t has k assignments, numbered t·k + j, each to a slot e, whose pieces are ``pieces[e]`` (int64 [E, P, 10]), or
to none. `assignments` int32 [M] lists them by slot; `segments` int32 [D, 3] are (slot, begin, end) in it. Empty segments
change nothing, a slot has at most one that is not empty, and assignments outside of all segments have no adapter: so static
buffers of any capacity do, which a CUDA graph may keep. `weights` float32 [T, k] multiplies, by assignment. S is float32
[M, width], its row p that of ``assignments[p]``; what no piece defines is undefined.

x and y: float32, bfloat16 or float16, rows may lie apart; `store` that dtype or float32. Sums are formed in float32 and
added to y with at most one rounding an assignment and piece. A row of y depends on x and the adapter of its own token alone,
by no bit on tokens of other segments (within one, how many tokens stand together decides how sums are formed, and so their
last bits: on AMX 64 or more neighbours, of single entries more than 3 in a block of 48). Indices that don't fit are the
caller's promise: looking would wait for a GPU. The reference also takes float64.

Shapes: T tokens, K in-features, N out-features, R rank, E slots, P pieces an adapter, M <= T·k assignments, D segments.
"""

import struct

import torch

from .lora import accumulator
from .registry import KERNEL_DTYPES, Op, forced_backend, nothing_fake

NONE, LOW_RANK, COLUMNS, ROWS, ENTRIES = range(5)
FIELDS = ("kind", "count", "left", "right", "x_first", "x_width", "y_first", "y_width", "s_first", "scale")
BLOCK = 4  # int64 an ENTRIES block


def scale_bits(scale: float) -> int:
    """A float32 scale as a piece holds it: its 32 bits."""
    return struct.unpack("<i", struct.pack("<f", scale))[0]


def transposed(pieces):
    """The pieces [..., 10] of the transposed linears, x and y exchanged. ENTRIES have no transpose and become nothing."""
    kind, *rest = pieces.unbind(-1)
    swapped = torch.where((kind == COLUMNS) | (kind == ROWS), COLUMNS + ROWS - kind, kind)
    swapped = torch.where(kind == ENTRIES, NONE, swapped)
    count, left, right, x_first, x_width, y_first, y_width, s_first, scale = rest
    return torch.stack([swapped, count, right, left, y_first, y_width, x_first, x_width, s_first, scale], -1)


def _live(pieces, segments, assignments, k):
    """(fields by name, positions p, tokens, assignments) of every piece that has tokens."""
    listed = pieces.tolist()
    for slot, begin, end in segments.tolist():
        if begin == end:
            continue
        chosen = assignments[begin:end].long()
        for fields in listed[slot]:
            piece = dict(zip(FIELDS, fields))
            if piece["kind"] != NONE and piece["count"] > 0:
                piece["scale"] = struct.unpack("<f", struct.pack("<i", piece["scale"]))[0]
                yield piece, slice(begin, end), chosen // k, chosen


def _table(offsets, at, count):
    return offsets[at : at + count]


def _rows_at(offsets, at, count, width):
    """Positions in the store [count, width] of a row table."""
    return _table(offsets, at, count)[:, None] + torch.arange(width, device=offsets.device)


def _window(x, first, width):
    return x[:, first : first + width]


def _shrink_reference(x, store, offsets, pieces, segments, assignments, k, width):
    acc = accumulator(x, store)
    s = x.new_empty((len(assignments), width), dtype=acc)
    for piece, at, tokens, _ in _live(pieces, segments, assignments, k):
        if piece["kind"] in (LOW_RANK, ROWS):
            rows = store[_rows_at(offsets, piece["left"], piece["count"], piece["x_width"])].to(acc)
            inputs = _window(x[tokens], piece["x_first"], piece["x_width"]).to(acc)
            s[at, piece["s_first"] : piece["s_first"] + piece["count"]] = inputs @ rows.t()
    return s


def _shrink_fake(x, store, offsets, pieces, segments, assignments, k, width):
    return x.new_empty((assignments.shape[0], width), dtype=accumulator(x, store))


def _entries(store, offsets, columns, piece):
    """(rows, columns, positions in the store) of all entries of a piece."""
    rows, cols, places = [], [], []
    for first, n, value, column in _table(offsets, piece["left"], BLOCK * piece["count"]).view(-1, BLOCK).tolist():
        starts = columns[column : column + n + 1].long() & 0xFFFF
        total = int(starts[-1])
        rows.append(first + torch.repeat_interleave(torch.arange(n, device=store.device), starts.diff()))
        cols.append(columns[column + n + 1 : column + n + 1 + total].long() & 0xFFFF)
        places.append(value + torch.arange(total, device=store.device))
    return torch.cat(rows), torch.cat(cols), torch.cat(places)


def _added(x, s, store, offsets, columns, piece, at, tokens, acc):
    """What a piece adds [m, y_width], before its scale."""
    kind, count, width = piece["kind"], piece["count"], piece["y_width"]
    inputs = _window(x[tokens], piece["x_first"], piece["x_width"]).to(acc)
    if kind == ENTRIES:
        rows, cols, places = _entries(store, offsets, columns, piece)
        delta = torch.zeros(width, piece["x_width"], dtype=acc, device=x.device)
        delta[rows, cols] = store[places].to(acc)
        return inputs @ delta.t()
    if kind == COLUMNS:
        coefficients = inputs[:, _table(offsets, piece["left"], count)]
    else:
        coefficients = s[at, piece["s_first"] : piece["s_first"] + count].to(acc)
    if kind == ROWS:
        added = torch.zeros(len(tokens), width, dtype=acc, device=x.device)
        added[:, _table(offsets, piece["right"], count)] = coefficients
        return added
    return coefficients @ store[_rows_at(offsets, piece["right"], count, width)].to(acc)


def _factor(piece, weights, chosen, acc):
    return piece["scale"] if weights is None else piece["scale"] * weights.reshape(-1)[chosen, None].to(acc)


def _expand_reference(y, x, s, store, offsets, columns, pieces, segments, assignments, weights, k):
    acc = accumulator(y, store)
    total, touched = torch.zeros(y.shape, dtype=acc, device=y.device), torch.zeros(len(y), dtype=torch.bool, device=y.device)
    for piece, at, tokens, chosen in _live(pieces, segments, assignments, k):
        added = _factor(piece, weights, chosen, acc) * _added(x, s, store, offsets, columns, piece, at, tokens, acc)
        _window(total, piece["y_first"], piece["y_width"]).index_add_(0, tokens, added)
        touched[tokens] = True
    y[touched] = (y[touched].to(acc) + total[touched]).to(y.dtype)  # the others keep their bits


def _add_reference(y, x, store, offsets, columns, pieces, segments, assignments, weights, k, width):
    y, x = y.view(-1, y.shape[-1]) if y.dim() > 2 else y, x.flatten(0, -2)
    s = _shrink_reference(x, store, offsets, pieces, segments, assignments, k, width)
    _expand_reference(y, x, s, store, offsets, columns, pieces, segments, assignments, weights, k)


def _outer_reference(grad, values, other, s, offsets, pieces, segments, assignments, weights, k):
    acc = accumulator(values, grad)
    for piece, at, tokens, chosen in _live(pieces, segments, assignments, k):
        if piece["kind"] not in (LOW_RANK, ROWS):
            continue
        if piece["kind"] == LOW_RANK:
            coefficients = s[at, piece["s_first"] : piece["s_first"] + piece["count"]].to(acc)
        else:
            channels = _table(offsets, piece["right"], piece["count"])
            coefficients = _window(other[tokens], piece["y_first"], piece["y_width"])[:, channels].to(acc)
        coefficients = coefficients * _factor(piece, weights, chosen, acc)
        product = coefficients.t() @ _window(values[tokens], piece["x_first"], piece["x_width"]).to(acc)
        grad[_rows_at(offsets, piece["left"], piece["count"], piece["x_width"])] = product.to(grad.dtype)


def _refuse(act, store):
    """For kernels: why these dtypes can't run, given the positions of the activation and of the store."""

    def reason(*args):
        x, own = args[act].dtype, args[store].dtype
        if x not in KERNEL_DTYPES:
            return f"{x} activations (kernels take float32, bfloat16, float16)"
        return None if own in (x, torch.float32) else f"adapters in {own} on {x} activations (kernels take {x} or float32)"

    return dict.fromkeys(("cpu", "cuda", "triton"), reason)


grouped_shrink = Op(
    "grouped_shrink(Tensor x, Tensor store, Tensor offsets, Tensor pieces, Tensor segments, Tensor assignments, int k, "
    "int width) -> Tensor",
    _shrink_reference,
    _shrink_fake,
    _refuse(act=0, store=1),
)
grouped_expand_ = Op(
    "grouped_expand_(Tensor(a!) y, Tensor x, Tensor s, Tensor store, Tensor offsets, Tensor columns, Tensor pieces, "
    "Tensor segments, Tensor assignments, Tensor? weights, int k) -> ()",
    _expand_reference,
    nothing_fake,
    _refuse(act=0, store=3),
)
# Both in one, where no gradient needs S; y and x may have leading dimensions if they are contiguous. On CPUs alone: decoding
# has so little to do that what a second call and views cost shows.
grouped_add_ = Op(
    "grouped_add_(Tensor(a!) y, Tensor x, Tensor store, Tensor offsets, Tensor columns, Tensor pieces, Tensor segments, "
    "Tensor assignments, Tensor? weights, int k, int width) -> ()",
    _add_reference,
    nothing_fake,
    _refuse(act=0, store=2),
    cpu_alone=True,
)
grouped_outer_ = Op(
    "grouped_outer_(Tensor(a!) grad, Tensor values, Tensor other, Tensor s, Tensor offsets, Tensor pieces, "
    "Tensor segments, Tensor assignments, Tensor? weights, int k) -> ()",
    _outer_reference,
    nothing_fake,
    _refuse(act=1, store=0),
)


def in_one_call(device: torch.device) -> bool:
    """Is `grouped_add_` what to call on this device where nobody needs S? Else there are its two halves alone."""
    return device.type == "cpu" and forced_backend() in (None, "cpu", "reference")
