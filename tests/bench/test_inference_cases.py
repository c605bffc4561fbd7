"""The inference family's cases: every arm computes the same without gradients, and the gate stops what doesn't."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastft.bench import peers, shapes
from fastft.bench.e2e import inference
from fastft.bench.ops import lora
from fastft.bench.runner import WrongResult

TINY = replace(shapes.LINEARS["tiny"], tokens=4)


@pytest.mark.parametrize("dtype", lora.DEFAULT_DTYPES)
def test_every_arm_passes_the_gate(dtype):
    found = list(inference.cases("cpu", ["tiny"], [dtype]))
    assert len(found) in (8, 16) and {int(case.size.split("x")[0]) for case in found} == set(inference.TOKENS)
    for case in found:
        d = case.inputs(torch.device("cpu"), 0)
        for build in case.arms.values():
            case.checker(d)(build)
            assert not build(d)()["y"].requires_grad


@pytest.mark.parametrize("kind", [inference.LORA, inference.DORA])
def test_the_gate_stops_the_floor(kind):
    with pytest.raises(WrongResult):
        kind.checker(kind.make_inputs(TINY, "fp32", 4, "cpu", 0))(inference.forward(peers.frozen_linear))


def test_operations_are_those_of_the_products():
    kind = inference.LORA
    d, work = kind.make_inputs(TINY, "fp32", 4, "cpu", 0), inference.work(TINY, "fp32", 4, kind)
    with FlopCounterMode(display=False) as counter:
        inference.forward(peers.frozen_linear)(d)()
    assert counter.get_total_flops() == work["floor_flops"]
    with FlopCounterMode(display=False) as counter:
        F.linear(F.linear(d.x, d.a), d.b)
    assert counter.get_total_flops() == work["flops"] - work["floor_flops"]


def test_it_has_no_dropout_and_two_peers():
    with pytest.raises(ValueError, match="dropout"):
        list(inference.cases("cpu", dropouts=[0.1]))
    with pytest.raises(ValueError, match="known: plain, peft"):
        list(inference.cases("cpu", peer_names=["addmm"]))
    assert set(next(inference.cases("cpu", peer_names=["plain"])).arms) == {"fastft", "plain"}
