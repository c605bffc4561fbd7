"""`fastft train` as a user runs it, on a tiny random Llama."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

import fastft
from fastft.cli.config import make_config
from fastft.cli.errors import UserError
from fastft.cli.folder import check_out, owned, resume_options
from fastft.cli.train import _warmup, choose_device_and_dtype
from fastft.integrations.transformers import last_checkpoint

from .conftest import adapter, assert_same_run, same, stopped, trained

SMALL = ["--r", "2", "--batch-size", "4", "--lr", "0.05", "--max-length", "32", "--device", "cpu", "--dropout", "0.1"]


@pytest.fixture(scope="module")
def straight(tiny_model, text_data, tmp_path_factory):
    """One finished run of 30 steps: (its folder, the options that made it)."""
    out = tmp_path_factory.mktemp("run") / "out"
    options = ["--model", tiny_model, "--data", text_data, *SMALL, "--max-steps", "30", "--save-steps", "5"]
    return out, options, trained(out, options)


def test_a_run_leaves_what_it_promises(straight):
    out, _, result = straight
    assert {p.name for p in out.iterdir()} == {
        "adapter",
        "checkpoint-25",
        "checkpoint-30",
        "config.yaml",
        "data.sha256",
        "summary.json",
        "loss.png",
    }
    summary = json.loads((out / "summary.json").read_text())
    assert summary["held_out_loss"]["after"] < summary["held_out_loss"]["before"] - 0.1
    assert summary["steps"] == 30 and summary["rows"] == {"train": 38, "held_out": 2}
    assert [p["step"] for p in summary["train_curve"]] == list(range(1, 31))
    assert [p["step"] for p in summary["held_out_curve"]] == [0, 30]
    assert summary["trainable_parameters"] == sum(t.numel() for t in adapter(out).values())
    assert summary["tokens_per_second"] > 0 and summary["peak_memory_bytes"] > 2**20
    assert {b["op"] for b in summary["backends"]} >= {"lora_shrink", "lora_grad_sb"}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "held-out loss" in result.stdout and str(out / "adapter").split("/")[-1] in result.stdout


def test_its_config_runs_it_again(straight, tmp_path, fastft_command):
    out, _, _ = straight
    assert fastft_command("train", "--config", out / "config.yaml", "--out", tmp_path / "again").exit_code == 0
    assert same(adapter(out), adapter(tmp_path / "again"))


def test_killed_and_resumed_is_bit_for_bit(straight, tmp_path, fastft_command):
    expected, options, _ = straight
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "fastft.cli.main", "train", *options, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (out / "checkpoint-5" / "trainer_state.json").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (out / "summary.json").exists()
    result = fastft_command("train", "--resume", "--out", out)
    assert result.exit_code == 0, result.output
    assert_same_run(expected, out)


def test_ctrl_c_says_how_to_go_on(straight, tmp_path, fastft_command, monkeypatch):
    expected, options, _ = straight
    out = tmp_path / "out"

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.Trainer.train", interrupted)
    result = fastft_command("train", *options, "--out", out)
    assert result.exit_code == 130 and "stopped before the first checkpoint" in result.stderr
    out = stopped(expected, tmp_path / "resumed", 30)
    result = fastft_command("train", "--resume", "--out", out)
    assert result.exit_code == 130 and f"fastft train --resume --out {out} continues from checkpoint-25" in result.stderr
    monkeypatch.setattr("fastft.cli.merge.run", interrupted)
    result = fastft_command("merge", "--model", "m", "--adapter", "a", "--out", "o")
    assert result.exit_code == 130 and result.stderr == "fastft: stopped\n"  # it has no --resume


@pytest.mark.parametrize("command", ["bench", "tune", "info"])
def test_ctrl_c_in_other_commands_is_no_traceback(command, monkeypatch, capsys):
    from fastft.cli import main

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "_bench", interrupted)
    monkeypatch.setattr("fastft.tune.main", interrupted)
    monkeypatch.setattr("fastft.info.main", interrupted)
    monkeypatch.setattr(sys, "argv", ["fastft", command])
    with pytest.raises(SystemExit) as exit:
        main.main()
    assert exit.value.code == 130 and capsys.readouterr().err == "fastft: stopped\n"


def test_a_folder_that_cannot_be_made_is_named(tiny_model, text_data, fastft_command):
    result = fastft_command("train", "--model", tiny_model, "--data", text_data, "--out", "/dev/null/x", *SMALL)
    assert result.exit_code == 2 and result.stderr.endswith("fastft: /dev/null/x: Not a directory\n"), result.stderr


def test_resuming_a_finished_run_trains_nothing(straight, tmp_path, fastft_command):
    out, _, _ = straight
    shutil.copytree(out, tmp_path / "out")
    for name in ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "summary.json"):
        (tmp_path / "out" / name).unlink()  # as if killed between the last checkpoint and the end
    result = fastft_command("train", "--resume", "--out", tmp_path / "out")
    assert result.exit_code == 0 and "is the run's end" in result.stdout
    assert same(adapter(out), adapter(tmp_path / "out"))
    before, after = (json.loads((folder / "summary.json").read_text()) for folder in (out, tmp_path / "out"))
    assert after["steps"] == 30 and after["held_out_loss"] == before["held_out_loss"]


def test_a_longer_run_stopped_before_its_result_is_finished(straight, tmp_path, fastft_command):
    out = tmp_path / "out"
    shutil.copytree(straight[0], out)
    assert fastft_command("train", "--resume", "--out", out, "--max-steps", "32").exit_code == 0
    longer = {key: value.clone() for key, value in adapter(out).items()}  # the file is written over
    for name in ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "summary.json"):
        shutil.copy(straight[0] / name, out / name)  # as if stopped in the last held-out evaluation
    assert fastft_command("train", "--resume", "--out", out).exit_code == 0
    assert same(adapter(out), longer) and not same(adapter(straight[0]), longer)
    assert json.loads((out / "summary.json").read_text())["steps"] == 32


def test_a_resumed_run_logs_evaluates_and_saves_as_it_is_told_now(straight, tmp_path, fastft_command):
    out = stopped(straight[0], tmp_path / "out", 30)
    more = ["--max-steps", "31", "--save-steps", "4", "--eval-steps", "3", "--log-steps", "2", "--keep-checkpoints", "9"]
    assert fastft_command("train", "--resume", "--out", out, *more).exit_code == 0
    found = json.loads((out / "summary.json").read_text())
    assert [p["step"] for p in found["held_out_curve"]] == [0, 27, 30, 31]
    assert [p["step"] for p in found["train_curve"]][24:] == [25, 26, 28, 30]
    assert {p.name for p in out.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (25, 28, 31)}


def test_folders_that_are_the_users_own_are_not_rotated_away(straight, tmp_path, fastft_command):
    out = stopped(straight[0], tmp_path / "out", 30)
    (out / "checkpoint-25").rename(out / "checkpoint-9")  # not by the names as text
    shutil.copytree(out / "checkpoint-9", out / "checkpoint-25")
    shutil.copytree(out / "checkpoint-25", out / "checkpoint-25-good")
    assert fastft_command("train", "--resume", "--out", out, "--save-steps", "1", "--max-steps", "27").exit_code == 0
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-25-good", "checkpoint-26", "checkpoint-27"}


def test_a_run_keeps_the_dtype_that_was_chosen_for_it(straight, tmp_path, monkeypatch):
    out, _, _ = straight
    assert yaml.safe_load((out / "config.yaml").read_text())["dtype"] == "float32"
    (tmp_path / "mine.yaml").write_text((out / "config.yaml").read_text().replace("dtype: float32", "dtype: auto"))
    config, kept = resume_options(str(tmp_path / "mine.yaml"), {"out": str(out)})
    assert make_config(kept, config).dtype == "float32"
    with pytest.raises(UserError, match="dtype was 'float32', is 'bfloat16'"):
        resume_options(None, {"out": str(out), "dtype": "bfloat16"})
    # A GPU that computes in bfloat16 only by emulating it.
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    device, dtype = choose_device_and_dtype(make_config({"model": "m", "data": "d", "out": "o"}))
    assert device.type == "cuda" and dtype == torch.float32


def test_lines_come_at_once_where_no_terminal_is(monkeypatch, straight):
    """And whole: the folder's name has no room in one line, and brackets mean nothing."""
    from fastft.cli import main
    from fastft.cli.report import print_summary

    stdout = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", ["fastft", "--version"])
    monkeypatch.setenv("COLUMNS", "80")
    main.main()
    assert stdout.buffer.getvalue().startswith(b"fastft ")
    out = Path("/runs") / "[lr=1e-4]" / ("long" * 30)
    print_summary(json.loads((straight[0] / "summary.json").read_text()), out)
    said = "".join(part for part in stdout.buffer.getvalue().decode() if part.isalnum() or part in "/[]=-.,")
    assert f"{out}/adapter" in said and f"{out}/loss.png" in said


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"],
)
def test_a_damaged_checkpoint_is_named(straight, tmp_path, fastft_command, name):
    out = stopped(straight[0], tmp_path / "out", 30)
    file = out / "checkpoint-25" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    result = fastft_command("train", "--resume", "--out", out)
    assert result.exit_code == 2 and f"--resume: {file.parents[name.count('/')]} is damaged (" in result.stderr, (
        result.stderr
    )
    assert "remove that folder" in result.stderr


def test_data_that_changed_is_not_resumed(straight, text_data, tmp_path, fastft_command):
    out = stopped(straight[0], tmp_path / "out", 30)
    (out / "data.sha256").write_text(f"{'0' * 64}  {text_data}\n")
    result = fastft_command("train", "--resume", "--out", out)
    assert result.exit_code == 2 and f"--resume: {text_data} changed since the run in {out} began" in result.stderr
    (out / "data.sha256").unlink()
    (out / "checkpoint-25" / "optimizer.pt").write_bytes(b"")
    assert "is damaged" in fastft_command("train", "--resume", "--out", out).stderr  # of an earlier version: not compared


def test_rows_that_changed_are_not_resumed(straight, tiny_model, tmp_path, fastft_command, monkeypatch):
    """A template that prints the date makes others of the same file each day."""
    lines = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"say {i}"}]} for i in range(8)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_model, model)
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text("Day 1. " + template)
    files = ["--model", model, "--data", tmp_path / "data.jsonl"]
    trained(out, [*files, *SMALL, "--max-steps", "2", "--eval-fraction", "0.3"])
    assert len((out / "data.sha256").read_text().splitlines()) == 3
    more = ["train", "--resume", "--out", out, "--max-steps", "4"]
    (model / "chat_template.jinja").write_text("Day 2. " + template)
    result = fastft_command(*more)
    assert result.exit_code == 2 and "--resume: the training rows and the held-out rows have other tokens" in result.stderr
    assert "the template prints the date" in result.stderr
    (model / "chat_template.jinja").write_text("Day 1. " + template)
    assert fastft_command(*more).exit_code == 0
    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum here")
    check = subprocess.run(["sha256sum", "-c", out / "data.sha256"], capture_output=True, text=True)
    assert check.returncode == 0 and check.stdout.count("\n") == 1 and not check.stderr, check.stderr


def test_the_digest_is_of_what_was_read(tiny_model, tmp_path, text_data):
    pipe, data = tmp_path / "pipe", Path(text_data).read_bytes()
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    trained(tmp_path / "out", ["--model", tiny_model, "--data", pipe, *SMALL, "--max-steps", "1"])
    writer.join()
    first = (tmp_path / "out" / "data.sha256").read_text().splitlines()[0]
    assert first == f"{hashlib.sha256(data).hexdigest()}  {pipe}"


def test_one_run_at_a_time_writes_into_a_folder(straight, tmp_path, monkeypatch, fastft_command):
    out = tmp_path / "out"
    with owned(out, resume=False, overwrite=False):
        result = fastft_command("train", *straight[1], "--out", out)
        assert result.exit_code == 2 and f"out {out}: another run is writing there" in result.stderr
        monkeypatch.setenv("RANK", "1")
        with owned(out, resume=False, overwrite=False):
            pass  # of the same run
        monkeypatch.delenv("RANK")
    (out / "config.yaml").touch()  # it came and went since the folder was looked at first
    with pytest.raises(UserError, match="is not empty"), owned(out, resume=False, overwrite=False):
        pass


def test_resuming_with_fewer_steps_than_it_has_changes_nothing(straight, tmp_path, fastft_command):
    out = tmp_path / "out"
    shutil.copytree(straight[0], out)
    result = fastft_command("train", "--resume", "--out", out, "--max-steps", "20")
    assert result.exit_code == 2 and "checkpoint-30 is beyond the run's 20 steps; give more" in result.stderr
    assert (out / "config.yaml").read_bytes() == (straight[0] / "config.yaml").read_bytes()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_without_the_trainers_state_is_not_resumed(straight, tmp_path, name):
    shutil.copytree(straight[0], tmp_path / "out")
    (tmp_path / "out" / "checkpoint-30" / name).unlink()
    assert last_checkpoint(tmp_path / "out").name == "checkpoint-25"


def test_epochs_are_counted_as_trainer_counts_them(tiny_model, text_data, tmp_path, fastft_command):
    options = ["--model", tiny_model, "--data", text_data, "--out", tmp_path / "out", *SMALL]
    assert fastft_command("train", *options, "--epochs", "1.5", "--gradient-accumulation", "4").exit_code == 0
    # 38 rows: 10 batches, 3 steps an epoch
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 5
    assert "is the run's end" in fastft_command("train", "--resume", "--out", tmp_path / "out").stdout


@pytest.mark.parametrize(
    "warmup, steps, expected, noted",
    [
        (0.03, 30, 0, False),
        (0.03, 34, 2, False),
        (0.5, 2, 1, False),
        (0.9, 3, 3, True),
        (2, 3, 2, False),
        (2, 2, 2, True),
        (0, 1, 0, False),
    ],
)
def test_a_warm_up_of_less_than_a_step_is_none(warmup, steps, expected, noted, capsys):
    config = make_config({"model": "m", "data": "d", "out": "o", "warmup": warmup})
    assert _warmup(config, steps) == expected
    assert ("not shorter than the run" in capsys.readouterr().out) == noted


def test_resume_refuses_other_options(straight, fastft_command):
    out, options, _ = straight
    result = fastft_command("train", *options, "--out", out, "--resume", "--lr", "0.5")
    assert result.exit_code == 2 and "lr was 0.05, is 0.5" in result.stderr


@pytest.mark.parametrize(
    "lines, note",
    [
        (
            [{"prompt": f"{i} and", "completion": f" {i}"} for i in range(8)],
            "8 prompt/completion examples, loss on the completion",
        ),
        (
            [
                {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}"}]}
                for i in range(8)
            ],
            "8 messages examples, loss on assistant turns",
        ),
    ],
)
def test_other_formats_train(tiny_model, tmp_path, write_jsonl, fastft_command, lines, note):
    result = fastft_command(
        "train",
        "--model",
        tiny_model,
        "--data",
        write_jsonl(*lines),
        "--out",
        tmp_path / "out",
        *SMALL,
        "--eval-fraction",
        "0",
        "--max-steps",
        "4",
        "--target-modules",
        "q_proj,up_proj",
        "--gradient-accumulation",
        "2",
        "--packing",
    )
    assert result.exit_code == 0, result.output
    assert note in result.stdout
    assert {key.split(".")[-3] for key in adapter(tmp_path / "out")} == {"q_proj", "up_proj"}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["held_out_loss"] is None


def test_separate_held_out_file_and_bfloat16(tiny_model, text_data, tmp_path, write_jsonl, fastft_command):
    lost = {"prompt": "a " * 40, "completion": "b"}
    held_out = write_jsonl({"text": "the file is read"}, {"text": "a list of lines"}, lost)
    result = fastft_command(
        "train",
        "--model",
        tiny_model,
        "--data",
        text_data,
        "--eval-data",
        held_out,
        "--eval-steps",
        "2",
        "--out",
        tmp_path / "out",
        *SMALL,
        "--max-steps",
        "4",
        "--dtype",
        "bfloat16",
        "--gradient-checkpointing",
    )
    assert result.exit_code == 0, result.output
    assert "held out: 1 examples dropped: no token to learn in the first 32" in result.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["rows"] == {"train": 40, "held_out": 2}
    assert {t.dtype for t in adapter(tmp_path / "out").values()} == {torch.float32}
    assert sorted({p["step"] for p in summary["held_out_curve"]}) == [0, 2, 4]


def test_dry_run(tiny_model, text_data, tmp_path, fastft_command):
    result = fastft_command(
        "train", "--model", tiny_model, "--data", text_data, "--out", tmp_path / "out", *SMALL, "--dry-run"
    )
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out").exists()
    # per layer r * (in + out): q, o 32-32; k, v 32-16; gate, up 32-48; down 48-32
    expected = 2 * 2 * (2 * 64 + 2 * 48 + 3 * 80)
    assert f"trainable: {expected:,} parameters" in result.stdout
    for word in ("model.layers.*.self_attn.q_proj", "32 -> 16", "AdamW state", "activations"):
        assert word in result.stdout


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--model": "./nowhere"}, "model ./nowhere: no such folder"),
        ({"--data": "nowhere.jsonl"}, "data nowhere.jsonl: No such file"),
        ({"--target-modules": "q_prok"}, "q_proj"),
        ({"--eval-fraction": "1.5"}, "eval_fraction must be in"),
        ({"--schedule": "cosin"}, "cosin"),
        ({"--max-length": "1"}, "max_length must be at least 2"),
        ({"--data": None}, "missing --data"),
    ],
)
def test_wrong_input_is_explained(tiny_model, text_data, tmp_path, fastft_command, change, message):
    options = {"--model": tiny_model, "--data": text_data, "--out": str(tmp_path / "out"), "--device": "cpu", **change}
    result = fastft_command("train", *(word for key, value in options.items() if value is not None for word in (key, value)))
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_no_folder_is_said_to_go_to_the_hub_before_it_does(text_data, tmp_path, monkeypatch, fastft_command):
    import transformers

    def unreachable(model, **options):
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    result = fastft_command("train", "--model", "demo-modle", "--data", text_data, "--out", tmp_path / "out")
    said = result.stderr.splitlines()
    assert result.exit_code == 2 and said[0] == "fastft: no folder demo-modle here; asking the Hugging Face Hub for it ..."
    assert "no network" in said[-1]


def test_a_folder_that_is_no_checkpoint(text_data, tmp_path, fastft_command):
    (tmp_path / "empty").mkdir()
    result = fastft_command("train", "--model", tmp_path / "empty", "--data", text_data, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "no config.json" in result.stderr


def test_an_output_folder_in_use(tiny_model, text_data, tmp_path, fastft_command):
    out = tmp_path / "out"
    (out / "checkpoint-9").mkdir(parents=True)
    (out / "mine.txt").write_text("keep")
    options = ["--model", tiny_model, "--data", text_data, "--out", out, *SMALL, "--max-steps", "1"]
    result = fastft_command("train", *options)
    assert result.exit_code == 2 and "is not empty; use --resume" in result.stderr
    result = fastft_command("train", *options, "--resume")
    assert result.exit_code == 2 and "no complete checkpoint" in result.stderr
    result = fastft_command("train", *options, "--overwrite")
    assert result.exit_code == 2 and "no run's config.yaml" in result.stderr and (out / "checkpoint-9").exists()
    (out / "config.yaml").write_text(yaml.safe_dump({"model": "m", "data": "d", "out": "o"}))
    (out / "adapter").mkdir()
    (out / "adapter" / "mine.txt").write_text("keep")
    result = fastft_command("train", *options, "--dry-run")
    assert result.exit_code == 0 and "will be refused" in result.stdout
    result = fastft_command("train", *options, "--overwrite", "--target-modules", "q_prok")
    assert result.exit_code == 2 and (out / "checkpoint-9").exists()  # a wrong option costs no earlier run
    assert fastft_command("train", *options, "--overwrite").exit_code == 0
    assert (out / "mine.txt").read_text() == "keep" == (out / "adapter" / "mine.txt").read_text()
    assert not (out / "checkpoint-9").exists()


def test_an_earlier_run_stays_until_the_new_one_can_begin(straight, monkeypatch, tmp_path, fastft_command):
    out = tmp_path / "out"
    shutil.copytree(straight[0], out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    result = fastft_command("train", *straight[1], "--out", out, "--overwrite", "--seed", "-1")
    assert result.exit_code == 2 and "seed must be in [0, 2**32), not -1" in result.stderr

    def refuse(*args, **options):
        raise ValueError("what no check foresaw")

    monkeypatch.setattr("fastft.integrations.transformers.make_trainer", refuse)
    with pytest.raises(ValueError, match="foresaw"):
        fastft_command("train", *straight[1], "--out", out, "--overwrite")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_killed_while_it_is_replaced_it_is_still_a_run(straight, monkeypatch, tmp_path, fastft_command):
    out = tmp_path / "out"
    shutil.copytree(straight[0], out)

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastft.cli.folder.shutil.rmtree", killed)
    assert fastft_command("train", *straight[1], "--out", out, "--overwrite").exit_code == 130
    monkeypatch.undo()
    check_out(out, resume=False, overwrite=True)
    before = (out / "config.yaml").read_bytes()
    monkeypatch.setattr("os.replace", killed)  # resumed, before the new configuration counts
    assert fastft_command("train", "--resume", "--out", out, "--max-steps", "32").exit_code == 130
    assert (out / "config.yaml").read_bytes() == before
    monkeypatch.undo()
    assert fastft_command("train", "--resume", "--out", out).exit_code == 0


@pytest.mark.parametrize("options", [(), ("--eval-fraction", "0")])
def test_a_run_that_diverged_unseen_leaves_no_adapter(tiny_model, text_data, tmp_path, fastft_command, options):
    run = ["--model", tiny_model, "--data", text_data, "--out", tmp_path / "out", *SMALL, "--log-steps", "100", *options]
    result = fastft_command("train", *run, "--max-steps", "6", "--lr", "1e30", "--warmup", "2", "--save-steps", "1")
    assert result.exit_code == 2 and "not finite at step" in result.stderr and "try a lower --lr" in result.stderr
    assert not (tmp_path / "out" / "adapter").exists() and not (tmp_path / "out" / "summary.json").exists()
    last = last_checkpoint(tmp_path / "out")
    assert all(torch.isfinite(value).all() for value in adapter(last).values())


def test_a_held_out_loss_that_is_not_finite(tiny_model, text_data, tmp_path, fastft_command):
    run = ["--model", tiny_model, "--data", text_data, "--out", tmp_path / "out", *SMALL, "--schedule", "constant"]
    result = fastft_command("train", *run, "--warmup", "0", "--max-steps", "1", "--lr", "1e30")
    assert result.exit_code == 2 and "the held-out loss is nan at step 1; try a lower --lr" in result.stderr
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_full_disk_names_the_folder(straight, tmp_path, fastft_command, largest_file):
    size = (straight[0] / "adapter" / "adapter_model.safetensors").stat().st_size
    for limit in (4096, size * 3 // 2):  # the adapter fails, then the optimizer's state, which torch writes
        out = tmp_path / str(limit)
        with largest_file(limit):
            result = fastft_command("train", *straight[1], "--out", out)
        assert result.exit_code == 2 and f"out {out}: cannot be written: " in result.stderr, result.output


def test_a_damaged_base_is_no_full_disk(straight, tiny_model, tmp_path, fastft_command):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:5000])
    result = fastft_command("train", *straight[1], "--model", model, "--out", tmp_path / "out")
    assert result.exit_code == 2 and f"model {model}: its weights are damaged" in result.stderr
    assert "cannot be written" not in result.stderr and not (tmp_path / "out").exists()


def test_a_path_that_cannot_be_written_is_one_line(tiny_model, text_data, fastft_command):
    result = fastft_command("train", "--model", tiny_model, "--data", text_data, "--out", "/proc/x", *SMALL)
    assert result.exit_code == 2 and "/proc/x" in result.stderr and "Traceback" not in result.output


def test_resuming_a_whole_run_leaves_its_summary(straight, tmp_path, fastft_command):
    out, _, _ = straight
    shutil.copytree(out, tmp_path / "out")
    assert fastft_command("train", "--resume", "--out", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "summary.json").read_bytes() == (out / "summary.json").read_bytes()


def test_unknown_key_in_a_config_file(tiny_model, tmp_path, fastft_command):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": tiny_model, "learning_rate": 1}))
    result = fastft_command("train", "--config", tmp_path / "run.yaml")
    assert result.exit_code == 2 and "unknown option 'learning_rate'" in result.stderr


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})


def test_the_command_is_light_to_import():
    heavy = "{'torch', 'typer', 'transformers', 'rich', 'yaml'}"
    result = run_python(f"import sys, fastft.cli.main; print(sorted({heavy} & set(sys.modules)))")
    assert result.stdout.strip() == "[]", result.stderr


def test_the_version_needs_no_extra():
    code = (
        "import sys; sys.argv = ['fastft', '--version']; sys.modules['typer'] = None\nimport fastft.cli.main as m; m.main()"
    )
    result = run_python(code)
    assert (result.returncode, result.stdout) == (0, f"fastft {fastft.__version__}\n"), result.stderr


@pytest.mark.parametrize("command", [(), ("train",), ("merge",)])
def test_short_help(command, fastft_command):
    short, long = (fastft_command(*command, option) for option in ("-h", "--help"))
    assert short.exit_code == 0 and short.stdout == long.stdout and "Usage" in short.stdout
    assert command or "..." not in short.stdout.partition("Commands:")[2]  # no command's line is cut


@pytest.mark.parametrize(
    "command, absent, told",
    [
        ("train", ("typer", "transformers"), "typer, transformers not installed; run: pip install 'fastft[train]'"),
        ("train", ("accelerate",), "accelerate not installed; run: pip install 'fastft[train]'"),
        ("merge", ("rich", "transformers", "matplotlib"), "transformers not installed; run: pip install 'fastft[train]'"),
        ("serve", ("accelerate", "uvicorn"), "uvicorn not installed; run: pip install 'fastft[serve]'"),
    ],
)
def test_without_the_extra_it_says_what_to_install(command, absent, told):
    code = (
        "import importlib.util, sys; found = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *a: None if name in {absent!r} else found(name, *a)\n"
        f"sys.argv = ['fastft', {command!r}]\nimport fastft.cli.main\nfastft.cli.main.main()"
    )
    result = run_python(code)
    assert result.returncode == 1 and f"fastft: {told}" in result.stderr


@pytest.mark.parametrize(
    "backend, problem", [("npu", "unknown backend 'npu' (FASTFT_BACKEND"), ("cuda", "FASTFT_BACKEND asks")]
)
def test_a_backend_that_cannot_run_is_refused_before_anything_is_written(
    backend, problem, tiny_model, text_data, tmp_path, fastft_command
):
    out = tmp_path / "out"
    with fastft.testing.use(backend):
        result = fastft_command("train", "--model", tiny_model, "--data", text_data, *SMALL, "--device", "cpu", "--out", out)
    assert result.exit_code == 2 and problem in result.stderr and not out.exists()


def test_dora_and_a_bias_on_b(tiny_model, text_data, tmp_path, fastft_command):
    run = ["train", "--model", tiny_model, "--data", text_data, *SMALL, "--max-steps", "2"]
    for option, part in (("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")):
        out = tmp_path / option
        assert fastft_command(*run, "--out", out, "--" + option.replace("_", "-")).exit_code == 0
        assert yaml.safe_load((out / "config.yaml").read_text())[option] is True
        assert sum(key.endswith(part) for key in adapter(out)) == 14
    merge = ["merge", "--model", tiny_model, "--out", tmp_path / "merged", "--adapter"]
    assert fastft_command(*merge, tmp_path / "use_dora" / "adapter").exit_code == 0
    refused = fastft_command(*merge, tmp_path / "lora_bias" / "adapter", "--overwrite")
    assert refused.exit_code != 0 and "no bias that its lora_bias could be added to" in refused.output.replace("\n", " ")
