"""The serving cases: every arm gives every row its own adapter's logits, and the gate stops what doesn't."""

from dataclasses import replace

import pytest
import torch

from fastft.bench import served, shapes
from fastft.bench.e2e import serve
from fastft.bench.runner import WrongResult

pytest.importorskip("transformers")
TINY, CPU = shapes.MODELS["tiny-llama"], torch.device("cpu")
MIXED = {"a": ("lora", 3), "b": ("lora", 5), "c": ("s2ft",), "d": ("spiel",)}


def inputs(rows, adapters=MIXED, dtype="fp32", tokens=1, even=None):
    batch = serve.Batch("test", adapters, tuple(rows), tokens, even=even)
    return serve.make_inputs(TINY, dtype, batch, CPU, 0)


@pytest.mark.parametrize("dtype", serve.DTYPES)
def test_every_arm_passes_the_gate(dtype):
    pytest.importorskip("peft")
    d = inputs(["a", "a", "b", "b"], {"a": ("lora", 3), "b": ("lora", 3)}, dtype, tokens=3)
    check = serve.checker(d)
    for build in (served.ours, served.peft, served.accelerated_peft, served.bmm):
        check(serve.arm(build))


@pytest.mark.parametrize("tokens", [1, 4])
def test_kinds_mix_with_the_base_in_one_batch(tokens):
    d = inputs(["d", "", "a", "c", "b", "c", ""], tokens=tokens)
    serve.checker(d)(serve.arm(served.ours))


def test_the_gate_stops_another_rows_adapter_and_the_base():
    d = inputs(["a", "b", "c", "d"])
    check = serve.checker(d)
    for wrong in (served.base, lambda own: served.ours(replace(own, names=("a", "b", "d", "c")))):
        with pytest.raises(WrongResult):
            check(serve.arm(wrong))


def test_the_floor_of_ragged_ranks_has_adapters_of_its_own():
    even = {"x": ("lora", 4), "y": ("lora", 4)}
    d = inputs(["a", "b"], {"a": ("lora", 3), "b": ("lora", 5)}, even=even)
    base = served.base(d.own)()["logits"]
    assert not torch.equal(serve.floor(d)()["logits"], base)
    assert d.even.model is d.own.model and d.even.ids is d.own.ids


def test_the_issue_s_cases_and_targets():
    cases = {(c.name, c.dtype): c for c in serve.cases("cpu")}
    assert cases["decode r=16 D=32", "fp32"].target == 1.28 and cases["decode r=16 D=8", "bf16"].target == 1.18
    assert cases["decode r=16 D=32 via PEFT", "bf16"].target == pytest.approx(1.45)
    assert {cases[name, "fp32"].target for name in ("decode mixed", "prefill r=16 D=4")} == {1.35, 1.12}
    assert cases["decode base only", "bf16"].target == 1.02 and cases["decode ragged vs even ranks", "fp32"].target == 1.15
    ragged = next(b for b in serve.batches(16) if b.even)
    assert sum(rank for _, rank in ragged.adapters.values()) == sum(rank for _, rank in ragged.even.values()) == 376
    assert served.bmm_missing(("a", "a", "b", "b")) is None and "equally" in served.bmm_missing(("a", "b", "b"))
