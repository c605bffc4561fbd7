"""The k largest of a matrix of scores, of which only a block of rows exists at a time.

    bin(s) = (the bits of |s| as float32) >> 15:  65,536 bins that ascend with |s|, 256 of them a factor of two

`count_bins_` adds a block's scores to a histogram; from the whole matrix's the bin of the k-th largest follows. Then
`count_at_least` counts, row by row, the scores in that bin and above, and `take_at_least_` writes where they are: a few more
than k, of which the smallest of the last bin are left out. So the matrix is looked at twice and never copied, and of equal
scores those that come first are taken, whatever the order in which threads get to them.

Shapes: scores [R, B] (R rows of a block, float32, bfloat16 or float16; rows may lie apart), counts int64 [65536], offsets
int64 [R]. NaNs count as the largest: the last 255 bins are theirs, 0xFF00 holds infinities.
"""

import torch

from .registry import Op, nothing_fake, refuse_dtypes

BINS, SHIFT = 1 << 16, 15


def keys(scores):
    """int32, ascending with |score|; a NaN keeps its bits (abs() would replace those of a bfloat16)."""
    bits = scores.float().contiguous().view(torch.int32) & 0x7FFFFFFF
    if scores.dtype != torch.float16:
        return bits
    # Widening float16 is an addition on NVIDIA's GPUs, which gives every NaN the same bits.
    half = scores.contiguous().view(torch.int16).int() & 0x7FFF
    return torch.where(half > 0x7C00, half << 13 | 0x7F800000, bits)


def _count_bins_reference(counts, scores):
    counts.add_(torch.bincount((keys(scores) >> SHIFT).flatten(), minlength=BINS))


def _count_reference(scores, bin):
    return ((keys(scores) >> SHIFT) >= bin).sum(1)


def _count_fake(scores, bin):
    return scores.new_empty(scores.shape[0], dtype=torch.int64)


def _take_reference(columns, found, scores, offsets, bin):
    key = keys(scores)
    mask = (key >> SHIFT) >= bin
    row, column = mask.nonzero(as_tuple=True)
    at = offsets[row] + (mask.cumsum(1) - 1)[mask]
    columns[at] = column.to(columns.dtype)
    found[at] = key[mask]


count_bins_ = Op(
    "count_bins_(Tensor(a!) counts, Tensor scores) -> ()", _count_bins_reference, nothing_fake, refuse_dtypes(1)
)
count_at_least = Op("count_at_least(Tensor scores, int bin) -> Tensor", _count_reference, _count_fake, refuse_dtypes(0))
take_at_least_ = Op(
    "take_at_least_(Tensor(a!) columns, Tensor(b!) keys, Tensor scores, Tensor offsets, int bin) -> ()",
    _take_reference,
    nothing_fake,
    refuse_dtypes(2),
)
