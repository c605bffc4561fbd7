"""bench/gpu.sh and its Python, as far as they go without a GPU."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from fastft import tune
from fastft.bench import gpu_checks, results, run

SCRIPT = results.ROOT / "bench" / "gpu.sh"
STAGES = ["build", "info", "test", "bench", "sanitize", "graph", "ops", "tune", "collect"]
MEASURED = ["calibration", "lora", "inference", "grouped", "dora", "partial", "sparse", "selection"]
MEASURED += ["step", "s2ft", "spiel", "serve", "peft", "qlora"]


def gpu_sh(*args, **env):
    env = {k: v for k, v in os.environ.items() if k not in ("DRY", "PYTHON", "LIMIT")} | env
    return subprocess.run([SCRIPT, *map(str, args)], env=env, capture_output=True, text=True, timeout=60)


@pytest.fixture
def fake(tmp_path):
    """A stand-in for Python that notes what it is asked to run, and fails at (or sleeps in) what the file `bad` names."""
    folder = tmp_path / "bin"
    folder.mkdir()
    action = f'case "$*" in *"$(cat "{tmp_path}/bad")"*) $(cat "{tmp_path}/action");; esac'
    (tmp_path / "bad").write_text("nothing")
    for name in ("python", "fastft"):
        (folder / name).write_text(f'#!/bin/sh\necho "$(basename "$0") $*" >>"{tmp_path}/calls"\n{action}\n')
        (folder / name).chmod(0o755)
    (tmp_path / "action").write_text("exit 3")
    return folder / "python"


def calls(tmp_path):
    return (tmp_path / "calls").read_text().splitlines()


def test_dry_run_prints_every_stage_and_touches_nothing(tmp_path):
    done = gpu_sh(tmp_path / "out", DRY="1")
    assert done.returncode == 0, done.stderr
    assert [line[2:] for line in done.stdout.splitlines() if line.startswith("# ")] == STAGES
    for wanted in (
        "pip install --no-build-isolation --no-deps -e",
        "--write-proof",
        "fastft.bench.run lora --device cuda --dtype bf16",
        "-n ",
        "tests/modules/test_routed.py",
        "streams\\ or\\ cuda",
        "fastft.bench.op_times --out",
        *(f"fastft.tune {family} --quick --out" for family in tune.families()),
    ):
        assert wanted in done.stdout
    assert (
        all(f"--tool {tool}" in done.stdout for tool in ("memcheck", "racecheck", "synccheck"))
        or "no-sanitizer" in done.stdout
    )
    assert not (tmp_path / "out").exists()


def test_every_family_is_measured_with_what_it_takes(tmp_path):
    """The command lines of the bench stage, parsed as they would be."""
    done = gpu_sh(tmp_path, "bench", DRY="1")
    commands = [line.split("fastft.bench.run ")[1].split() for line in done.stdout.splitlines() if "bench.run " in line]
    assert [family for family, *_ in commands] == MEASURED
    assert run.families().keys() <= set(MEASURED), "a family is forgotten in gpu.sh"
    for family, *rest in commands:
        args = run._parser().parse_args([family, *rest])
        if family == run.CALIBRATION:
            continue
        cases = importlib.import_module(run.families()[family]).cases(args.device, None, args.dtype, None)
        assert any(True for _ in cases), family


def test_a_finished_stage_is_skipped_and_a_failed_one_repeated(tmp_path, fake):
    out = tmp_path / "out"
    (tmp_path / "bad").write_text("write-proof")
    first = gpu_sh(out, "info", "test", "bench", PYTHON=str(fake))
    assert first.returncode == 1 and "test: FAILED with exit status 3" in first.stderr
    assert sorted(p.name for p in out.iterdir() if p.suffix in (".done", ".failed")) == [
        "bench.done",
        "info.done",
        "test.failed",
    ]
    # info's two, whether xdist is there and the tests twice, a bench for each family
    assert [line.split()[0] for line in calls(tmp_path)] == [
        "python",
        "fastft",
        *["python"] * 3,
        *["python"] * len(MEASURED),
    ]
    measured = [line.split("fastft.bench.run ")[1].split()[0] for line in calls(tmp_path) if "fastft.bench.run" in line]
    assert measured == MEASURED

    (tmp_path / "bad").write_text("nothing")
    (tmp_path / "calls").unlink()
    second = gpu_sh(out, "info", "test", "bench", PYTHON=str(fake))
    assert second.returncode == 0
    assert "info: done before, skipped" in second.stderr and "bench: done before, skipped" in second.stderr
    assert len(calls(tmp_path)) == 3 and all("-m pytest" in call for call in calls(tmp_path)[1:])
    assert (out / "test.done").exists() and not (out / "test.failed").exists()


def test_the_test_stage_ends_with_one_line_for_each_failing_test(tmp_path, fake):
    out = tmp_path / "out"
    out.mkdir()
    lines = [f"tests/ops/test_a.py::test_{name}[{i}] (call): assert {i}\n" for name in "xy" for i in range(100)]
    (out / "test-failures.txt").write_text("".join(lines))
    (tmp_path / "bad").write_text("write-proof")
    (tmp_path / "fail").write_text("echo 200 failed, 3 passed in 1.0s; exit 1")
    (tmp_path / "action").write_text(f"sh {tmp_path}/fail")
    done = gpu_sh(out, "test", PYTHON=str(fake))
    assert done.returncode == 1
    said = done.stdout.splitlines()
    assert said[-1] == "200 failed, 3 passed in 1.0s" and said[-3:-1] == [lines[0].strip(), lines[100].strip()]
    assert said[-4].startswith("200 failures; the first of each test")


def test_a_family_that_fails_does_not_keep_the_others_from_being_measured(tmp_path, fake):
    (tmp_path / "bad").write_text("fastft.bench.run dora")
    done = gpu_sh(tmp_path / "out", "bench", PYTHON=str(fake), FAMILIES="lora dora sparse")
    assert [line.split("fastft.bench.run ")[1].split()[0] for line in calls(tmp_path)] == ["lora", "dora", "sparse"]
    # 3 says that ours is behind, which the rows tell.
    assert done.returncode == 0 and (tmp_path / "out" / "bench.done").exists()
    (tmp_path / "action").write_text("exit 1")
    (tmp_path / "out" / "bench.done").unlink()
    (tmp_path / "calls").unlink()
    done = gpu_sh(tmp_path / "out", "bench", PYTHON=str(fake), FAMILIES="lora dora sparse")
    assert len(calls(tmp_path)) == 3 and done.returncode == 1 and (tmp_path / "out" / "bench.failed").exists()


def test_a_tree_without_git_and_commit_is_said_to_resume_nothing(tmp_path, fake):
    script = tmp_path / "tree" / "bench" / "gpu.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, script)
    env = {name: value for name, value in os.environ.items() if name != "FASTFT_COMMIT"} | {"PYTHON": str(fake)}
    for given, said in (({"FASTFT_COMMIT": "abc"}, False), ({}, True)):
        done = subprocess.run(
            [script, tmp_path / f"{said}", "bench"], env=env | given, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 and ("FASTFT_COMMIT is unset" in done.stdout) == said


def test_without_transformers_the_tests_of_serving_are_none_and_that_is_no_failure(tmp_path, fake):
    (tmp_path / "bad").write_text("test_routed")
    (tmp_path / "action").write_text("exit 5")
    assert gpu_sh(tmp_path / "out", "test", PYTHON=str(fake)).returncode == 0
    (tmp_path / "out" / "test.done").unlink()
    (tmp_path / "action").write_text("exit 1")
    assert gpu_sh(tmp_path / "out", "test", PYTHON=str(fake)).returncode == 1


def test_tune_goes_on_where_it_was_stopped(tmp_path, fake):
    (tmp_path / "bad").write_text("fastft.tune grouped")
    first = gpu_sh(tmp_path / "out", "tune", PYTHON=str(fake), TUNED="lora grouped dora")
    assert first.returncode == 1 and [line.split()[3] for line in calls(tmp_path)] == ["lora", "grouped"]
    (tmp_path / "bad").write_text("nothing")
    (tmp_path / "calls").unlink()
    second = gpu_sh(tmp_path / "out", "tune", PYTHON=str(fake), TUNED="lora grouped dora")
    assert second.returncode == 0 and [line.split()[3] for line in calls(tmp_path)] == ["grouped", "dora"]


def test_a_stage_is_stopped_at_its_limit(tmp_path, fake):
    (tmp_path / "bad").write_text("graph")
    (tmp_path / "action").write_text("sleep 30")
    done = gpu_sh(tmp_path / "out", "graph", PYTHON=str(fake), LIMIT="1")
    assert done.returncode == 1 and "stopped after 1 s; call again to go on" in done.stderr
    assert not (tmp_path / "out" / "graph.done").exists()


def test_usage(tmp_path):
    assert gpu_sh("--help").returncode == 0 and "usage: bench/gpu.sh OUT" in gpu_sh("--help").stdout
    assert gpu_sh().returncode == 2
    assert "unknown stage tset" in gpu_sh(tmp_path / "out", "tset").stderr
    assert "is no command" in gpu_sh(tmp_path / "out", "info", PYTHON="no-such-python").stderr
    missing = gpu_sh(tmp_path / "out", "info")
    assert missing.returncode == 2 and "run the build stage first" in missing.stderr


def test_collect_runs_without_a_gpu_and_each_time_anew(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "test.log").write_text("")
    (out / "test.failed").write_text("exit status 3 after 4 s\n")
    for state in ("failed: exit status 3 after 4 s", "done in 5 s"):
        assert gpu_sh(out, "collect", PYTHON=sys.executable).returncode == 0
        assert json.loads((out / "summary.json").read_text())["stages"] == {"test": state}
        (out / "test.done").write_text("5 s\n")


CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
RACES = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"


@pytest.mark.parametrize(
    "log, output, status, verdict, message",
    [
        (CLEAN, "4 passed in 1 s", 0, "passed", "0 errors, 4 passed"),
        (CLEAN.replace("ERROR SUMMARY: 0", "ERROR SUMMARY: 3"), "4 passed", 9, "failed", "3 errors"),
        (RACES, "4 passed", 9, "failed", "2 errors"),
        (RACES.replace("2", "0"), "4 passed", 0, "passed", "0 errors"),
        ("", "4 passed", 0, "failed", "no ERROR SUMMARY"),
        (CLEAN, "no tests ran", 5, "failed", "status 5"),
        (CLEAN, "1 failed, 3 passed", 1, "failed", "status 1"),
        ("========= Error: Device not supported. Please refer to ...", "", 1, "skipped", "Device not supported"),
    ],
)
def test_sanitizer_verdict(log, output, status, verdict, message):
    found = gpu_checks.sanitizer_verdict(log, output, status)
    assert found["verdict"] == verdict and message in found["message"]


def test_sanitizer_command_keeps_its_verdict(tmp_path):
    (tmp_path / "sanitize-memcheck.log").write_text(CLEAN)
    (tmp_path / "sanitize-memcheck.txt").write_text("4 passed")
    assert gpu_checks.main(["sanitizer", "memcheck", "--out", str(tmp_path), "--status", "0"]) == 0
    assert gpu_checks.main(["sanitizer", "racecheck", "--out", str(tmp_path), "--status", "1"]) == 1
    found = gpu_checks.summary(tmp_path)["sanitizer"]
    assert {tool: v["verdict"] for tool, v in found.items()} == {"memcheck": "passed", "racecheck": "failed"}


def test_link_packages(tmp_path):
    """In a real bare environment: packages are found in the folders' order, those that a folder links to as well."""
    for name in ("first", "second", "linked"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "everywhere.py").write_text(f"print({name!r})")
    (tmp_path / "linked" / "far.py").write_text("print('far')")
    (tmp_path / "second" / "link.pth").write_text(f"{tmp_path}/linked\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, gpu_checks.__file__, "link-packages", tmp_path / "first", tmp_path / "second"], check=True)
    done = subprocess.run([python, "-c", "import everywhere, far"], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["first", "far"]


def test_graph_check_accepts_a_faithful_replay():
    assert gpu_checks.check_graph("cpu", lambda step: step) == []


def test_grouped_graph_check_accepts_a_faithful_replay_and_finds_frozen_segments():
    assert gpu_checks.check_grouped_graph("cpu", lambda step: step) == []

    def frozen(step):
        outputs = step()
        return lambda: outputs

    faults = "\n".join(gpu_checks.check_grouped_graph("cpu", frozen))
    assert all(f"{active} adapters: y0 of the replay differs" in faults for active in (0, 1, 2, 4))


def test_graph_check_finds_frozen_masks_and_frozen_inputs():
    def frozen(step):
        outputs = step()
        return lambda: outputs

    faults = "\n".join(gpu_checks.check_graph("cpu", frozen))
    assert "p=0.0, overwritten input: y of the replay differs" in faults
    assert "p=0.0, first input" not in faults
    assert "p=0.1, first input: two replays used the same dropout mask" in faults
