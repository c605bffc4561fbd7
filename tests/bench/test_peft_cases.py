"""The cases of accelerated PEFT models, quantised or not: arms agree, and our ops are what runs in ours."""

import pytest
import torch

from fastft import testing
from fastft.bench import shapes
from fastft.bench.e2e import peft, qlora, step
from fastft.bench.runner import WrongResult

pytest.importorskip("peft")
CPU = torch.device("cpu")


def the_case(dtype, p):
    family = peft
    if dtype == qlora.DTYPE:
        pytest.importorskip("bitsandbytes")
        family = qlora
    (case,) = family.cases("cpu", ["tiny-llama"], [dtype], [p], peer_names=["peft"])
    return family, case


@pytest.mark.parametrize("dtype", ["fp32", "bf16+fp32", qlora.DTYPE])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_steps(dtype, p):
    _, case = the_case(dtype, p)
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


@pytest.mark.parametrize("dtype", ["fp32", qlora.DTYPE])
def test_the_gate_finds_an_error(dtype):
    family, case = the_case(dtype, 0.0)
    check = case.checker(case.inputs(CPU, 0))

    def wrong(model, d):
        trained = family.ARMS["fastft"](model, d)
        model.model.layers[0].mlp.up_proj.scale_layer(1.01)
        return trained

    with pytest.raises(WrongResult):
        check(step.training(wrong))


def test_quantised_weights():
    _, case = the_case(qlora.DTYPE, 0.0)
    d = case.inputs(CPU, 0)
    layers = [type(layer) for layer in d.model.modules() if isinstance(layer, torch.nn.Linear)]
    assert {cls.__name__ for cls in layers} == {"Linear4bit", "Linear"} and layers.count(torch.nn.Linear) == 1  # the head
    got, want = (m(input_ids=d.ids).logits for m in (d.model, d.dense))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert case.floor(d)()["norm"].norm() > 0  # backward goes down to the first layer
    wide = step.work(shapes.MODELS["tiny-llama"], 16, "fp32", 0.0)
    assert case.flops == wide["flops"] and 0 < case.floor_moved < case.moved < wide["moved"]
    with pytest.raises(ValueError, match="unknown dtype 'fp32'; known: nf4"):
        list(qlora.cases("cpu", dtypes=["fp32"]))


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
