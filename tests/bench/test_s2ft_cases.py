"""S²FT's steps and exchanges: every arm trains the same slices, and what stands in the weights is what an arm says."""

import pytest
import torch

from fastft.bench import exchange, peers, runner, shapes
from fastft.bench.e2e import s2ft
from fastft.bench.runner import WrongResult

pytest.importorskip("transformers")
TINY = shapes.MODELS["tiny-llama"]
OPTIONS = {"down_ratio": 0.1, "o_ratio": 0.25}


def inputs(dtype="fp32", options=OPTIONS):
    return s2ft.make_inputs(TINY, dtype, options, torch.device("cpu"), 0)


OURS = s2ft.training(s2ft.ours, s2ft.own_optimizer, s2ft.STATE_BYTES)


@pytest.mark.parametrize("dtype", s2ft.DTYPES)
@pytest.mark.parametrize("options", [OPTIONS, {"up_ratio": 0.1, "v_ratio": 0.5}], ids=["columns", "rows"])
def test_every_arm_passes_the_gate(dtype, options):
    check = s2ft.checker(inputs(dtype, options))
    for build in (OURS, *s2ft.STEP_PEERS.values()):
        check(build)


def test_the_gate_stops_other_units_and_a_forgotten_update():
    d = inputs()
    check = s2ft.checker(d)

    def shifted(model, d):
        parts = {n: s2ft.replace(p, index=(p.index + 1) % 32) for n, p in d.parts.items()}
        return s2ft.plain(model, s2ft.replace(d, parts=parts))

    with pytest.raises(WrongResult, match="parts: relative error"):
        check(s2ft.training(shifted, s2ft.write_back))
    with pytest.raises(WrongResult, match="lowers the loss by"):
        check(s2ft.training(s2ft.plain))  # whose slices never reach the weights


def test_the_floor_computes_the_same_loss_and_trains_nothing_of_it():
    d = inputs()
    run = s2ft.training(s2ft.frozen)(d)
    out = run()
    ours = OURS(d)()
    assert out["loss"] == ours["loss"] and out.keys() - {"loss"} == d.parts.keys()
    assert all(out[name].shape == (1,) and out[name] == 0 for name in d.parts)
    assert run()["loss"] == out["loss"]


def test_a_step_saves_the_floors_and_the_slices_of_x():
    d = inputs()
    runs = {name: build(d) for name, build in {"floor": s2ft.training(s2ft.frozen), "ours": OURS}.items()}
    saved = {}
    for name, run in runs.items():
        run()
        saved[name] = runner.saved_bytes(run, [*d.model.parameters(), d.ids, *run.parameters()])
    tokens = TINY.batch * TINY.length
    assert saved["ours"] - saved["floor"] == sum(tokens * len(part.index) * 4 for part in d.parts.values())


@pytest.mark.parametrize("dtype, ours, plain", [("fp32", 20, 16), ("bf16+fp32", 18, 16)])
def test_state_is_what_a_trained_number_needs(dtype, ours, plain):
    """Delta, gradient and two moments, float32; ours also the pristine value, in the model's dtype."""
    d = inputs(dtype)
    for build, expected in ((OURS, ours), (s2ft.STEP_PEERS["plain"], plain)):
        run = build(d)
        run()
        (fact,) = run.facts()
        assert (fact.metric, fact.value, fact.unit) == ("state_bytes", expected, "B/entry")
        assert fact.met is (True if build is OURS else None)


def merged(d):
    """PEFT's arm up to its merge: taking the delta out again does not bring back all bits."""
    run = exchange.peft(d)
    run.adapters = run.adapters[:1]
    return run


def exchanged(dtype=torch.float32):
    return exchange.make_inputs(TINY, dtype, 0.1, torch.device("cpu"), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_exchange_passes_the_gate(dtype):
    d = exchanged(dtype)
    before = {name: p.clone() for name, p in d.model.named_parameters()}
    check = exchange.checker(d)
    check(exchange.ours)
    check(exchange.lora)
    if peers.peft_missing() is None:
        check(merged)
    assert all(torch.equal(p, before[name]) for name, p in d.model.named_parameters()), "arms work on copies"


def test_the_gate_stops_an_exchange_that_leaves_the_old_adapter():
    def stays(d):
        run = exchange.ours(d)
        weights = run()

        def same():
            return weights

        same.adapters = run.adapters
        return same

    with pytest.raises(WrongResult, match="with slice 0 in it"):
        exchange.checker(exchanged())(stays)


def test_an_exchanged_lora_is_as_large_as_the_slices():
    d = exchange.make_inputs(shapes.MODELS["llama-6l"], torch.float32, 0.03, torch.device("cpu"), 0)
    lora, slices = (sum(t.numel() for part in parts for t in part[0].values()) for parts in ((d.a, d.b), (d.deltas,)))
    assert lora / slices == pytest.approx(1, abs=0.05)


def test_targets_belong_to_the_shapes_they_were_set_for():
    found = {(c.name, c.shape): c.target for c in s2ft.cases("cpu", peer_names=[])}
    assert found["step down 3 %", "llama-6l"] == 1.02 and found["step down 3 % + o 5 %", "llama-6l"] == 1.03
    switches = {shape: target for (name, shape), target in found.items() if name == "switch down 3 % vs PEFT merge"}
    if peers.peft_missing() is None:
        assert switches == dict.fromkeys(s2ft.SWITCH, 0.1)
    tiny = {c.name: c.target for c in s2ft.cases("cpu", names=["tiny-llama"])}
    assert "step down 3 % + o 5 %" not in tiny and set(tiny.values()) == {None}, "5 % of its heads are less than one"
    for wrong in ({"names": ["square2048"]}, {"dtypes": ["fp8"]}, {"peer_names": ["nobody"]}):
        with pytest.raises(ValueError, match="known: "):
            list(s2ft.cases("cpu", **wrong))
    with pytest.raises(ValueError, match="no dropout and no rank"):
        list(s2ft.cases("cpu", rank=8))
