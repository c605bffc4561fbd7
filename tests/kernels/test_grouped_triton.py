"""The grouped Triton kernels beside tests/ops/test_grouped.py: paths, grids and configurations that it does not reach."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastft.kernels import _config, _grouped, grouped
from fastft.ops import grouped as ops
from fastft.ops.grouped import COLUMNS, ENTRIES, LOW_RANK, ROWS
from tests.golden import assert_close, poisoned
from tests.kernels.guarded import DEVICE, guarded
from tests.ops.grouped_cases import expected, make, route

F32, BF16 = torch.float32, torch.bfloat16
# Few programs, since the interpreter is slow: small blocks where many are not the point.
VECTOR = {
    "grouped_shrink": {"BLOCK_M": 2, "BLOCK_R": 8, "BLOCK_K": 32, "STAGES": 1, "MOST": 8},
    "grouped_expand_": {"BLOCK_M": 2, "BLOCK_N": 32, "NARROW": 16, "BLOCK_R": 16},
    "grouped_outer_": {"BLOCK_M": 16, "BLOCK_K": 32, "NARROW": 16, "BLOCK_R": 16, "row_programs": 2},
}
TENSOR = {
    "grouped_shrink": {"BLOCK_M": 16, "BLOCK_R": 16, "BLOCK_K": 16, "STAGES": 1, "MOST": 1, "programs": 8},
    "grouped_expand_": {"BLOCK_M": 16, "BLOCK_N": 16, "NARROW": 16, "BLOCK_R": 16},
    "grouped_outer_": {"BLOCK_M": 32, "BLOCK_K": 16, "NARROW": 16, "BLOCK_R": 16, "row_programs": 1},
}
ENTRY_BLOCKS = {"BLOCK_I": 4, "BLOCK_T": 2, "BLOCK_B": 2, "BLOCK_A": 8, "BLOCK_E": 4, "STAGES": 1}
SLOTS = [0, -1, 2, 2, 0, 1, 2]
LONG = SLOTS + [2] * 14  # more than one tile for tensor cores
ADAPTERS = [
    [(LOW_RANK, 5), (ROWS, 6)],
    [(COLUMNS, 9), (ENTRIES, 20)],
    [(LOW_RANK, 17), (LOW_RANK, 3)],
]


def configuration(op, configs):
    extra = ENTRY_BLOCKS if op == "grouped_expand_" else {}
    return {**extra, **configs[op], "num_warps": 4, "num_stages": 1}


def drawn(rows, columns, dtype, seed):
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return guarded(values, between=8)


def moved(case, routing):
    segments, assignments, k = routing
    return case.to(DEVICE), segments.to(DEVICE), assignments.to(DEVICE), k


def update(y, x, case, segments, assignments, k, weights=None, configs=None):
    configs = {op: configs and configuration(op, configs) for op in ("grouped_shrink", "grouped_expand_")}
    with poisoned():
        s = grouped.grouped_shrink(
            x, case.store, case.offsets, case.pieces, segments, assignments, k, case.width, config=configs["grouped_shrink"]
        )
    grouped.grouped_expand_(
        y, x, s, case.store, case.offsets, case.columns, case.pieces, segments, assignments, weights, k,
        config=configs["grouped_expand_"],
    )  # fmt: skip


def check_update(case, routing, slots, dtype, configs, weights=None):
    x, _ = drawn(len(slots), int(case.pieces[..., 5].max()), dtype, 1)
    y, intact = drawn(len(slots), int((case.pieces[..., 6] + case.pieces[..., 7]).max()), dtype, 2)
    plain = y.clone()
    want, magnitude = expected(y, x, case, slots, weights)
    case, segments, assignments, k = moved(case, routing)
    update(y, x, case, segments, assignments, k, weights, configs)
    tables = case.pieces, segments, assignments
    s = ops._shrink_reference(x, case.store, case.offsets, *tables, k, case.width)
    ops._expand_reference(plain, x, s, case.store, case.offsets, case.columns, *tables, weights, k)
    assert_close(y.cpu(), want, plain.cpu(), magnitude, f"{dtype}")
    assert intact(), "wrote outside of y"
    return y


def test_names_mean_what_the_reference_means():
    names = ("LOW_RANK", "COLUMNS", "ROWS", "ENTRIES")
    assert [getattr(_grouped, name).value for name in names] == [getattr(ops, name) for name in names]
    fields = [getattr(_grouped, field.upper()).value for field in ops.FIELDS]
    assert fields == list(range(_grouped.FIELDS.value)) and len(ops.FIELDS) == grouped._FIELDS


@pytest.mark.parametrize("outputs", [(40, 24), (33, 7)], ids=["whole vectors", "odd widths"])
@pytest.mark.parametrize("configs", [VECTOR, TENSOR], ids=["vector units", "tensor cores"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_both_ways_to_multiply(configs, outputs, dtype):
    """Rows and windows that whole vectors fit, and others; columns and rows that go round programs; slabs of K."""
    case = make(ADAPTERS, 40, outputs, dtype, seed=3)
    slots = SLOTS if configs is VECTOR else LONG
    check_update(case, route(slots, empty=2), slots, dtype, configs)


@pytest.mark.parametrize("configs", [VECTOR, TENSOR], ids=["vector units", "tensor cores"])
def test_rows_that_no_vector_fits_behind_windows_that_do(configs):
    case = make(ADAPTERS[:1], 40, (40, 24), seed=3)
    case.store = torch.cat([torch.full((3,), float("nan")), case.store])
    for kind, count, left, right, *_ in case.pieces[0].tolist():
        case.offsets[left : left + count] += 3
        if kind == LOW_RANK:
            case.offsets[right : right + count] += 3
    check_update(case, route([0, 0, 0, -1]), [0, 0, 0, -1], F32, configs)


@pytest.mark.parametrize("configs", [VECTOR, TENSOR], ids=["vector units", "tensor cores"])
def test_pieces_that_overlap_and_windows_that_differ(configs):
    """Two pieces on the same columns of y, from other windows of x; S's columns of both lie in one tile."""
    case = make([[(LOW_RANK, 3), (LOW_RANK, 2)]], 24, (16, 16), seed=1)
    fields = {name: i for i, name in enumerate(ops.FIELDS)}
    second = case.pieces[0, 1]
    second[fields["x_first"]], second[fields["x_width"]], second[fields["y_first"]] = 16, 8, 8
    delta = torch.zeros_like(case.deltas[0])
    for piece in case.pieces[0].tolist():
        _, count, left, right, x_first, k, y_first, n, _, _ = piece
        rows = [case.store[ops._rows_at(case.offsets, at, count, size)].double() for at, size in ((left, k), (right, n))]
        scale = 0.5 if y_first == 0 else 1.0
        delta[y_first : y_first + n, x_first : x_first + k] += scale * rows[1].t() @ rows[0]
    case.deltas[0] = delta
    slots = [0, 0, -1, 0]
    x, y = drawn(4, 24, F32, 1)[0], drawn(4, 32, F32, 2)[0]
    want, magnitude = expected(y, x, case, slots)
    plain = want.float()
    moved_case, segments, assignments, k = moved(case, route(slots))
    update(y, x, moved_case, segments, assignments, k, configs=configs)
    assert_close(y.cpu(), want, plain, magnitude, "overlapping pieces")


def test_any_number_of_adapters_runs_in_the_same_static_buffers():
    """What a CUDA graph keeps: buffers for 4 segments and 6 assignments, refilled. No plan but the first is made."""
    case = make([[(LOW_RANK, 2), (ENTRIES, 20)], [(ROWS, 3), None], [None, (COLUMNS, 3)], [(LOW_RANK, 5)] * 2], 16, (16, 8))
    case = case.to(DEVICE)
    segments = torch.zeros(4, 3, dtype=torch.int32, device=DEVICE)
    assignments = torch.zeros(6, dtype=torch.int32, device=DEVICE)
    x, y = drawn(6, 16, F32, 1)[0], drawn(6, 24, F32, 2)[0]
    plans = None
    for slots in ([-1] * 6, [0] * 6, [3, -1, -1, -1, -1, -1], [0, 1, 2, 3, -1, 0], [3, 2, 1, 0, 3, 3]):
        own, order, k = route(slots)
        segments.fill_(0)
        segments[: len(own)], assignments[: len(order)] = own, order
        out = y.clone(memory_format=torch.preserve_format)
        s = grouped.grouped_shrink(x, case.store, case.offsets, case.pieces, segments, assignments, k, case.width)
        tables = case.pieces, segments, assignments
        grouped.grouped_expand_(out, x, s, case.store, case.offsets, case.columns, *tables, None, k)
        want, magnitude = expected(y, x, case, slots)
        assert_close(out.cpu(), want, want.float(), magnitude, f"{slots}")
        plans = plans or len(grouped.planned.__globals__["_plans"])
        assert len(grouped.planned.__globals__["_plans"]) == plans


def test_tiles_are_as_many_as_segments_can_have():
    for M in range(1, 9):
        for D in range(1, 5):
            for block in (1, 2, 4):
                most = max(sum(-(-n // block) for n in lengths) for lengths in _partitions(M, D))
                assert grouped.token_tiles(M, D, block) == most


def _partitions(total, parts):
    if parts == 1:
        yield from ([n] for n in range(total + 1))
        return
    for n in range(total + 1):
        yield from ([n, *rest] for rest in _partitions(total - n, parts - 1))


@pytest.mark.parametrize("op", ["grouped_shrink", "grouped_expand_"])
def test_few_tokens_take_vector_units_and_many_tensor_cores(op):
    for dtypes in ("16/16", "16/32", "32/32"):
        blocks = [_config.lookup("default", "grouped", op, dtypes=dtypes, M=M)["BLOCK_M"] for M in (1, 32, 2048)]
        assert blocks[0] <= blocks[1] <= grouped._MOST_VECTOR_TOKENS < blocks[2]


@pytest.mark.parametrize("configs", [VECTOR, TENSOR], ids=["few rows", "many rows"])
@pytest.mark.parametrize("k", [40, 39], ids=["whole vectors", "odd widths"])
def test_gradients_in_other_blocks(configs, k):
    case = make(ADAPTERS, k, (24, 9), seed=3)
    moved_case, segments, assignments, _ = moved(case, route(LONG, empty=1))
    x, dy = drawn(len(LONG), k, F32, 1)[0], drawn(len(LONG), 33, F32, 2)[0]
    s = torch.randn(len(assignments), case.width, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    got, want = (torch.full_like(moved_case.store, float("nan"), dtype=dtype) for dtype in (F32, torch.float64))
    arguments = x, dy, s, moved_case.offsets, moved_case.pieces, segments, assignments, None, 1
    grouped.grouped_outer_(got, *arguments, config=configuration("grouped_outer_", configs))
    ops._outer_reference(want, *(t.double() for t in arguments[:3]), *arguments[3:])
    assert torch.equal(got.isnan(), want.isnan())
    there = ~want.isnan()
    assert torch.allclose(got[there].double(), want[there], rtol=1e-5, atol=1e-5)


def test_arguments_that_do_not_fit_are_refused():
    case = make([[(LOW_RANK, 2)]], 16, (8,))
    case, segments, assignments, k = moved(case, route([0, 0]))
    x = torch.randn(2, 16, device=DEVICE)
    tables = case.offsets, case.pieces, segments, assignments
    with pytest.raises(TypeError, match="grouped_shrink: store"):
        grouped.grouped_shrink(x, case.store.to(BF16), *tables, k, case.width)
    with pytest.raises(ValueError, match="segments"):
        grouped.grouped_shrink(x, case.store, case.offsets, case.pieces, segments[:, :2], assignments, k, case.width)
    with pytest.raises(ValueError, match="2 assignments of 1 tokens"):
        grouped.grouped_shrink(x[:1], case.store, *tables, k, case.width)
