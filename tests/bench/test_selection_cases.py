"""The selection cases: every arm passes the gate of its sort, wrong ones don't; counted work adds up."""

from dataclasses import replace

import pytest
import torch

from fastft.bench import shapes
from fastft.bench.ops import selection
from fastft.bench.runner import WrongResult

TINY = shapes.LINEARS["tiny"]
MIDDLE = replace(TINY, k=300, n=400)


def made(sort, dtype="fp32", linear=MIDDLE):
    _, inputs, floor, ours, checker = selection.SORTS[sort]
    d = inputs(linear, dtype, torch.device("cpu"), 0)
    return d, floor, ours, checker(d)


@pytest.mark.parametrize("dtype", selection.DTYPES)
@pytest.mark.parametrize("linear", [TINY, MIDDLE], ids=str)
@pytest.mark.parametrize("sort", selection.SORTS)
def test_arms_pass_the_gate(sort, dtype, linear):
    d, floor, ours, check = made(sort, dtype, linear)
    before = d.weight.clone()
    check(ours)
    if dtype == "fp32" or sort != "largest":  # of equal sizes torch.topk takes any
        check(floor)
    assert torch.equal(d.weight, before)


def test_the_gate_of_a_mask_stops_other_entries_and_other_numbers_of_them():
    _, _, _, check = made("LIFT mask")
    with pytest.raises(WrongResult, match="of the exact mask's entries"):
        check(selection.choosing(lambda d: selection.magnitude(d.weight.roll(1, 0))))
    with pytest.raises(WrongResult, match="positions in ascending order"):
        check(lambda d: selection.choosing(selection.reduced)(replace(d, k=d.k - 1)))


def test_the_gate_of_the_largest_stops_a_single_other_one():
    _, _, ours, check = made("largest")

    def build(d):
        index = ours(d)()["index"]
        missing = next(i for i in range(d.weight.numel()) if i not in index)
        return lambda: {"index": index[1:].new_tensor(sorted([*index[1:].tolist(), missing]))}

    with pytest.raises(WrongResult, match="index: 1 of"):
        check(build)
    with pytest.raises(WrongResult, match="ascending"):
        check(lambda d: lambda: {"index": ours(d)()["index"].flip(0)})


def test_the_gate_of_a_histogram_stops_wrong_counts():
    _, _, ours, check = made("histogram")
    with pytest.raises(WrongResult, match="counts"):
        check(lambda d: lambda: {"counts": ours(d)()["counts"].roll(1)})


def test_work_formulas():
    linear = replace(TINY, k=4096, n=1024)
    w, size, f = selection.work(linear, "bf16"), 4096 * 1024, 128
    assert selection.rank_of(linear) == f
    # 7 steps of WᵀW on 64 columns, W on all 448, the scores twice.
    assert w["LIFT mask"]["flops"] == 7 * 2 * 2 * size * 64 + 2 * size * 448 + 2 * 2 * size * f
    assert w["LIFT mask"]["moved"] == 8 * 2 * size and w["largest"]["moved"] == 4 * size
    assert w["LIFT mask"]["floor_flops"] == 14 * 4096 * 1024**2 + 8 * 1024**3 + 2 * size * f


def test_cases_cover_what_is_asked():
    found = {(c.name, c.shape, c.dtype): c for c in selection.cases("cpu")}
    assert ("LIFT mask f=128 vs exact SVD", "square4096", "fp32") in found and len(found) == 2 * (1 + 2 + 2)
    assert {c.target for c in found.values()} == {0.05, 1.0}
    assert {c.shape for c in selection.cases("cuda", dtypes=["bf16"])} > {"llama3-8b/q_proj", "llama3-8b/down_proj"}
    assert len(list(selection.cases("cpu", ["tiny"], ["bf16"], None, shapes.RANK, []))) == 3
    for wrong in ({"names": ["huge"]}, {"dtypes": ["fp8"]}, {"peer_names": ["nobody"]}):
        with pytest.raises(ValueError, match="known: "):
            list(selection.cases("cpu", **wrong))
    for wrong in ({"dropouts": [0.1]}, {"rank": 8}):
        with pytest.raises(ValueError, match="no dropout and no rank"):
            list(selection.cases("cpu", **wrong))
