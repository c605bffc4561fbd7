"""The sparse family: every op on every backend against the formula in float64.

Copies, index searches and the bits that stochastic rounding adds are exact; sums are formed in float32. Tolerance of sums,
AdamW and SM3: `tests/golden.py`.
"""

import functools
import re
from pathlib import Path

import pytest
import torch

import fastft
from fastft.ops import sparse
from tests.golden import assert_close, backends, cut_off_product, plain_product, poisoned, run_on
from tests.ops.test_partial import BF16, DTYPES, F16, F32, F64, bits, draw, generator, interpreted, wider

# rows, columns, entries: none, one, all, rows without any
SHAPES = [
    (5, 24, 17),
    (1, 1, 1),
    (1, 1, 0),
    (7, 8, 56),
    (0, 8, 0),
    (7, 0, 0),
    (40, 3, 30),
    (3, 700, 1),
    (33, 129, 400),
]
LARGE = [(300, 1023, 9000), (33, 5000, 3000), (2000, 65, 1500)]
TOKENS = (1, 0, 5, 33)
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(params=backends())
def backend(request):
    with run_on(request.param) as device:
        yield device


def needs(device, *ops):
    """Only the C++ CPU kernels and the reference have all ops: elsewhere those that are missing fall to the next backend."""
    forced = fastft.ops.registry._forced.get()
    missing = [reason for op in ops if (reason := op.missing(forced, device))]
    if missing and forced not in ("cpu", "reference"):
        pytest.skip(missing[0])


def shapes(device):
    yield from SHAPES if interpreted() and device == "cpu" else SHAPES + LARGE


def with_tokens(device):
    for shape in shapes(device):
        yield from ((t, shape) for t in (TOKENS if shape in SHAPES else TOKENS[-1:]))


def choose(rows, cols, count, device, seed=3):
    """(starts, columns) of `count` entries: some rows have many times the mean, every fifth has only what must go there."""
    weight = torch.randn(rows, 1, generator=generator(seed)).mul_(2).exp_()
    weight[2::5] = 1e-30
    score = torch.rand(rows, cols, generator=generator(seed + 1)).clamp_(min=1e-30).log_() / weight
    mask = torch.zeros(rows * cols, dtype=torch.bool)
    mask[score.flatten().topk(count).indices] = True
    mask = mask.view(rows, cols)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return starts.to(device), mask.nonzero()[:, 1].to(torch.int32).to(device)


def at(starts, columns):
    """Row and column of every entry."""
    rows = torch.arange(len(starts) - 1, device=starts.device).repeat_interleave(starts.diff())
    return rows, columns.long()


def entries(device, seed=3):
    """(weight [A, B], starts, columns, base) of every shape and dtype; base differs from what stands in the weight."""
    for a, b, e in shapes(device):
        starts, columns = choose(a, b, e, device, seed)
        for dtype in DTYPES:
            weight = draw(a, b, dtype=dtype, device=device)
            yield weight, starts, columns, draw(e, dtype=dtype, device=device, seed=5)


def vectors(count, device, **seeds):
    return {name: draw(count, dtype=F32, device=device, seed=seed) for name, seed in seeds.items()}


def untouched(wide, cols):
    return wide[:, :3].isnan().all() and wide[:, 3 + cols :].isnan().all()


@pytest.mark.sanitize
@pytest.mark.parametrize("apart", [False, True])
def test_gather(backend, apart):
    needs(backend, sparse.gather_entries)
    for weight, starts, columns, _ in entries(backend):
        view = wider(weight)[1] if apart else weight
        with poisoned():
            got = sparse.gather_entries(view, starts, columns)
        assert got.is_contiguous() and torch.equal(bits(got), bits(weight[at(starts, columns)])), f"{list(weight.shape)}"


@pytest.mark.sanitize
@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("apart", [False, True])
def test_write(backend, apart, with_delta):
    needs(backend, sparse.write_entries_)
    for weight, starts, columns, base in entries(backend):
        delta = draw(len(columns), dtype=F32, device=backend, seed=6) if with_delta else None
        want = weight.clone()
        want[at(starts, columns)] = base if delta is None else (base.float() + delta).to(base.dtype)
        wide, got = wider(weight) if apart else (weight, weight)
        sparse.write_entries_(got, starts, columns, base, delta)
        what = f"{list(weight.shape)} {len(columns)} {weight.dtype}"
        assert torch.equal(bits(got), bits(want)), what
        if apart:
            assert untouched(wide, weight.shape[1]), what


def by_tensor_cores(device, dtype):
    """Triton's products, as PyTorch's on a GPU, add up nothing outside of the tensor cores; the CUDA kernels do."""
    return device == "cuda" and dtype != F32 and fastft.ops.registry._forced.get() == "triton"


@functools.cache
def product_problem(tokens, shape, dtype, cut_off):
    """(index, left, right, sums in float64, of absolute values, PyTorch's in float32), once for all backends, on the CPU."""
    a, b, e = shape
    index = choose(a, b, e, "cpu")
    left, right = draw(tokens, a, dtype=dtype, device="cpu"), draw(tokens, b, dtype=dtype, device="cpu", seed=2)
    where, wide = at(*index), (left.double().t(), right.double())
    sums, magnitudes = ((one @ two)[where] for one, two in (wide, [t.abs() for t in wide]))
    plain = cut_off_product(left.t(), right, where) if cut_off else plain_product(left.float().t(), right.float(), where)
    return index, left, right, sums, magnitudes, plain


def check_product(device, tokens, shape, dtype, add, apart=False):
    cut_off = by_tensor_cores(device, dtype) and tokens > 256
    index, left, right, sums, magnitudes, plain = product_problem(tokens, shape, dtype, cut_off)
    before = draw(shape[2], dtype=F32, device="cpu", seed=4)
    out = before.to(device, copy=True) if add else torch.full_like(before, float("nan"), device=device)
    given = [wider(t)[1] if apart else t for t in (left.to(device), right.to(device))]
    sparse.sampled_product_(out, *given, *(t.to(device) for t in index), add)
    start = before if add else torch.zeros_like(before)
    what = f"{tokens} {shape} {dtype} add {add}"
    assert_close(out.cpu(), start.double() + sums, start + plain, start.double().abs() + magnitudes, what)
    return out


@pytest.mark.sanitize
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_sampled_product(backend, apart, add):
    needs(backend, sparse.sampled_product_)
    for tokens, shape in with_tokens(backend):
        for dtype in DTYPES:
            check_product(backend, tokens, shape, dtype, add, apart)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sampled_product_of_many_tokens(backend, dtype):
    """Several blocks of tokens and of columns; the same bits again."""
    needs(backend, sparse.sampled_product_)
    problems = [(300, (9, 70, 50))]  # Triton's interpreter is slow
    if not (interpreted() and backend == "cpu"):
        problems += [(1100, (70, 300, 900)), (2049, (20, 5000, 1500)), (513, (300, 40, 12000)), (64, (1100, 1100, 24200))]
    for tokens, shape in problems:
        first = check_product(backend, tokens, shape, dtype, add=False)
        assert torch.equal(first, check_product(backend, tokens, shape, dtype, add=False)), "repeats bit by bit"


def adamw(delta, grad, m, v, first, second, lr, beta1, beta2, eps, weight_decay):
    """The formulas of the family's docstring in the dtype of the arguments; first and second are c₁ and c₂."""
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad * grad
    return (1 - lr * weight_decay) * delta - lr * first * m / (v.sqrt() * second + eps), m, v


def corrections_of(steps, beta1, beta2):
    """float64 (c₁, c₂) of ages; whatever stands at age 0 is never used."""
    steps = torch.as_tensor(steps, dtype=F64).clamp(min=1)
    return 1 / (1 - beta1**steps), (1 - beta2**steps) ** -0.5


def check_adamw(device, weight, starts, columns, base, moments, aged, step):
    """One update against the formula; stored moments are those of the formula, or one of the two bfloat16 next to them."""
    count = len(columns)
    state = vectors(count, device, delta=7, grad=8, m=9, v=11)
    state["v"].square_()
    state["m"], state["v"] = state["m"].to(moments), state["v"].to(moments)
    before = {name: t.clone() for name, t in state.items()}
    first, second = corrections_of(step, HYPER["beta1"], HYPER["beta2"])
    age = table = None
    if aged:
        age = torch.randint(0, 14, (count,), generator=generator(13)).to(torch.int32).to(device)
        table = torch.stack(corrections_of(torch.arange(9), HYPER["beta1"], HYPER["beta2"]), 1).float().to(device)
        first, second = table[(age + 1).clamp(max=8).long()].double().unbind(1)
        old_age = age.clone()
    rest, (wide, got) = weight.clone(), wider(weight)
    sparse.sparse_adamw_(
        got,
        starts,
        columns,
        base,
        state["delta"],
        state["grad"],
        state["m"],
        state["v"],
        age,
        table,
        *HYPER.values(),
        step,
        5,
    )
    what = f"{list(weight.shape)} {count} {weight.dtype} moments {moments} aged {aged} step {step}"
    wide_before = {name: t.double() for name, t in before.items()}
    want = adamw(*wide_before.values(), first, second, **HYPER)
    narrow = (c.float() if isinstance(c, torch.Tensor) else c for c in (first, second))
    plain = adamw(*(t.float() for t in before.values()), *narrow, **HYPER)
    scale = adamw(*(t.abs() for t in wide_before.values()), first, second, **HYPER)
    # A delta is what it was minus an update: both terms' magnitudes.
    old = wide_before["delta"].abs()
    for name, w, p, mag in zip(("delta", "m", "v"), want, plain, (old + (scale[0] - old).abs(), *scale[1:]), strict=True):
        if state[name].dtype == F32:
            assert_close(state[name], w, p, mag, f"{name} {what}")
        else:
            step_size = torch.ldexp(torch.ones_like(w), torch.frexp(w.abs().clamp(min=1e-38))[1] - 8)
            # A float32 just below a bfloat16 can round to the next one above it.
            assert ((state[name].double() - w).abs() <= step_size * 1.001).all(), f"{name} {what}"
    assert torch.equal(state["grad"], before["grad"])
    if aged:
        assert torch.equal(age, old_age + 1), what
    rest[at(starts, columns)] = (base.float() + state["delta"]).to(base.dtype)
    assert torch.equal(bits(got), bits(rest)), f"the weight is round(base + delta): {what}"
    assert untouched(wide, weight.shape[1]), what


@pytest.mark.sanitize
@pytest.mark.parametrize("aged", [False, True])
@pytest.mark.parametrize("moments", [F32, BF16])
def test_adamw(backend, moments, aged):
    needs(backend, sparse.sparse_adamw_)
    for step in (1,) if aged else (1, 1000):
        for problem in entries(backend):
            check_adamw(backend, *problem, moments, aged, step)


def test_adamw_is_pytorchs(backend):
    """Ten steps with a schedule: torch.optim.AdamW over the delta, and the entries of the weight follow it."""
    needs(backend, sparse.sparse_adamw_)
    a, b, e = 9, 40, 50
    starts, columns = choose(a, b, e, backend)
    where = at(starts, columns)
    base_weight = draw(a, b, dtype=BF16, device=backend)
    base, weight = base_weight[where], base_weight.clone()
    delta, m, v = (torch.zeros(e, device=backend) for _ in range(3))
    aged = [torch.zeros(e, device=backend) for _ in range(3)]
    age = torch.zeros(e, dtype=torch.int32, device=backend)
    table = torch.stack(corrections_of(torch.arange(11), 0.9, 0.95), 1).float().to(backend)
    twin = torch.nn.Parameter(delta.clone())
    optimizer = torch.optim.AdamW([twin], lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.3)
    for step in range(1, 11):
        grad = draw(e, dtype=F32, device=backend, seed=step)
        twin.grad, optimizer.param_groups[0]["lr"] = grad.clone(), 1e-2 / step
        optimizer.step()
        rest = 1e-2 / step, 0.9, 0.95, 1e-6, 0.3, step, 0
        sparse.sparse_adamw_(weight, starts, columns, base, delta, grad, m, v, None, None, *rest)
        sparse.sparse_adamw_(weight, starts, columns, base, aged[0], grad, *aged[1:], age, table, *rest)
    torch.testing.assert_close(delta, twin.detach(), rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(aged[0], delta, rtol=1e-5, atol=1e-7)
    assert (age == 10).all()
    others = torch.ones(a, b, dtype=torch.bool, device=backend)
    others[where] = False
    assert torch.equal(weight[others], base_weight[others]), "what is not chosen keeps its bits"


def added_bits(position, seed):
    """What is added below the 16 bits that are kept: (of the first, of the second moment)."""
    h = (position * 0x9E3779B1 + seed * 0x85EBCA77) % 2**32
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    h ^= h >> 16
    return h & 0xFFFF, h >> 16


@pytest.mark.parametrize("seed", [0, 12345, 2**40 + 7, -3])
def test_stochastic_rounding_adds_the_hash(backend, seed):
    """Values whose float32 arithmetic is exact, so that every backend rounds the same ones: the bits are the formula's."""
    needs(backend, sparse.sparse_adamw_)
    a, b, e = 40, 60, 611
    starts, columns = choose(a, b, e, backend)
    whole = [torch.randint(lo, hi, (e,), generator=generator(i)).float() for i, (lo, hi) in enumerate([(-128, 128)] * 2)]
    grad, m, v = whole[0], whole[1] * 2.0**-11, torch.randint(0, 256, (e,), generator=generator(5)) * 2.0**-7
    exact = 0.5 * m + 0.5 * grad, 0.5 * v + 0.5 * grad * grad
    grad = grad.to(backend)
    state = [t.to(BF16).to(backend) for t in (m, v)]
    weight, base, delta = (torch.zeros(*size, device=backend) for size in ((a, b), (e,), (e,)))
    rest = 1e-2, 0.5, 0.5, 1e-8, 0.0, 1, seed
    sparse.sparse_adamw_(weight, starts, columns, base, delta, grad, *state, None, None, *rest)
    added = torch.tensor([added_bits(p, seed % 2**32) for p in range(e)])
    for got, value, noise in zip(state, exact, added.unbind(1), strict=True):
        want = ((value.view(torch.int32) + noise.to(torch.int32)) >> 16).to(torch.int16)
        assert torch.equal(bits(got).cpu(), want)
        assert (got.cpu().float() != value).any(), "something was rounded"


def test_stochastic_rounding_is_unbiased(backend):
    """Second moments decay on the average although a single one can't: v · 0.999 rounds to v."""
    needs(backend, sparse.sparse_adamw_)
    e = 4096
    starts = torch.tensor([0, e], dtype=torch.int64, device=backend)
    columns = torch.arange(e, dtype=torch.int32, device=backend)
    zeros = torch.zeros(e, device=backend)
    weight, m = torch.zeros(1, e, device=backend), torch.full((e,), 0.9, dtype=BF16, device=backend)
    v, value = torch.full((e,), 1.25, dtype=BF16, device=backend), (0.999 * 1.25, 0.999 * float(m[0]))
    sparse.sparse_adamw_(weight, starts, columns, zeros, zeros.clone(), zeros, m, v, None, None, 0, 0.999, 0.999, 1, 0, 1, 3)
    for got, want, step in ((v, value[0], 2**-7), (m, value[1], 2**-8)):
        # A mean of e draws, each one of two numbers `step` apart: half a step of deviation at most, five of them allowed.
        assert len(got.unique()) == 2 and abs(got.double().mean().item() - want) < 5 * step / 2 / e**0.5


def test_moments_that_are_not_finite_stay_so(backend):
    needs(backend, sparse.sparse_adamw_)
    starts = torch.tensor([0, 3], dtype=torch.int64, device=backend)
    columns = torch.arange(3, dtype=torch.int32, device=backend)
    grad = torch.tensor([float("nan"), float("inf"), 1.0], device=backend)
    weight, base, delta = torch.zeros(1, 3, device=backend), torch.zeros(3, device=backend), torch.zeros(3, device=backend)
    m, v = (torch.zeros(3, dtype=BF16, device=backend) for _ in range(2))
    sparse.sparse_adamw_(weight, starts, columns, base, delta, grad, m, v, None, None, *HYPER.values(), 1, 9)
    for got in (m, v):
        assert got[0].isnan() and got[1] == float("inf") and got[2].isfinite()
    assert weight[0, 0].isnan() and weight[0, 2].isfinite()


def check_sm3(device, weight, starts, columns, base):
    """One update against the formula; the weight is round(base + delta) and keeps its other bits."""
    lr, eps, decay = 1e-2, 1e-8, 0.1
    (a, b), (rows, cols) = weight.shape, at(starts, columns)
    old = vectors(len(columns), device, delta=7, grad=8)
    row, col = (draw(n, dtype=F32, device=device, seed=s).square() for n, s in ((a, 9), (b, 10)))

    def formula(delta, grad, row, col):
        bound = torch.minimum(row[rows], col[cols]) + grad * grad
        held = row.new_full((len(row) + 1, len(col) + 1), -1)
        held[:-1, -1], held[-1, :-1], held[rows, cols] = row, col, bound
        update = lr * grad / (bound + eps).sqrt()
        return (1 - lr * decay) * delta - update, held[:-1].amax(1), held[:, :-1].amax(0), update

    want = formula(*(t.double() for t in (*old.values(), row, col)))
    plain = formula(*old.values(), row, col)
    delta, new_row, new_col, rest, (wide, got) = (
        old["delta"].clone(),
        row.clone(),
        col.clone(),
        weight.clone(),
        wider(weight),
    )
    sparse.sparse_sm3_(got, starts, columns, base, delta, old["grad"], new_row, new_col, lr, eps, decay)
    what = f"{[a, b]} {len(columns)} {weight.dtype}"
    assert_close(delta, want[0], plain[0], old["delta"].double().abs() + want[3].abs(), f"delta {what}")
    assert_close(new_row, want[1], plain[1], want[1], f"row {what}")
    assert_close(new_col, want[2], plain[2], want[2], f"column {what}")
    rest[rows, cols] = (base.float() + delta).to(base.dtype)
    assert torch.equal(bits(got), bits(rest)), f"the weight is round(base + delta): {what}"
    assert untouched(wide, b), what


@pytest.mark.sanitize
def test_sm3(backend):
    needs(backend, sparse.sparse_sm3_)
    for problem in entries(backend):
        check_sm3(backend, *problem)


def test_match(backend):
    needs(backend, sparse.match_entries)
    for a, b, e in shapes(backend):
        some, none = choose(a, b, e, backend), choose(a, b, 0, backend)
        for other in (some, none, choose(a, b, (e + 1) // 2, backend, seed=17), choose(a, b, min(a * b, 3 * e), backend)):
            for one, two in ((some, other), (other, some)):
                place = {(r, c): i for i, (r, c) in enumerate(zip(*(t.tolist() for t in at(*two)), strict=True))}
                want = [place.get(entry, -1) for entry in zip(*(t.tolist() for t in at(*one)), strict=True)]
                with poisoned():
                    got = sparse.match_entries(*one, *two)
                assert got.dtype == torch.int64 and got.tolist() == want, f"{(a, b, e)}"


@functools.cache
def add_product_problem(tokens, shape, dtype):
    """(index, values, y, x, sums in float64, of absolute values, PyTorch's), once for all backends, on the CPU."""
    a, b, e = shape
    index, values = choose(a, b, e, "cpu"), draw(e, dtype=F32, device="cpu", seed=4)
    dense = torch.zeros(a, b)
    dense[at(*index)] = values
    x, y = draw(tokens, b, dtype=dtype, device="cpu"), draw(tokens, a, dtype=dtype, device="cpu", seed=2)
    sums, magnitudes = (
        one + two @ three.t()
        for one, two, three in ([t.double() for t in (y, x, dense)], [t.double().abs() for t in (y, x, dense)])
    )
    return index, values, y, x, sums, magnitudes, (y.float() + plain_product(x.float(), dense.t())).to(dtype)


@pytest.mark.sanitize
@pytest.mark.parametrize("apart", [False, True])
def test_add_product(backend, apart):
    needs(backend, sparse.add_sparse_product_)
    problems = list(with_tokens(backend))
    if not (interpreted() and backend == "cpu"):
        problems += [(300, (70, 300, 900)), (17, (300, 2000, 9000)), (700, (20, 64, 300))]
    for tokens, shape in problems:
        for dtype in DTYPES:
            index, values, y, x, want, magnitudes, plain = add_product_problem(tokens, shape, dtype)
            starts, columns, values, x, y = (t.to(backend, copy=True) for t in (*index, values, x, y))
            wide, got = wider(y) if apart else (None, y.clone())
            sparse.add_sparse_product_(got, wider(x)[1] if apart else x, starts, columns, values)
            assert_close(got.cpu(), want, plain, magnitudes, f"{tokens} {shape} {dtype}")
            empty = starts.diff() == 0
            assert torch.equal(got[:, empty], y[:, empty]), "rows of delta without entries add nothing"
            if apart:
                assert untouched(wide, shape[0])


def test_without_a_delta_bits_are_copied(backend):
    """Also those of signalling NaNs and of -0.0: whatever was pretrained comes back."""
    needs(backend, sparse.write_entries_, sparse.gather_entries)
    starts = torch.tensor([0, 1, 1, 3], dtype=torch.int64, device=backend)
    columns = torch.tensor([5, 0, 7], dtype=torch.int32, device=backend)
    for dtype, patterns in (
        (BF16, [0x7F81, -0x8000, 0x0001]),
        (F16, [0x7C01, -0x8000, 0x0001]),
        (F32, [0x7F800001, -(2**31), 1]),
    ):
        base = torch.tensor(patterns, dtype=torch.int32 if dtype == F32 else torch.int16).view(dtype).to(backend)
        weight = torch.ones(3, 8, dtype=dtype, device=backend)
        sparse.write_entries_(weight, starts, columns, base, None)
        assert torch.equal(bits(sparse.gather_entries(weight, starts, columns)), bits(base)), dtype
        assert (weight == 1).sum() == 21


def test_wrong_arguments_are_refused_by_the_kernels(backend):
    if fastft.ops.registry._forced.get() == "reference":
        pytest.skip("PyTorch checks the reference")
    starts, columns = choose(6, 40, 30, backend)
    x, y, w = (draw(6, n, dtype=BF16, device=backend) for n in (40, 6, 40))
    base, f = draw(30, dtype=BF16, device=backend), torch.zeros(30, device=backend)
    age, table, rest = (
        torch.zeros(30, dtype=torch.int32, device=backend),
        torch.ones(4, 2, device=backend),
        (*HYPER.values(), 1, 0),
    )
    row, col = torch.zeros(6, device=backend), torch.zeros(40, device=backend)
    gather, write, product = sparse.gather_entries, sparse.write_entries_, sparse.sampled_product_
    step, sm3, match, add = sparse.sparse_adamw_, sparse.sparse_sm3_, sparse.match_entries, sparse.add_sparse_product_
    for op, *wrong in (
        (gather, w.t(), starts, columns),
        (gather, w, starts.int(), columns),
        (gather, w, starts, columns.long()),
        (gather, w, starts[:-1].contiguous(), columns),
        (gather, w[0], starts, columns),
        (write, w, starts, columns, base.float(), None),
        (write, w, starts, columns, base[:29], None),
        (write, w, starts, columns, base, f.to(BF16)),
        (product, f[:29], y, x, starts, columns, False),
        (product, f.to(BF16), y, x, starts, columns, False),
        (product, f, y[:5], x, starts, columns, False),
        (product, f, x, y, starts, columns, False),
        (step, w, starts, columns, base, f, f.to(BF16), f, f, None, None, *rest),
        (step, w, starts, columns, base, f, f, f, f[:29], None, None, *rest),
        (step, w, starts, columns, base, f, f, f, f.to(BF16), None, None, *rest),
        (step, w, starts, columns, base, f, f, f, f, age, None, *rest),
        (step, w, starts, columns, base, f, f, f, f, age.long(), table, *rest),
        (step, w, starts, columns, base, f, f, f, f, age, table[:, 0].contiguous(), *rest),
        (step, w, starts, columns, base, f, f, f, f, age, table[:0], *rest),
        (step, w, starts, columns, base, f, f, f, f, None, None, *rest[:-2], 0, 0),
        (sm3, w, starts, columns, base, f, f, col, row, 0.1, 1e-8, 0.0),
        (sm3, w, starts, columns, base, f, f.to(BF16), row, col, 0.1, 1e-8, 0.0),
        (match, starts, columns.long(), starts, columns),
        (match, starts, columns, starts[:-1].contiguous(), columns),
        (add, y, x, starts, columns, f[:29]),
        (add, y, x, starts, columns, f.to(BF16)),
        (add, x, y, starts, columns, f),
        (add, y.t(), x, starts, columns, f),
    ):
        if op.missing(fastft.ops.registry._forced.get(), backend) is None:
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                op(*wrong)


def test_indices_that_do_not_fit_are_refused_on_cpus():
    if "cpu" not in fastft.testing.available("cpu"):
        pytest.skip("no C++ library")
    w, x, y, f = torch.zeros(3, 8), torch.ones(4, 8), torch.zeros(4, 3), torch.ones(40)
    right = torch.tensor([0, 1, 1, 40]), torch.tensor([3, *range(39)], dtype=torch.int32) % 8
    wrong = [
        (right[0], right[1].index_fill(0, torch.tensor([place]), i)) for place in (0, 20, 39) for i in (-1, 8, 2**31 - 1)
    ]
    wrong += [
        (torch.tensor(s), right[1]) for s in ([0, 1, 1, 39], [1, 1, 1, 40], [0, 5, 4, 40], [0, -1, 1, 40], [0, 50, 50, 40])
    ]
    for index in wrong:
        for call in (
            lambda index=index: sparse.gather_entries(w, *index),
            lambda index=index: sparse.write_entries_(w, *index, f, None),
            lambda index=index: sparse.sampled_product_(f, torch.ones(4, 3), x, *index, True),
            lambda index=index: sparse.sparse_adamw_(w, *index, f, f, f, f, f, None, None, *HYPER.values(), 1, 0),
            lambda index=index: sparse.sparse_sm3_(w, *index, f, f, f, torch.zeros(3), torch.zeros(8), 0.1, 1e-8, 0.0),
            lambda index=index: sparse.add_sparse_product_(y, x, *index, f),
        ):
            with fastft.testing.use("cpu"), pytest.raises(RuntimeError, match="columns|starts"):
                call()
    assert not w.any() and not y.any() and (f == 1).all()


def test_thread_count_changes_no_bit():
    if "cpu" not in fastft.testing.available("cpu"):
        pytest.skip("no C++ library")
    threads, results = torch.get_num_threads(), []
    a, b, e = 700, 900, 40000
    starts, columns = choose(a, b, e, "cpu")
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            with fastft.testing.use("cpu"):
                weight, base = draw(a, b, dtype=BF16, device="cpu"), draw(e, dtype=BF16, device="cpu", seed=5)
                out, row, col = torch.empty(e), torch.zeros(a), torch.zeros(b)
                left, right = (draw(600, n, dtype=BF16, device="cpu", seed=s) for n, s in ((a, 6), (b, 7)))
                sparse.sampled_product_(out, left, right, starts, columns, False)
                state = [torch.zeros(e), *(torch.zeros(e, dtype=BF16) for _ in range(2))]
                sparse.sparse_adamw_(
                    weight, starts, columns, base, state[0], out, *state[1:], None, None, *HYPER.values(), 1, 0
                )
                sparse.sparse_sm3_(weight, starts, columns, base, state[0], out, row, col, 0.1, 1e-8, 0.0)
                products = [draw(t, a, dtype=F32, device="cpu") for t in (3, 40, 600)]
                for y in products:
                    sparse.add_sparse_product_(y, right[: len(y)].float(), starts, columns, out)
                results.append((out, weight, *state, row, col, *products, sparse.gather_entries(weight, starts, columns)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(g, w) for g, w in zip(other, results[0], strict=True))


def peak_bytes(call) -> int:
    """By how much the memory of this process rises in a call."""

    def resident(name):
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is there now
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def test_many_threads_share_blocks_of_tokens():
    """40 transposed blocks of 4096 and 4096 columns would be 356 MB. On any number of threads no bit changes."""
    if "cpu" not in fastft.testing.available("cpu"):
        pytest.skip("no C++ library")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this kernel does not tell how much memory was in use at most")
    threads, starts, columns = torch.get_num_threads(), *choose(4096, 4096, 500, "cpu")
    side = torch.rand(256, 4096, generator=torch.Generator().manual_seed(1)).repeat(41, 1)
    side[:, 0] = torch.arange(len(side))  # no block is another's
    first, other = torch.zeros(500), torch.zeros(500)
    try:
        with fastft.testing.use("cpu"):
            sparse.sampled_product_(first, side, side, starts, columns, False)
            torch.set_num_threads(40)
            torch.rand(1 << 20).sigmoid_()  # the threads' own memory
            peak = peak_bytes(lambda: sparse.sampled_product_(other, side, side, starts, columns, False))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first, other) and peak < 200e6


def test_the_reference_takes_float64():
    starts, columns = choose(6, 40, 30, "cpu")
    out, left, right = torch.zeros(30, dtype=F64), torch.randn(5, 6, dtype=F64), torch.randn(5, 40, dtype=F64)
    with fastft.testing.use("reference"):
        sparse.sampled_product_(out, left, right, starts, columns, False)
        assert torch.equal(out, (left.t() @ right)[at(starts, columns)])
        weight, state = torch.zeros(6, 40, dtype=F64), [torch.zeros(30, dtype=F64) for _ in range(4)]
        sparse.sparse_adamw_(weight, starts, columns, state[0], state[1], out, *state[2:], None, None, *HYPER.values(), 1, 0)
        assert torch.equal(weight[at(starts, columns)], state[1]) and state[1].abs().max() <= 0.011
    with fastft.testing.use("cpu"), pytest.raises(fastft.testing.BackendError, match="float64"):
        sparse.sampled_product_(out, left, right, starts, columns, False)


def test_opcheck():
    starts, columns = choose(6, 40, 30, "cpu")
    w, y, left, right = torch.randn(6, 40), torch.randn(5, 6), torch.randn(5, 6), torch.randn(5, 40)
    base, state, low = torch.randn(30), [torch.zeros(30) for _ in range(4)], [torch.zeros(30, dtype=BF16) for _ in range(2)]
    age, table = torch.zeros(30, dtype=torch.int32), torch.ones(4, 2)
    ops, index = torch.ops.fastft, (starts, columns)
    for op, args in (
        (ops.gather_entries, (w, *index)),
        (ops.gather_entries, (torch.zeros(6, 60)[:, 3:43], *index)),
        (ops.write_entries_, (w.clone(), *index, base, None)),
        (ops.write_entries_, (w.clone(), *index, base, base.clone())),
        (ops.sampled_product_, (base.clone(), left, right, *index, True)),
        (ops.sparse_adamw_, (w.clone(), *index, base, *state, None, None, *HYPER.values(), 3, 1)),
        (ops.sparse_adamw_, (w.clone(), *index, base, *state[:2], *low, age, table, *HYPER.values(), 3, 1)),
        (ops.sparse_sm3_, (w.clone(), *index, base, *state[:2], torch.zeros(6), torch.zeros(40), 0.1, 1e-8, 0.1)),
        (ops.match_entries, (*index, *choose(6, 40, 20, "cpu", seed=9))),
        (ops.add_sparse_product_, (y, right, *index, base)),
    ):
        torch.library.opcheck(op.default, args)
