"""The Triton LoRA kernels against their definition: on the GPU, or in Triton's interpreter where there is none."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from fastft import testing
from fastft.kernels import _tiles, lora
from fastft.kernels._lang import draw_mask, unpack_mask
from fastft.ops import lora as ops
from fastft.ops._philox import dropout_mask, philox4x32, threshold
from fastft.ops._philox import unpack_mask as unpack_reference
from tests.golden import assert_close, plain_product, poisoned
from tests.kernels.guarded import DEVICE, guarded

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)]
# Ranks of the groups and (T, K, N): around the tiles' boundaries, beyond the largest rank tile, and empty.
SIZES = [
    ((0,), (5, 9, 6)),
    ((1,), (1, 1, 1)),
    ((3,), (63, 100, 65)),
    ((16,), (65, 7, 130)),
    ((17,), (33, 41, 9)),
    ((64,), (20, 129, 31)),
    ((130,), (20, 40, 33)),
    ((4,), (0, 9, 4)),
    ((4,), (5, 0, 4)),
    ((4,), (5, 9, 0)),
    ((3, 0, 17), (33, 41, 9)),
    ((16, 16), (65, 130, 20)),
    ((1, 40, 2, 7, 16), (9, 70, 5)),
    ((0, 0), (5, 9, 4)),
    ((2, 3), (0, 9, 4)),
    ((2, 3), (5, 0, 4)),
    ((), (5, 9, 4)),
]
SCALE = 0.75
GROUPED = ("lora_shrink", "lora_grad_a", "lora_grad_x_")


@pytest.fixture(autouse=True)
def poisoned_allocations():
    with poisoned():
        yield


def seeds_of(ranks):
    return torch.arange(len(ranks), device=DEVICE) * 2**40 - 2**61 + 12345


class Problem:
    """Inputs of the five ops for adapters on one layer, all drawn from one seed.

    `between` columns of NaN lie between the rows of y and of s.
    """

    def __init__(self, shape, ranks, act, adapter, p, between=0):
        self.ranks, self.act, self.adapter, self.p, self.between = list(ranks), act, adapter, p, between
        (tokens, k, n), rank = shape, sum(ranks)
        generator = torch.Generator().manual_seed(7)

        def draw(dtype, *size, between=0):
            return guarded(torch.randn(size, generator=generator).to(dtype), between)[0]

        self.x, self.dy = draw(act, tokens, k), draw(act, tokens, n)
        self.y, self.dx = draw(act, tokens, n, between=between), draw(act, tokens, k)
        self.a, self.b = draw(adapter, rank, k), draw(adapter, n, rank)
        self.s, self.ds = draw(F32, tokens, rank, between=between), draw(F32, tokens, rank)
        self.seed, self.mask = None, torch.empty(0, dtype=torch.uint8, device=DEVICE)
        # What each group keeps; without dropout all groups are one.
        self.keep = torch.ones(1, tokens, k, dtype=torch.bool, device=DEVICE)
        if p:
            self.seed = seeds_of(ranks)
            masks = [dropout_mask(seed, tokens, k, p) for seed in (self.seed[g : g + 1] for g in range(len(ranks)))]
            self.mask = torch.stack(masks) if masks else self.mask.new_empty(0, tokens, (k + 7) // 8)
            self.keep = torch.stack([unpack_reference(m, k) for m in masks]) if masks else self.keep[:0]

    def arguments(self, op):
        return {
            "lora_shrink": (self.x, self.a, self.ranks, self.p, self.seed),
            "lora_expand_": (self.y, self.s, self.b, SCALE),
            "lora_grad_sb": (self.dy, self.s, self.b, SCALE),
            "lora_grad_a": (self.ds, self.x, self.a, self.ranks, self.mask, self.p),
            "lora_grad_x_": (self.dx, self.ds, self.a, self.ranks, self.mask, self.p),
        }[op]

    def composed(self, op, dtype, change=lambda t: t):
        """The op in plain PyTorch: as PEFT computes it in the adapter's dtype, or the exact formula in float64."""
        act = dtype if dtype == torch.float64 else self.act
        tensors = self.x, self.dy, self.y, self.dx, self.a, self.b, self.s, self.ds
        x, dy, y, dx, a, b, s, ds = (change(t.to(dtype)) for t in tensors)
        inverse_keep = 1 / (1 - self.p) if self.p < 1 else 0.0
        ranks = self.ranks if self.p else [sum(self.ranks)]
        groups = list(zip(self.keep, a.split(ranks), ds.split(ranks, 1)))

        def dropped(keep):
            return torch.where(keep, x, 0) * inverse_keep

        def grad_x():
            parts = [torch.where(keep, plain_product(ds_g, a_g) * inverse_keep, 0) for keep, a_g, ds_g in groups]
            return sum((part.to(act) for part in parts), start=dx).to(act)

        return {
            "lora_shrink": lambda: (
                torch.cat([ds[:, :0], *(plain_product(dropped(keep), a_g.t()) for keep, a_g, _ in groups)], 1),
            ),
            "lora_expand_": lambda: ((y + SCALE * plain_product(s, b.t())).to(act),),
            "lora_grad_sb": lambda: (plain_product(SCALE * dy, b), plain_product((SCALE * dy).t(), s)),
            "lora_grad_a": lambda: (
                torch.cat([a[:0], *(plain_product(ds_g.t(), dropped(keep)) for keep, _, ds_g in groups)]),
            ),
            "lora_grad_x_": lambda: (grad_x(),),
        }[op]()


OPS = list(lora._OPERANDS)


def run(op, problem, config=None):
    """Floating results of the launcher; an in-place op works on a guarded copy."""
    args = list(problem.arguments(op))
    launcher = getattr(lora, op)
    if op.endswith("_"):
        args[0], intact = guarded(args[0], problem.between if op == "lora_expand_" else 0)
        assert launcher(*args, config=config) is None
        assert intact(), "wrote outside its tensor"
        return (args[0],)
    results = launcher(*args, config=config)
    if op == "lora_shrink":
        assert torch.equal(results[1], problem.mask)
        return results[:1]
    assert all(result.is_contiguous() for result in results)
    return results if isinstance(results, tuple) else (results,)


def check(op, problem, config=None):
    results = run(op, problem, config)
    expected_dtypes = {
        "lora_shrink": (F32,),
        "lora_grad_sb": (F32, problem.adapter),
        "lora_grad_a": (problem.adapter,),
    }.get(op, (problem.act,))
    assert tuple(r.dtype for r in results) == expected_dtypes
    plain = problem.composed(op, problem.adapter)
    exact = problem.composed(op, torch.float64)
    magnitude = problem.composed(op, torch.float64, torch.abs)
    for got, *expected in zip(results, exact, plain, magnitude, strict=True):
        assert_close(got, *expected, op)


def test_the_interpreter_runs_where_there_is_no_gpu():
    assert DEVICE == "cuda" or isinstance(lora._lora_shrink_kernel, InterpretedFunction), "TRITON_INTERPRET=1 was ignored"


# In the interpreter float16 differs from bfloat16 in NumPy's conversions alone: some sizes are enough.
CASES = [
    (ranks, shape, *dtypes)
    for i, (ranks, shape) in enumerate(SIZES)
    for dtypes in DTYPES
    if DEVICE == "cuda" or dtypes[0] != F16 or i % 3 == 0
]


@pytest.mark.parametrize("ranks,shape,act,adapter", CASES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_size_and_dtype(op, ranks, shape, act, adapter):
    check(op, Problem(shape, ranks, act, adapter, p=0.0))
    if op in GROUPED:
        check(op, Problem(shape, ranks, act, adapter, p=0.3))
    else:
        check(op, Problem(shape, ranks, act, adapter, p=0.0, between=5))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "config",
    [
        {"BLOCK_M": 16, "features": 16, "BLOCK_R": 16, "programs": 1},
        {"BLOCK_M": 32, "features": 64, "BLOCK_R": 32, "programs": 7},
        {"BLOCK_M": 128, "features": 16, "BLOCK_R": 16, "programs": 1000},
    ],
    ids=lambda c: f"programs={c['programs']}",
)
def test_any_configuration_is_right_and_repeatable(op, config):
    config = dict(config, num_warps=4, num_stages=1)
    config["BLOCK_K" if op in ("lora_shrink", "lora_grad_a") else "BLOCK_N"] = config.pop("features")
    if op in ("lora_expand_", "lora_grad_x_"):
        del config["programs"]
    problem = Problem((40, 42, 35), (20, 5), F32, F32, p=0.5)
    check(op, problem, config)
    for first, second in zip(run(op, problem, config), run(op, problem, config), strict=True):
        assert torch.equal(first, second), "not bitwise repeatable"


@pytest.mark.parametrize("p", [1e-9, 0.01, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 - 1, 2**32, -(2**63)])
def test_masks_are_those_of_the_reference(p, seed):
    x, a, seed = torch.randn(19, 43, device=DEVICE), torch.randn(2, 43, device=DEVICE), torch.tensor([seed], device=DEVICE)
    seeds = torch.cat([seed, seed ^ 2**33])
    s, mask = lora.lora_shrink(x, a, [2, 0], p, seeds)
    assert torch.equal(mask, torch.stack([dropout_mask(one, 19, 43, p) for one in seeds.split(1)]))
    assert mask.dtype == torch.uint8
    assert (s == 0).all() or p < 1


@triton.jit
def _mask_kernel(p_mask, p_keep, p_seed, first_token, first_byte, threshold, K):
    o_t, o_byte = tl.arange(0, 4), tl.arange(0, 2)
    b_mask = draw_mask(tl.load(p_seed), first_token + o_t.to(tl.int64), first_byte + o_byte, threshold, K)
    tl.store(p_mask + o_t[:, None] * 2 + o_byte[None, :], b_mask)
    tl.store(p_keep + o_t[:, None] * 16 + tl.arange(0, 16)[None, :], unpack_mask(b_mask).to(tl.int8))


def test_mask_beyond_two_to_the_32_tokens():
    token, byte, cut = 2**32 * 3 - 2, 1000, threshold(0.5)
    seed = torch.tensor([2**40 + 17], device=DEVICE)
    mask, keep = seed.new_empty(4, 2, dtype=torch.uint8), seed.new_empty(4, 16, dtype=torch.int8)
    _mask_kernel[(1,)](mask, keep, seed, token, byte, cut, 8 * 1002)
    t, i = token + torch.arange(4, device=DEVICE)[:, None], byte + torch.arange(2, device=DEVICE)[None, :]
    words = philox4x32((t & 0xFFFFFFFF, t >> 32, i, torch.zeros_like(i)), (seed & 0xFFFFFFFF, seed >> 32))
    lanes = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    assert torch.equal(keep.bool().view(4, 2, 8), lanes >= cut)
    assert torch.equal(mask.long(), ((lanes >= cut).long() << torch.arange(8, device=DEVICE)).sum(-1))


@pytest.mark.parametrize("act,adapter", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_dropped_elements_do_not_exist(act, adapter):
    """A NaN in x reaches the groups that keep it and no other; what all groups drop of dX keeps its bits."""
    problem = Problem((20, 30, 10), (5, 2), act, adapter, p=0.5)
    clean = run("lora_shrink", problem)[0], run("lora_grad_a", problem)[0]
    only_second = ~problem.keep[0] & problem.keep[1]
    problem.x.masked_fill_(~problem.keep.any(0) | only_second, float("nan"))
    s, da = run("lora_shrink", problem)[0], run("lora_grad_a", problem)[0]
    assert torch.equal(s[:, :5], clean[0][:, :5]) and torch.equal(da[:5], clean[1][:5])
    assert torch.equal(s[:, 5:].isnan(), only_second.any(1)[:, None].expand(20, 2)) and only_second.any()
    assert torch.equal(da[5:].isnan(), only_second.any(0)[None].expand(2, 30))
    # A NaN with a payload, in bits: a conversion there and back would make it another NaN.
    bits = {F32: torch.int32, BF16: torch.int16, F16: torch.int16}[act]
    dropped = ~problem.keep.any(0)
    problem.dx.view(bits).masked_fill_(dropped, {F32: 0x7F812345, BF16: 0x7F81, F16: 0x7C01}[act])
    before = problem.dx.view(bits).clone()
    problem.ds[:, 0] = float("nan")
    after = run("lora_grad_x_", problem)[0]
    assert torch.equal(after.view(bits)[dropped], before[dropped])
    assert torch.equal(after.isnan(), problem.keep[0] | dropped), "a NaN of the first group crossed to where it drops"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("act,adapter", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_non_finite_values_reach_what_they_enter_and_nothing_else(act, adapter, value):
    problem = Problem((9, 12, 10), (3,), act, adapter, p=0.0)
    for tensor in (problem.x, problem.dy, problem.y, problem.dx):
        tensor[2, 4] = value
    rows, columns = torch.arange(9, device=DEVICE) == 2, torch.arange(12, device=DEVICE) == 4
    (s,), (ds, db) = run("lora_shrink", problem), run("lora_grad_sb", problem)
    assert torch.equal(~s.isfinite(), rows[:, None].expand(9, 3))
    assert torch.equal(~ds.isfinite(), rows[:, None].expand(9, 3))
    assert torch.equal(~db.isfinite(), columns[:10, None].expand(10, 3))
    assert torch.equal(~run("lora_grad_a", problem)[0].isfinite(), columns[None].expand(3, 12))
    assert torch.equal(~run("lora_expand_", problem)[0].isfinite(), (rows[:, None] & columns[None, :10]))
    assert torch.equal(~run("lora_grad_x_", problem)[0].isfinite(), (rows[:, None] & columns[None]))


def test_partial_sums_stay_within_the_workspace(monkeypatch):
    """Chunks of T give the same dS (a token's sum does not cross them), and dB within rounding."""
    problem = Problem((100, 8, 40), (5,), F32, F32, p=0.0)
    ds, _ = run("lora_grad_sb", problem)
    monkeypatch.setattr(_tiles, "WORKSPACE", 1)
    assert torch.equal(run("lora_grad_sb", problem)[0], ds)
    check("lora_grad_sb", problem)


@pytest.mark.parametrize("op", OPS)
def test_the_registry_runs_the_launcher_and_records_its_configuration(op):
    problem = Problem((5, 6, 7), (2, 1), F32, F32, p=0.5)
    args = problem.arguments(op)
    with testing.use("triton"), testing.record() as calls:
        getattr(ops, op)(*args)
    assert [(c.op, c.backend) for c in calls] == [(op, "triton")]
    assert calls[0].config == lora.config_for(op, *args)
    assert calls[0].config["BLOCK_R"] == 16


@pytest.mark.parametrize("op", OPS)
def test_launchers_refuse_what_their_kernels_would_misread(op):
    args = Problem((6, 8, 10), (4, 1), F32, F32, p=0.5).arguments(op)
    launcher = getattr(lora, op)
    for i, argument in enumerate(args):
        if not isinstance(argument, torch.Tensor):
            continue
        wrong_type = argument.to(torch.int32)
        with pytest.raises(TypeError, match=f"{op}: .* is torch.int32"):
            launcher(*args[:i], wrong_type, *args[i + 1 :])
        if argument.dim() >= 2:
            strided = torch.stack([argument, argument], dim=-1)[..., 0]
            with pytest.raises(ValueError, match=f"{op}: .* not contiguous"):
                launcher(*args[:i], strided, *args[i + 1 :])
            wider = torch.cat([argument, argument[..., :1]], dim=-1)
            with pytest.raises(ValueError, match=f"{op}: "):
                launcher(*args[:i], wider, *args[i + 1 :])
            may_lie_apart = (op, i) in (("lora_expand_", 0), ("lora_expand_", 1), ("lora_grad_sb", 1))
            if not may_lie_apart:
                with pytest.raises(ValueError, match=f"{op}: .* not contiguous"):
                    launcher(*args[:i], wider[..., :-1], *args[i + 1 :])


@pytest.mark.parametrize("ranks", [[4], [4, 2], [4, 1, 1], [6, -1], []])
@pytest.mark.parametrize("op", GROUPED)
def test_launchers_refuse_ranks_that_are_not_those_of_the_stack(op, ranks):
    args = Problem((6, 8, 10), (4, 1), F32, F32, p=0.5).arguments(op)
    position = lora._GROUPS[op][0]
    with pytest.raises(ValueError, match=f"{op}: ranks"):
        getattr(lora, op)(*args[:position], ranks, *args[position + 1 :])


def test_groups_choose_a_configuration_only_with_dropout():
    def configuration(ranks, p):
        x, a = torch.empty(64, 128, dtype=BF16, device="meta"), torch.empty(sum(ranks), 128, dtype=BF16, device="meta")
        return lora.config_for("lora_shrink", x, a, ranks, p, None)

    assert configuration([16, 16, 16, 16], 0.0) == configuration([64], 0.0)
    assert configuration([64], 0.5) == configuration([64], 0.0)
    assert configuration([16, 1, 4], 0.5)["BLOCK_R"] == 16
    assert configuration([16, 1, 4], 0.5) != configuration([16], 0.5), "three accumulators need smaller tiles"
