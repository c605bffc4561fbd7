"""The partial cases: every arm passes the gate of its sort, wrong ones don't; counted work adds up."""

from dataclasses import replace

import pytest
import torch

from fastft.bench import peers, runner, shapes, slices
from fastft.bench.ops import lora, partial
from fastft.bench.runner import WrongResult

TINY = shapes.LINEARS["tiny"]
WIDE = ("fp32", "bf16+fp32", "fp16+fp32")  # what attached layers train is float32


def tiny(kind="columns", dtype="fp32", bias=False):
    return slices.make_inputs(replace(TINY, bias=bias), kind, dtype, torch.device("cpu"), 0)


@pytest.fixture(autouse=True)
def larger_slices(monkeypatch):
    monkeypatch.setattr(slices, "RATIO", 0.2)


@pytest.mark.parametrize("kind", partial.KINDS)
@pytest.mark.parametrize("dtype", lora.DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_layers_pass_the_gate(kind, dtype, bias):
    check = partial.layer_checker(tiny(kind, dtype, bias))
    for build in (lora.adapted(slices.ours), lora.adapted(slices.plain), slices.permuted, slices.full):
        check(build)


@pytest.mark.parametrize("kind", partial.KINDS)
@pytest.mark.parametrize("dtype", WIDE)
def test_unmerged_layers_and_loras_pass_the_gate(kind, dtype):
    d = tiny(kind, dtype, bias=True)
    before = d.weight.clone()
    check = partial.forward_checker(d)
    check(partial.forward(slices.unmerged))
    check(partial.forward(slices.low_rank, "y_lora"))
    if peers.peft_missing() is None:
        check(partial.forward(peers.peft, "y_lora"))
    assert torch.equal(d.weight, before), "arms leave the inputs' weight as it was"


@pytest.mark.parametrize("kind", partial.KINDS)
@pytest.mark.parametrize("dtype", WIDE)
def test_updates_pass_the_gate(kind, dtype):
    d = tiny(kind, dtype)
    before = d.weight.clone()
    check = partial.update_checker(d)
    check(partial.updating(slices.slice_adamw))
    check(partial.updating(slices.adamw_and_copy))
    assert torch.equal(d.weight, before)


def test_the_gate_stops_another_slice_and_an_arm_without_one():
    d = tiny()
    shifted = replace(d, part=replace(d.part, index=(d.part.index + 1) % TINY.k))
    with pytest.raises(WrongResult, match="dslice: relative error"):
        partial.layer_checker(d)(lambda _: lora.adapted(slices.ours)(shifted))
    with pytest.raises(WrongResult, match="gives none of dfirst, dslice, dw"):
        partial.layer_checker(d)(lora.floor)


def test_the_gate_stops_a_forgotten_delta_and_a_wrong_update():
    d = tiny()
    with pytest.raises(WrongResult, match="y: relative error"):
        partial.forward_checker(d)(partial.forward(peers.frozen_linear))

    with pytest.raises(WrongResult, match="w: relative error"):
        partial.update_checker(d)(partial.updating(lambda i: slices.adamw_and_copy(i, betas=(0.8, 0.999))))


def test_saved_is_the_slice_of_x():
    """Columns keep a copy of x[:, C], rows nothing but x itself."""
    for kind, expected in (("columns", TINY.tokens * slices.slice_size(TINY, "columns") * 4), ("rows", 0)):
        d = tiny(kind)
        run = lora.adapted(slices.ours)(d)
        run()
        assert runner.saved_bytes(run, d.tensors()) == expected


def test_a_lora_of_equal_size():
    for linear in (shapes.LINEARS["square2048"], shapes.LINEARS["llama-6l/down_proj"]):
        for kind in partial.KINDS:
            d = slices.make_inputs(replace(linear, tokens=1), kind, "fp32", torch.device("cpu"), 0)
            assert (d.a.numel() + d.b.numel()) / d.delta.numel() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("kind", partial.KINDS)
def test_work_formulas(kind):
    t, k, n = TINY.tokens, TINY.k, TINY.n
    d = tiny(kind)
    c, trained, r = len(d.part.index), d.delta.numel(), d.a.shape[0]
    other = trained // c
    w = partial.work(TINY, kind, "bf16+fp32")
    assert w["layer"]["floor_flops"] == 4 * t * k * n
    assert w["layer"]["flops"] - w["layer"]["floor_flops"] == 2 * t * trained
    # The slice of x (of dy) read, its copy written and read; dy (x) once more; the gradient, float32.
    assert w["layer"]["moved"] - w["layer"]["floor_moved"] == 2 * (3 * t * c + t * other) + 4 * trained
    assert w["unmerged"]["flops"] - w["unmerged"]["floor_flops"] == 2 * t * trained - 2 * t * (k + n) * r
    # delta, gradient, two moments read, all but the gradient written; 2 bytes of base read and of weight written.
    assert w["update"]["moved"] == (7 * 4 + 2 * 2) * trained


def test_cases_cover_what_is_asked(monkeypatch):
    monkeypatch.undo()
    found = list(partial.cases("cpu"))
    assert {(c.name, c.shape) for c in found if c.name.startswith("layer")} == {
        (f"layer {kind} 3 %", shape) for kind in partial.KINDS for shape in ("square2048", "square4096")
    }
    unmerged = [c for c in found if c.name.startswith("unmerged")]
    assert {c.shape for c in unmerged} == {"square2048", "llama-6l/down_proj"} and len(unmerged) == 2 * 2 * 2 * 4
    assert {c.target for c in unmerged} == {1.0} and all(c.name.endswith(" vs LoRA") for c in unmerged)
    assert {c.dtype for c in found} == set(partial.DEFAULT_DTYPES)
    by_gpu = {(c.shape, c.name): c.target for c in partial.cases("cuda") if c.name.startswith("layer")}
    assert (
        by_gpu["llama3-8b/down_proj", "layer columns 3 %"] == 1.02 and by_gpu["llama3-8b/q_proj", "layer rows 3 %"] is None
    )
    assert {c.name.split()[0] for c in partial.cases("cpu", ["tiny"], ["bf16"])} == {"layer"}
    for wrong in ({"names": ["huge"]}, {"dtypes": ["fp8"]}, {"peer_names": ["nobody"]}):
        with pytest.raises(ValueError, match="known: "):
            list(partial.cases("cpu", **wrong))
    for wrong in ({"dropouts": [0.1]}, {"rank": 8}):
        with pytest.raises(ValueError, match="no dropout and no rank"):
            list(partial.cases("cpu", **wrong))


def test_an_absent_peer_is_skipped_with_its_reason(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    found = list(partial.cases("cpu", ["tiny"], ["fp32"]))
    assert {c.name.split()[0] for c in found if "peft" in c.skipped} == {"unmerged"}
    assert not any("peft" in c.arms for c in found)
