"""`fastft train --method spiel` and `lift` as a user runs them: train, stop while a choice is prepared, resume, merge."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import fastft

from .conftest import adapter, assert_same_run, stopped, trained

SMALL = ["--device", "cpu", "--batch-size", "4", "--lr", "0.01", "--max-length", "16"]
SPIEL = ["--method", "spiel", "--density", "0.01", "--reselection-steps", "5", "--selection-accumulation-steps", "3"]
LIFT = ["--method", "lift", "--rank-budget", "2", "--filter-rank", "8", "--update-interval", "3"]
# how it is asked for, at which updates it chooses, bytes of an entry's delta, gradient, state, place and pretrained value
RUNS = {
    "accumulated": ([*SPIEL], [3, 8], 28),
    "momentum": ([*SPIEL, "--selection", "momentum", "--policy", "cosine"], [3, 8], 16),
    "lift": ([*LIFT], [3, 6, 9], 24),
}


@pytest.mark.parametrize("kind", RUNS)
def test_train_stop_resume_merge(kind, tiny_model, text_data, tmp_path, fastft_command):
    options, choices, bytes_an_entry = RUNS[kind]
    out = tmp_path / "out"
    # The checkpoint of step 7 lies in the middle of SpIEL's second choice.
    files = ["--model", tiny_model, "--data", text_data]
    said = trained(out, [*files, *SMALL, *options, "--max-steps", "10", "--save-steps", "7"])
    assert {p.name for p in out.iterdir()} >= {"adapter", "checkpoint-7", "summary.json", "loss.png", "selection.png"}
    assert (out / "selection.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["held_out_loss"]["after"] < summary["held_out_loss"]["before"]
    history, layers = summary["selection"]["choices"], summary["selection"]["layers"]
    assert [one["update"] for one in history] == choices and history[0]["changed"] > 0
    entries = sum(t.numel() for key, t in adapter(out).items() if key.endswith("sparse_delta"))
    assert entries == summary["trainable_parameters"] == sum(sum(one["entries"]) for one in layers.values())
    assert len(layers) == 7 and all(len(one["density"]) == 2 for one in layers.values())
    memory = summary["adapter_memory_bytes"]
    kept = {"entries that are kept", "candidates, while a choice is prepared", "SM3 state"}
    assert (kind == "accumulated") == ("candidates, while a choice is prepared" in memory)
    held = sum(size for name, size in memory.items() if name not in kept)
    rows_and_bits = memory["places"] - 4 * entries
    kept_base = memory["entries from before"] - 4 * entries
    assert held - rows_and_bits - kept_base == bytes_an_entry * entries
    op = "sparse_sm3_" if kind == "momentum" else "sparse_adamw_"
    assert sum(b["calls"] for b in summary["backends"] if b["op"] == op) == 10 * 14
    assert f"step {choices[0]}: {history[0]['changed']:,} of {entries:,} entries replaced" in said.stderr

    again = stopped(out, tmp_path / "stopped", last=10)
    saved = json.loads((again / "checkpoint-7" / "adapter" / "adapter_config.json").read_text())
    assert any(candidates for _, _, candidates in saved["entries"].values()) == (kind == "accumulated")
    assert fastft_command("train", "--resume", "--out", again).exit_code == 0
    assert_same_run(out, again, "selection")

    merge = ["merge", "--model", tiny_model, "--adapter", out / "adapter", "--out", tmp_path / "merged"]
    assert fastft_command(*merge).exit_code == 0
    ids, model = torch.arange(20)[None], AutoModelForCausalLM.from_pretrained(tiny_model)
    fastft.load(model, out / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged(input_ids=ids).logits, model(input_ids=ids).logits)


def test_spiel_beside_a_quantised_base(tiny_model, text_data, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    files = ["--model", tiny_model, "--data", text_data]
    trained(tmp_path / "out", [*files, *SMALL, *SPIEL, "--max-steps", "4", "--load-in-4bit"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "4-bit base" in summary["title"] and [one["update"] for one in summary["selection"]["choices"]] == [3]
    assert "entries from before" not in summary["adapter_memory_bytes"]


@pytest.mark.parametrize(
    "options, words",
    [
        ([*SPIEL], ["spiel density=0.01, accumulated", "AdamW state, with ages", "candidates, while a choice is prepared"]),
        ([*SPIEL, "--load-in-4bit"], ["base weights, 4 bits", "spiel density=0.01, accumulated, 4-bit base"]),
        ([*LIFT], ["lift rank_budget=2, filter_rank=8", "q_proj: 128 of 1,024 entries train, 12.50 %", "are kept"]),
    ],
)
def test_dry_run(options, words, tiny_model, text_data, tmp_path, fastft_command):
    files = ["--model", tiny_model, "--data", text_data, "--out", tmp_path / "out"]
    result = fastft_command("train", *files, *SMALL, *options, "--dry-run")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert not (tmp_path / "out").exists() and all(word in said for word in words), said
    assert ("entries from before" in said) == ("--load-in-4bit" not in options)


@pytest.mark.parametrize(
    "options, message",
    [
        ([*SPIEL, "--r", "4"], "r=4 is an option of method lora; this run's method is spiel"),
        ([*SPIEL, "--rank-budget", "4"], "rank_budget=4 is an option of method lift"),
        ([*LIFT, "--load-in-4bit"], "load_in_4bit=True is an option of methods lora and spiel; this run's method is lift"),
        ([*LIFT, "--density", "0.1"], "density and rank_budget both say how many"),
        ([*LIFT, "--selection", "momentum"], "selection='momentum' is an option of method spiel"),
        (["--density", "0.1"], "density=0.1 is an option of methods spiel and lift; this run's method is lora"),
        ([*SPIEL, "--density", "1.5"], "density must be in (0, 1]"),
        ([*SPIEL, "--selection-accumulation-steps", "9"], "is more than reselection_steps=5"),
        ([*LIFT, "--filter-rank", "0"], "filter_rank must be positive"),
    ],
)
def test_wrong_options_are_explained(options, message, tiny_model, text_data, tmp_path, fastft_command):
    files = ["--model", tiny_model, "--data", text_data, "--out", tmp_path / "out"]
    result = fastft_command("train", *files, *SMALL, *options)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.output
    assert not (tmp_path / "out").exists()


def test_learning_rate_and_adam_are_the_methods_unless_given():
    from transformers import TrainingArguments

    from fastft.cli.config import TrainConfig
    from fastft.integrations.transformers import own_optimizer
    from tests.methods.models import llama

    def rate(**options):
        return TrainConfig(model="m", data="d", out="o", **options).lr

    assert rate() == 2e-4 and rate(method="spiel") == 1e-4 and rate(method="spiel", selection="momentum") == 1e-3
    assert rate(method="lift") == 1e-4 and rate(method="lift", lr=0.5) == 0.5
    handle = fastft.attach(llama(), fastft.LIFT(rank_budget=1, filter_rank=4))
    plain, given = TrainingArguments(use_cpu=True), TrainingArguments(use_cpu=True, adam_beta1=0.8)
    (group,) = own_optimizer(handle, plain).param_groups
    assert group["betas"] == (0.9, 0.95) and group["eps"] == 1e-6
    assert own_optimizer(handle, given).param_groups[0]["betas"] == (0.8, 0.95)
    handle.detach()
    handle = fastft.attach(handle.model, fastft.SpIEL(selection="momentum"))
    assert own_optimizer(handle, plain).param_groups[0]["eps"] == 1e-8
    with pytest.raises(ValueError, match="adam_beta1: SM3"):
        own_optimizer(handle, given)
