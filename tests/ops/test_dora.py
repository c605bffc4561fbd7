"""The DoRA family: both ops on every backend against the formula in float64, and the row norm without B A.

Tolerance: `tests/golden.py`. The public function with a magnitude is in `test_dora_linear`.
"""

import pytest
import torch

import fastft
from fastft.ops import dora
from tests.golden import assert_close, backends, plain_product, poisoned, run_on

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]
# T, N, R
SHAPES = [
    (5, 24, 4),
    (1, 1, 1),
    (63, 129, 3),
    (100, 63, 16),
    (37, 48, 17),
    (33, 130, 65),
    (3, 1023, 1),
    (0, 8, 4),
    (7, 0, 4),
    (7, 8, 0),
]
LARGE = [(1100, 550, 8), (130, 1023, 33), (1023, 100, 100)]


@pytest.fixture(params=backends("amx"))
def backend(request):
    with run_on(request.param) as device:
        yield device


def inputs(shape, act, adapter, device, seed=1):
    t, n, r = shape
    g = torch.Generator().manual_seed(seed)

    def draw(*size, dtype):
        # Signed, matrices with outlier rows: cancellation and range at once. Several, for one alone makes one element of the
        # result so large that plain PyTorch's luck in rounding it would be the measure of the whole.
        value = torch.randn(*size, generator=g)
        if len(size) > 1:
            value[2::5] *= 30
        return value.to(dtype).to(device)

    return {
        "u": draw(t, n, dtype=act),
        "dy": draw(t, n, dtype=act),
        "s": draw(t, r, dtype=F32),
        "b": draw(n, r, dtype=adapter),
        "g": draw(n, dtype=F32),
        "bias": draw(n, dtype=act),
    }


def each(device):
    if fastft.ops.registry._forced.get() == "reference":
        pytest.skip("the reference is the definition: float64 tests and gradcheck hold it to the formula")
    small = fastft.ops.registry._forced.get() in ("triton", "cuda_host") and device == "cpu"
    for shape in SHAPES if small else SHAPES + LARGE:
        for act, adapter in DTYPES:
            yield shape, act, adapter, inputs(shape, act, adapter, device)


def double(v):
    """The inputs in float64, as they are and as absolute values (for the sum of the terms' magnitudes)."""
    exact = {name: t.double() for name, t in v.items()}
    return exact, {name: t.abs() for name, t in exact.items()}


@pytest.mark.parametrize("with_bias", [True, False])
def test_expand(backend, with_bias):
    for shape, act, adapter, v in each(backend):
        got_u = v["u"].clone()
        with poisoned():
            y = dora.dora_expand_(got_u, v["s"], v["b"], v["g"], v["bias"] if with_bias else None, 0.7)
        assert y.dtype == act and y.is_contiguous()
        what = f"{shape} {act} {adapter}"
        (want, d), (terms, m) = ((d["u"] + 0.7 * d["s"] @ d["b"].t(), d) for d in double(v))
        plain = (v["u"] + plain_product(v["s"].to(adapter), v["b"].t()) * 0.7).to(act)
        assert_close(got_u, want, plain, terms, f"U {what}")
        want, terms, plain = d["g"] * want, m["g"] * terms, v["g"].to(act) * plain
        if with_bias:
            want, terms, plain = want + d["bias"], terms + m["bias"], plain + v["bias"]
        assert_close(y, want, plain, terms, f"Y {what}")


def test_y_is_made_of_the_unrounded_sum(backend):
    """u · g would triple a rounding error of u: of 1 + 2^-9 bfloat16 leaves 1, of three times that and a bias 3.015625."""
    u, s = torch.ones(2, 3, dtype=BF16, device=backend), torch.full((2, 1), 2.0**-9, device=backend)
    b, g = torch.ones(3, 1, dtype=BF16, device=backend), torch.full((3,), 3.0, device=backend)
    bias = torch.full((3,), 2.0**-7, dtype=BF16, device=backend)
    y = dora.dora_expand_(u, s, b, g, bias, 1.0)
    assert (u == 1).all() and (y == 3.015625).all(), (u, y)


def test_grad_y(backend):
    for shape, act, adapter, v in each(backend):
        if act == adapter:  # the op has no adapter
            with poisoned():
                dyg, dots = dora.dora_grad_y(v["dy"], v["u"], v["g"])
            assert dyg.is_contiguous() and dots.dtype == F32
            assert torch.equal(dyg, (v["g"] * v["dy"].float()).to(act)), "one float32 product, rounded once"
            want, terms = ((d["dy"] * d["u"]).sum(0) for d in double(v))
            plain = plain_product(v["dy"].float().t(), v["u"].float()).diagonal()
            assert_close(dots, want, plain, terms, f"dots {shape} {act}")


def in_columns(t, before, after):
    """(a wider matrix of NaN, the view of it that holds t)."""
    wide = t.new_full((t.shape[0], before + t.shape[1] + after), float("nan"))
    return wide, wide[:, before : before + t.shape[1]].copy_(t)


@pytest.mark.sanitize
@pytest.mark.parametrize("before,after", [(0, 7), (8, 8), (3, 0)])
def test_columns_of_a_wider_matrix(backend, before, after):
    """Rows of u and s that lie apart, at aligned and unaligned addresses: the same bits, and the neighbours' untouched."""
    for t, n, r in ((5, 24, 4), (63, 129, 3), (40, 64, 16), (0, 8, 4), (1, 1, 1), (7, 0, 4), (7, 8, 0)):
        for act, adapter in DTYPES:
            v = inputs((t, n, r), act, adapter, backend)
            rest = v["b"], v["g"], v["bias"], 0.7
            want_u, (wide, u), (_, s) = v["u"].clone(), in_columns(v["u"], before, after), in_columns(v["s"], before, after)
            want = dora.dora_expand_(want_u, v["s"], *rest)
            with poisoned():
                y = dora.dora_expand_(u, s, *rest)
                grads = dora.dora_grad_y(v["dy"], u, v["g"])
            what = f"{(t, n, r)} {act} {adapter}"
            assert torch.equal(u, want_u) and torch.equal(y, want) and y.is_contiguous(), what
            assert wide[:, :before].isnan().all() and wide[:, before + n :].isnan().all(), f"beside U {what}"
            for g, w in zip(grads, dora.dora_grad_y(v["dy"], want_u, v["g"]), strict=True):
                assert g.is_contiguous() and torch.equal(g, w), what


@pytest.mark.sanitize
def test_bitwise_repeatable(backend):
    v = inputs((100, 63, 16), BF16, F32, backend)

    def once():
        u = v["u"].clone()
        return u, dora.dora_expand_(u, v["s"], v["b"], v["g"], v["bias"], 0.7), *dora.dora_grad_y(v["dy"], u, v["g"])

    assert all(torch.equal(g, w) for g, w in zip(once(), once(), strict=True))


@pytest.mark.parametrize("shape", [(1100, 1100, 8), (4000, 5, 3)])
def test_thread_count_changes_no_bit(shape):
    if "cpu" not in fastft.testing.available("cpu"):
        pytest.skip("no C++ library")
    v = inputs(shape, BF16, F32, "cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            with fastft.testing.use("cpu"):
                y = dora.dora_expand_(v["u"].clone(), v["s"], v["b"], v["g"], v["bias"], 0.7)
                results.append((y, *dora.dora_grad_y(v["dy"], v["u"], v["g"])))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(g, w) for g, w in zip(other, results[0], strict=True))


@pytest.mark.sanitize
def test_nan_and_infinity_stay_in_their_row_and_column(backend):
    v = inputs((5, 24, 4), F32, F32, backend)
    v["u"][2, 3], v["g"][5] = float("inf"), float("nan")
    y = dora.dora_expand_(v["u"], v["s"], v["b"], v["g"], v["bias"], 0.7)
    dyg, dots = dora.dora_grad_y(v["dy"], v["u"], v["g"])
    bad = ~y.isfinite()
    assert bad[:, 5].all() and bad[2, 3] and bad.sum() == 6
    assert dyg[:, 5].isnan().all() and dyg[:, :5].isfinite().all()
    assert not dots[3].isfinite() and dots.isfinite().sum() == 23


def test_wrong_arguments_are_refused_by_the_kernels(backend):
    if fastft.ops.registry._forced.get() == "reference":
        pytest.skip("PyTorch checks the reference")
    u, dy, s, b, g, bias = inputs((5, 24, 4), BF16, F32, backend).values()
    overlapping = torch.zeros(40, dtype=BF16, device=backend).as_strided((5, 24), (4, 1))
    for wrong in (
        lambda: dora.dora_expand_(u.t().contiguous().t(), s, b, g, bias, 1.0),
        lambda: dora.dora_expand_(overlapping, s, b, g, bias, 1.0),
        lambda: dora.dora_expand_(u, s[:4], b, g, bias, 1.0),
        lambda: dora.dora_expand_(u, s.to(BF16), b, g, bias, 1.0),
        lambda: dora.dora_expand_(u, s, b[:, :3].contiguous(), g, bias, 1.0),
        lambda: dora.dora_expand_(u, s, b.to(F16), g, bias, 1.0),
        lambda: dora.dora_expand_(u, s, b, g[:23], bias, 1.0),
        lambda: dora.dora_expand_(u, s, b, g.to(BF16), bias, 1.0),
        lambda: dora.dora_expand_(u, s, b, g, bias[:23], 1.0),
        lambda: dora.dora_expand_(u, s, b, g, bias.to(F32), 1.0),
        lambda: dora.dora_grad_y(dy.t().contiguous().t(), u, g),
        lambda: dora.dora_grad_y(dy, u[:4], g),
        lambda: dora.dora_grad_y(dy, u.to(F32), g),
        lambda: dora.dora_grad_y(dy, u, g[:23]),
    ):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            wrong()


def test_opcheck():
    u, dy, s, b, g, bias = inputs((5, 24, 4), F32, F32, "cpu").values()
    ops = torch.ops.fastft
    for op, args in (
        (ops.dora_expand_, (u.clone(), s, b, g, bias, 0.5)),
        (ops.dora_expand_, (torch.zeros(5, 30)[:, 3:27], torch.zeros(5, 9)[:, 2:6], b, g, None, 0.5)),
        (ops.dora_grad_y, (dy, u, g)),
        (ops.dora_grad_y, (dy, torch.zeros(5, 30)[:, 3:27], g)),
    ):
        torch.library.opcheck(op.default, args)


def weights(n, k, r, weight, adapter, seed=0):
    gen = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=gen)  # noqa: E731
    return draw(n, k).to(weight), draw(r, k).to(adapter), draw(n, r).to(adapter)


@pytest.mark.parametrize("weight,adapter", [*DTYPES, (F64, F64)])
@pytest.mark.parametrize("n,k,r", [(24, 40, 4), (1, 1, 1), (600, 100, 3), (63, 129, 17), (0, 8, 2), (8, 0, 2), (8, 16, 0)])
def test_row_norm(n, k, r, weight, adapter):
    w, a, b = weights(n, k, r, weight, adapter)
    want = (w.double() + 0.7 * b.double() @ a.double()).norm(dim=1)
    for fan_in_fan_out in (False, True):
        stored = w.t().contiguous() if fan_in_fan_out else w
        with fastft.testing.use("reference" if weight == F64 else "cpu"):
            squared = dora.squared_row_norm(stored, fan_in_fan_out)
            norm = dora.dora_norm(stored, squared, a, b, 0.7, fan_in_fan_out)
        assert squared.dtype == norm.dtype == (F64 if weight == F64 else F32) and norm.shape == (n,)
        tolerance = 1e-12 if weight == F64 else 2e-6
        torch.testing.assert_close(squared.double(), w.double().square().sum(1), rtol=tolerance, atol=0)
        torch.testing.assert_close(norm.double(), want, rtol=4 * tolerance, atol=0)


@pytest.mark.parametrize("weight,adapter,eps", [(F32, F32, 2**-23), (BF16, F32, 2**-23), (F64, F64, 2**-52)])
@pytest.mark.parametrize("rest", [1.0, 1e-1, 1e-3, 0.0])
def test_row_norm_where_the_update_almost_cancels_the_weight(weight, adapter, eps, rest):
    """What holds: the square errs by at most 2 eps of (‖W‖ + ‖sBA‖)². In float32 a norm of 1/20 of the weight's has 4
    digits left, one of 1/1000 none, and below sqrt(eps) of the weight's a norm is that floor, never 0.
    """
    noise, a, b = weights(64, 96, 4, weight, adapter)
    noise = rest * noise.double()
    w = (noise - b.double() @ a.double()).to(weight)
    update = b.double() @ a.double()
    want = (w.double() + update).norm(dim=1)
    size = w.double().norm(dim=1) + update.norm(dim=1)
    with fastft.testing.use("reference" if weight == F64 else "cpu"):
        norm = dora.dora_norm(w, dora.squared_row_norm(w), a, b, 1.0).double()
    assert ((norm.square() - want.square()).abs() <= 2 * eps * size.square()).all()
    assert (norm >= 0.99 * eps**0.5 * w.double().norm(dim=1)).all()
    if rest == 1e-1:  # about 1/20 of the weight's norm: (‖W‖ + ‖sBA‖) / norm is up to 64, and its square times eps the error
        assert ((norm - want).abs() <= 4e3 * eps * want).all()


def test_row_norm_is_not_rounded_by_autocast():
    w, a, b = weights(24, 40, 4, F32, F32)
    squared = dora.squared_row_norm(w)
    want = dora.dora_norm(w, squared, a, b, 0.7)
    with torch.autocast("cpu", BF16):
        assert torch.equal(dora.squared_row_norm(w), squared)
        assert torch.equal(dora.dora_norm(w, squared, a, b, 0.7), want)


def test_row_norm_has_no_gradient():
    w, a, b = weights(24, 40, 4, F32, F32)
    assert not dora.dora_norm(w, dora.squared_row_norm(w), a.requires_grad_(), b.requires_grad_(), 0.7).requires_grad


def test_row_norm_of_a_zero_row_without_an_update_is_zero():
    w, a, b = weights(24, 40, 4, F32, F32)
    w[3], b[3] = 0, 0
    norm = dora.dora_norm(w, dora.squared_row_norm(w), a, b, 0.7)
    assert norm[3] == 0 and (norm > 0).sum() == 23


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_row_norm_takes_factors_of_any_strides(fan_in_fan_out):
    w, a, b = weights(24, 40, 4, F32, F32)
    if fan_in_fan_out:
        w = w.t().contiguous()
    squared = dora.squared_row_norm(w, fan_in_fan_out)
    want = dora.dora_norm(w, squared, a, b, 0.7, fan_in_fan_out)
    strided = [t.t().contiguous().t() for t in (a, b)]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(dora.dora_norm(w, squared, *strided, 0.7, fan_in_fan_out), want)
