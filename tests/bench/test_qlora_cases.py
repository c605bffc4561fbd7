"""The cases of QLoRA: arms agree with what the quantised weights stand for, and our ops are what runs in ours."""

import pytest
import torch

from fastft import testing
from fastft.bench import shapes
from fastft.bench.e2e import qlora, step
from fastft.bench.runner import WrongResult

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_steps(p):
    (case,) = qlora.cases("cpu", ["tiny-llama"], dropouts=[p])
    d = case.inputs(CPU, 0)
    check = case.checker(d)
    for build in case.arms.values():
        check(build)
    with testing.record() as calls:
        case.arms["fastft"](d)()
    assert {call.op for call in calls} >= {"lora_shrink", "lora_expand_", "lora_grad_sb"}
    with testing.record() as calls:
        case.arms["peft"](d)()
    assert not calls


def test_the_gate_finds_an_error():
    (case,) = qlora.cases("cpu", ["tiny-llama"], dropouts=[0.0])

    def wrong(model, d):
        trained = qlora.accelerated(model, d)
        model.model.layers[0].mlp.up_proj.scale_layer(1.01)
        return trained

    with pytest.raises(WrongResult):
        case.checker(case.inputs(CPU, 0))(step.training(wrong))


def test_quantised_weights():
    (case,) = qlora.cases("cpu", ["tiny-llama"], dropouts=[0.0])
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
