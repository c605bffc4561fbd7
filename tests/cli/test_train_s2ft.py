"""`fastft train --method s2ft` as a user runs it: train, kill, resume, look before, merge."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import fastft

from .conftest import adapter, assert_same_run, same, stopped, trained

SMALL = ["--method", "s2ft", "--down-ratio", "0.2", "--o-ratio", "0.5", "--v-ratio", "0.5", "--device", "cpu"]
SMALL += ["--batch-size", "4", "--lr", "0.03", "--max-length", "32", "--weight-decay", "0.01"]


@pytest.fixture(scope="module")
def straight(tiny_model, text_data, tmp_path_factory):
    """One finished run of 12 steps on units chosen by the data: (its folder, the options that made it, the result)."""
    out = tmp_path_factory.mktemp("run") / "out"
    options = ["--model", tiny_model, "--data", text_data, *SMALL, "--select", "activation", "--calibration-rows", "6"]
    options += ["--max-steps", "12", "--save-steps", "5"]
    return out, options, trained(out, options)


def test_a_run_leaves_what_it_promises(straight, tiny_model):
    out, _, result = straight
    assert {p.name for p in out.iterdir()} == {
        "adapter",
        "checkpoint-10",
        "checkpoint-12",
        "config.yaml",
        "data.sha256",
        "summary.json",
        "loss.png",
    }
    assert not list(out.glob("checkpoint-*/*.safetensors"))  # no base weights
    summary = json.loads((out / "summary.json").read_text())
    assert summary["held_out_loss"]["after"] < summary["held_out_loss"]["before"] - 0.1
    trained = [tensor for key, tensor in adapter(out).items() if key.endswith("s2ft_delta")]
    entries, base = sum(t.numel() for t in trained), AutoModelForCausalLM.from_pretrained(tiny_model).num_parameters()
    assert summary["trainable_parameters"] == entries and {t.dtype for t in trained} == {torch.float32}
    assert summary["base_parameters"] == base and summary["trainable_fraction"] == pytest.approx(entries / base)
    assert sum(summary["adapter_memory_bytes"].values()) == (16 + 4) * entries
    down = summary["slices"]["model.layers.*.mlp.down_proj"]
    assert sum(down["units"]) == round(0.2 * 2 * 48) and len(down["units"]) == 2
    ran = {(b["op"], b["backend"]): b["calls"] for b in summary["backends"]}
    assert sum(calls for (op, _), calls in ran.items() if op == "slice_adamw_") == 12 * len(trained)
    assert f"{entries:,} of {base:,} parameters" in result.stdout
    assert yaml.safe_load((out / "config.yaml").read_text())["select"] == "activation"


def test_its_config_runs_it_again(straight, tmp_path, fastft_command):
    out, _, _ = straight
    assert fastft_command("train", "--config", out / "config.yaml", "--out", tmp_path / "again").exit_code == 0
    assert same(adapter(out), adapter(tmp_path / "again"))


def test_resumed_is_bit_for_bit_on_the_checkpoints_units(straight, tmp_path, fastft_command, monkeypatch):
    expected, _, _ = straight
    out = stopped(expected, tmp_path / "stopped", last=12)
    monkeypatch.setattr(fastft.methods.s2ft, "unit_scores", None)  # nothing is measured again
    refused = fastft_command("train", "--resume", "--out", out, "--down-ratio", "0.3")
    assert refused.exit_code == 2 and "down_ratio was 0.2, is 0.3" in refused.stderr
    result = fastft_command("train", "--resume", "--out", out)
    assert result.exit_code == 0, result.output
    assert_same_run(expected, out, "slices")


def test_merge_gives_a_plain_checkpoint_with_the_same_logits(straight, tiny_model, tmp_path, fastft_command):
    out, _, _ = straight
    result = fastft_command("merge", "--model", tiny_model, "--adapter", out / "adapter", "--out", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    ids = torch.arange(20)[None]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = model(input_ids=ids).logits
    fastft.load(model, out / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert torch.equal(merged(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not torch.equal(merged(input_ids=ids).logits, before)


@pytest.mark.parametrize("select", ["random", "gradient"])
def test_dry_run(tiny_model, text_data, tmp_path, fastft_command, select):
    command = ["train", "--model", tiny_model, "--data", text_data, "--out", tmp_path / "out", *SMALL, "--dry-run"]
    scored = ["--largest", "--calibration-rows", "6"] if select == "gradient" else []
    result = fastft_command(*command, "--select", select, *scored)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out").exists()
    said = " ".join(result.stdout.split())
    # one of two KV groups in two layers is chosen twice: of o 2 heads' columns, of v one head's rows
    entries = round(0.2 * 96) * 32 + 2 * (2 * 8 * 32 + 8 * 32)
    assert f"trainable: {entries:,} parameters" in said
    assert "s2ft down_ratio=0.2 o_ratio=0.5 v_ratio=0.5" in said
    assert "model.layers.*.mlp.down_proj: 19 columns train; in each layer:" in said
    assert "model.layers.*.self_attn.o_proj: 2 units of 16 columns train; in each layer:" in said
    for word in ("48 -> 32", "AdamW state", "slices from before", "activations"):
        assert word in said
    assert ("those by gradient are known when it is measured" in said) == (select == "gradient")


def test_bfloat16_with_accumulation_and_checkpointing(tiny_model, text_data, tmp_path, fastft_command):
    command = ["train", "--model", tiny_model, "--data", text_data, "--out", tmp_path / "out", *SMALL]
    command += ["--dtype", "bfloat16", "--gradient-accumulation", "2", "--gradient-checkpointing", "--max-steps", "3"]
    command += ["--target-modules", "down_proj,v_proj", "--o-ratio", "0"]
    command += ["--multiple", "2", "--largest", "--select", "weight"]
    result = fastft_command(*command)
    assert result.exit_code == 0, result.output
    saved = adapter(tmp_path / "out")
    assert {key.split(".")[-2] for key in saved} == {"down_proj", "v_proj"}
    assert {t.dtype for t in saved.values()} == {torch.float32, torch.int32}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    entries = sum(t.numel() for key, t in saved.items() if key.endswith("s2ft_delta"))
    assert sum(summary["adapter_memory_bytes"].values()) == (16 + 2) * entries


@pytest.mark.parametrize(
    "options, message",
    [
        (["--r", "4"], "r=4 is an option of method lora; this run's method is s2ft"),
        (["--use-dora"], "use_dora=True is an option of method lora"),
        (["--dropout", "0.1"], "dropout=0.1 is an option of method lora"),
        (["--method", "lora"], "down_ratio=0.2 is an option of method s2ft; this run's method is lora"),
        (["--down-ratio", "1.5"], "down_ratio must be in [0, 1]"),
        (["--down-ratio", "0", "--o-ratio", "0", "--v-ratio", "0"], "trains nothing"),
        (["--down-ratio", "0.001"], "the smallest ratio that gives one is"),
        (["--select", "weights"], "'weights' is not one of 'random', 'weight',"),
        (["--target-modules", "q_proj"], "of which no slice is asked for"),
        (["--calibration-rows", "0"], "calibration_rows must be positive"),
    ],
)
def test_wrong_options_are_explained(tiny_model, text_data, tmp_path, fastft_command, options, message):
    command = ["train", "--model", tiny_model, "--data", text_data, "--out", tmp_path / "out", *SMALL, *options]
    result = fastft_command(*command)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.output
    assert not (tmp_path / "out").exists()


def test_help_names_the_methods_and_whose_options_are_whose(fastft_command):
    said = " ".join(fastft_command("train", "--help").stdout.split())
    assert "--method s2ft" in said and "--largest" in said and "--no-largest" in said
    assert "lora: Rank." in said and "s2ft: Fraction of feed-forward channels" in said
