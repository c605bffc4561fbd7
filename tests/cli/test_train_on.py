"""`fastft train --adapter`: another run with an adapter that was trained before."""

import json

import pytest
import torch

import fastft
from fastft.cli.config import make_config
from tests.methods.sparse_net import NAMES, Net

from .conftest import adapter, assert_same_run, stopped, trained

SMALL = ["--device", "cpu", "--batch-size", "4", "--lr", "0.01", "--max-length", "16", "--log-steps", "1"]
LORA = ["--r", "2", "--target-modules", "q_proj,down_proj"]
SPIEL = ["--density", "0.01", "--reselection-steps", "4", "--selection-accumulation-steps", "2"]
RUNS = {
    "lora": LORA,
    "s2ft": ["--down-ratio", "0.1"],
    "spiel": SPIEL,
    "lift": ["--rank-budget", "2", "--filter-rank", "8", "--update-interval", "3"],
}


@pytest.fixture
def first(tiny_model, text_data, tmp_path):
    """Run `fastft train` in OUT, 7 steps of a method."""

    def run(method):
        files = ["--model", tiny_model, "--data", text_data, *SMALL, "--method", method]
        trained(tmp_path / "first", [*files, *RUNS[method], "--max-steps", "7"])
        return tmp_path / "first", files

    return run


@pytest.mark.parametrize("method", RUNS)
def test_a_second_run_goes_on_from_the_first(method, first, tmp_path, fastft_command):
    before, files = first(method)
    second = tmp_path / "second"
    trained(second, [*files, "--adapter", before / "adapter", "--max-steps", "7", "--save-steps", "3"])
    old, new = (json.loads((out / "summary.json").read_text()) for out in (before, second))
    assert new["held_out_loss"]["before"] == pytest.approx(old["held_out_loss"]["after"], rel=1e-6)
    assert new["held_out_loss"]["after"] < new["held_out_loss"]["before"]
    assert new["trainable_parameters"] == old["trainable_parameters"] and str(before) in new["title"]
    if old["selection"]:
        chosen = [[one["update"] for one in summary["selection"]["choices"]] for summary in (old, new)]
        assert chosen[0] == chosen[1] and len(chosen[0]) == 2
    assert adapter(before).keys() <= adapter(second).keys() | {key for key in adapter(before) if "candidate" in key}
    again = stopped(second, tmp_path / "stopped", last=7)
    (before / "adapter" / "adapter_config.json").unlink()  # what goes on is the run, not what it began from
    assert fastft_command("train", "--resume", "--out", again).exit_code == 0
    assert_same_run(second, again, *(["selection"] if old["selection"] else []))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--r", "4"], r"r=4: adapter FOLDER has its own; leave it out"),
        (["--target-modules", "v_proj"], "target_modules='v_proj': adapter FOLDER has its own"),
        (["--method", "lift"], "adapter FOLDER is LoRA's, which --method lift can't train"),
        (["--dry-run"], "--dry-run counts an adapter that begins anew"),
    ],
)
def test_what_does_not_go_together(options, message, first, tmp_path, fastft_command):
    before, files = first("lora")
    folder, out = before / "adapter", tmp_path / "out"
    result = fastft_command("train", *files, "--out", out, "--adapter", folder, *options)
    assert result.exit_code == 2 and message.replace("FOLDER", str(folder)) in result.stderr and not out.exists()


@pytest.mark.parametrize(("selection", "rate"), [("accumulated", 1e-4), ("momentum", 1e-3)])
def test_the_learning_rate_is_that_of_the_adapters_way(selection, rate, tmp_path):
    handle = fastft.attach(Net(), fastft.SpIEL(density=0.1, selection=selection, target_modules=NAMES))
    assert handle.optimizer().param_groups[0]["lr"] == rate
    handle.save(tmp_path)
    config = make_config({"model": "m", "data": "d", "out": "o", "method": "spiel", "adapter": str(tmp_path)})
    assert config.lr == rate


def test_no_adapter_there(first, tmp_path, fastft_command):
    before, files = first("lora")
    command = ["train", *files, "--out", tmp_path / "out", "--adapter"]
    assert f"did you mean {before / 'adapter'}?" in fastft_command(*command, before).stderr
    weights = before / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    result = fastft_command(*command, before / "adapter")
    assert result.exit_code == 2 and f"adapter {before / 'adapter'}: " in result.stderr and not (tmp_path / "out").exists()


def test_what_overwrite_would_remove_is_not_trained_on(first, tmp_path, fastft_command):
    before, files = first("lora")
    (tmp_path / "link").symlink_to(before / "adapter")
    last = before / "checkpoint-7"
    for folder in (before / "adapter", last / "adapter", tmp_path / "link"):
        result = fastft_command("train", *files, "--out", before, "--overwrite", "--adapter", folder)
        assert result.exit_code == 2 and f"adapter {folder} belongs to the run in {before}, which" in result.stderr
    result = fastft_command("train", *files, "--out", before, "--overwrite", "--data", last / "trainer_state.json")
    assert result.exit_code == 2 and "data " in result.stderr and "belongs to the run" in result.stderr
    assert adapter(before) and last.is_dir()


def test_an_adapter_of_peft(tiny_model, text_data, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(tmp_path / "peft")
    files = ["--model", tiny_model, "--data", text_data, *SMALL]
    trained(tmp_path / "out", [*files, "--adapter", tmp_path / "peft", "--max-steps", "3"])
    found = adapter(tmp_path / "out")
    assert len(found) == 4 and all(3 in t.shape for t in found.values())
    assert all(t.any() and torch.isfinite(t).all() for t in found.values())
