"""`fastft train` under `accelerate launch` and torchrun: two processes are one with batches of twice the size."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
TRAIN = ["-m", "fastft.cli.main", "train"]
OPTIONS = ["--r", "2", "--lr", "0.05", "--max-length", "32", "--device", "cpu", "--eval-fraction", "0.08"]
OPTIONS += ["--max-steps", "6", "--save-steps", "3", "--keep-checkpoints", "5"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launch(*arguments):
    """The finished process; its output as text."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launchers pass it on
        stdout, stderr = process.communicate()
        stderr += "\nnot done after 120 s"
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def summary(out):
    return json.loads((out / "summary.json").read_text())


def curves(out):
    """Losses of the steps, and of what is held out."""
    found = summary(out)
    return [p["loss"] for p in found["train_curve"]], [p["loss"] for p in found["held_out_curve"]]


@pytest.fixture(scope="module")
def two(tiny_model, text_data, tmp_path_factory):
    """(the folder of a run of two processes, the options that made it, the process)."""
    out = tmp_path_factory.mktemp("launch") / "out"
    options = ["--model", tiny_model, "--data", text_data, *OPTIONS, "--batch-size", "2"]
    process = launch(*ACCELERATE, *TRAIN, *options, "--out", out)
    assert process.returncode == 0, process.stderr[-4000:]
    return out, options, process


def test_two_processes_are_one(two, tmp_path, fastft_command):
    out, options, _ = two
    alone = fastft_command("train", *options, "--batch-size", "4", "--out", tmp_path / "alone")
    assert alone.exit_code == 0, alone.output
    for found, expected in zip(curves(out), curves(tmp_path / "alone")):
        assert len(found) == len(expected) >= 2 and found == pytest.approx(expected, rel=2e-4)
    assert curves(out)[0][-1] < curves(out)[0][0] - 0.05
    assert summary(out)["processes"] == 2 and summary(tmp_path / "alone")["processes"] == 1
    assert summary(out)["rows"] == {"train": 37, "held_out": 3}, "of which one process evaluates two and one one"
    first, second = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (out, tmp_path / "alone"))
    assert first.keys() == second.keys()


def test_rank_0_alone_writes_and_prints(two):
    out, _, process = two
    assert {p.name for p in out.iterdir()} == {
        *("adapter", "checkpoint-3", "checkpoint-6", "config.yaml", "data.sha256", "summary.json", "loss.png")
    }
    assert process.stdout.count("run summary") == process.stdout.count("data: 37 rows") == 1
    assert process.stdout.count("training ") >= 1 and "on 2 processes, cpu" in process.stdout
    assert process.stderr.count("step 6/6:") == 1


def test_a_stopped_run_is_continued(two, tmp_path, fastft_command):
    """Bit for bit, here by torchrun; and not by another number of processes."""
    expected, _, _ = two
    out = tmp_path / "out"
    shutil.copytree(expected, out)
    shutil.rmtree(out / "checkpoint-6")
    shutil.rmtree(out / "adapter")
    (out / "summary.json").unlink()
    refused = fastft_command("train", "--resume", "--out", out)
    assert refused.exit_code == 2 and "the run had 2 processes, now there are 1" in refused.stderr
    process = launch(*TORCHRUN, *TRAIN, "--resume", "--out", out)
    assert process.returncode == 0, process.stderr[-4000:]
    first, second = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (expected, out))
    assert first.keys() == second.keys() and all((first[key] == second[key]).all() for key in first)
    assert curves(expected) == curves(out)


def test_processes_know_each_other_when_the_method_looks(tiny_model, text_data, tmp_path):
    """What doesn't go with several is refused. (Without the -- torchrun would take --r for one of its own options.)"""
    options = ["--model", tiny_model, "--data", text_data, "--method", "spiel", "--selection-accumulation-steps", "1"]
    process = launch(*TORCHRUN, "-m", "--", *TRAIN[1:], *options, *OPTIONS[2:], "--out", tmp_path / "out")
    assert process.returncode and not (tmp_path / "out").exists()
    assert "fastft: selection_accumulation_steps=1 on several processes" in process.stderr


def test_what_is_not_for_processes_is_refused(tiny_model, text_data, tmp_path, fastft_command, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    result = fastft_command("train", "--model", tiny_model, "--data", text_data, "--out", tmp_path / "out", *OPTIONS)
    assert result.exit_code == 2 and "launch it without FSDP" in result.stderr and not (tmp_path / "out").exists()
