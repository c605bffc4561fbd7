"""Choosing entries: the k largest scores as a stable sort of all finds them, LIFT's mask as an SVD gives it, random ones."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastft
from fastft.methods import entry_selection as selection
from fastft.methods.entry_selection import budget, excluding, largest, magnitude, outer, product, random_entries
from fastft.methods.low_rank import low_rank
from fastft.ops.entries import Entries

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.fixture(params=["reference", None])
def anywhere(request):
    """On the references, and on what runs by default."""
    with fastft.testing.use(request.param) if request.param else torch.no_grad():
        yield


def randn(*shape, seed=0, dtype=F32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense_largest(scores, k, exclude=None):
    """(sorted positions, |scores| there) of a stable sort of the whole matrix."""
    size = scores.float().abs().flatten()
    if exclude is not None:
        size[exclude.flat()] = -1
    index = size.sort(descending=True, stable=True).indices[:k].sort().values
    return index, size[index]


def assert_largest(blocks, k, scores, exclude=None):
    entries, values = largest(blocks, k, scores.shape, scores.device, exclude=exclude)
    index, size = dense_largest(scores, k, exclude)
    assert len(entries) == k and entries.shape == tuple(scores.shape)
    assert torch.equal(entries.flat(), index)
    assert torch.equal(values, size)
    assert torch.equal(Entries.of_flat(entries.flat(), entries.shape).starts, entries.starts)


# ---- the k largest


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_the_largest_of_a_weight(anywhere, dtype, monkeypatch):
    monkeypatch.setattr(selection, "BLOCK_ROWS", 16)
    weight = randn(50, 129, dtype=dtype)
    weight[::3] = (weight[::3] * 4).round() / 4  # equal scores, some of them zero
    for k in (0, 1, 63, 1000, 50 * 129 - 1, 50 * 129):
        assert_largest(magnitude(weight), k, weight)
    assert_largest(magnitude(weight[:, 3:90]), 500, weight[:, 3:90])


@pytest.mark.parametrize("value", [0.0, -1.5])
@pytest.mark.parametrize("spare", [0, 100, 1 << 20])
def test_of_equal_scores_the_first(anywhere, value, spare, monkeypatch):
    monkeypatch.setattr(selection, "BLOCK_ROWS", 8)
    monkeypatch.setattr(selection, "SPARE", spare)
    weight = torch.full((30, 70), value)
    weight[17, 3:9] = -2.0
    weight[20, 11:60] = torch.linspace(1.5, 1.5001, 49)  # in the bin of 1.5, and larger
    for k in (3, 6, 50, 400, 2000):
        assert_largest(magnitude(weight), k, weight)


def test_empty_weights(anywhere):
    for shape in ((0, 5), (5, 0), (0, 0)):
        entries, values = largest(magnitude(torch.zeros(shape)), 0, shape, "cpu")
        assert len(entries) == len(values) == 0 and entries.shape == shape


def test_excluded_entries_never_appear(anywhere, monkeypatch):
    monkeypatch.setattr(selection, "BLOCK_ROWS", 16)
    weight = randn(50, 65)
    weight[10:30] = 0  # as small as what is excluded
    exclude = dense_largest(weight, 400)[0]
    exclude = Entries.of_flat(torch.cat([exclude, torch.tensor([15 * 65 + 7, 15 * 65 + 8])]), weight.shape)
    for k in (1, 500, weight.numel() - 402):
        entries, _ = largest(magnitude(weight), k, weight.shape, "cpu", exclude=exclude)
        assert torch.equal(entries.flat(), dense_largest(weight, k, exclude)[0])
    before = weight.clone()
    assert all((block >= 0).all() for block in excluding(magnitude(weight), exclude)())
    assert torch.equal(weight, before)
    none = Entries.of_mask(torch.zeros(weight.shape, dtype=torch.bool))
    assert_largest(magnitude(weight), 40, weight, none)


def test_too_many_are_refused():
    weight = randn(6, 10)
    exclude = Entries.of_flat(torch.arange(50), (6, 10))
    with pytest.raises(ValueError, match="the gate's weight: 61 entries are asked for, of 60"):
        largest(magnitude(weight), 61, (6, 10), "cpu", what="the gate's weight")
    with pytest.raises(ValueError, match="11 entries are asked for, of 10"):
        largest(magnitude(weight), 11, (6, 10), "cpu", exclude=exclude)
    with pytest.raises(ValueError, match="shape"):
        largest(magnitude(weight), 5, (6, 10), "cpu", exclude=Entries.of_flat(torch.arange(5), (10, 6)))


@pytest.mark.parametrize("shape", [(7, 10), (5, 10), (6, 11)])
def test_blocks_must_make_up_the_weight(shape):
    with pytest.raises(ValueError, match="of a weight of shape"):
        largest(magnitude(randn(6, 10)), 5, shape, "cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_scores_that_are_no_numbers_are_refused(anywhere, value, dtype):
    weight = randn(600, 10, dtype=dtype)
    weight[500, 3] = value
    with pytest.raises(FloatingPointError, match="q_proj's gradient: 1 of 600 x 10 are NaN or infinite"):
        largest(magnitude(weight), 5, weight.shape, "cpu", what="q_proj's gradient")


# ---- scores


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_products_are_those_of_float32(anywhere, dtype, monkeypatch):
    monkeypatch.setattr(selection, "BLOCK_ROWS", 16)
    monkeypatch.setattr(selection, "_TERMS", 7)
    pairs = [(randn(24, 50, seed=i, dtype=dtype).t(), randn(24, 33, seed=i + 9, dtype=dtype)) for i in range(2)]
    want = sum(left.double() @ right.double() for left, right in pairs)
    blocks = list(product(*pairs)())
    assert [len(b) for b in blocks] == [16, 16, 16, 2] and {b.dtype for b in blocks} == {F32}
    assert torch.allclose(torch.cat(blocks).double(), want, rtol=0, atol=1e-4)
    assert_largest(product(*pairs), 77, torch.cat(blocks))


def test_a_product_of_nothing():
    assert_largest(product((torch.zeros(5, 0), torch.zeros(0, 7))), 3, torch.zeros(5, 7))


def test_outer_products_rank_as_the_accumulators_do(anywhere, monkeypatch):
    monkeypatch.setattr(selection, "BLOCK_ROWS", 16)
    row, column = randn(40, seed=1).double().square() + 0.1, randn(30, seed=2).double().square() + 0.1
    entries, _ = largest(outer((row * 1e-25).float(), (column * 1e-25).float()), 100, (40, 30), "cpu")
    assert torch.equal(entries.flat(), (row[:, None] * column).flatten().topk(100).indices.sort().values)


# ---- low rank


def spectrum(rows, columns, power, seed=1):
    """A matrix with singular values i^-power, and its (U S, V)."""
    rank = min(rows, columns)
    u, v = torch.linalg.qr(randn(rows, rank, seed=seed)).Q, torch.linalg.qr(randn(columns, rank, seed=seed + 1)).Q
    us = u * torch.arange(1, rank + 1.0) ** -power
    return us @ v.t(), us, v


def overlap(a, b):
    return int((a.find(b) >= 0).sum()) / len(a)


@pytest.mark.parametrize("dtype,least", [(F32, 0.99), (BF16, 0.97)])
@pytest.mark.parametrize("shape", [(1024, 768), (300, 1000)])
def test_lifts_mask_is_that_of_an_exact_svd(shape, dtype, least):
    rank, k = 64, sum(shape) * 64
    weight, _, _ = spectrum(*shape, 1.0)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    exact, _ = largest(product((u[:, :rank] * s[:rank], v[:rank])), k, shape, "cpu")
    us, v = low_rank(weight.to(dtype), rank)
    assert us.shape == (shape[0], rank) and v.shape == (shape[1], rank) and us.dtype == v.dtype == F32
    mask, _ = largest(product((us, v.t())), k, shape, "cpu")
    assert overlap(mask, exact) >= least
    assert torch.allclose(v.t() @ v, torch.eye(rank), atol=1e-4)
    assert torch.allclose(us.norm(dim=0), s[:rank], rtol=1e-2 if dtype == BF16 else 1e-3)


def test_low_rank_repeats_bit_for_bit_and_asks_no_global_generator():
    weight = randn(100, 80)
    first = low_rank(weight, 8)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(first, low_rank(weight, 8)))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first[0], low_rank(weight, 8, generator=torch.Generator().manual_seed(7))[0])


@pytest.mark.parametrize("shape,rank", [((5, 3), 4), ((1, 9), 1), ((40, 40), 40), ((40, 200), 128), ((64, 100), 20)])
def test_low_rank_of_small_weights_is_exact(shape, rank):
    weight = randn(*shape)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    us, right = low_rank(weight, rank)
    rank = min(rank, *shape)
    assert us.shape[1] == right.shape[1] == rank
    assert torch.allclose(us @ right.t(), (u[:, :rank] * s[:rank]) @ v[:rank], atol=2e-2 if rank < min(shape) else 1e-4)


@pytest.mark.parametrize("kind", ["zero", "one entry", "rank 3", "steep"])
def test_low_rank_of_weights_that_have_less_rank(kind):
    weight = torch.zeros(200, 150)
    if kind == "one entry":
        weight[7, 9] = -3.0
    elif kind == "rank 3":
        weight = randn(200, 3) @ randn(3, 150)
    elif kind == "steep":
        weight, _, _ = spectrum(200, 150, 8.0)
    us, v = low_rank(weight, 16)
    assert torch.allclose(us @ v.t(), weight, atol=1e-4)
    assert torch.allclose(v.t() @ v, torch.eye(16), atol=1e-4)


def test_low_rank_refuses_what_is_no_number():
    weight = randn(20, 30)
    weight[3, 4] = float("nan")
    with pytest.raises(FloatingPointError, match="up_proj's weight holds NaN"):
        low_rank(weight, 4, what="up_proj's weight")


def test_low_rank_is_not_rounded_by_autocast():
    weight, plain = randn(60, 50), low_rank(randn(60, 50), 8)
    with torch.autocast("cpu", dtype=BF16):
        assert all(torch.equal(a, b) for a, b in zip(plain, low_rank(weight, 8)))


def test_a_planted_low_rank_part_is_found_better_than_by_magnitude():
    """What LIFT is for: entries that are large in the signal, under noise as large as it."""
    signal = randn(400, 4, seed=1) @ randn(4, 300, seed=2) / 2
    weight = signal + randn(400, 300, seed=3)
    k = 6000
    planted, _ = largest(magnitude(signal), k, signal.shape, "cpu")
    us, v = low_rank(weight, 4)
    by_rank, _ = largest(product((us, v.t())), k, weight.shape, "cpu")
    by_size, _ = largest(magnitude(weight), k, weight.shape, "cpu")
    assert overlap(by_rank, planted) > 0.8 > 0.6 > overlap(by_size, planted)


# ---- memory


class Largest(TorchDispatchMode):
    """Bytes of the largest storage that an op returned and that is none of the inputs'."""

    def __init__(self, *inputs):
        super().__init__()
        self.known, self.bytes = {t.untyped_storage().data_ptr() for t in inputs}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("what", ["magnitude", "low rank", "gradient", "momentum", "equal"])
def test_nothing_as_large_as_the_weight_is_made(what, monkeypatch):
    monkeypatch.setattr(selection, "SPARE", 1 << 12)
    shape = (4096, 512)
    left, right, weight = randn(4096, 16), randn(16, 512), randn(*shape, dtype=BF16)
    equal = torch.ones(shape, dtype=BF16)
    exclude = random_entries(shape, 20_000, torch.Generator().manual_seed(0))
    blocks = {
        "magnitude": lambda: magnitude(weight),
        "low rank": lambda: product((left, right)),
        "gradient": lambda: product((left.bfloat16(), right.bfloat16())),
        "momentum": lambda: outer(left[:, 0].square(), right[0].square()),
        "equal": lambda: magnitude(equal),
    }[what]()
    with Largest(weight, equal, left, right) as made:
        entries, _ = largest(blocks, 20_000, shape, "cpu", exclude=exclude if what == "momentum" else None)
    assert len(entries) == 20_000
    assert made.bytes <= weight.numel()  # in float32 it takes four times as much


def test_low_rank_converts_no_more_than_a_block():
    weight = randn(4096, 512, dtype=BF16)
    with Largest(weight) as made:
        low_rank(weight, 32)
    assert made.bytes <= 4096 * 112 * 8 < weight.numel() * 4  # W Q in float64


# ---- random entries, budgets


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (7, 13), (100, 50)])
def test_random_entries_are_as_many_as_asked(shape):
    size = shape[0] * shape[1]
    for k in {0, min(1, size), size // 3, size // 2, size - size // 4, size}:
        entries = random_entries(shape, k, torch.Generator().manual_seed(3))
        flat = entries.flat()
        assert len(flat) == k and (flat.diff() > 0).all() and entries.shape == shape
    with pytest.raises(ValueError, match="random entries are asked for"):
        random_entries(shape, size + 1, torch.Generator())


def test_random_entries_repeat_for_a_seed_and_are_the_same_everywhere():
    draw = lambda seed: random_entries((6, 10), 7, torch.Generator().manual_seed(seed)).flat().tolist()  # noqa: E731
    assert draw(0) == draw(0) != draw(1)
    assert draw(0) == [0, 7, 37, 39, 43, 44, 53]


def test_random_entries_are_equally_likely():
    generator = torch.Generator().manual_seed(0)
    for k in (7, 15, 25):
        counts, rounds = torch.zeros(30), 3000
        for _ in range(rounds):
            counts[random_entries((5, 6), k, generator).flat()] += 1
        expected, spread = rounds * k / 30, (rounds * k / 30 * (1 - k / 30)) ** 0.5
        assert ((counts - expected).abs() < 5 * spread).all()


def test_random_entries_of_a_large_weight_take_memory_for_those_alone():
    with Largest() as made:
        entries = random_entries((100_000, 50_000), 1000, torch.Generator().manual_seed(0))
    assert len(entries) == 1000 and entries.flat()[-1] > 4_000_000_000 and made.bytes <= 8 * 100_001


def test_budgets_are_in_proportion_and_rounded_down():
    assert budget([100, 50, 50], 21) == [10, 5, 5]
    assert budget([10, 1], 100) == [10, 1]
    assert budget([10, 1], 0) == [0, 0] and budget([], 5) == []
    assert budget([2**33, 2**33 + 1], 2**33) == [2**33 * 2**33 // (2**34 + 1), (2**33 + 1) * 2**33 // (2**34 + 1)]
