"""The sparse cases: every arm passes the gate of its sort, wrong ones don't; counted work adds up."""

from dataclasses import replace

import pytest
import torch

from fastft.bench import entries, entry_updates, peers, runner, shapes
from fastft.bench.ops import lora, sparse
from fastft.bench.runner import WrongResult

TINY = shapes.LINEARS["tiny"]


def tiny(dtype="fp32", bias=False):
    return entries.make_inputs(replace(TINY, bias=bias), 0.1, dtype, torch.device("cpu"), 0)


def updates(dtype="fp32"):
    return entry_updates.make_inputs(TINY, 0.05, dtype, torch.device("cpu"), 0)


@pytest.mark.parametrize("dtype", sparse.DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_layers_pass_the_gate(dtype, bias):
    d = tiny(dtype, bias)
    before = d.weight.clone()
    check = sparse.layer_checker(d)
    for make in (entries.ours, entries.plain, entries.published, *([entries.shira] if peers.peft_missing() is None else [])):
        check(entries.training(make))
    assert torch.equal(d.weight, before), "arms leave the inputs' weight as it was"


@pytest.mark.parametrize("dtype", sparse.DTYPES)
def test_deltas_beside_the_weight_pass_the_gate(dtype):
    d = tiny(dtype, bias=True)
    check = sparse.forward_checker(d)
    check(sparse.forward(entries.beside))
    check(sparse.forward(entries.CsrDelta))
    if peers.peft_missing() is None:
        check(sparse.forward(peers.peft, "y_lora"))


@pytest.mark.parametrize("dtype", sparse.DTYPES)
def test_updates_pass_the_gate(dtype):
    d = updates(dtype)
    before = [w.clone() for w in d.weights]
    check = entry_updates.checker(d)
    check(entry_updates.ours)
    if dtype == "fp32":  # in 16 bits LIFT's moments and weights are rounded
        check(entry_updates.published)
    assert all(map(torch.equal, d.weights, before))


def test_the_gates_stop_other_entries_a_forgotten_delta_and_a_forgotten_update():
    d = tiny()
    with pytest.raises(WrongResult, match="y: relative error"):
        sparse.layer_checker(d)(lambda _: entries.training(entries.plain)(replace(d, weight=2 * d.weight)))
    with pytest.raises(WrongResult, match="gives none of ddelta"):
        sparse.layer_checker(d)(lora.floor)
    with pytest.raises(WrongResult, match="y: relative error"):
        sparse.forward_checker(d)(sparse.forward(peers.frozen_linear))
    u = updates()
    with pytest.raises(WrongResult, match="w: relative error"):
        entry_updates.checker(u)(lambda d: lambda: {"w": [entry_updates.live(d, i) for i in range(len(d.weights))]})
    with pytest.raises(WrongResult, match="no entry has changed"):
        entry_updates.checker(u)(lambda d: lambda: {"w": [w + 1 for w in d.weights]})


def test_a_layer_saves_nothing_of_its_own():
    d = tiny()
    run = entries.training(entries.ours)(d)
    run()
    assert runner.saved_bytes(run, [*d.everything(), *run.parameters()]) == 0


@pytest.mark.skipif(peers.peft_missing() is not None, reason="needs peft")
def test_what_peft_saves_is_counted_in_sparse_tensors_too():
    d = tiny()
    run = entries.training(entries.shira)(d)
    run()
    saved = runner.saved_bytes(run, [*d.everything(), *run.parameters()])
    assert saved >= d.weight.numel() * 4 + len(d.entries) * 16, "a clone of the weight, int64 indices"


@pytest.mark.parametrize("dtype, expected", [("fp32", 24), ("bf16+fp32", 22)])
def test_state_is_what_an_entry_needs(dtype, expected):
    d = updates(dtype)
    run = entry_updates.ours(d)
    run()
    by_entry, total = run.facts()
    assert (by_entry.metric, by_entry.value, by_entry.met) == ("entry_bytes", pytest.approx(expected), True)
    starts = 8 * (TINY.n + 1) / len(d.entries)
    assert (total.metric, total.value) == ("state_bytes", pytest.approx(expected + starts))


@pytest.mark.parametrize("dtype, e", [("fp32", 4), ("bf16+fp32", 2)])
def test_bytes_of_an_update_are_entries_and_sectors(dtype, e):
    linear = shapes.Linear(1, 512, 512)
    d = entry_updates.make_inputs(linear, 0.05, dtype, torch.device("cpu"), 0)
    sectors = (d.entries.flat() * e // 32).unique().numel()
    counted = entry_updates.MATRICES * (len(d.entries) * (4 + e + 4 + 8 + 8 + 8) + 64 * sectors)
    assert entry_updates.moved(linear, 0.05, dtype) == pytest.approx(counted, rel=0.01)
    assert entry_updates.copies(d)()["copy"].numel() == d.size // 2


def test_work_formulas():
    t, k, n, count = TINY.tokens, TINY.k, TINY.n, entries.count_of(TINY, 0.1)
    w = sparse.work(TINY, 0.1, "bf16+fp32")
    assert w["layer"]["floor_flops"] == 4 * t * k * n and w["beside"]["floor_flops"] == 2 * t * k * n
    for sort in ("layer", "beside"):
        assert w[sort]["flops"] - w[sort]["floor_flops"] == 2 * t * count
    assert w["layer"]["moved"] - w["layer"]["floor_moved"] == 2 * t * (k + n) + 8 * count


def test_cases_cover_what_is_asked(monkeypatch):
    found = {(c.name, c.shape, c.dtype): c for c in sparse.cases("cpu")}
    assert found["layer 1 %", "square4096", "fp32"].target == 1.06
    assert {c.size.split("x")[0] for c in found.values() if c.name.startswith("layer")} == {"1024"}
    assert found["layer 5 %", "square2048", "bf16+fp32"].target is None
    assert found["update 5 % vs LIFT's algorithm", "square4096", "fp32"].target == 0.1
    assert sum(c.name.startswith("beside") for c in found.values()) == 2 * 2 * len(sparse.TOKENS)
    by_gpu = {(c.name, c.shape): c.target for c in sparse.cases("cuda", dtypes=["bf16+fp32"]) if "layer" in c.name}
    assert by_gpu["layer 0.1 %", "llama3-8b/k_proj"] == 1.30 and by_gpu["layer 0.1 %", "llama3-8b/q_proj"] == 1.15
    assert by_gpu["layer 5 %", "llama3-8b/down_proj"] == 1.60 and None not in by_gpu.values()
    for wrong in ({"names": ["huge"]}, {"dtypes": ["bf16"]}, {"peer_names": ["nobody"]}):
        with pytest.raises(ValueError, match="known: "):
            list(sparse.cases("cpu", **wrong))
    with pytest.raises(ValueError, match="no dropout and no rank"):
        list(sparse.cases("cpu", rank=8))
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert {n for c in sparse.cases("cpu", ["tiny"], ["fp32"]) for n in c.skipped} == {"shira", "peft"}
