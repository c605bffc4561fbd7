"""A drawn problem of every op of the registry.

PROBLEMS maps the op's name to a function (data, *dtypes) that draws sizes and options, and checks the op on the library that
is forced.
"""

import torch
from hypothesis import strategies as st

import fastft
from fastft.ops import grouped, registry
from tests.fuzz.op_calls import F32, bits, called, exactly, filled, matrix, plain, sums
from tests.ops import test_partial, test_sparse
from tests.ops.drawing import judge
from tests.ops.grouped_cases import defined, expected, make, route

SIZES = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 96, 127, 129, 200]))
RANKS = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 33, 64, 70]))
SCALES = st.sampled_from([1.0, 0.5, -3.7, 0.0])
DROPOUTS = st.sampled_from([0.0, 0.05, 0.5, 1.0])
STEPS = st.sampled_from([1, 2, 1000])
PROBLEMS = {}


def problem(function):
    PROBLEMS[function.__name__] = function
    return function


def seed_of(data):
    return data.draw(st.integers(0, 2**31), "seed")


# ---- LoRA and DoRA


def groups(data):
    """(ranks of adapters that share x, dropout's p, a seed for each or None)."""
    ranks, p = data.draw(st.lists(RANKS, min_size=1, max_size=3), "ranks"), data.draw(DROPOUTS, "p")
    generator = torch.Generator().manual_seed(seed_of(data))
    return ranks, p, torch.randint(2**62, (len(ranks),), generator=generator) if p else None


def masked(data, ranks, p, seed, rows, columns):
    """The packed masks of a shrink."""
    if not p:
        return torch.empty(0, dtype=torch.uint8)
    with fastft.testing.use("reference"), fastft.testing.record():
        return registry.OPS["lora_shrink"](torch.zeros(rows, columns), torch.zeros(sum(ranks), columns), ranks, p, seed)[1]


@problem
def lora_shrink(data, act, wide):
    t, k = data.draw(SIZES, "T"), data.draw(SIZES, "K")
    ranks, p, seed = groups(data)
    sums("lora_shrink", k, plain(t, k, dtype=act), plain(sum(ranks), k, dtype=wide), ranks, p, seed, fixed=(3,))


@problem
def lora_expand_(data, act, wide):
    t, n, r = data.draw(SIZES, "T"), data.draw(SIZES, "N"), data.draw(RANKS, "R")
    y, s = matrix(data, t, n, act), matrix(data, t, r, F32)
    sums("lora_expand_", r + 1, y, s, plain(n, r, dtype=wide), data.draw(SCALES, "scale"), beside=(1, 2))


@problem
def lora_add_(data, act, wide):
    """It is the two others in one call, to the bit."""
    t, k, n, r = (data.draw(sizes, name) for sizes, name in zip((SIZES, SIZES, SIZES, RANKS), "TKNR"))
    y, scale = matrix(data, t, n, act), data.draw(SCALES, "scale")
    makers = [y, plain(t, k, dtype=act), plain(r, k, dtype=wide), plain(n, r, dtype=wide)]
    for seed in range(2):
        y, x, a, b = filled(makers, torch.Generator().manual_seed(seed))
        s = called("lora_shrink", [x, a, [r], 0.0, None])[0]
        (want,), (got,) = called("lora_expand_", [y, s, b, scale]), called("lora_add_", [y, x, a, b, scale])
        assert torch.equal(bits(got), bits(want)), f"lora_add_ {list(x.shape)} {list(b.shape)}"


@problem
def lora_grad_sb(data, act, wide):
    t, n, r = data.draw(SIZES, "T"), data.draw(SIZES, "N"), data.draw(RANKS, "R")
    s, scale = matrix(data, t, r, F32), data.draw(SCALES, "scale")
    sums("lora_grad_sb", max(t, n), plain(t, n, dtype=act), s, plain(n, r, dtype=wide), scale, beside=(1, 2))


@problem
def lora_grad_a(data, act, wide):
    t, k = data.draw(SIZES, "T"), data.draw(SIZES, "K")
    ranks, p, seed = groups(data)
    mask, r = masked(data, ranks, p, seed, t, k), sum(ranks)
    sums(
        "lora_grad_a",
        t,
        plain(t, r),
        plain(t, k, dtype=act),
        plain(r, k, dtype=wide),
        ranks,
        mask,
        p,
        fixed=(5,),
        beside=(0, 2),
    )


@problem
def lora_grad_x_(data, act, wide):
    t, k = data.draw(SIZES, "T"), data.draw(SIZES, "K")
    ranks, p, seed = groups(data)
    mask, r = masked(data, ranks, p, seed, t, k), sum(ranks)
    dx, a = plain(t, k, dtype=act), plain(r, k, dtype=wide)
    sums("lora_grad_x_", r + 1, dx, plain(t, r), a, ranks, mask, p, fixed=(5,), beside=(1, 2))


@problem
def dora_expand_(data, act, wide):
    t, n, r = data.draw(SIZES, "T"), data.draw(SIZES, "N"), data.draw(RANKS, "R")
    u, s = matrix(data, t, n, act), matrix(data, t, r, F32)
    bias = plain(n, dtype=act) if data.draw(st.booleans(), "bias") else None
    b = plain(n, r, dtype=wide)
    sums("dora_expand_", r + 2, u, s, b, plain(n), bias, data.draw(SCALES, "scale"), beside=(1, 2))


@problem
def dora_grad_y(data, act, wide):
    t, n = data.draw(SIZES, "T"), data.draw(SIZES, "N")
    sums("dora_grad_y", t, plain(t, n, dtype=act), matrix(data, t, n, act), plain(n))


# ---- slices


def some(data, size):
    """Different indices of `size`, in any order, int32."""
    count = data.draw(st.integers(0, size), "indices")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed_of(data)))
    return order[:count].int()


def sliced(data, act):
    """(weight, index, dim, shape of the slice)."""
    a, b, dim = data.draw(SIZES, "A"), data.draw(SIZES, "B"), data.draw(st.integers(0, 1), "dim")
    index = some(data, (a, b)[dim])
    return matrix(data, a, b, act), index, dim, (len(index), b) if dim == 0 else (a, len(index))


@problem
def gather_columns(data, act, wide):
    t, k = data.draw(SIZES, "T"), data.draw(SIZES, "K")
    exactly("gather_columns", matrix(data, t, k, act), some(data, k))


@problem
def scatter_add_columns_(data, act, wide):
    t, n = data.draw(SIZES, "T"), data.draw(SIZES, "N")
    index = some(data, n)
    exactly("scatter_add_columns_", matrix(data, t, n, act), index, plain(t, len(index), dtype=wide))


@problem
def write_slice_(data, act, wide):
    weight, index, dim, size = sliced(data, act)
    delta = plain(*size) if data.draw(st.booleans(), "delta") else None
    exactly("write_slice_", weight, index, dim, plain(*size, dtype=act), delta)


@problem
def exchange_slice_(data, act, wide):
    weight, index, dim, size = sliced(data, act)
    shape = weight(torch.Generator()).shape
    old = some(data, shape[dim])
    old_size = (len(old), shape[1]) if dim == 0 else (shape[0], len(old))
    exactly("exchange_slice_", weight, dim, old, plain(*old_size, dtype=act), index, plain(*size))


@problem
def slice_adamw_(data, act, wide):
    weight, index, dim, size = sliced(data, act)
    generator = torch.Generator().manual_seed(seed_of(data))
    base = plain(*size, dtype=act)(generator)
    test_partial.check_adamw("cpu", weight(generator).contiguous(), index, dim, base, data.draw(STEPS, "step"))


# ---- entries


def entries(data, a, b):
    """(starts, columns) of drawn entries of a weight [a, b]: rows have very different numbers of them."""
    count = data.draw(st.one_of(st.sampled_from([0, a * b]), st.integers(0, a * b)), "entries")
    return test_sparse.choose(a, b, count, "cpu", seed_of(data))


@problem
def gather_entries(data, act, wide):
    a, b = data.draw(SIZES, "A"), data.draw(SIZES, "B")
    exactly("gather_entries", matrix(data, a, b, act), *entries(data, a, b))


@problem
def write_entries_(data, act, wide):
    a, b = data.draw(SIZES, "A"), data.draw(SIZES, "B")
    starts, columns = entries(data, a, b)
    delta = plain(len(columns)) if data.draw(st.booleans(), "delta") else None
    exactly("write_entries_", matrix(data, a, b, act), starts, columns, plain(len(columns), dtype=act), delta)


@problem
def sampled_product_(data, act, wide):
    t, a, b = (data.draw(SIZES, name) for name in ("T", "A", "B"))
    starts, columns = entries(data, a, b)
    left, right = matrix(data, t, a, act), matrix(data, t, b, act)
    sums("sampled_product_", t + 1, plain(len(columns)), left, right, starts, columns, data.draw(st.booleans(), "add"))


@problem
def sparse_adamw_(data, act, wide):
    a, b = data.draw(SIZES, "A"), data.draw(SIZES, "B")
    starts, columns = entries(data, a, b)
    generator = torch.Generator().manual_seed(seed_of(data))
    moments, aged = data.draw(st.sampled_from([F32, torch.bfloat16]), "moments"), data.draw(st.booleans(), "aged")
    weight, base = (plain(*size, dtype=act)(generator) for size in ((a, b), (len(columns),)))
    test_sparse.check_adamw("cpu", weight, starts, columns, base, moments, aged, data.draw(STEPS, "step"))


@problem
def sparse_sm3_(data, act, wide):
    a, b = data.draw(SIZES, "A"), data.draw(SIZES, "B")
    starts, columns = entries(data, a, b)
    generator = torch.Generator().manual_seed(seed_of(data))
    weight, base = (plain(*size, dtype=act)(generator) for size in ((a, b), (len(columns),)))
    test_sparse.check_sm3("cpu", weight, starts, columns, base)


@problem
def match_entries(data, act, wide):
    a, b = data.draw(SIZES, "A"), data.draw(SIZES, "B")
    exactly("match_entries", *entries(data, a, b), *entries(data, a, b))


@problem
def add_sparse_product_(data, act, wide):
    t, a, b = (data.draw(SIZES, name) for name in ("T", "A", "B"))
    starts, columns = entries(data, a, b)
    y, x = matrix(data, t, a, act), matrix(data, t, b, act)
    sums("add_sparse_product_", b + 1, y, x, starts, columns, plain(len(columns)))


# ---- choosing entries


def scores(data, act):
    """(a matrix of many equal scores, NaNs and infinities among them; a bin below, inside or above what it holds)."""
    r, b = data.draw(SIZES, "R"), data.draw(SIZES, "B")
    given = matrix(data, r, b, act, data.draw(st.sampled_from([1.0, 1e-30, 1e4]), "factor"))
    special = data.draw(st.lists(st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40]), max_size=4))

    def fill(generator):
        value = given(generator)
        value[:, ::3] = value[:, ::3].round()
        for number in special if value.numel() else ():
            row, column = (int(torch.randint(size, (), generator=generator)) for size in value.shape)
            value[row, column] = number
        return value

    return fill, data.draw(st.one_of(st.sampled_from([0, 1, 0xFF00, 0xFF01, 0xFFFF]), st.integers(0, 0xFFFF)), "bin")


@problem
def count_bins_(data, act, wide):
    given, _ = scores(data, act)
    exactly("count_bins_", torch.arange(1 << 16), given)


@problem
def count_at_least(data, act, wide):
    exactly("count_at_least", *scores(data, act))


@problem
def take_at_least_(data, act, wide):
    given, bin = scores(data, act)
    gap = data.draw(st.integers(0, 2), "gap")
    value = given(torch.Generator().manual_seed(0))
    counts = called("count_at_least", [value, bin], "reference")[0]
    offsets = counts.cumsum(0) - counts + gap * torch.arange(1, len(counts) + 1)
    places = int(counts.sum()) + gap * (len(counts) + 1)
    exactly("take_at_least_", *(torch.full((places,), -7, dtype=torch.int32) for _ in range(2)), value, offsets, bin)


# ---- grouped

KINDS = st.sampled_from([grouped.NONE, grouped.LOW_RANK, grouped.COLUMNS, grouped.ROWS, grouped.ENTRIES])
FEW = st.one_of(st.integers(1, 20), st.sampled_from([33, 64, 100]))


class Routed:
    """Drawn adapters of every kind on a site, tokens that name them, and what they add, as dense float64."""

    def __init__(self, data, act, wide, choices=2, fewest=0):
        self.k, self.outputs = data.draw(FEW, "K"), data.draw(st.lists(FEW, min_size=1, max_size=3), "N")
        piece = st.one_of(st.none(), st.tuples(KINDS, st.integers(fewest, 17)))
        adapters = st.lists(st.lists(piece, min_size=len(self.outputs), max_size=len(self.outputs)), min_size=1, max_size=4)
        self.adapters = data.draw(adapters, "adapters")
        self.case = make(self.adapters, self.k, self.outputs, wide, seed_of(data), data.draw(SCALES, "scale"))
        slot, count = st.integers(-1, len(self.adapters) - 1), data.draw(st.integers(1, choices), "choices")
        one = slot if count == 1 else st.lists(slot, min_size=count, max_size=count)
        self.slots = data.draw(st.lists(one, max_size=12), "slots")
        self.count = count if self.slots else 1
        self.segments, self.assignments, _ = route(self.slots, data.draw(st.integers(0, 2), "empty"))
        generator = torch.Generator().manual_seed(seed_of(data))
        t = len(self.slots)
        self.x = matrix(data, t, self.k, act)(generator)
        self.y = matrix(data, t, sum(self.outputs), act)(generator)
        weighted = data.draw(st.booleans(), "weighted")
        self.weights = torch.randn(t, self.count, generator=generator) if weighted else None

    def where(self, *more):
        case = self.case
        return [case.store, case.offsets, *more, case.pieces, self.segments, self.assignments]


@problem
def grouped_shrink(data, act, wide):
    one = Routed(data, act, wide)
    mask = defined(one.case, one.segments, one.assignments)
    arguments = [one.x, *one.where(), one.count, one.case.width]

    def draws(generator):
        found = []
        for backend, change in ((None, None), ("reference", torch.Tensor.double), ("reference", None)):
            own = [*arguments] if change is None else [change(one.x), change(one.case.store), *arguments[2:]]
            found.append([called("grouped_shrink", own, backend)[0][mask]])
        most = called("grouped_shrink", [one.x.double().abs(), one.case.store.double().abs(), *arguments[2:]], "reference")
        return (*found, [most[0][mask]])

    judge(draws, one.k, "grouped_shrink")


def added(op, data, act, wide):
    one = Routed(data, act, wide)
    s = called("grouped_shrink", [one.x, *one.where(), one.count, one.case.width], "reference")[0]
    want, magnitude = expected(one.y, one.x, one.case, one.slots, one.weights)
    places = [*one.where(one.case.columns), one.weights, one.count]
    arguments = [one.y, one.x, *places, one.case.width] if op == "grouped_add_" else [one.y, one.x, s, *places]
    got, same = called(op, arguments)[0], called(op, arguments, "reference")[0]
    # One rounding an assignment and piece, of the reference one in all (`test_several_weighted_assignments`).
    rounding = one.count * len(one.outputs) * torch.finfo(act).eps / 2 * magnitude
    error = (got.double() - want).abs()
    allowed = 2 * (same.double() - want).abs() + rounding + 4 * (one.k + 20) ** 0.5 * torch.finfo(F32).eps * magnitude
    assert got.isfinite().all() and (error <= allowed).all(), f"{op}: {(error / allowed.clamp(min=1e-300)).max():.2f}"
    none = [t for t, own in enumerate(one.slots) if all(slot < 0 for slot in (own if isinstance(own, list) else [own]))]
    assert torch.equal(bits(got[none]), bits(one.y[none])), "rows without an adapter keep their bits"


@problem
def grouped_expand_(data, act, wide):
    added("grouped_expand_", data, act, wide)


@problem
def grouped_add_(data, act, wide):
    added("grouped_add_", data, act, wide)


@problem
def grouped_outer_(data, act, wide):
    one = Routed(data, act, wide, choices=1)
    s = torch.randn(len(one.assignments), one.case.width, generator=torch.Generator().manual_seed(7))
    swapped = data.draw(st.booleans(), "transposed")
    values, other = (one.y, one.x) if swapped else (one.x, one.y)
    pieces = grouped.transposed(one.case.pieces) if swapped else one.case.pieces
    empty, weights = torch.full_like(one.case.store, float("nan")), one.weights

    def result(change, backend, weights=weights):
        places = [one.case.offsets, pieces, one.segments, one.assignments, weights, 1]
        return called("grouped_outer_", [*(change(t) for t in (empty, values, other, s)), *places], backend)[0]

    got, same, want = (
        result(*how) for how in ((torch.clone, None), (torch.clone, "reference"), (torch.Tensor.double, "reference"))
    )
    most = result(lambda t: t.double().abs(), "reference", None if weights is None else weights.abs())
    there = ~want.isnan()
    assert torch.equal(got.isnan(), ~there), "other rows are left alone"
    error, most = (got.double() - want).abs()[there], most[there].abs()
    terms = torch.finfo(F32).eps * 4 * (len(one.slots) + 1) ** 0.5 * most
    assert (error <= 2 * (same.double() - want).abs()[there] + torch.finfo(got.dtype).eps * most + terms).all()
