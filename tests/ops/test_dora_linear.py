"""`lora_linear` and `SharedInput.project` with a magnitude (DoRA): against the explicit formula and PEFT's layer."""

import pytest
import torch
import torch.nn.functional as F

import fastft
from fastft.ops.dora import dora_norm, squared_row_norm
from fastft.ops.lora_linear import SharedInput, lora_linear
from tests.golden import assert_close, backends, run_on
from tests.ops.layers import BF16, F16, F32, F64, grads, layer, saved_bytes, seeded

SCALE = 0.5


@pytest.fixture(params=backends("amx"))
def device(request):
    with run_on(request.param) as device:
        yield device


def dora_layer(*args, **kwargs):
    """x, W, bias, A, B of `layer`, a float32 (float64) magnitude, and the norm for `SCALE`."""
    x, w, bias, a, b = layer(*args, **kwargs)
    norm = (w.double() + SCALE * b.detach().double() @ a.detach().double()).norm(dim=1)
    norm = norm.to(torch.promote_types(w.dtype, F32))
    spread = torch.rand(norm.shape, generator=torch.Generator().manual_seed(9)).to(norm)
    return x, w, bias, a, b, (norm * (0.5 + spread)).requires_grad_(), norm


def ours(x, w, bias, a, b, magnitude, norm, **options):
    return lora_linear(x, w, bias, a, b, SCALE, magnitude=magnitude, weight_norm=norm, **options)


def formula(x, w, bias, a, b, magnitude, norm):
    """In the inputs' dtypes, as PEFT composes it: base, low-rank term, g, bias."""
    y = F.linear(x, w) + (F.linear(F.linear(x.to(a.dtype), a), b) * SCALE).to(x.dtype)
    y = (magnitude / norm).to(x.dtype) * y
    return y if bias is None else y + bias


@pytest.mark.parametrize("act,adapter", [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)])
def test_outputs_and_gradients_beside_the_plain_composition(device, act, adapter):
    for t in ((7,), (2, 3), (), (0,)):
        # Rank 16: of few numbers in 16 bits plain PyTorch's error is luck.
        inputs = dora_layer(t, r=16, act=act, adapter=adapter, device=device)
        inputs[1].requires_grad_(), inputs[2].requires_grad_()
        dy = torch.randn(*t, 24, generator=torch.Generator().manual_seed(1)).to(act).to(device)
        exact = [i.detach().double().requires_grad_(i.requires_grad) for i in inputs]
        absolute = [i.detach().abs().requires_grad_(i.requires_grad) for i in exact]
        rows = zip(
            ("y", "dx", "dw", "dbias", "da", "db", "dm"),
            grads(ours, inputs, dy),
            grads(formula, exact, dy.double()),
            grads(formula, inputs, dy),
            grads(formula, absolute, dy.double().abs()),
            (act, act, act, act, adapter, adapter, F32),
            strict=True,
        )
        for name, got, want, plain, terms, dtype in rows:
            assert got.dtype == dtype
            assert_close(got, want, plain, terms, f"{name} {t} {act} {adapter}")


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p):
    x, w, bias, a, b, magnitude, norm = dora_layer((2, 3), k=8, n=5, r=3, act=F64, adapter=F64)
    extra = torch.randn(5, dtype=F64, requires_grad=True)
    diagonal = torch.randn(3, dtype=F64, requires_grad=True)

    def f(x, w, bias, a, b, magnitude, extra, diagonal):
        options = {"lora_bias": extra, "middle": lambda s: s * diagonal}
        return lora_linear(x, w, bias, a, b, 0.7, p, magnitude=magnitude, weight_norm=norm, **options)

    inputs = (x, w.requires_grad_(), bias.requires_grad_(), a, b, magnitude, extra, diagonal)
    with fastft.testing.use("reference"):
        assert torch.autograd.gradcheck(seeded(f), inputs)


def test_the_explicit_formula_with_the_norm_in_the_function():
    """m ∘ (W + s B A) / ‖W + s B A‖ as one weight, and the gradient with the norm a constant."""
    x, w, bias, a, b, magnitude, _ = dora_layer((2, 3), act=F64, adapter=F64)

    def composed(x, a, b, magnitude):
        norm = dora_norm(w, squared_row_norm(w), a, b, SCALE)
        return ours(x, w, bias, a, b, magnitude, norm)

    def explicit(x, a, b, magnitude):
        merged = w + SCALE * b @ a
        return F.linear(x, magnitude[:, None] * merged / merged.norm(dim=1, keepdim=True).detach(), bias)

    dy = torch.randn(2, 3, 24, dtype=F64)
    with fastft.testing.use("reference"):
        got = grads(composed, (x, a, b, magnitude), dy)
    for g, e in zip(got, grads(explicit, (x, a, b, magnitude), dy), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_pefts_layer_has_the_same_values_and_gradients(conv1d, with_bias):
    peft = pytest.importorskip("peft")
    if conv1d:
        base = pytest.importorskip("transformers.pytorch_utils").Conv1D(24, 40)
        base.bias.data.normal_()
        with_bias = True
    else:
        base = torch.nn.Linear(40, 24, bias=with_bias)
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        use_dora=True,
        target_modules=["0"],
        lora_dropout=0.0,
        init_lora_weights=False,
        fan_in_fan_out=conv1d,
    )
    model = peft.get_peft_model(torch.nn.Sequential(base), config)
    adapted = model.base_model.model[0]
    a, b = adapted.lora_A.default.weight, adapted.lora_B.default.weight
    magnitude = adapted.lora_magnitude_vector.default.weight
    magnitude.data *= torch.rand(24) + 0.5
    parameters = [a, b, magnitude]
    x, dy = torch.randn(2, 3, 40, requires_grad=True), torch.randn(2, 3, 24)
    want = model(x)
    want_grads = torch.autograd.grad(want, [x, *parameters], dy)
    norm = dora_norm(base.weight, squared_row_norm(base.weight, conv1d), a, b, 2.0, conv1d)
    got = lora_linear(x, base.weight, base.bias, a, b, 2.0, fan_in_fan_out=conv1d, magnitude=magnitude, weight_norm=norm)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for g, w in zip(torch.autograd.grad(got, [x, *parameters], dy), want_grads, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("magnitude_of_zero_row", [0.0, 1.0, 1e3])
def test_zero_rows_and_zero_magnitudes_give_no_nan(magnitude_of_zero_row):
    """A row of zeros stays zero whatever its magnitude; a magnitude of 0 passes its own gradient alone."""
    x, w, bias, a, b, magnitude, _ = dora_layer()
    with torch.no_grad():
        w[3], b[3], magnitude[3], magnitude[5] = 0, 0, magnitude_of_zero_row, 0
    norm = dora_norm(w, squared_row_norm(w), a, b, SCALE)
    y, dx, da, db, dm = grads(ours, (x, w, bias, a, b, magnitude, norm), torch.ones(6, 24))
    assert all(t.isfinite().all() for t in (y, dx, da, db, dm))
    assert torch.equal(y[:, 3], bias[3].expand(6)) and torch.equal(y[:, 5], bias[5].expand(6))
    assert dm[3] == 0 and not db[3].any() and dm[5] != 0 and not db[5].any()


def test_a_magnitude_of_the_norm_and_a_zero_b_is_the_base():
    x, w, bias, a, b, _, _ = dora_layer((2, 3))
    norm = dora_norm(w, squared_row_norm(w), a, torch.zeros_like(b), SCALE)
    y = ours(x, w, bias, a, torch.zeros_like(b), norm.clone(), norm)
    torch.testing.assert_close(y, F.linear(x, w, bias), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("act", [F32, BF16])
def test_saved_is_the_sum_before_the_magnitude_only_if_that_is_trained(act):
    t, k, r, n = 64, 256, 8, 128
    x, w, bias, a, b, magnitude, norm = dora_layer((t,), k=k, n=n, r=r, act=act)
    parameters, own = (x, w, bias, a, b, magnitude), 2 * 4 * n  # g and 1 / norm
    size, _ = saved_bytes(lambda: ours(x, w, bias, a, b, magnitude, norm), *parameters)
    assert size == 4 * t * r + own + t * n * x.element_size()
    size, _ = saved_bytes(lambda: ours(x, w, bias, a, b, magnitude.detach(), norm), *parameters)
    assert size == 4 * t * r + own


@pytest.mark.parametrize("packed", [False, True])
def test_a_group_of_dora_and_lora_on_one_input(packed):
    """Gradients of both kinds are chained in one dX; with columns of one GEMM as bases too."""
    x, w, bias, a, b, magnitude, norm = dora_layer((2, 3))
    _, w1, _, a1, b1 = layer(n=17, r=3, seed=1)
    _, w2, bias2, a2, b2, magnitude2, norm2 = dora_layer(n=9, r=2, seed=2)

    def shared(x, a, b, magnitude, a1, b1, a2, b2, magnitude2):
        inputs, bases = SharedInput(x, [a, a1, a2]), (None, None, None)
        if packed:
            bases = F.linear(inputs.x.detach(), torch.cat([w, w1, w2])).split([24, 17, 9], 1)
        y0 = inputs.project(0, w, bias, b, SCALE, magnitude=magnitude, weight_norm=norm, base=bases[0])
        y1 = inputs.project(1, w1, None, b1, SCALE, base=bases[1])
        y2 = inputs.project(2, w2, bias2, b2, SCALE, magnitude=magnitude2, weight_norm=norm2, base=bases[2])
        return torch.cat([F.relu(y0, inplace=True), y1.mul_(2), y2], -1)

    def apart(x, a, b, magnitude, a1, b1, a2, b2, magnitude2):
        y1 = F.linear(x, w1) + SCALE * x @ a1.t() @ b1.t()
        y0, y2 = formula(x, w, bias, a, b, magnitude, norm), formula(x, w2, bias2, a2, b2, magnitude2, norm2)
        return torch.cat([F.relu(y0), 2 * y1, y2], -1)

    inputs, dy = (x, a, b, magnitude, a1, b1, a2, b2, magnitude2), torch.randn(2, 3, 50)
    for g, e in zip(grads(shared, inputs, dy), grads(apart, inputs, dy), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


def test_frozen_parts():
    for trained in ("x", "w", "bias", "a", "b", "magnitude"):
        names, tensors = ("x", "w", "bias", "a", "b", "magnitude"), dora_layer()
        for name, tensor in zip(names, tensors):
            tensor.requires_grad_(name == trained)
        got, want = (grads(f, tensors, torch.ones(6, 24)) for f in (ours, formula))
        assert len(got) == 2
        torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast(dtype):
    x, w, bias, a, b, magnitude, _ = dora_layer((8,))
    with torch.autocast("cpu", dtype):
        norm = dora_norm(w, squared_row_norm(w), a, b, SCALE)
        y = ours(x, w, bias, a, b, magnitude, norm)
        plain = formula(x, w, bias, a, b, magnitude, norm)
    assert y.dtype == dtype and norm.dtype == F32
    y.sum().backward()
    assert {t.grad.dtype for t in (x, a, b, magnitude)} == {F32}
    exact = formula(*(t.double() for t in (x, w, bias, a, b, magnitude, norm)))
    assert (y - exact).norm() <= 1.5 * (plain - exact).norm()
