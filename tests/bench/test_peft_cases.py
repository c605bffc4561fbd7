"""The cases of accelerated PEFT models: arms agree, and our ops are what runs in ours."""

import pytest
import torch

from fastft import testing
from fastft.bench.e2e import peft, step
from fastft.bench.runner import WrongResult

pytest.importorskip("peft")
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["fp32", "bf16+fp32"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_steps(dtype, p):
    (case,) = peft.cases("cpu", ["tiny-llama"], [dtype], [p], peer_names=["peft"])
    d = case.inputs(CPU, 0)
    check = case.checker(d)
    for build in case.arms.values():
        check(build)
    with testing.record() as calls:
        case.arms["fastft"](d)()
    assert {call.op for call in calls} >= {"lora_shrink", "lora_expand_", "lora_grad_sb"}
    with testing.record() as calls:
        case.arms["peft"](d)()
    assert not calls and case.target is None


def test_the_gate_finds_an_error():
    (case,) = peft.cases("cpu", ["tiny-llama"], ["fp32"], [0.0])
    check = case.checker(case.inputs(CPU, 0))

    def wrong(model, d):
        trained = peft.accelerated(model, d)
        model.model.layers[0].mlp.up_proj.scale_layer(1.01)
        return trained

    with pytest.raises(WrongResult):
        check(step.training(wrong))


def test_calls_and_facts():
    (case,) = peft.cases("cpu", ["tiny"])
    d = case.inputs(CPU, 0)
    check = case.checker(d)
    for build in case.arms.values():
        check(build)
    run = case.arms["fastft"](d)
    run()
    overhead, accelerate = run.facts()
    assert overhead.unit == "us" and overhead.target > 0
    assert accelerate.unit == "s" and accelerate.value > 0
    with pytest.raises(ValueError, match="unknown shape 'huge'; known: tiny, llama3-8b"):
        list(peft.cases("cpu", ["huge"]))
