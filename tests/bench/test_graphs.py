"""Which arms are timed as CUDA graphs, beside what, and what their rows say; captured by a fake, without a GPU."""

import pytest
import torch

from fastft.bench import graphs, run, runner
from tests.bench.test_runner import by_name, make_case, square


@pytest.fixture
def captures(monkeypatch):
    """Names what is captured; what is called `stuck` refuses. Runs on the CPU believe that they are on a GPU."""
    seen = []

    def capture(run, pool):
        if getattr(run, "stuck", False):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        seen.append(run)
        return lambda: run() and None

    monkeypatch.setattr(graphs, "new_pool", lambda: "pool")
    monkeypatch.setattr(graphs, "capture", capture)
    return seen


def stuck(x):
    def run():
        return {"y": x * x}

    run.stuck = True
    return run


def arms(*names, stuck_ones=()):
    built = {name: [square(torch.ones(2)) for _ in range(3)] for name in names}
    return built | {name: [stuck(torch.ones(2))] * 3 for name in stuck_ones}


def test_every_arm_and_input_set_is_captured(captures):
    runs = arms("floor", "floor2", "fastft")
    (group,) = graphs.groups(runs, "graph")
    assert captures == [run for arm in runs.values() for run in arm]
    assert {name: len(arm) for name, arm in group.runs.items()} == {"floor": 3, "floor2": 3, "fastft": 3}
    assert set(group.notes.values()) == {"CUDA graph"} and not set(group.runs["floor"]) & set(runs["floor"])


def test_what_cannot_be_captured_is_timed_beside_an_eager_floor(captures):
    runs = arms("floor", "floor2", "fastft", stuck_ones=["peer"])
    captured, eager = graphs.groups(runs, "graph")
    assert set(captured.runs) == {"floor", "floor2", "fastft"}
    assert eager.runs == {name: runs[name] for name in ("floor", "floor2", "peer")}
    assert eager.notes["peer"] == ("eager: not captured, RuntimeError: operation not permitted when stream is capturing")


@pytest.mark.parametrize("stuck_ones", [["floor"], ["fastft"]])
def test_without_floor_or_any_arm_all_are_eager(captures, stuck_ones):
    runs = arms(*({"floor", "floor2", "fastft"} - set(stuck_ones)), stuck_ones=stuck_ones)
    (group,) = graphs.groups(runs, "graph")
    assert group.runs is runs and all(note.startswith("eager") for note in group.notes.values())


def test_eager_timing_captures_nothing(captures):
    runs = arms("floor", "floor2")
    assert graphs.groups(runs, "eager") == [graphs.Group(runs, {"floor": "eager", "floor2": "eager"})]
    assert graphs.groups(runs, None) == [graphs.Group(runs, {"floor": "", "floor2": ""})]
    assert not captures


def test_rows_say_how_they_were_timed(captures, monkeypatch):
    split = graphs.groups
    monkeypatch.setattr(graphs, "groups", lambda runs, timing: split(runs, "graph"))
    found = by_name(runner.measure(make_case({"fastft": square, "peer": stuck}), "cpu", rounds=3))
    assert found["floor2"].note == found["fastft"].note == "CUDA graph" and found["peer"].note.startswith("eager: not")
    assert all(m.status == "quick" and m.ratio is not None for m in found.values())


def test_cpu_rows_have_no_note():
    assert {m.note for m in runner.measure(make_case({"fastft": square}), "cpu", rounds=2)} == {""}


def test_rows_of_another_timing_have_a_name_of_their_own(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run.results, "environment", lambda device: dict.fromkeys(run.results.FIELDS, "0"))
    monkeypatch.setattr(run.runner, "measure", lambda case, *rest: asked.append((case.name, rest[4])) or [])
    common = ["--device", "cuda", "--shape", "tiny", "--dtype", "fp32", "--dropout", "0", "--peers", "none", "--quick"]
    for more in ([], ["--timing", "eager"]):
        assert run.main(["lora", *common, *more]) == 0
    assert asked == [("layer r=16 p=0", "graph"), ("layer r=16 p=0 eager", "eager")]
