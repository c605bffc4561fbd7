"""Chosen entries of a weight that train where they stand (SpIEL, Ansell et al. 2024, https://arxiv.org/abs/2401.16405; LIFT,
Liu et al. 2025, https://arxiv.org/abs/2506.00772).

    W' = round(base + delta) at the entries, W elsewhere;  forward and dX are the frozen layer's, on W'
    ddelta = (dYᵀ X) at the entries, of which nothing else is computed

`gather_entries` reads them; `write_entries_` writes base + delta, or without a delta the bits of base; `sampled_product_`
forms the chosen entries of leftᵀ right and nothing else (left = dY, right = X, or the other way round for a weight stored
[K, N]); `sparse_adamw_` and `sparse_sm3_` make an update and write it in one pass over the entries; `match_entries` finds
the entries of one choice in another. Where the weight can't be written (it is quantised, or shared with adapters that are
not wanted) `add_sparse_product_` applies the delta beside it: Y += X deltaᵀ.

AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), with decay on the delta, so towards the pretrained weight:

    m = β₁ m + (1 - β₁) g,  v = β₂ v + (1 - β₂) g²
    delta = (1 - lr · decay) delta - lr c₁(age) m / (c₂(age) √v + ε),   c₁(t) = 1 / (1 - β₁ᵗ), c₂(t) = 1 / √(1 - β₂ᵗ)

where age counts an entry's own updates (`age` int32, advanced by the op; `corrections` float32 [n, 2] holds c₁ and c₂ of the
ages 0 to n - 1, the last row is also that of older ones), or is `step` for all entries without `age`. bfloat16 moments are
rounded stochastically, or v would never decay: v · 0.999 rounds to v. What is rounded up follows from the entry's position
and `seed` by the hash in `_noise`, on every backend alike.

SM3-II (Anil et al. 2019, arXiv:1901.11150) holds the second moments of all entries in one number a row and one a column:

    ν = min(row, column) + g²;  delta = (1 - lr · decay) delta - lr g / √(ν + ε);  row, column = max of theirs and their ν

Indices are row-compressed: entry j of row i of the stored weight [A, B] is in column ``columns[starts[i] + j]``; starts
int64 [A + 1], columns int32 [E], ascending within a row, each once. So nothing overflows in a weight of more than 2³¹
elements, an index takes 4 bytes an entry, and no op converts one. The weight is float32, bfloat16 or float16, and its rows
may lie apart; base has its dtype; delta, grad and accumulators are float32, moments float32 or bfloat16. Sums are formed in
float32. The reference also takes float64 (then everything is float64). Indices that don't fit are refused on CPUs; on GPUs,
where looking would wait for the device, they are the caller's promise.

Shapes: A rows and B columns of the stored weight, E entries, T tokens.
"""

import torch

from .registry import Op, nothing_fake, refuse_dtypes


def rows_of(starts, columns):
    """int64 [E]: the row of each entry."""
    rows = torch.arange(len(starts) - 1, device=starts.device)
    return torch.repeat_interleave(rows, starts.diff(), output_size=len(columns))


def _at(starts, columns):
    return rows_of(starts, columns), columns.long()


def _gather_reference(weight, starts, columns):
    return weight[_at(starts, columns)]


def _gather_fake(weight, starts, columns):
    return weight.new_empty(columns.shape)


def _write_reference(weight, starts, columns, base, delta):
    weight[_at(starts, columns)] = base if delta is None else (base.to(delta.dtype) + delta).to(weight.dtype)


def _product_reference(out, left, right, starts, columns, add):
    value = (left.to(out.dtype).t() @ right.to(out.dtype))[_at(starts, columns)]
    out.add_(value) if add else out.copy_(value)


def _noise(count, seed, device):
    """Two random 16-bit numbers (int64 [count]) an entry: the halves of murmur3's finaliser over position and seed."""
    mask = 0xFFFFFFFF
    h = (torch.arange(count, device=device) * 0x9E3779B1 + (seed & mask) * 0x85EBCA77) & mask
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & mask
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & mask
    h = h ^ (h >> 16)
    return h & 0xFFFF, h >> 16


def _store_moment(moment, value, noise):
    """Into bfloat16: up with the probability of the part that is cut off. A NaN or infinity stays one."""
    if moment.dtype != torch.bfloat16:
        moment.copy_(value)
        return
    rounded = ((value.view(torch.int32) + noise.to(torch.int32)) >> 16).to(torch.int16).view(torch.bfloat16)
    moment.copy_(torch.where(value.isfinite(), rounded, value.to(torch.bfloat16)))


def _adamw_reference(weight, starts, columns, base, delta, grad, exp_avg, exp_avg_sq, age, corrections,
                     lr, beta1, beta2, eps, weight_decay, step, seed):  # fmt: skip
    wide = delta.dtype
    mean = beta1 * exp_avg.to(wide) + (1 - beta1) * grad
    square = beta2 * exp_avg_sq.to(wide) + (1 - beta2) * grad * grad
    if age is None:
        first, second = 1 / (1 - beta1**step), (1 - beta2**step) ** -0.5
    else:
        age.add_(1)
        first, second = corrections[age.clamp(max=len(corrections) - 1).long()].to(wide).unbind(1)
    delta.copy_((1 - lr * weight_decay) * delta - lr * first * mean / (square.sqrt() * second + eps))
    low, high = _noise(len(columns), seed, delta.device) if exp_avg.dtype == torch.bfloat16 else (None, None)
    _store_moment(exp_avg, mean, low)
    _store_moment(exp_avg_sq, square, high)
    _write_reference(weight, starts, columns, base, delta)


def _sm3_reference(weight, starts, columns, base, delta, grad, row_max, column_max, lr, eps, weight_decay):
    sm3_update(delta, grad, *_at(starts, columns), row_max, column_max, lr, eps, weight_decay)
    _write_reference(weight, starts, columns, base, delta)


def sm3_update(delta, grad, rows, columns, row_max, column_max, lr, eps, weight_decay):
    """A step of SM3 in plain PyTorch, on a delta that stands in no weight. rows, columns: int64 [E]."""
    bound = torch.minimum(row_max[rows], column_max[columns]) + grad * grad
    delta.copy_((1 - lr * weight_decay) * delta - lr * grad * (bound + eps).rsqrt())
    row_max.scatter_reduce_(0, rows, bound, "amax")
    column_max.scatter_reduce_(0, columns, bound, "amax")


def _match_reference(starts, columns, other_starts, other_columns):
    width = 1 + max([int(c.max()) for c in (columns, other_columns) if len(c)], default=0)
    flat = rows_of(starts, columns) * width + columns
    other = rows_of(other_starts, other_columns) * width + other_columns
    if not len(other):
        return torch.full_like(flat, -1)
    at = torch.searchsorted(other, flat).clamp(max=len(other) - 1)
    return torch.where(other[at] == flat, at, -1)


def _match_fake(starts, columns, other_starts, other_columns):
    return columns.new_empty(columns.shape, dtype=torch.int64)


def _add_product_reference(y, x, starts, columns, values):
    delta = values.new_zeros(y.shape[1], x.shape[1])
    delta[_at(starts, columns)] = values
    y.copy_(y.to(values.dtype) + x.to(values.dtype) @ delta.t())


gather_entries = Op(
    "gather_entries(Tensor weight, Tensor starts, Tensor columns) -> Tensor",
    _gather_reference,
    _gather_fake,
    refuse_dtypes(0),
)
write_entries_ = Op(
    "write_entries_(Tensor(a!) weight, Tensor starts, Tensor columns, Tensor base, Tensor? delta) -> ()",
    _write_reference,
    nothing_fake,
    refuse_dtypes(0),
)
sampled_product_ = Op(
    "sampled_product_(Tensor(a!) out, Tensor left, Tensor right, Tensor starts, Tensor columns, bool add) -> ()",
    _product_reference,
    nothing_fake,
    refuse_dtypes(1, 2),
    # Few entries, which is what GPUs use it for: 88 and 110 us on an H200 (4096 tokens, 0.1 % of 4096 x 4096, bfloat16), 109
    # and 183 at 0.25 %.
    order={"cuda": ("triton", "cuda", "reference")},
)
sparse_adamw_ = Op(
    "sparse_adamw_(Tensor(a!) weight, Tensor starts, Tensor columns, Tensor base, Tensor(b!) delta, Tensor grad, "
    "Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor(e!)? age, Tensor? corrections, float lr, float beta1, float beta2, "
    "float eps, float weight_decay, int step, int seed) -> ()",
    _adamw_reference,
    nothing_fake,
    refuse_dtypes(0),
)
sparse_sm3_ = Op(
    "sparse_sm3_(Tensor(a!) weight, Tensor starts, Tensor columns, Tensor base, Tensor(b!) delta, Tensor grad, "
    "Tensor(c!) row_max, Tensor(d!) column_max, float lr, float eps, float weight_decay) -> ()",
    _sm3_reference,
    nothing_fake,
    refuse_dtypes(0),
)
match_entries = Op(
    "match_entries(Tensor starts, Tensor columns, Tensor other_starts, Tensor other_columns) -> Tensor",
    _match_reference,
    _match_fake,
)
add_sparse_product_ = Op(
    "add_sparse_product_(Tensor(a!) y, Tensor x, Tensor starts, Tensor columns, Tensor values) -> ()",
    _add_product_reference,
    nothing_fake,
    refuse_dtypes(0, 1),
)
