"""Whole training steps: every arm trains the same thing; the gate stops one that does not."""

import pytest
import torch

from fastft.bench import peers, runner, shapes
from fastft.bench.e2e import step
from fastft.bench.runner import WrongResult

pytest.importorskip("transformers")
TINY = shapes.MODELS["tiny-llama"]


def inputs(dtype="fp32", p=0.0):
    return step.make_inputs(TINY, dtype, 4, p, torch.device("cpu"), 0)


@pytest.mark.parametrize("p", step.DROPOUTS)
@pytest.mark.parametrize("dtype", step.DTYPES)
def test_every_arm_passes_the_gate(dtype, p):
    d = inputs(dtype, p)
    check = step.checker(d)
    arms = [step.ours, step.ungrouped, step.packed, step.addmm] + [step.peft] * (peers.peft_missing() is None)
    for prepare in arms:
        check(step.training(prepare))


def test_the_gate_stops_another_scale_and_a_forgotten_dropout():
    def half(model, d):
        return step.addmm(model, step.replace(d, scale=d.scale / 2))

    with pytest.raises(WrongResult, match="relative error"):
        step.checker(inputs())(step.training(half))

    def still(model, d):
        return step.addmm(model, step.replace(d, p=0.0))

    with pytest.raises(WrongResult, match="does not change the loss"):
        step.checker(inputs(p=0.05))(step.training(still))


def test_adapters_are_trained_and_nothing_else():
    d = inputs()
    before = {name: p.clone() for name, p in d.model.named_parameters()}
    run = step.training(step.ours)(d)
    first, second = run()["loss"], run()["loss"]
    assert second < first
    assert all(torch.equal(p, before[name]) for name, p in d.model.named_parameters()), "arms work on copies"


def test_dropout_keeps_packed_masks_and_nothing_else():
    still, dropped = inputs(), inputs(p=0.05)
    plain, dropout = (runner.saved_bytes(step.training(step.ours)(d), d.model.parameters()) for d in (still, dropped))
    tokens, layers = TINY.batch * TINY.length, [still.model.get_submodule(name) for name in step.linear_names(still.model)]
    assert dropout - plain == sum(tokens * -(-layer.in_features // 8) for layer in layers)


def test_targets_belong_to_the_shape_they_were_set_for():
    found = {case.name: case.target for case in step.cases("cpu", peer_names=[])}
    assert found == {
        "step r=16 p=0": 1.085,
        "step r=16 p=0 packed": 1.06,
        "step r=16 p=0.05": 1.105,
        "step r=16 p=0.05 packed": 1.08,
    }
    assert all(case.target is None for case in step.cases("cpu", names=["tiny-llama"], peer_names=[]))
    with pytest.raises(ValueError, match="unknown shape 'square2048'"):
        list(step.cases("cpu", names=["square2048"]))
