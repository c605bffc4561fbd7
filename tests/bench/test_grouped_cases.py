"""The grouped family's cases: every arm computes the same, the gate stops what doesn't, and operations are counted."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastft.bench import libraries, shapes
from fastft.bench.ops import grouped
from fastft.bench.runner import WrongResult

TINY = shapes.MODELS["tiny-llama"]


def inputs(dtype="fp32", count=2, tokens=8):
    return grouped.make_inputs(TINY, dtype, count, tokens, 4, torch.device("cpu"), 0)


@pytest.mark.parametrize("dtype", grouped.DTYPES)
@pytest.mark.parametrize("count", [1, 2, 8])
def test_every_arm_passes_the_gate(dtype, count):
    check = grouped.checker(inputs(dtype, count))
    for build in (grouped.each_site(grouped.ours), *(grouped.PEERS[n] for n in libraries.usual(grouped.PEERS, "cpu"))):
        check(build)


def test_adapters_above_the_padded_rank_are_not_cut_off():
    (*_, fits), (*_, above) = (list(grouped.cases("cpu", ["tiny-llama"], ["fp32"], None, r, ["padded"])) for r in (64, 65))
    assert "padded" in fits.arms and not fits.skipped
    assert "padded" not in above.arms and above.skipped == {"padded": "it pads to rank 64, and this is 65"}


def test_the_gate_stops_rows_of_another_adapter_and_the_floor():
    d = inputs()
    check = grouped.checker(d)

    def shifted(y, x, i, d):
        swapped = torch.cat([d.segments[[1, 0], :1], d.segments[:, 1:]], 1)
        grouped.ours(y, x, i, replace(d, segments=swapped))

    for wrong in (grouped.frozen, shifted):
        with pytest.raises(WrongResult):
            check(grouped.each_site(wrong))


def test_operations_are_those_of_the_products():
    d = inputs(count=1)
    with FlopCounterMode(display=False) as counter:
        grouped.each_site(grouped.frozen)(d)()
    assert counter.get_total_flops() == grouped.work(TINY, "fp32", 1, 8, 4)["floor_flops"]
    with FlopCounterMode(display=False) as counter:
        for x, site in zip(d.x, d.adapters):
            for a, b in zip(site.a[0], site.b[0]):
                F.linear(F.linear(x, a), b)
    work = grouped.work(TINY, "fp32", 1, 8, 4)
    assert counter.get_total_flops() == work["flops"] - work["floor_flops"]


def test_what_a_gpu_is_asked_has_targets():
    cases = list(grouped.cases("cuda", dtypes=["bf16"]))
    assert {c.name: c.target for c in cases} == {
        "decode D=1 r=16": 1.08,
        "decode D=4 r=16": None,
        "decode D=16 r=16": 1.14,
        "prefill D=4 r=16": 1.05,
    }
    with pytest.raises(ValueError, match="dropout"):
        list(grouped.cases("cpu", dropouts=[0.1]))
