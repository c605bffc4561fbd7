"""The LoRA cases: the gate lets right implementations through and stops the wrong ones; counted work adds up."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastft.bench import peers, runner, shapes
from fastft.bench.ops import lora
from fastft.bench.runner import WrongResult

TINY = shapes.LINEARS["tiny"]


def tiny(dtype="fp32", p=0.0, bias=False):
    return lora.make_inputs(replace(TINY, bias=bias), dtype, shapes.RANK, p, torch.device("cpu"), seed=0)


@pytest.mark.parametrize("p", lora.DROPOUTS)
@pytest.mark.parametrize("dtype", lora.DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_ours_and_the_peers_pass_the_gate(dtype, p, bias):
    torch.manual_seed(0)
    d = tiny(dtype, p, bias)
    check = lora.checker(d)
    arms = {"fastft": lora.ours, "addmm": peers.addmm}
    if peers.peft_missing() is None:
        arms["peft"] = peers.peft
    if p == 0 and "+" not in dtype:  # its GEMM has one dtype, which rounds float32 adapters
        arms |= {name: peers.LORA[name][0] for name in peers.WITHOUT_DROPOUT}
    for make in arms.values():
        check(lora.adapted(make))


def wrong_scale(d):
    return lambda x: F.linear(x, d.weight, d.bias) + F.linear(F.linear(F.dropout(x, d.p), d.a), d.b) * d.scale * 1.01


def no_dropout(d):
    return lora.plain(replace(d, p=0.0))


def test_the_gate_stops_a_wrong_scale():
    with pytest.raises(WrongResult, match="relative error"):
        lora.checker(tiny())(lora.adapted(wrong_scale))


def test_the_gate_stops_a_layer_that_does_not_drop():
    lora.checker(tiny())(lora.adapted(no_dropout))
    with pytest.raises(WrongResult, match=r"dropout p=0\.05 moves y by 0\.000"):
        lora.checker(tiny(p=0.05))(lora.adapted(no_dropout))


@pytest.mark.parametrize("name", ["dA", "dB", "dX"])
def test_the_gate_stops_a_gradient_under_another_mask(name):
    def build(d):
        right, other = lora.adapted(lora.plain)(d), lora.adapted(lora.plain)(d)
        key = name.lower()
        return lambda: {**right(), key: other()[key]}

    torch.manual_seed(0)
    with pytest.raises(WrongResult, match=f"{name} does not replay"):
        lora.check_dropout(build, tiny(p=0.05))


def test_dropout_saves_less_than_peft():
    """ARCHITECTURE's bound: beyond x, float32 S and a packed mask."""
    d = tiny(p=0.05)
    saved = runner.saved_bytes(lora.adapted(lora.ours)(d), d.tensors())
    assert saved == TINY.tokens * (4 * shapes.RANK + (TINY.k + 7) // 8)


def test_work_formulas():
    t, k, n, r = TINY.tokens, TINY.k, TINY.n, shapes.RANK
    w = lora.work(TINY, "fp32", r, 0.0)
    assert w["floor_flops"] == 2 * (2 * t * k * n)  # forward, dX
    low_rank = {"S": 2 * t * k * r, "y": 2 * t * r * n, "dS": 2 * t * n * r, "dB": 2 * t * n * r, "dA": 2 * t * r * k}
    assert w["flops"] - w["floor_flops"] == sum(low_rank.values()) + 2 * t * r * k
    # x twice, dy once, y and dx read and written; S and dS three times each; A three times and dA, B twice and dB.
    elements = 2 * t * k + t * n + 2 * t * n + 2 * t * k + 6 * t * r + 4 * r * k + 3 * n * r
    assert w["moved"] - w["floor_moved"] == 4 * elements
    mixed = lora.work(TINY, "bf16+fp32", r, 0.05)
    assert mixed["floor_moved"] == w["floor_moved"] // 2
    assert mixed["moved"] - lora.work(TINY, "bf16+fp32", r, 0.0)["moved"] == 3 * t * ((k + 7) // 8)


def test_cases_cover_what_is_asked():
    found = list(lora.cases("cpu"))
    assert {(c.shape, c.dtype) for c in found} == {
        (s, d) for s in ("square2048", "square4096") for d in ("fp32", "bf16", "bf16+fp32")
    }
    assert {c.name for c in found} == {"layer r=16 p=0", "layer r=16 p=0.05"}
    targets = {(c.shape, c.dtype, c.name[-4:]): c.target for c in found}
    assert targets["square2048", "fp32", " p=0"] == 1.035
    assert targets["square4096", "bf16", "0.05"] == pytest.approx(1.045)
    assert all(c.target is None for c in lora.cases("cpu", ["tiny"]))
    assert all(c.target is None for c in lora.cases("cpu", ["square2048"], rank=8))
    for wrong in ({"names": ["huge"]}, {"dtypes": ["fp8"]}, {"peer_names": ["nobody"]}):
        with pytest.raises(ValueError, match="known: "):
            list(lora.cases("cpu", **wrong))


def test_an_absent_peer_is_skipped_with_its_reason(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    (case,) = lora.cases("cpu", ["tiny"], ["fp32"], [0.0])
    assert case.skipped == {"peft": "peft is not installed (pip install peft)"} and "peft" not in case.arms


def test_model_shapes():
    linears = shapes.resolve(["llama3-8b"])
    assert {name: (s.k, s.n) for name, s in linears.items()} == {
        "llama3-8b/q_proj": (4096, 4096),
        "llama3-8b/k_proj": (4096, 1024),
        "llama3-8b/gate_proj": (4096, 14336),
        "llama3-8b/down_proj": (14336, 4096),
    }
    assert shapes.LINEARS["qwen2.5-7b/q_proj"].bias and not shapes.LINEARS["qwen2.5-7b/down_proj"].bias
