"""What `tests/ops/test_sparse.py` and `test_selection.py` do not ask of the Triton kernels; on the GPU, or interpreted."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastft import testing
from fastft.kernels import _sampled, selection, sparse
from fastft.ops import selection as selection_ops
from fastft.ops import sparse as ops
from tests.kernels.guarded import DEVICE, guarded

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
A, B, T = 37, 70, 19
HYPER = 1e-2, 0.9, 0.99, 1e-8, 0.1
FLAT = ["gather_entries", "write_entries_", "sparse_adamw_", "sparse_sm3_", "match_entries"]
SELECTION = ["count_bins_", "count_at_least", "take_at_least_"]
WARPS = {"num_warps": 4, "num_stages": 1}
TILES = {"engine": "tiles", "BLOCK_T": 16, "GROUP": 2, **WARPS}
# Tiles that the weight is a part of, that it fills several of, and that its edges cross.
SAMPLED = [
    {**TILES, "BLOCK_A": 64, "BLOCK_B": 128, "BLOCK_E": 4},
    {**TILES, "BLOCK_A": 16, "BLOCK_B": 32, "BLOCK_E": 2},
    {"engine": "entries", "BLOCK_E": 16, "BLOCK_T": 256, **WARPS},
    {"engine": "entries", "BLOCK_E": 8, "BLOCK_T": 16, **WARPS},
]


def draw(*size, dtype=F32, seed=1):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def choose(seed=1):
    """starts and columns of entries: one row has many times the mean, some rows and nearly half of the columns have none."""
    mask = torch.rand(A, B, generator=torch.Generator().manual_seed(seed)) < 0.1
    mask[5], mask[8:20], mask[:, 32:64] = True, False, False
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return starts.to(DEVICE), mask.nonzero()[:, 1].to(torch.int32).to(DEVICE)


def arguments(op, dtype=BF16):
    """Arguments of an op, the changed ones among them."""
    index, weight = choose(), draw(A, B, dtype=dtype, seed=2)
    E = len(index[1])
    base, delta, grad = draw(E, dtype=dtype, seed=3), draw(E, seed=4), draw(E, seed=5)
    if op in SELECTION:
        counts = torch.zeros(selection_ops.BINS, dtype=torch.int64, device=DEVICE)
        found = [torch.full((A * B,), -1, dtype=torch.int32, device=DEVICE) for _ in range(2)]
        offsets = torch.arange(0, A * B, B, device=DEVICE)
        rest = {"count_bins_": (counts, weight), "count_at_least": (weight, 0x7F10)}
        return rest.get(op, (*found, weight, offsets, 0x7F10))
    start = weight, *index
    moments = draw(E, dtype=BF16, seed=6), draw(E, seed=7).square().to(BF16)
    age, corrections = torch.arange(E, dtype=torch.int32, device=DEVICE) % 7, 1 + draw(5, 2, seed=8).square()
    return {
        "gather_entries": start,
        "write_entries_": (*start, base, delta),
        "sparse_adamw_": (*start, base, delta, grad, *moments, age, corrections, *HYPER, 3, 5),
        "sparse_sm3_": (*start, base, delta, grad, draw(A, seed=9).square(), draw(B, seed=10).square(), 1e-2, 1e-8, 0.1),
        "match_entries": (*index, *choose(seed=2)),
        "sampled_product_": (delta, draw(T, A, dtype=dtype, seed=11), draw(T, B, dtype=dtype, seed=12), *index, True),
        "add_sparse_product_": (draw(T, A, dtype=dtype, seed=13), draw(T, B, dtype=dtype, seed=14), *index, delta),
    }[op]


def run(op, args, config=None, between=0):
    """What the launcher returns and the tensors after it; matrices had NaN around them that are still there."""
    values, checks = [], []
    for value in args:
        if isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[1] > 2:
            value, intact = guarded(value, between)
            checks.append(intact)
        values.append(value.clone() if isinstance(value, torch.Tensor) and value.dim() == 1 else value)
    result = getattr(selection if op in SELECTION else sparse, op)(*values, config=config)
    assert all(intact() for intact in checks), "wrote outside its tensors"
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return tensors if result is None else [*tensors, result]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("op", [*FLAT, *SELECTION])
def test_any_configuration_gives_the_bits_of_the_shipped_one(op, dtype):
    args = arguments(op, dtype)
    want = run(op, args)
    for block in (32, 128):
        for between in (0, 5):
            got = run(op, args, {"BLOCK": block, **WARPS}, between)
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True)), (block, between)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("config", SAMPLED)
def test_every_engine_forms_the_products_and_repeats_its_bits(config, dtype):
    out, left, right, starts, columns, _ = arguments("sampled_product_", dtype)
    where = ops.rows_of(starts, columns), columns.long()
    dense = left.double().t() @ right.double()
    for between in (0, 5):
        first, second = (run("sampled_product_", (out, left, right, starts, columns, True), config, between) for _ in "ab")
        torch.testing.assert_close(first[0].double(), out.double() + dense[where], rtol=1e-5, atol=1e-5)
        assert torch.equal(first[0], second[0])
        fresh = run("sampled_product_", (out * float("nan"), left, right, starts, columns, False), config, between)[0]
        torch.testing.assert_close(fresh.double(), dense[where], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", SAMPLED[:2])
def test_what_is_not_finite_stays_with_its_entries(config):
    """A tile is picked from by comparing: its other elements must not matter."""
    out, left, right, starts, columns, _ = arguments("sampled_product_", F32)
    left[3, 5], right[2, 20], right[4, 1] = float("inf"), float("nan"), -float("inf")
    want = (left.t() @ right)[ops.rows_of(starts, columns), columns.long()]
    got = run("sampled_product_", (out, left, right, starts, columns, False), config)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert got.isnan().any() and got.isinf().any() and got.isfinite().any()


@pytest.mark.parametrize("op,config", [("sampled_product_", SAMPLED[3]), ("add_sparse_product_", None)])
def test_tokens_in_several_slabs(op, config, monkeypatch):
    """Of 64 tokens each, the last one shorter: the same sums as in one."""
    monkeypatch.setattr(_sampled, "WORKSPACE", 1)
    args = list(arguments(op, F32))
    config = config or {"BLOCK_T": 16, "BLOCK_A": 16, **WARPS}
    for i, columns in ((1, A), (2, B)) if op == "sampled_product_" else ((0, A), (1, B)):
        args[i] = draw(150, columns, seed=20 + i)
    for add in (True, False) if op == "sampled_product_" else (None,):
        if add is not None:
            args[5] = add
        got = run(op, args, config, between=3)[0]
        want = [value.clone() if isinstance(value, torch.Tensor) else value for value in args]
        with testing.use("reference"):
            getattr(ops, op)(*want)
        torch.testing.assert_close(got, want[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("A,B,density,dtype,engine", [
    (4096, 4096, 0.001, BF16, "entries"),
    (4096, 4096, 0.005, F16, "entries"),
    (4096, 4096, 0.010, BF16, "tiles"),
    (1024, 4096, 0.004, BF16, "entries"),
    (1024, 4096, 0.006, BF16, "tiles"),
    (512, 512, 0.001, BF16, "tiles"),
    (4096, 4096, 0.010, F32, "entries"),
    (4096, 4096, 0.050, F32, "entries"),
    (4096, 4096, 0.080, F32, "tiles"),
])  # fmt: skip
def test_the_engine_follows_from_density_shape_and_dtype(A, B, density, dtype, engine):
    E = round(density * A * B)
    left, right = (torch.empty(8, n, dtype=dtype, device="meta") for n in (A, B))
    out, starts, columns = (torch.empty(n, device="meta") for n in (E, A + 1, E))
    assert sparse.config_for("sampled_product_", out, left, right, starts, columns, False)["engine"] == engine


@pytest.mark.parametrize("op", [*FLAT, "sampled_product_", "add_sparse_product_", *SELECTION])
def test_the_registry_runs_the_launcher_and_records_its_configuration(op):
    args = arguments(op)
    with testing.use("triton"), testing.record() as calls:
        getattr(selection_ops if op in SELECTION else ops, op)(*args)
    assert [(c.op, c.backend) for c in calls] == [(op, "triton")]
    assert calls[0].config == (selection if op in SELECTION else sparse).config_for(op, *args)


def test_any_seed_rounds_as_the_reference_does():
    for seed in (0, 1, -1, 2**31, 2**32 + 5, -(2**63), 2**63 - 1):
        args = list(arguments("sparse_adamw_"))
        args[-1] = seed
        got, want = run("sparse_adamw_", args), [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        with testing.use("reference"):
            ops.sparse_adamw_(*want)
        for g, w in zip(got[6:8], want[6:8], strict=True):
            # A sum that float32 rounds otherwise may fall on the other side: once in 65,536 entries.
            assert (g != w).sum() <= 1, seed


def test_maxima_of_sm3_keep_a_nan():
    args = list(arguments("sparse_sm3_"))
    row, column = ops.rows_of(*args[1:3])[7], args[2][7]
    for bad in (float("nan"), -float("nan")):
        args[5] = args[5].clone()
        args[5][7] = bad
        row_max, column_max = run("sparse_sm3_", args)[6:8]
        assert row_max.isnan().nonzero().tolist() == [[row]] and column_max.isnan().nonzero().tolist() == [[column]]


@pytest.mark.parametrize("op", [*FLAT, "sampled_product_", "add_sparse_product_", *SELECTION])
def test_launchers_refuse_what_their_kernels_would_misread(op):
    args, launcher = arguments(op), getattr(selection if op in SELECTION else sparse, op)
    for i, argument in enumerate(args):
        if not isinstance(argument, torch.Tensor):
            continue
        wrong = torch.int16 if argument.is_floating_point() else F32
        with pytest.raises(TypeError, match=f"{op}: .* must be torch"):
            launcher(*args[:i], argument.to(wrong), *args[i + 1 :])
        strided = torch.stack([argument, argument], dim=-1)[..., 0]
        with pytest.raises(ValueError, match=f"{op}: .* not contiguous"):
            launcher(*args[:i], strided, *args[i + 1 :])


def test_step_and_corrections_are_checked():
    args = list(arguments("sparse_adamw_"))
    with pytest.raises(ValueError, match="sparse_adamw_: age needs corrections"):
        sparse.sparse_adamw_(*args[:9], None, *args[10:])
    with pytest.raises(ValueError, match="sparse_adamw_: step is 0, the first is 1"):
        sparse.sparse_adamw_(*args[:8], None, None, *args[10:-2], 0, 1)
