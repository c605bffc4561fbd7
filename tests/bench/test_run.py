import logging

import pytest
import torch

from fastft.bench import results, rounds, run
from fastft.bench.ops import lora

TINY = ["lora", "--device", "cpu", "--shape", "tiny", "--dtype", "fp32", "--threads", "1"]


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_quick_run_end_to_end(tmp_path, capsys):
    assert run.main([*TINY, "--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "quick look, not a result" in printed and "tiny fp32" in printed
    (path,) = tmp_path.glob("*.csv")
    rows = results.read([path])
    timed = [r for r in rows if r["metric"] == "time"]
    assert {(r["case"], r["implementation"]) for r in timed} == {
        (f"layer r=16 p={p}", name) for p in ("0", "0.05") for name in ("floor2", "fastft", "peft", "addmm")
    }
    assert all(r["status"] in ("quick", "skipped") and r["threads"] == "1" for r in rows)
    ours = next(r for r in timed if r["implementation"] == "fastft")
    assert ours["backend"].startswith("fastft_cpu") or ours["backend"] == "reference"
    assert float(ours["lo"]) <= float(ours["ratio"]) <= float(ours["hi"]) and ours["rounds"] == str(run.QUICK_ROUNDS)


def test_quick_rows_do_not_go_to_the_results(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / ".git").mkdir()
    assert run.main([*TINY, "--dropout", "0", "--rounds", "2", "--peers", "none"]) == 0
    assert "rows are not kept" in capsys.readouterr().out and not (tmp_path / "bench").exists()


def test_wrong_results_of_ours_are_said_and_fail_the_run(monkeypatch, capsys):
    def broken(d):
        return lambda x: lora.plain(d)(x) * 1.01

    monkeypatch.setattr(lora, "ours", broken)
    assert run.main([*TINY, "--dropout", "0", "--quick", "--peers", "addmm"]) == 1
    assert "WRONG  lora layer r=16 p=0 tiny fp32: fastft gives wrong results" in capsys.readouterr().out


def test_being_behind_is_an_exit_status_of_its_own(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run.stats, "is_void", lambda floor: False)
    monkeypatch.setitem(rounds.MIN_SAMPLE, "cpu", 0.0)
    monkeypatch.setitem(lora.TARGETS, ("tiny", "fp32"), 0.01)
    once = [*TINY, "--dropout", "0", "--peers", "none", "--no-calibrate", "--out", str(tmp_path)]
    assert run.main(once) == 3 and "MISSED lora layer r=16 p=0 tiny fp32: fastft" in capsys.readouterr().out
    assert run.main([*once, "--quick"]) == 0, "no result"
    monkeypatch.setattr(run.results, "losses", lambda case, found: ["CLOSE  x", "MET    x", "LOOK   x", "SLOW   x"])
    assert run.main(once) == 0


def test_help_tells_the_exit_statuses(capsys):
    with pytest.raises(SystemExit) as error:
        run.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert error.value.code == 0 and "1 if an implementation of ours gave wrong results; 2 for bad arguments; 3 if" in text


def test_resume_skips_only_what_counts_at_this_commit(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FASTFT_COMMIT", "abc")
    monkeypatch.setattr(run.runner.stats, "is_void", lambda floor: False)
    monkeypatch.setitem(rounds.MIN_SAMPLE, "cpu", 0.0)
    once = [*TINY, "--peers", "none", "--dropout", "0", "--out", str(tmp_path), "--resume", "--no-calibrate"]
    assert run.main(once) == 0 and "already measured" not in capsys.readouterr().out
    assert run.main(once) == 0 and "layer r=16 p=0 tiny fp32: already measured at abc" in capsys.readouterr().out
    monkeypatch.setenv("FASTFT_COMMIT", "def")
    assert run.main([*once, "--quick"]) == 0 and "already measured" not in capsys.readouterr().out
    assert run.main(once) == 0 and "already measured" not in capsys.readouterr().out


def test_resume_trusts_no_changed_tree_and_no_wrong_result(monkeypatch, tmp_path):
    env = results.environment("cpu") | {"commit": "abc"}
    key = {"family": "lora", "case": "layer r=16 p=0", "shape": "tiny", "dtype": "fp32"}

    def done(commit, *arms):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.csv"
        same = env | {"commit": commit, "metric": "time"} | key
        results.append(path, [same | {"implementation": name, "status": status} for name, status in arms])
        return run._done(path, env | {"commit": commit})

    assert done("abc", ("floor2", "ok"), ("fastft", "ok")) == {tuple(key.values())}
    assert not done("abc+dirty", ("floor2", "ok"), ("fastft", "ok"))
    assert not done("abc", ("floor2", "ok"), ("fastft", "wrong"), ("peft", "ok"))
    monkeypatch.delenv("FASTFT_COMMIT", raising=False)
    monkeypatch.setattr(results, "ROOT", tmp_path)  # no checkout
    assert not done(results.environment("cpu")["commit"], ("floor2", "ok"), ("fastft", "ok")), (
        "every tree of a version has it"
    )
    assert not done("abc", ("fastft", "ok"), ("fastft:triton", "wrong"))
    assert done("abc", ("fastft", "ok"), ("peft", "wrong"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--rank", "-1"], "--rank must be at least 1, not -1"),
        (["--rank", "0"], "--rank must be at least 1, not 0"),
        (["--dropout", "2"], "--dropout must be in [0, 1), not 2.0"),
        (["--dropout", "nan"], "--dropout must be in [0, 1), not nan"),
        (["--threads", "-1"], "--threads must be at least 1, not -1"),
        (["--threads", "0"], "--threads must be at least 1, not 0"),
        (["--rounds", "0"], "--rounds must be at least 2, not 0"),
        (["--out", "/proc/x"], "--out /proc/x: cannot be written: No such file or directory; give another folder"),
        (["--html", "--out", "/proc/x/page.html"], "--out /proc/x/page.html: cannot be written: No such file"),
    ],
)
def test_numbers_and_folders_are_checked_before_anything_is_measured(wrong, message, monkeypatch, capsys):
    monkeypatch.setattr(run.runner, "measure", lambda *args: pytest.fail("measured"))
    with pytest.raises(SystemExit) as error:
        run.main([*TINY[:5], "--quick", *wrong])
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        ["--shape", "huge"],
        ["--dtype", "fp8"],
        ["--peers", "nobody"],
        ["--rounds", "1"],
        ["nothing"],
        ["dora", "--peers", "addm"],
    ],
)
def test_bad_arguments(wrong, capsys):
    with pytest.raises(SystemExit) as error:
        run.main(wrong)
    assert error.value.code == 2
    assert "known:" in (message := capsys.readouterr().err) or "at least 2" in message or "choose from" in message


def test_what_no_case_has_is_no_run_without_findings(capsys):
    pytest.importorskip("peft")
    with pytest.raises(SystemExit) as error:
        run.main(["peft", "--device", "cpu", "--shape", "tiny", "--dtype", "bf16+fp32", "--quick"])
    assert error.value.code == 2 and "peft has no case of this shape and dtype" in capsys.readouterr().err


def test_torchao_is_quiet(monkeypatch, capsys):
    for name in ("torchao", "torch.utils._pytree"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    run.main(["--list"])
    assert not logging.getLogger("torchao.ops").isEnabledFor(logging.WARNING)
    assert not logging.getLogger("torch.utils._pytree").isEnabledFor(logging.WARNING)


def test_list(capsys):
    assert run.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert "square2048               T x K x N = 1024x2048x2048" in printed
    assert "llama-6l                 model of 6 layers, T = 1024" in printed
