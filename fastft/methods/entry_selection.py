"""Which entries of a weight train: those with the largest scores (SpIEL, arXiv:2401.16405; LIFT, arXiv:2506.00772), or any.

Scores of a weight [A, B] are a function that yields them anew at every call, block after block of rows, so that only a
block of them exists at a time: `magnitude`, `product`, `outer`. Their sign doesn't matter.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..ops import selection
from ..ops.entries import Entries
from ..ops.registry import KERNEL_DTYPES
from ..ops.sparse import write_entries_

Blocks = Callable[[], Iterable[Tensor]]
BLOCK_ROWS = 256
SPARE = 1 << 20  # entries that may be taken, besides twice as many as are wanted, before equal scores are thinned out
_TERMS = 512  # of a product's sums that are converted to float32 at a time
_FIRST_INFINITE = 0xFF00  # the bin of infinities; those of NaN follow


# ---- scores


def magnitude(weight: Tensor) -> Blocks:
    """The weight's own entries: a view of all of it where the kernels take its dtype, since each block is some launches."""
    rows = max(1, len(weight)) if weight.dtype in KERNEL_DTYPES else BLOCK_ROWS
    return lambda: weight.detach().split(rows)


def product(*pairs: tuple[Tensor, Tensor]) -> Blocks:
    """The sum of left @ right over pairs of left [A, T] and right [T, B], in float32.

    What LIFT ranks by is product((U S, Vᵀ)) of `low_rank`; a weight's gradient, never whole, product((dYᵀ, X), …).
    """
    rows, columns, device = pairs[0][0].shape[0], pairs[0][1].shape[1], pairs[0][0].device

    def blocks():
        for begin in range(0, rows, BLOCK_ROWS):
            block = torch.zeros(min(BLOCK_ROWS, rows - begin), columns, dtype=torch.float32, device=device)
            for left, right in pairs:
                left, right = left.detach()[begin : begin + BLOCK_ROWS], right.detach()
                step = max(1, left.shape[1]) if left.dtype == right.dtype == torch.float32 else _TERMS
                for some, terms in zip(left.split(step, 1), right.split(step), strict=True):
                    block.addmm_(some.float(), terms.float())
            yield block

    return blocks


def outer(row: Tensor, column: Tensor) -> Blocks:
    """√row[i] √column[j] of SM3's accumulators [A] and [B]: ranks as their product does, which would underflow sooner."""

    def blocks():
        across = column.detach().float().sqrt()
        for down in row.detach().float().sqrt().split(BLOCK_ROWS):
            yield down[:, None] * across

    return blocks


def excluding(blocks: Blocks, entries: Entries) -> Blocks:
    """|score|, 0 at `entries` and elsewhere at least the smallest normal float32, so that no other is as small."""
    begins, tiny = entries.starts.tolist(), torch.finfo(torch.float32).tiny

    def without():
        row = 0
        for block in blocks():
            block = block.float().abs().clamp_(min=tiny)
            begin, end = begins[row], begins[row + len(block)]
            starts = entries.starts[row : row + len(block) + 1] - begin
            write_entries_(block, starts, entries.columns[begin:end], block.new_zeros(end - begin), None)
            yield block
            row += len(block)

    return without


# ---- the choice


def largest(
    blocks: Blocks, k: int, shape, device, *, exclude: Entries | None = None, what: str = "the scores"
) -> tuple[Entries, Tensor]:
    """The k entries with the largest |score|, none of them in `exclude`, and those |scores| (float32 [k]).

    Exactly k: of equal ones the first (row-major), the same at every call. `blocks` is called twice and must yield the same
    scores both times, on `device`. No more than a block of them exists at a time, and no block is waited for. They are
    compared as float32.

    Raises:
        FloatingPointError: a score is NaN or infinite; `what` names the scores.
        ValueError: fewer entries than k, or blocks that do not make up `shape`.
    """
    shape = tuple(shape)
    available = shape[0] * shape[1] - (0 if exclude is None else len(exclude))
    if not 0 <= k <= available:
        raise ValueError(f"{what}: {k} entries are asked for, of {available} that can be chosen")
    if exclude is not None and len(exclude):
        if exclude.shape != shape:
            raise ValueError(f"{what}: entries of a weight of shape {exclude.shape} are excluded from one of {shape}")
        blocks = excluding(blocks, exclude)
    bin, count, above = _threshold(blocks, k, shape, device, what)
    if count <= 2 * k + SPARE:
        entries, keys = _take(blocks(), count, bin, shape, device)
    else:
        entries, keys = _take_thinned(blocks(), k, bin, shape, device)
    return _cut(entries, keys, bin, k - above)


def _comparable(block):
    return block if block.dtype in KERNEL_DTYPES else block.float()


def _threshold(blocks, k, shape, device, what):
    """(the bin of the k-th largest, how many scores are in it or above it, how many above it)."""
    counts = torch.zeros(selection.BINS, dtype=torch.int64, device=device)
    rows = 0
    for block in blocks():
        rows += len(block)
        if block.shape[1] != shape[1] or rows > shape[0]:
            raise ValueError(
                f"{what}: a block of shape {tuple(block.shape)} ends at row {rows} of a weight of shape {shape}"
            )
        selection.count_bins_(counts, _comparable(block))
    if rows != shape[0]:
        raise ValueError(f"{what}: blocks of {rows} rows in all, of a weight of shape {shape}")
    # One wait for the device.
    from_bin = torch.cat([counts.flip(0).cumsum(0).flip(0), counts.new_zeros(1)])
    bin = (from_bin[:-1] >= k).sum() - 1
    bin, count, above, wrong = torch.stack([bin, from_bin[bin], from_bin[bin + 1], from_bin[_FIRST_INFINITE]]).tolist()
    if wrong:
        raise FloatingPointError(f"{what}: {wrong} of {shape[0]} x {shape[1]} are NaN or infinite")
    return bin, count, above


def _take(blocks, count, bin, shape, device):
    """The `count` entries whose scores are in `bin` or above it, and their keys."""
    columns, keys = (torch.empty(count, dtype=torch.int32, device=device) for _ in range(2))
    starts = torch.zeros(shape[0] + 1, dtype=torch.int64, device=device)
    row = 0
    for block in map(_comparable, blocks):
        end = row + len(block)
        torch.cumsum(selection.count_at_least(block, bin), 0, out=starts[row + 1 : end + 1]).add_(starts[row])
        selection.take_at_least_(columns, keys, block, starts[row:end], bin)
        row = end
    return Entries(starts, columns, shape), keys


def _take_thinned(blocks, k, bin, shape, device):
    """The same but for most of what `_cut` would leave out, where equal scores make that much. Waits for each block."""
    index, keys = (torch.empty(0, dtype=dtype, device=device) for dtype in (torch.int64, torch.int32))
    row = 0
    for block in itertools.chain.from_iterable(block.split(BLOCK_ROWS) for block in blocks):
        count = int(selection.count_at_least(_comparable(block), bin).sum())
        inside, found = _take([block], count, bin, tuple(block.shape), device)
        index, keys = torch.cat([index, inside.flat() + row * shape[1]]), torch.cat([keys, found])
        if len(keys) > 2 * k + SPARE:
            kept = keys.sort(descending=True, stable=True).indices[:k].sort().values
            index, keys = index[kept], keys[kept]
        row += len(block)
    return Entries.of_flat(index, shape), keys


def _cut(entries, keys, bin, wanted):
    """Of the scores in `bin` only the `wanted` largest, of equal ones the first."""
    last = (keys >> selection.SHIFT == bin).nonzero()[:, 0]
    if len(last) > wanted:
        order = keys[last].sort(descending=True, stable=True).indices
        keep = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
        keep[last[order[wanted:]]] = False
        entries, keys = entries.select(keep), keys[keep]
    return entries, keys.view(torch.float32)


def random_entries(shape, k: int, generator: torch.Generator) -> Entries:
    """k different entries, every such choice equally likely, on the CPU: the same for a generator's seed on every machine.

    Positions are drawn until k of them differ (or, for more than half of the weight, as many as are not wanted): memory is
    in proportion to k.

    Raises:
        ValueError: fewer entries than k.
    """
    shape = tuple(shape)
    size = shape[0] * shape[1]
    if not 0 <= k <= size:
        raise ValueError(f"{k} random entries are asked for, of {size} that there are")
    if k > size - k:
        return Entries.of_mask(~random_entries(shape, size - k, generator).mask())
    drawn = torch.empty(0, dtype=torch.int64, device="cpu")
    while True:
        # n drawn are about size (1 - exp(-n / size)) different ones.
        count = int(-size * math.log1p(-k / max(size, 1)) + 4 * math.sqrt(k)) + 16
        drawn = torch.cat([drawn, torch.randint(max(size, 1), (count,), generator=generator, device="cpu")])
        ordered, order = drawn.sort(stable=True)
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        # The first k different ones in the order in which they were drawn: of all, the smallest k would be no random choice.
        at = order[first].sort().values[:k]
        if len(at) == k:
            return Entries.of_flat(drawn[at], shape)


def budget(numels: Sequence[int], total: int) -> list[int]:
    """How many of `total` entries each matrix gets: in proportion to its size, rounded down, at most all of it (SpIEL)."""
    size = sum(numels)
    return [min(numel, total * numel // size) for numel in numels]
