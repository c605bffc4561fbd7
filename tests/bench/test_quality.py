"""The quality family: methods of equal size, a gate that finds another LoRA than PEFT's, times to a loss, rows."""

import csv
import functools
import inspect
import textwrap

import pytest
import torch

from fastft.bench import peers, quality, quality_runs, results, run
from fastft.bench.quality_runs import Run

pytestmark = [
    pytest.mark.skipif(quality_runs.missing() is not None, reason=str(quality_runs.missing())),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
STEPS = quality_runs.EVALUATIONS
ENVIRONMENT = dict.fromkeys(results.FIELDS[: results.FIELDS.index("family")], "x")


@functools.cache
def task():
    """The demonstration's model, on a few short rows: to collect the standard library's functions takes some seconds."""
    texts = [inspect.getsource(function) for function in vars(textwrap.TextWrapper).values() if inspect.isfunction(function)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality_runs, "_functions", lambda count: texts * 4)
        made = quality_runs.make_task("cpu", held_out=8)
    made.rows[:] = [{name: values[:24] for name, values in row.items()} for row in made.rows]
    made.held_out[:] = [{name: values[:, :24] for name, values in batch.items()} for batch in made.held_out]
    return made


@functools.cache
def trained(name, rate=4e-3, seed=0):
    return quality_runs.train(name, task(), rate, STEPS, seed)


@pytest.mark.parametrize("name", quality.ARMS)
def test_every_method_learns_with_as_many_numbers(name):
    if name == "peft" and peers.peft_missing():
        pytest.skip(peers.peft_missing())
    before = {key: value.clone() for key, value in task().model.state_dict().items()}
    one = trained(name)
    assert quality.gate(name, [one], {}) is None, (one.trained, one.held_out)
    assert len(one.training) == STEPS and len(one.held_out) == quality_runs.EVALUATIONS + 1
    assert one.held_out[0][0] == 0 and one.seconds > 0
    assert all(torch.equal(value, before[key]) for key, value in task().model.state_dict().items()), "methods train copies"


def test_ours_is_peft_and_the_gate_sees_when_it_is_not():
    pytest.importorskip("peft")
    ours, theirs = trained("fastft:LoRA"), trained("peft")
    assert quality.gate("fastft:LoRA", [ours], {"peft": [theirs]}) is None
    other = trained("fastft:LoRA", seed=1)
    assert "from PEFT's" in quality.gate("fastft:LoRA", [other], {"peft": [theirs]})
    assert "it trains 5 numbers" in quality.gate("fastft:LIFT", [Run(5, held_out=[(0, 2.0), (1, 1.0)])], {})
    assert "does not fall" in quality.gate("full", [Run(5, held_out=[(0, 2.0), (1, 2.0)])], {})


def test_batches_follow_from_the_seed():
    one, same, other = (quality_runs.batches(task(), 20, seed) for seed in (0, 0, 1))
    assert len(one) == 20 and all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0]["input_ids"], other[0]["input_ids"])


def test_seconds_to_a_loss_lie_between_evaluations():
    one = Run(1, held_out=[(0.0, 4.0), (10.0, 3.0), (20.0, 3.5), (30.0, 2.0)])
    assert one.seconds_to(3.5) == 5.0 and one.seconds_to(3.0) == 10.0 and one.seconds_to(2.75) == 25.0
    assert one.seconds_to(4.0) == 0.0 and one.seconds_to(1.9) is None
    assert (one.before, one.after, one.seconds) == (4.0, 2.0, 30.0)


def made_up(after, seconds):
    return Run(quality_runs.TRAINED, training=[3.0], held_out=[(0.0, 4.0), (seconds, after)])


def test_rows_and_verdicts():
    found = {
        "peft": [made_up(3.0, 10.0), made_up(3.0, 12.0)],
        "fastft:LoRA": [made_up(3.0, 11.0), made_up(3.0, 14.4)],
        "fastft:S2FT": [made_up(2.0, 10.0), made_up(3.5, 12.0)],
        "fastft:LIFT": [Run(7, held_out=[(0, 4.0), (1, 3.0)])] * 2,
    }
    made = quality.rows(found, 60, "ok", ENVIRONMENT, {"full": "not wanted"})
    by = {(row["implementation"], row.get("metric")): row for row in made}
    assert all(row.keys() <= set(results.FIELDS) for row in made)
    assert by["fastft:LoRA", "held_out_loss"]["value"] == "3" and by["fastft:LoRA", "held_out_loss"]["ratio"] == "1.00000"
    # 90 % of a fall of 1, in a straight line.
    assert by["peft", "seconds_to_loss"]["value"] == "9.9" and by["fastft:LoRA", "seconds_to_loss"]["ratio"] == "1.15000"
    assert "not reached in 1 of 2" in by["fastft:S2FT", "seconds_to_loss"]["note"]
    assert "value" not in by["fastft:S2FT", "seconds_to_loss"] and by["fastft:S2FT", "held_out_loss"]["value"] == "2.75"
    assert by["fastft:LIFT", "held_out_loss"]["status"] == "wrong" and by["full", None]["note"] == "not wanted"
    said = quality.losses(made)
    assert said[0].startswith("WRONG  quality: fastft:LIFT: it trains 7 numbers")
    assert [line.split(":")[0] for line in said[1:]] == ["LOST   quality seconds_to_loss", "LOST   quality seconds_a_step"]
    lines = quality.table(made)
    assert [line[0] for line in lines] == ["implementation", *found, "full"] and all(len(line) == 5 for line in lines)


def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(quality, "make_task", lambda device: task())
    monkeypatch.setattr(quality, "QUICK_STEPS", STEPS)
    assert run.main(["quality", "--quick", "--peers", "none", "--out", str(tmp_path), "--device", "cpu"]) == 0
    (file,) = tmp_path.glob("*.csv")
    with open(file, newline="") as opened:
        written = list(csv.DictReader(opened))
    assert {(row["implementation"], row["metric"], row["status"]) for row in written} == {
        (f"fastft:{name}", metric, "quick")
        for name in ("LoRA", "DoRA", "S2FT", "SpIEL", "LIFT")
        for metric in ("held_out_loss", "seconds_to_loss", "seconds_a_step")
    }
    assert "fastft's LoRA is not behind PEFT's" in capsys.readouterr().out
    for wrong in (["--peers", "nobody"], ["--rounds", "0"], ["--steps", "1"], ["--threads", "0"]):
        with pytest.raises(SystemExit):
            run.main(["quality", *wrong, "--out", str(tmp_path)])


def test_an_absent_peer_says_why(monkeypatch):
    monkeypatch.setitem(quality.PEERS, "peft", lambda: "peft is not installed")
    monkeypatch.setattr(quality, "train", lambda name, *rest: made_up(3.0, 1.0))
    found, skipped = quality.measure(task(), 1, STEPS, ["peft"], say=lambda line: None)
    assert skipped == {"peft": "peft is not installed"} and "peft" not in found and "fastft:LIFT" in found
