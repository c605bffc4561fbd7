"""The Triton DoRA kernels against their definition: on the GPU, or in Triton's interpreter where there is none."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastft import testing
from fastft.kernels import dora
from fastft.ops import dora as ops
from tests.golden import assert_close, plain_product, poisoned
from tests.kernels.guarded import DEVICE, guarded

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)]
# T, N, R: around the tiles' boundaries, beyond the largest rank tile, and empty.
SIZES = [
    (1, 1, 1),
    (5, 6, 0),
    (63, 65, 3),
    (65, 130, 16),
    (33, 9, 17),
    (20, 31, 130),
    (0, 4, 4),
    (5, 0, 4),
]
SCALE = 0.75
OPS = ["dora_expand_", "dora_grad_y"]
EXPAND = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_R": 16, "num_warps": 4, "num_stages": 1}
GRAD_Y = {"BLOCK_M": 4, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}


@pytest.fixture(autouse=True)
def poisoned_allocations():
    with poisoned():
        yield


class Problem:
    """Inputs of both ops for one layer, all drawn from one seed; `between` columns of NaN lie between rows of u and s."""

    def __init__(self, shape, act, adapter, between=0, bias=True):
        self.act, self.adapter, self.between = act, adapter, between
        tokens, n, rank = shape
        generator = torch.Generator().manual_seed(7)

        def draw(dtype, *size, between=0):
            values = torch.randn(size, generator=generator).to(dtype)
            return guarded(values, between)[0] if len(size) == 2 else guarded(values[None])[0][0]

        self.u, self.dy = draw(act, tokens, n, between=between), draw(act, tokens, n)
        self.s, self.b = draw(F32, tokens, rank, between=between), draw(adapter, n, rank)
        self.g, self.bias = draw(F32, n), draw(act, n) if bias else None

    def arguments(self, op):
        expand = self.u, self.s, self.b, self.g, self.bias, SCALE
        return expand if op == "dora_expand_" else (self.dy, self.u, self.g)

    def composed(self, op, dtype, change=lambda t: t):
        """The op's results in plain PyTorch with operands in `dtype`; the exact formula in float64."""
        act = dtype if dtype == torch.float64 else self.act
        wide = torch.float64 if dtype == torch.float64 else F32
        u, dy, g = (change(t.to(wide)) for t in (self.u, self.dy, self.g))
        if op == "dora_grad_y":
            return (g * dy).to(act), (dy * u).sum(0)
        total = u + SCALE * plain_product(change(self.s.to(dtype)), change(self.b.to(dtype)).t()).to(wide)
        return total.to(act), (g * total + (0 if self.bias is None else change(self.bias.to(wide)))).to(act)


def run(op, problem, config=None):
    """The launcher's results, the argument changed in place first, which is a guarded copy."""
    args = list(problem.arguments(op))
    if op == "dora_grad_y":
        results = dora.dora_grad_y(*args, config=config)
    else:
        args[0], intact = guarded(args[0], problem.between)
        results = args[0], dora.dora_expand_(*args, config=config)
        assert intact(), "wrote outside its tensor"
        assert results[1].is_contiguous()
    assert [r.dtype for r in results] == [problem.act, F32 if op == "dora_grad_y" else problem.act]
    return results


def check(op, problem, config=None):
    composed = (problem.composed(op, torch.float64), problem.composed(op, problem.adapter))
    magnitude = problem.composed(op, torch.float64, torch.abs)
    for got, *expected in zip(run(op, problem, config), *composed, magnitude, strict=True):
        assert_close(got, *expected, op)


@pytest.mark.parametrize("act,adapter", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("op", OPS)
def test_every_size_and_dtype(op, shape, act, adapter):
    check(op, Problem(shape, act, adapter))
    check(op, Problem(shape, act, adapter, between=5, bias=False))


@pytest.mark.parametrize("programs", [1, 7, 1000])
def test_any_configuration_of_grad_y_is_right_and_repeatable(programs):
    problem = Problem((70, 35, 1), F32, F32)
    config = dict(GRAD_Y, programs=programs)
    check("dora_grad_y", problem, config)
    for first, second in zip(run("dora_grad_y", problem, config), run("dora_grad_y", problem, config), strict=True):
        assert torch.equal(first, second), "not bitwise repeatable"


@pytest.mark.parametrize("blocks", [{}, {"BLOCK_M": 64}, {"BLOCK_N": 64, "BLOCK_R": 32}])
def test_any_configuration_of_expand_is_right(blocks):
    check("dora_expand_", Problem((70, 35, 20), F32, F32), EXPAND | blocks)


def test_y_is_made_from_the_sum_before_it_is_rounded():
    """u in bfloat16 rounds the update away; y must show it all the same."""
    u, s, b = torch.ones(1, 1, dtype=BF16, device=DEVICE), torch.ones(1, 1, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    y = dora.dora_expand_(
        u, s, b, torch.full((1,), 1024.0, device=DEVICE), torch.full((1,), -1024.0, dtype=BF16, device=DEVICE), 2**-10
    )
    assert u.item() == 1 and y.item() == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("act,adapter", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_non_finite_values_reach_what_they_enter_and_nothing_else(act, adapter, value):
    problem = Problem((9, 12, 3), act, adapter)
    at, column = torch.zeros(9, 12, dtype=torch.bool, device=DEVICE), torch.arange(12, device=DEVICE) == 4
    at[2, 4] = True
    problem.dy[2, 4] = value
    dyg, dots = run("dora_grad_y", problem)
    assert torch.equal(~dyg.isfinite(), at) and torch.equal(~dots.isfinite(), column)
    problem.u[2, 4] = value
    for result in run("dora_expand_", problem):
        assert torch.equal(~result.isfinite(), at)


@pytest.mark.parametrize("op", OPS)
def test_the_registry_runs_the_launcher_and_records_its_configuration(op):
    args = Problem((5, 6, 3), F32, F32).arguments(op)
    with testing.use("triton"), testing.record() as calls:
        getattr(ops, op)(*args)
    assert [(c.op, c.backend) for c in calls] == [(op, "triton")]
    assert calls[0].config == dora.config_for(op, *args)
    assert calls[0].config["BLOCK_N"] >= 16


@pytest.mark.parametrize("op", OPS)
def test_launchers_refuse_what_their_kernels_would_misread(op):
    args = Problem((6, 10, 4), F32, F32).arguments(op)
    launcher = getattr(dora, op)
    for i, argument in enumerate(args):
        if not isinstance(argument, torch.Tensor):
            continue
        with pytest.raises(TypeError, match=f"{op}: .* is torch.int32"):
            launcher(*args[:i], argument.to(torch.int32), *args[i + 1 :])
        strided = torch.stack([argument, argument], dim=-1)[..., 0]
        with pytest.raises(ValueError, match=f"{op}: .* not contiguous"):
            launcher(*args[:i], strided, *args[i + 1 :])
        wider = torch.cat([argument, argument[..., :1]], dim=-1)
        with pytest.raises(ValueError, match=f"{op}: "):
            launcher(*args[:i], wider, *args[i + 1 :])
        may_lie_apart = (op, i) in (("dora_expand_", 0), ("dora_expand_", 1), ("dora_grad_y", 1))
        if argument.dim() == 2 and not may_lie_apart:
            with pytest.raises(ValueError, match=f"{op}: .* not contiguous"):
                launcher(*args[:i], wider[:, :-1], *args[i + 1 :])
