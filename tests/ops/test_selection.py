"""The selection family: every op on every backend against its definition, exactly; and the use that is made of the three."""

import pytest
import torch

import fastft
from fastft.ops import selection
from tests.golden import backends, poisoned, run_on

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
# rows, columns
SHAPES = [(5, 24), (1, 1), (3, 63), (2, 1023), (0, 8), (7, 0), (0, 0), (1, 4096), (17, 100)]
LARGE = [(100, 63), (63, 129), (33, 1023), (1100, 550), (130, 2049)]
INFINITY_BIN, LAST_BIN = 0xFF00, 0xFFFF


@pytest.fixture(params=backends())
def backend(request):
    with run_on(request.param) as device:
        yield device


def interpreted(device):
    return fastft.ops.registry._forced.get() in ("triton", "cuda_host") and device == "cpu"


def draw(rows, columns, dtype, device, seed=1):
    """Scores over many powers of two, many of them equal or equal but for the sign, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(rows, columns, generator=generator) * torch.randn(rows, 1, generator=generator).mul(4).exp()
    value[:, ::3] = (value[:, ::3] * 4).round() / 4
    return value.to(dtype).to(device)


def special(dtype):
    """One row of what float formats hold besides ordinary numbers, in no order and each more than once."""
    limits = torch.finfo(dtype)
    tiny = limits.smallest_normal * 2.0**-5  # a subnormal number of every dtype
    value = [0.0, -0.0, 1.0, float("nan"), -float("inf"), tiny, -tiny, limits.max, limits.min, limits.smallest_normal, -1.0]
    row = torch.tensor([*value, float("inf"), -float("nan"), limits.eps, *value], dtype=F32).to(dtype)
    return row[None]


def wider(t, before=3, after=4):
    """A view of a wider matrix of NaN that holds t: rows that lie apart, at odd addresses."""
    wide = t.new_full((t.shape[0], before + t.shape[1] + after), float("nan"))
    return wide[:, before : before + t.shape[1]].copy_(t)


def keys(scores):
    """int64: the bits of |score| as float32; widened on the CPU, where a NaN of a float16 keeps what it holds."""
    return (scores.cpu().float().contiguous().view(torch.int32).long() & 0x7FFFFFFF).to(scores.device)


def all_scores(device, apart):
    for dtype in DTYPES:
        for rows, columns in SHAPES if interpreted(device) else SHAPES + LARGE:
            scores = draw(rows, columns, dtype, device)
            yield scores, wider(scores) if apart else scores
        scores = special(dtype).to(device)
        yield scores, wider(scores) if apart else scores


def bins_of(scores):
    """Bins below, inside and above what the scores are in, 0 and those of NaN."""
    found = (keys(scores) >> 15).flatten().unique().tolist()
    few = [0, *found[len(found) // 2 :][:1], INFINITY_BIN + 1]
    return few if interpreted(scores.device.type) else [*few, 1, *(b + 1 for b in few[1:-1]), *found[-1:], LAST_BIN]


def test_bins_are_256_of_a_power_of_two():
    for i in range(256):
        scores = torch.tensor([[1 + i / 256, -1 - (i + 0.996) / 256]])
        assert (selection.keys(scores) >> selection.SHIFT).tolist() == [[127 * 256 + i] * 2]
    assert (selection.keys(torch.tensor([float("inf")])) >> selection.SHIFT).tolist() == [INFINITY_BIN]


@pytest.mark.sanitize
@pytest.mark.parametrize("apart", [False, True])
def test_count_bins(backend, apart):
    for scores, view in all_scores(backend, apart):
        counts = torch.arange(selection.BINS, device=backend)
        selection.count_bins_(counts, view)
        want = torch.arange(selection.BINS) + torch.bincount((keys(scores) >> 15).flatten().cpu(), minlength=selection.BINS)
        assert torch.equal(counts.cpu(), want), f"{list(scores.shape)} {scores.dtype}"


def test_counts_go_past_32_bits(backend):
    counts = torch.full((selection.BINS,), 2**40, device=backend)
    selection.count_bins_(counts, torch.ones(3, 5, device=backend))
    assert counts.sum() == 2**40 * selection.BINS + 15


def test_equal_scores_are_all_counted(backend):
    """Where all threads want the same counter."""
    for value in (0.0, -0.0, 1.5, float("nan")):
        counts = torch.zeros(selection.BINS, dtype=torch.int64, device=backend)
        selection.count_bins_(counts, torch.full((9, 1030), value, dtype=BF16, device=backend))
        assert counts.max() == counts.sum() == 9 * 1030, value


@pytest.mark.sanitize
@pytest.mark.parametrize("apart", [False, True])
def test_count_at_least(backend, apart):
    for scores, view in all_scores(backend, apart):
        for bin in bins_of(scores):
            with poisoned():
                got = selection.count_at_least(view, bin)
            want = ((keys(scores) >> 15) >= bin).sum(1)
            assert got.dtype == torch.int64 and torch.equal(got, want), f"{list(scores.shape)} {scores.dtype} bin {bin}"


def taken(scores, view, bin, gap):
    """What take_at_least_ writes, with `gap` places between the rows' that nothing may be written to, and what it should."""
    key = keys(scores).cpu()
    mask = (key >> 15) >= bin
    row_counts = mask.sum(1)
    before = row_counts.cumsum(0) - row_counts
    offsets = before + gap * torch.arange(1, len(row_counts) + 1)
    size = gap * (len(row_counts) + 1) + int(row_counts.sum())
    columns, found = (torch.full((size,), -7, dtype=torch.int32, device=scores.device) for _ in range(2))
    rows, places = mask.nonzero().unbind(1)
    to = offsets[rows] + torch.arange(len(rows)) - before[rows]
    want = [torch.full((size,), -7, dtype=torch.int32).index_put_((to,), t.int()) for t in (places, key[mask])]
    selection.take_at_least_(columns, found, view, offsets.to(scores.device), bin)
    return (columns.cpu(), found.cpu()), want


@pytest.mark.sanitize
@pytest.mark.parametrize("gap", [0, 2])
@pytest.mark.parametrize("apart", [False, True])
def test_take_at_least(backend, apart, gap):
    for scores, view in all_scores(backend, apart):
        for bin in bins_of(scores):
            got, want = taken(scores, view, bin, gap)
            what = f"{list(scores.shape)} {scores.dtype} bin {bin}"
            assert torch.equal(got[0], want[0]), f"columns {what}"
            assert torch.equal(got[1], want[1]), f"keys {what}"


def largest(blocks, k):
    """(row, column), each int64 [k] in the order of the matrix, of the k largest of the matrix that `blocks` make up."""
    device = blocks[0].device
    counts = torch.zeros(selection.BINS, dtype=torch.int64, device=device)
    for block in blocks:
        selection.count_bins_(counts, block)
    above = counts.flip(0).cumsum(0).flip(0)  # scores in a bin and those above it
    bin = int((above >= k).sum()) - 1
    row_counts = [selection.count_at_least(block, bin) for block in blocks]
    every = torch.cat(row_counts)
    offsets = every.cumsum(0) - every
    columns, found = (torch.empty(int(every.sum()), dtype=torch.int32, device=device) for _ in range(2))
    for block, at in zip(blocks, offsets.split([len(block) for block in blocks]), strict=True):
        selection.take_at_least_(columns, found, block, at.contiguous(), bin)
    assert len(found) == above[bin] and (bin == LAST_BIN or len(found) - int(above[bin + 1]) > len(found) - k)
    kept = found.sort(descending=True, stable=True).indices[:k].sort().values
    rows = torch.repeat_interleave(torch.arange(len(every), device=device), every)
    return rows[kept], columns[kept].long()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_k_largest_of_blocks_of_rows(backend, dtype, apart):
    """Those that a stable sort of the whole matrix puts first, whatever the blocks."""
    matrix = draw(40, 129, dtype, backend, seed=9)
    matrix[3], matrix[7, :100], matrix[31, 5] = 0, 2.5, float("nan")
    matrix[20] = matrix[21]
    blocks = [wider(block) if apart else block for block in matrix.split([16, 1, 0, 23])]
    order = keys(matrix).flatten().sort(descending=True, stable=True).indices
    few = (1, 1023, matrix.numel())
    for k in few if interpreted(backend) else (*few, 2, 63, 100, matrix.numel() - 1):
        row, column = largest(blocks, k)
        assert torch.equal(row * matrix.shape[1] + column, order[:k].sort().values), k


def test_of_equal_scores_the_first_are_taken(backend):
    matrix = torch.full((6, 1030), -0.5, dtype=BF16, device=backend)
    row, column = largest(list(matrix.split(4)), 1500)
    assert torch.equal(row * 1030 + column, torch.arange(1500, device=backend))


def test_the_same_bits_every_time(backend):
    scores = draw(33, 1023, BF16, backend)
    first, second = (taken(scores, scores, 0x7F00, 0)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_wrong_arguments_are_refused_by_the_kernels(backend):
    if fastft.ops.registry._forced.get() == "reference":
        pytest.skip("PyTorch checks the reference")
    scores = draw(6, 40, BF16, backend)
    counts, offsets = (torch.zeros(n, dtype=torch.int64, device=backend) for n in (selection.BINS, 6))
    columns, found = (torch.zeros(240, dtype=torch.int32, device=backend) for _ in range(2))
    for wrong in (
        lambda: selection.count_bins_(counts.int(), scores),
        lambda: selection.count_bins_(counts[:-1], scores),
        lambda: selection.count_bins_(counts, scores.t()),
        lambda: selection.count_bins_(counts, scores[0]),
        lambda: selection.count_bins_(counts, scores.double()),
        lambda: selection.count_at_least(scores.t(), 5),
        lambda: selection.count_at_least(scores.int(), 5),
        lambda: selection.take_at_least_(columns.long(), found, scores, offsets, 5),
        lambda: selection.take_at_least_(columns, found.long(), scores, offsets, 5),
        lambda: selection.take_at_least_(columns, found[:-1], scores, offsets, 5),
        lambda: selection.take_at_least_(columns, found, scores, offsets[:-1], 5),
        lambda: selection.take_at_least_(columns, found, scores, offsets.int(), 5),
        lambda: selection.take_at_least_(columns, found, scores.t(), offsets, 5),
    ):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            wrong()


def test_offsets_beyond_all_places_are_refused_on_cpus():
    """The largest number's sum with what a row has is negative, and was taken for a place before the first."""
    scores, offsets = draw(1, 40, BF16, "cpu"), torch.full((1,), 2**63 - 1)
    columns, found = (torch.zeros(240, dtype=torch.int32)[100:140] for _ in range(2))
    with fastft.testing.use("cpu"), pytest.raises(RuntimeError, match="beyond"):
        selection.take_at_least_(columns, found, scores, offsets, 5)


def test_opcheck():
    scores = draw(6, 40, F32, "cpu")
    counts, offsets = torch.zeros(selection.BINS, dtype=torch.int64), torch.arange(0, 240, 40)
    columns, found = (torch.zeros(240, dtype=torch.int32) for _ in range(2))
    ops = torch.ops.fastft
    for op, args in (
        (ops.count_bins_, (counts, scores)),
        (ops.count_at_least, (scores, 0x7F00)),
        (ops.count_at_least, (wider(scores), 0x7F00)),
        (ops.take_at_least_, (columns, found, scores, offsets, 0x7F00)),
    ):
        torch.library.opcheck(op.default, args)
