"""The partial family: every op on every backend against the formula in float64.

Copies are exact; sums are formed in float32 and rounded once. Tolerance of AdamW: `tests/golden.py`. The linears on top are
in `test_partial_linear`.
"""

import pytest
import torch

import fastft
from fastft.ops import partial
from tests.golden import assert_close, backends, poisoned, run_on

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = (F32, BF16, F16)
# rows, columns, indices
SHAPES = [
    (5, 24, 4),
    (1, 1, 1),
    (63, 129, 17),
    (100, 63, 63),
    (33, 1023, 100),
    (0, 8, 3),
    (7, 8, 0),
    (7, 0, 0),
    (2, 4096, 300),
]
LARGE = [(1100, 550, 40), (130, 2048, 700)]
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(params=backends())
def backend(request):
    with run_on(request.param) as device:
        yield device


def interpreted():
    return fastft.ops.registry._forced.get() in ("triton", "cuda_host")


def shapes(device):
    if fastft.ops.registry._forced.get() == "reference":
        pytest.skip("the reference is the definition: float64 tests hold it to the formula")
    yield from SHAPES if interpreted() and device == "cpu" else SHAPES + LARGE


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def draw(*size, dtype, device, seed=1):
    value = torch.randn(*size, generator=generator(seed))
    if len(size) > 1:
        value[2::5] *= 30
    return value.to(dtype).to(device)


def choose(size, count, device, seed=3):
    """`count` of `size` indices in a random order: kernels may not count on an ascending one."""
    return torch.randperm(size, generator=generator(seed))[:count].to(torch.int32).to(device)


def wider(t, before=3, after=4):
    """(a wider matrix of NaN, the view of it that holds t): rows that lie apart, at odd addresses."""
    wide = t.new_full((t.shape[0], before + t.shape[1] + after), float("nan"))
    return wide, wide[:, before : before + t.shape[1]].copy_(t)


def bits(t):
    return t.contiguous().view(torch.int16 if t.element_size() == 2 else torch.int32)


@pytest.mark.sanitize
@pytest.mark.parametrize("apart", [False, True])
def test_gather(backend, apart):
    for t, k, c in shapes(backend):
        for dtype in DTYPES:
            x, index = draw(t, k, dtype=dtype, device=backend), choose(k, c, backend)
            view = wider(x)[1] if apart else x
            with poisoned():
                got = partial.gather_columns(view, index)
            assert got.is_contiguous() and torch.equal(bits(got), bits(x[:, index.long()])), f"{(t, k, c)} {dtype}"


@pytest.mark.parametrize("apart", [False, True])
def test_scatter_add(backend, apart):
    for t, n, c in shapes(backend):
        for dtype in DTYPES:
            for z_dtype in {dtype, F32}:
                y, index = draw(t, n, dtype=dtype, device=backend), choose(n, c, backend)
                z = draw(t, c, dtype=z_dtype, device=backend, seed=2)
                want = y.clone()
                want[:, index.long()] = (y[:, index.long()].float() + z.float()).to(dtype)
                wide, got = wider(y) if apart else (y, y)
                partial.scatter_add_columns_(got, index, z)
                assert torch.equal(bits(got), bits(want)), f"{(t, n, c)} {dtype} {z_dtype}: one float32 sum, rounded once"
                if apart:
                    assert wide[:, :3].isnan().all() and wide[:, 3 + n :].isnan().all()


def slices(device, dtypes=DTYPES):
    """(weight [A, B], index, dim, base) for both dims and all dtypes; base differs from what stands in the weight."""
    for a, b, c in shapes(device):
        for dim in (0, 1):
            size = (a, b)[dim]
            for dtype in dtypes:
                index = choose(size, min(c, size), device)
                weight = draw(a, b, dtype=dtype, device=device)
                base = draw(*((len(index), b) if dim == 0 else (a, len(index))), dtype=dtype, device=device, seed=5)
                yield weight, index, dim, base


@pytest.mark.sanitize
@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("apart", [False, True])
def test_write(backend, apart, with_delta):
    for weight, index, dim, base in slices(backend):
        delta = draw(*base.shape, dtype=F32, device=backend, seed=6) if with_delta else None
        want = weight.clone()
        value = base if delta is None else (base.float() + delta).to(base.dtype)
        want.index_copy_(dim, index.long(), value)
        wide, got = wider(weight) if apart else (weight, weight)
        partial.write_slice_(got, index, dim, base, delta)
        what = f"{list(weight.shape)} {list(base.shape)} dim {dim} {weight.dtype}"
        assert torch.equal(bits(got), bits(want)), what
        if apart:
            assert wide[:, :3].isnan().all() and wide[:, 3 + weight.shape[1] :].isnan().all(), what


@pytest.mark.parametrize("apart", [False, True])
def test_exchange(backend, apart):
    """The old slice's base goes back, the new one's is kept and written with its delta, also where both lie."""
    slow = fastft.ops.registry._forced.get() == "triton" and backend == "cpu"  # the interpreter: nine launches a dtype
    for weight, index, dim, old_base in slices(backend, (BF16 if apart else F32,) if slow else DTYPES):
        size = weight.shape[dim]
        for fresh in (choose(size, min(len(index), size), backend, seed=8), index[:0], index):
            for old in ((index, old_base), (index[:0], old_base.narrow(dim, 0, 0).contiguous())):
                shape = [*weight.shape]
                shape[dim] = len(fresh)
                delta = draw(*shape, dtype=F32, device=backend, seed=6)
                restored = weight.index_copy(dim, old[0].long(), old[1])
                base = restored.index_select(dim, fresh)
                want = restored.index_copy(dim, fresh.long(), (base.float() + delta).to(base.dtype))
                got = wider(weight)[1] if apart else weight.clone()
                kept = partial.exchange_slice_(got, dim, *old, fresh, delta)
                what = f"{list(weight.shape)} {len(old[0])} -> {len(fresh)} dim {dim} {weight.dtype}"
                assert kept.is_contiguous() and torch.equal(bits(kept), bits(base)), what
                assert torch.equal(bits(got), bits(want)), what


def adamw(base, delta, grad, m, v, step, lr, beta1, beta2, eps, weight_decay):
    """The formulas (Loshchilov & Hutter 2019, algorithm 2) in the dtype of the arguments."""
    delta = delta * (1 - lr * weight_decay)
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad * grad
    update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
    return delta - lr * update, m, v


def check_adamw(device, weight, index, dim, base, step):
    """One update against the formula; the weight is round(base + delta) and keeps its other bits."""
    state = {n: draw(*base.shape, dtype=F32, device=device, seed=i) for i, n in enumerate(("delta", "grad", "m"), 7)}
    state["v"] = draw(*base.shape, dtype=F32, device=device, seed=11).square()
    before = {name: t.clone() for name, t in state.items()}
    rest, got = weight.clone(), wider(weight)[1]
    partial.slice_adamw_(got, index, dim, base, state["delta"], state["grad"], state["m"], state["v"], *HYPER.values(), step)
    what = f"{list(weight.shape)} {list(base.shape)} dim {dim} {weight.dtype} step {step}"
    want = adamw(base.double(), *(t.double() for t in before.values()), step, **HYPER)
    plain = adamw(base.float(), *before.values(), step, **HYPER)
    scale = adamw(base.double().abs(), *(t.double().abs() for t in before.values()), step, **HYPER)
    # A delta is what it was minus an update: both terms' magnitudes.
    magnitudes = before["delta"].double().abs() + (scale[0] - before["delta"].double().abs()).abs(), scale[1], scale[2]
    for name, w, p, mag in zip(("delta", "m", "v"), want, plain, magnitudes, strict=True):
        assert_close(state[name], w, p, mag, f"{name} {what}")
    assert torch.equal(state["grad"], before["grad"])
    written = rest.index_copy(dim, index.long(), (base.float() + state["delta"]).to(base.dtype))
    assert torch.equal(bits(got), bits(written)), f"the weight is round(base + delta): {what}"


@pytest.mark.sanitize
@pytest.mark.parametrize("step", [1, 1000])
def test_adamw(backend, step):
    for problem in slices(backend):
        check_adamw(backend, *problem, step)


def test_adamw_is_pytorchs(backend):
    """Ten steps with a schedule: torch.optim.AdamW over the delta, and the slice of the weight follows it."""
    a, b, c = 9, 40, 6
    base_weight, index = draw(a, b, dtype=BF16, device=backend), choose(b, c, backend)
    base, weight = base_weight[:, index.long()].contiguous(), base_weight.clone()
    delta, m, v = (torch.zeros(a, c, device=backend) for _ in range(3))
    twin = torch.nn.Parameter(delta.clone())
    optimizer = torch.optim.AdamW([twin], lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.3)
    for step in range(1, 11):
        grad = draw(a, c, dtype=F32, device=backend, seed=step)
        twin.grad, optimizer.param_groups[0]["lr"] = grad.clone(), 1e-2 / step
        optimizer.step()
        partial.slice_adamw_(weight, index, 1, base, delta, grad, m, v, 1e-2 / step, 0.9, 0.95, 1e-6, 0.3, step)
    torch.testing.assert_close(delta, twin.detach(), rtol=2e-5, atol=1e-7)
    rest = torch.ones(b, dtype=torch.bool, device=backend)
    rest[index.long()] = False
    assert torch.equal(weight[:, rest], base_weight[:, rest]), "what is not chosen keeps its bits"


@pytest.mark.sanitize
def test_nan_and_infinity_stay_where_they_are(backend):
    for dtype in DTYPES:
        x = draw(6, 40, dtype=dtype, device=backend)
        x[1, 3], x[2, 5], x[3, 7] = float("nan"), float("inf"), -float("inf")
        index = torch.tensor([7, 3, 5], dtype=torch.int32, device=backend)
        assert torch.equal(bits(partial.gather_columns(x, index)), bits(x[:, [7, 3, 5]]))
        delta = torch.zeros(6, 3, device=backend)
        delta[0, 0] = float("nan")
        weight, base = torch.zeros(6, 40, dtype=dtype, device=backend), x[:, [7, 3, 5]].contiguous()
        partial.write_slice_(weight, index, 1, base, delta)
        bad = ~weight.isfinite()
        assert bad.sum() == 4 and weight[1, 3].isnan() and weight[2, 5] == float("inf") and weight[0, 7].isnan()


def test_without_a_delta_bits_are_copied(backend):
    """Also those of signalling NaNs and of -0.0: whatever was pretrained comes back."""
    for dtype, patterns in (
        (BF16, [0x7F81, -0x8000, 0x0001]),
        (F16, [0x7C01, -0x8000, 0x0001]),
        (F32, [0x7F800001, -(2**31), 1]),
    ):
        integer = torch.int32 if dtype == F32 else torch.int16
        base = torch.tensor([patterns, patterns], dtype=integer).view(dtype).to(backend)
        for dim, slice in ((1, base), (0, base.t().contiguous())):
            index = choose(8, 3, backend)
            weight = torch.zeros((2, 8) if dim else (8, 2), dtype=dtype, device=backend)
            partial.write_slice_(weight, index, dim, slice, None)
            assert torch.equal(bits(weight.index_select(dim, index)), bits(slice)), f"{dtype} dim {dim}"


def test_wrong_arguments_are_refused_by_the_kernels(backend):
    if fastft.ops.registry._forced.get() == "reference":
        pytest.skip("PyTorch checks the reference")
    x, index = draw(6, 40, dtype=BF16, device=backend), choose(40, 5, backend)
    z, delta = draw(6, 5, dtype=BF16, device=backend), torch.zeros(6, 5, device=backend)
    w = draw(6, 40, dtype=BF16, device=backend)
    rest = 0.1, 0.9, 0.99, 1e-8, 0.0, 1
    for wrong in (
        lambda: partial.gather_columns(x.t(), index),
        lambda: partial.gather_columns(x, index.long()),
        lambda: partial.gather_columns(x, index[:, None]),
        lambda: partial.gather_columns(x[0], index),
        lambda: partial.scatter_add_columns_(x, index, z[:, :4].contiguous()),
        lambda: partial.scatter_add_columns_(x, index, z.to(F16)),
        lambda: partial.scatter_add_columns_(x.t(), index, z),
        lambda: partial.write_slice_(w, index, 2, z, None),
        lambda: partial.write_slice_(w, index, 0, z, None),
        lambda: partial.write_slice_(w, index, 1, z.to(F32), None),
        lambda: partial.write_slice_(w, index, 1, z, delta.to(BF16)),
        lambda: partial.write_slice_(w, index, 1, z, delta[:, :4].contiguous()),
        lambda: partial.exchange_slice_(w, 1, index, z.to(F32), index, delta),
        lambda: partial.exchange_slice_(w, 1, index, z, index[:4], delta),
        lambda: partial.slice_adamw_(w, index, 1, z, delta, delta.to(BF16), delta, delta, *rest),
        lambda: partial.slice_adamw_(w, index, 1, z, delta, delta, delta[:5], delta, *rest),
    ):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            wrong()


def test_indices_out_of_range_are_refused_on_cpus():
    if "cpu" not in fastft.testing.available("cpu"):
        pytest.skip("no C++ library")
    x, w, z = torch.randn(4, 8), torch.zeros(4, 8), torch.zeros(4, 1)
    for i in (-1, 8, 2**31 - 1):
        index = torch.tensor([i], dtype=torch.int32)
        for call in (
            lambda index=index: partial.gather_columns(x, index),
            lambda index=index: partial.scatter_add_columns_(w, index, z),
            lambda index=index: partial.write_slice_(w, index, 1, z, None),
        ):
            with pytest.raises(RuntimeError, match=rf"index {i} .*8"):
                call()
    assert not w.any()


@pytest.mark.parametrize("shape", [(1100, 700, 90), (40, 5000, 3)])
def test_thread_count_changes_no_bit(shape):
    if "cpu" not in fastft.testing.available("cpu"):
        pytest.skip("no C++ library")
    a, b, c = shape
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            with fastft.testing.use("cpu"):
                weight, index = draw(a, b, dtype=BF16, device="cpu"), choose(b, c, "cpu")
                base, grad = weight[:, index.long()].contiguous(), draw(a, c, dtype=F32, device="cpu", seed=4)
                state = [torch.zeros(a, c) for _ in range(3)]
                partial.slice_adamw_(weight, index, 1, base, state[0], grad, *state[1:], *HYPER.values(), 1)
                results.append((weight, *state, partial.gather_columns(weight, index)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(g, w) for g, w in zip(other, results[0], strict=True))


def test_opcheck():
    x, index = draw(6, 40, dtype=F32, device="cpu"), choose(40, 5, "cpu")
    z, state = torch.randn(6, 5), [torch.zeros(6, 5) for _ in range(4)]
    ops = torch.ops.fastft
    for op, args in (
        (ops.gather_columns, (x, index)),
        (ops.gather_columns, (torch.zeros(6, 60)[:, 3:43], index)),
        (ops.scatter_add_columns_, (x.clone(), index, z)),
        (ops.write_slice_, (x.clone(), index, 1, z, None)),
        (ops.write_slice_, (x.clone(), index, 1, z, z.clone())),
        (ops.exchange_slice_, (x.clone(), 1, index, z, choose(40, 5, "cpu", seed=9), z.clone())),
        (ops.slice_adamw_, (x.clone(), index, 1, z, *state, *HYPER.values(), 3)),
    ):
        torch.library.opcheck(op.default, args)
