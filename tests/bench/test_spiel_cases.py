"""Steps and periods of SpIEL and LIFT: every arm trains the same entries, and a period chooses anew."""

import pytest
import torch

from fastft.bench import peers, runner, shapes
from fastft.bench.e2e import s2ft, spiel
from fastft.bench.runner import WrongResult

pytest.importorskip("transformers")
TINY = shapes.MODELS["tiny-llama"]


@pytest.fixture(autouse=True)
def more_entries(monkeypatch):
    monkeypatch.setattr(spiel, "DENSITY", 0.1)


def inputs(method="SpIEL", dtype="fp32", period=spiel.ENDLESS):
    return spiel.make_inputs(TINY, dtype, method, period, torch.device("cpu"), 0)


@pytest.mark.parametrize("dtype", s2ft.DTYPES)
@pytest.mark.parametrize("method", spiel.STATE_BYTES)
def test_every_arm_passes_the_gate(dtype, method):
    d = inputs(method, dtype)
    check = s2ft.checker(d)
    check(spiel.STEP)
    for build, why in spiel.PEERS.values():
        if why() is None:
            check(build)


def test_methods_train_as_many_entries():
    counts = [sum(len(part.index) for part in inputs(method).parts.values()) for method in spiel.STATE_BYTES]
    assert counts[0] == pytest.approx(counts[1], rel=0.01)


@pytest.mark.parametrize("method, expected", [("SpIEL", 28), ("LIFT", 24 + 1 / 8)])
def test_state_is_what_an_entry_needs(method, expected):
    """Delta, gradient, two moments, pristine value and column; SpIEL's age; LIFT's bit for what trained first."""
    run = spiel.STEP(inputs(method))
    run()
    by_entry, total = run.facts()
    assert by_entry.metric == "entry_bytes" and by_entry.value == pytest.approx(expected, abs=0.01)
    assert by_entry.met == (by_entry.value <= spiel.STATE_BYTES[method])
    assert total.value > by_entry.value


def test_ordinary_steps_choose_nothing_and_periods_do():
    run = spiel.STEP(inputs())
    for _ in range(3):
        run()
    (handle,) = spiel.handles(run.held[0]).values()
    assert not handle.method.history
    assert all(module.sparse[handle.name].candidates is None for module in handle.targets.values())

    d = inputs(period=spiel.PERIOD)
    spiel.cycle_checker(d)(spiel.cycle(spiel.STEP))
    run = spiel.cycle(spiel.STEP)(d)
    for _ in range(2):
        run()
    (handle,) = spiel.handles(run.held[0]).values()
    assert [event["update"] for event in handle.method.history] == [spiel.SUMMED, spiel.PERIOD + spiel.SUMMED]
    with pytest.raises(WrongResult, match="chosen anew"):
        still = s2ft.training(spiel.ours, spiel.own_optimizer)  # without a schedule
        spiel.cycle_checker(d)(spiel.cycle(still))


def test_the_published_algorithm_chooses_what_ours_does():
    """Nearly, after two periods: PyTorch's AdamW counts the updates of a tensor, SpIEL's those of an entry."""
    d = inputs(period=spiel.PERIOD)
    check = spiel.cycle_checker(d)
    check(spiel.cycle(spiel.PUBLISHED))
    ours, theirs = (spiel.cycle(build)(d) for build in (spiel.STEP, spiel.PUBLISHED))
    first = {name: set(part.index.flat().tolist()) for name, part in d.parts.items()}
    for run in (ours, theirs):
        for _ in range(2):
            run()
    (handle,) = spiel.handles(ours.held[0]).values()
    found = dict(zip(d.parts, theirs.held[0].spiel_schedule.sites, strict=True))
    same, total, kept, pairs = 0, 0, 0, []
    for name, module in handle.targets.items():
        one = dict(zip(module.sparse[handle.name].entries.flat().tolist(), module.sparse[handle.name].delta.tolist()))
        two = dict(zip(found[name].flat.tolist(), found[name].delta.tolist()))
        assert len(one) == len(two) == len(first[name])
        both = one.keys() & two.keys()
        same, total, kept = same + len(both), total + len(one), kept + len(both & first[name])
        pairs += [(one[entry], two[entry]) for entry in both]
    assert same > 0.9 * total and kept < 0.5 * total
    mine, theirs = torch.tensor(pairs).unbind(1)
    assert torch.cosine_similarity(mine, theirs, 0) > 0.95

    still = s2ft.training(spiel.published, spiel.published_optimizer)  # without a schedule
    with pytest.raises(WrongResult, match="chosen anew"):
        spiel.cycle_checker(d)(spiel.cycle(still))


def test_memory_of_a_period_is_a_steps():
    d = inputs(period=spiel.PERIOD)
    found = {}
    for name, build in {"step": spiel.STEP, "cycle": spiel.cycle(spiel.STEP)}.items():
        found[name] = runner._profile(
            build(d), [*d.model.parameters(), d.ids], runner.Measurement(name), torch.device("cpu")
        )
    assert found["cycle"].saved_bytes == found["step"].saved_bytes


def test_cases_cover_what_is_asked():
    found = {c.name: c for c in spiel.cases("cpu")}
    assert {name: c.target for name, c in found.items()} == {
        "step SpIEL 1 %": 1.10,
        "step LIFT 1 %": 1.10,
        "cycle of 20 steps SpIEL 1 %": 1.18,
    }
    assert "shira" in found["step LIFT 1 %"].arms or peers.peft_missing()
    assert {c.target for c in spiel.cases("cpu", names=["tiny-llama"])} == {None}
    for wrong in ({"names": ["square2048"]}, {"dtypes": ["fp8"]}, {"peer_names": ["nobody"]}):
        with pytest.raises(ValueError, match="known: "):
            list(spiel.cases("cpu", **wrong))
    with pytest.raises(ValueError, match="no dropout and no rank"):
        list(spiel.cases("cpu", rank=8))
