"""The LoRA family: every op on every backend against the formula in float64. Groups are in `test_lora_groups`.

Tolerance (written down once, in `tests/golden.py`): relative Frobenius error <= 1.5x and maximum error <= 2x that of
the plain PyTorch composition in the same dtypes, or one ulp of the element.
"""

import pytest
import torch

import fastft
from fastft import _native
from fastft.ops import lora
from fastft.ops._philox import dropout_mask, philox4x32, unpack_mask
from tests.golden import assert_close, backends, plain_product, poisoned, run_on

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]
# T, K, N, R: empty sizes, sizes off every vector and tile boundary, ranks around them.
SHAPES = [
    (5, 16, 24, 4),
    (1, 1, 1, 1),
    (63, 100, 129, 3),
    (100, 257, 63, 16),
    (37, 64, 48, 17),
    (33, 65, 130, 65),
    (0, 16, 8, 4),
    (7, 0, 8, 4),
    (7, 16, 0, 4),
    (7, 16, 8, 0),
]
LARGE = [(1100, 320, 550, 8), (130, 1536, 513, 33), (40, 48, 60, 256)]


@pytest.fixture(params=backends("amx"))
def backend(request):
    with run_on(request.param) as device:
        yield device


def inputs(shape, act, adapter, device, seed=0):
    t, k, n, r = shape
    g = torch.Generator().manual_seed(seed)

    def draw(*size, dtype):
        # Signed, with one outlier row: cancellation and range at once.
        value = torch.randn(*size, generator=g)
        if size[0] > 2:
            value[size[0] // 2] *= 30
        return value.to(dtype).to(device)

    return {
        "x": draw(t, k, dtype=act),
        "a": draw(r, k, dtype=adapter),
        "b": draw(n, r, dtype=adapter),
        "y": draw(t, n, dtype=act),
        "s": draw(t, r, dtype=F32),
        "seed": torch.tensor([0x123456789ABCDEF + seed], device=device),
    }


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_products_of_torch_between_ours(isa):
    """Both may keep AMX's registers in shapes of their own, on the same threads."""
    x, w = torch.randn(70, 100).bfloat16(), torch.randn(90, 100).bfloat16()
    want = [x[:n] @ w.t() for n in (70, 33, 5)]
    with run_on(f"cpu_{isa}"):
        for rank in (3, 16, 40):
            for rows, y in zip((70, 33, 5), want, strict=True):
                torch.ops.fastft.lora_shrink(x[:rows], w[:rank].contiguous(), [rank], 0.0, None)
                assert torch.equal(x[:rows] @ w.t(), y)


def shapes_for(device):
    return SHAPES if fastft.ops.registry._forced.get() in ("triton", "cuda_host") and device == "cpu" else SHAPES + LARGE


def each(device):
    if fastft.ops.registry._forced.get() == "reference":
        pytest.skip("the reference is the definition: float64 tests and gradcheck below hold it to the formula")
    for shape in shapes_for(device):
        for act, adapter in DTYPES:
            yield shape, act, adapter, inputs(shape, act, adapter, device)


def double(v):
    """The inputs in float64, as they are and as absolute values (for the sum of the terms' magnitudes)."""
    exact = {name: t.double() if t.is_floating_point() else t for name, t in v.items()}
    return exact, {name: t.abs() for name, t in exact.items()}


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_shrink(backend, p):
    for shape, act, adapter, v in each(backend):
        seed = v["seed"] if p else None
        with poisoned():
            s, mask = lora.lora_shrink(v["x"], v["a"], [shape[3]], p, seed)
        (want, want_mask), (terms, _) = (lora._shrink_reference(d["x"], d["a"], [shape[3]], p, seed) for d in double(v))
        assert torch.equal(mask, want_mask), "masks are bit-identical on every backend"
        plain = plain_product((v["x"] * keep_factor(mask, shape, p)).to(act).to(adapter), v["a"].t())
        assert s.dtype == F32
        assert_close(s, want, plain, terms, f"S {shape} {act} {adapter}")


def test_expand(backend):
    for shape, act, adapter, v in each(backend):
        got = v["y"].clone()
        lora.lora_expand_(got, v["s"], v["b"], 0.7)
        want, terms = (d["y"] + 0.7 * d["s"] @ d["b"].t() for d in double(v))
        plain = (v["y"] + plain_product(v["s"].to(adapter), v["b"].t()) * 0.7).to(act)
        assert_close(got, want, plain, terms, f"Y {shape} {act} {adapter}")


def test_grad_sb(backend):
    for shape, act, adapter, v in each(backend):
        with poisoned():
            ds, db = lora.lora_grad_sb(v["y"], v["s"], v["b"], 0.7)
        assert ds.dtype == F32 and db.dtype == adapter
        scaled = (v["y"].to(adapter) * 0.7).to(adapter)
        want, terms = (0.7 * d["y"] @ d["b"] for d in double(v))
        assert_close(ds, want, plain_product(scaled, v["b"]), terms, f"dS {shape} {act} {adapter}")
        want, terms = (0.7 * d["y"].t() @ d["s"] for d in double(v))
        assert_close(db, want, plain_product(scaled.t(), v["s"].to(adapter)), terms, f"dB {shape} {act} {adapter}")


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_grad_a(backend, p):
    for shape, act, adapter, v in each(backend):
        mask = mask_of(v, p)
        with poisoned():
            da = lora.lora_grad_a(v["s"], v["x"], v["a"], [shape[3]], mask, p)
        want, terms = (lora._grad_a_reference(d["s"], d["x"], d["a"], [shape[3]], mask, p) for d in double(v))
        plain = plain_product(v["s"].to(adapter).t(), (v["x"] * keep_factor(mask, shape, p)).to(act).to(adapter))
        assert da.dtype == adapter
        assert_close(da, want, plain, terms, f"dA {shape} {act} {adapter}")


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_grad_x(backend, p):
    for shape, act, adapter, v in each(backend):
        mask = mask_of(v, p)
        got = v["x"].clone()
        lora.lora_grad_x_(got, v["s"], v["a"], [shape[3]], mask, p)
        factor = keep_factor(mask, shape, p)
        want, terms = (d["x"] + (d["s"] @ d["a"]) * factor for d in double(v))
        plain = (v["x"] + (plain_product(v["s"].to(adapter), v["a"]) * factor).to(act)).to(act)
        assert_close(got, want, plain, terms, f"dX {shape} {act} {adapter}")
        if p:
            dropped = ~unpack_mask(mask[0], shape[1])
            assert torch.equal(got[dropped], v["x"][dropped]), "a dropped element's dX is untouched"


def keep_factor(mask, shape, p):
    return unpack_mask(mask[0], shape[1]) / (1 - p) if p else 1.0


def mask_of(v, p):
    """The packed masks [G, T, ceil(K/8)] of the seeds [G], as `lora_shrink` returns them."""
    if not p:
        return torch.empty(0, dtype=torch.uint8, device=v["x"].device)
    return torch.stack([dropout_mask(seed, *v["x"].shape, p) for seed in v["seed"].split(1)])


@pytest.mark.sanitize
def test_bitwise_repeatable(backend):
    v = inputs((100, 257, 63, 16), BF16, F32, backend)
    mask = mask_of(v, 0.3)

    def once():
        return [
            *lora.lora_shrink(v["x"], v["a"], [16], 0.3, v["seed"]),
            *lora.lora_grad_sb(v["y"], v["s"], v["b"], 0.7),
            lora.lora_grad_a(v["s"], v["x"], v["a"], [16], mask, 0.3),
        ]

    assert all(torch.equal(g, w) for g, w in zip(once(), once(), strict=True))


def test_thread_count_changes_no_bit():
    if "cpu" not in fastft.testing.available("cpu"):
        pytest.skip("no C++ library")
    v = inputs((1100, 640, 1100, 8), BF16, F32, "cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            with fastft.testing.use("cpu"):
                results.append(
                    (*lora.lora_grad_sb(v["y"], v["s"], v["b"], 0.7), lora.lora_shrink(v["x"], v["a"], [8], 0.0, None)[0])
                )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(g, w) for g, w in zip(other, results[0], strict=True))


@pytest.mark.sanitize
def test_rows_do_not_depend_on_their_neighbours(backend):
    v = inputs((63, 100, 129, 3), F32, F32, backend)
    order = torch.randperm(63, generator=torch.Generator().manual_seed(1)).to(backend)
    s, _ = lora.lora_shrink(v["x"], v["a"], [3], 0.0, None)
    shuffled, _ = lora.lora_shrink(v["x"][order].contiguous(), v["a"], [3], 0.0, None)
    assert torch.equal(shuffled, s[order])


@pytest.mark.sanitize
def test_nan_propagates_and_a_dropped_nan_does_not(backend):
    v = inputs((5, 16, 24, 4), F32, F32, backend)
    v["x"][2, 3] = float("nan")
    s, _ = lora.lora_shrink(v["x"], v["a"], [4], 0.0, None)
    assert s[2].isnan().all() and s[[0, 1, 3, 4]].isfinite().all()
    everything_dropped, mask = lora.lora_shrink(v["x"], v["a"], [4], 1.0, v["seed"])
    assert not mask.any() and torch.equal(everything_dropped, torch.zeros_like(s))
    assert torch.equal(lora.lora_grad_a(v["s"], v["x"], v["a"], [4], mask, 1.0), torch.zeros_like(v["a"]))


def test_sixteen_bit_extremes_round_as_torch_does(backend):
    """Adding 0 · S must return every 16-bit pattern unchanged: denormals, infinities, signed zeros; NaN stays NaN."""
    for dtype in (BF16, F16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(256, 256).to(backend)
        got = every.clone()
        lora.lora_expand_(got, torch.zeros(256, 1, device=backend), torch.zeros(256, 1, dtype=dtype, device=backend), 1.0)
        same = (
            (got.view(torch.int16) == every.view(torch.int16)) | ((every == 0) & (got == 0)) | (every.isnan() & got.isnan())
        )
        assert same.all(), every[~same]


def test_wrong_arguments_are_refused_by_the_kernels(backend):
    if fastft.ops.registry._forced.get() == "reference":
        pytest.skip("PyTorch checks the reference")
    v = inputs((5, 16, 24, 4), F32, F32, backend)
    x, a, b, y, s, seed = (v[name] for name in ("x", "a", "b", "y", "s", "seed"))
    mask, two_seeds = mask_of(v, 0.5), torch.cat([seed, seed])
    overlapping = torch.zeros(40, device=backend).as_strided((5, 24), (4, 1))
    for wrong in (
        lambda: lora.lora_shrink(x, a[:, :8].contiguous(), [4], 0.0, None),
        lambda: lora.lora_shrink(x.t(), a[:, :5].contiguous(), [4], 0.0, None),  # not contiguous
        lambda: lora.lora_shrink(x, a.to(BF16), [4], 0.0, None),
        lambda: lora.lora_shrink(x, a, [4], 0.5, two_seeds),  # one seed for each group
        lambda: lora.lora_shrink(x, a, [2, 2], 0.5, seed),
        lambda: lora.lora_shrink(x, a, [2, 1], 0.5, two_seeds),  # the ranks are not those of a
        lambda: lora.lora_shrink(x, a, [5, -1], 0.5, two_seeds),
        lambda: lora.lora_grad_sb(y, s[:4].contiguous(), b, 1.0),
        lambda: lora.lora_grad_sb(y, s.t().contiguous().t(), b, 1.0),  # columns of a wider matrix, not rows
        lambda: lora.lora_expand_(y, s.t().contiguous().t(), b, 1.0),
        lambda: lora.lora_expand_(y.t().contiguous().t(), s, b, 1.0),
        lambda: lora.lora_expand_(overlapping, s, b, 1.0),
        lambda: lora.lora_grad_a(s, x, a, [2, 2], mask, 0.5),  # one mask for each group
        lambda: lora.lora_grad_a(s, x, a, [3], mask, 0.5),
        lambda: lora.lora_grad_a(s, x, a, [4], mask[0], 0.5),
        lambda: lora.lora_grad_x_(x, s, a, [2, 2], mask, 0.5),
        lambda: lora.lora_grad_x_(x, s, a, [5], mask, 0.5),
        lambda: lora.lora_grad_x_(x, s.to(BF16), a, [4], mask, 0.5),
    ):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            wrong()


def test_philox_known_answers():
    """Known answers of Philox4x32-7 published with the paper's reference implementation (Random123)."""
    zero, ones = torch.tensor(0), torch.tensor(0xFFFFFFFF)
    assert [int(c) for c in philox4x32([zero] * 4, [zero] * 2)] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert [int(c) for c in philox4x32([ones] * 4, [ones] * 2)] == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_statistics(p):
    seed = torch.tensor([7])
    kept = unpack_mask(dropout_mask(seed, 400, 1000, p), 1000).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 4 * sigma / 400_000**0.5
    # Neither rows, columns nor neighbours share bits: their means and correlation are binomial too.
    assert ((kept.mean(0) - (1 - p)).abs() < 5 * sigma / 400**0.5).all()
    assert ((kept.mean(1) - (1 - p)).abs() < 5 * sigma / 1000**0.5).all()
    centred = (kept - kept.mean()) / sigma
    for a, b in ((centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])):
        assert abs((a * b).mean()) < 5 / 400_000**0.5
    other = unpack_mask(dropout_mask(seed + 1, 400, 1000, p), 1000).double()
    assert abs(((kept - kept.mean()) * (other - other.mean())).mean() / sigma**2) < 5 / 400_000**0.5
