"""`fastft train --load-in-4bit` and `--load-in-8bit`: QLoRA from the command line, and back into the base's own weights."""

import importlib.util
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

SMALL = ["--r", "2", "--batch-size", "4", "--lr", "0.05", "--max-length", "32", "--device", "cpu"]


@pytest.fixture
def run(tiny_model, text_data, tmp_path, fastft_command):
    def run(*options, out="out"):
        files = ["--model", tiny_model, "--data", text_data, "--out", tmp_path / out]
        return fastft_command("train", *files, *SMALL, *options)

    return run


@pytest.mark.parametrize("bits", [4, 8])
def test_train_and_merge(bits, run, tiny_model, tmp_path, fastft_command):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    result = run(f"--load-in-{bits}bit", "--max-steps", "4", "--gradient-checkpointing")
    assert result.exit_code == 0 and f"base of {bits} bits" in result.stdout, result.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["held_out_loss"]["after"] < summary["held_out_loss"]["before"]
    assert {b["op"] for b in summary["backends"]} >= {"lora_shrink", "lora_grad_sb", "lora_grad_x_"}
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())[f"load_in_{bits}bit"] is True
    assert summary["title"] == f"lora r=2, {bits}-bit base"

    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert summary["base_parameters"] == sum(p.numel() for p in base.parameters())
    if bits == 8:
        return
    merge = ["merge", "--model", tiny_model, "--adapter", tmp_path / "out" / "adapter", "--out", tmp_path / "merged"]
    assert fastft_command(*merge).exit_code == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tensors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    want = torch.addmm(base.get_parameter(f"{name}.weight").detach(), b, a, alpha=16 / 2)
    assert torch.equal(merged.get_parameter(f"{name}.weight"), want)

    assert run("--max-steps", "5", "--resume").exit_code == 0
    changed = run("--max-steps", "6", "--resume", "--no-load-in-4bit")
    assert changed.exit_code == 2 and "load_in_4bit was True, is False" in changed.stderr


@pytest.mark.parametrize(("bits", "bytes_a_weight"), [(4, (4 + 8 / 64 + 32 / 64 / 256) / 8), (8, 1 + 4 / 32)])
def test_a_dry_run_counts_codes(bits, bytes_a_weight, run, tiny_model, text_data):
    from fastft.cli.config import make_config
    from fastft.cli.data import Tokenized
    from fastft.cli.dryrun import estimate

    options = {"model": tiny_model, "data": text_data, "out": "-", "dtype": "float32", f"load_in_{bits}bit": True}
    rows = Tokenized([{"input_ids": [1] * 8, "labels": [1] * 8}], [])
    handle, sizes = estimate(make_config(options), rows)
    layers = [m for name, m in handle.model.named_modules() if type(m).__name__ == "AdaptedLinear"]
    weights = sum(m.weight.numel() for m in layers)
    rest = sum(p.numel() for p in handle.model.parameters()) - weights - sum(p.numel() for p in handle.parameters())
    assert sizes["base weights that stay (torch.float32)"] == 4 * rest
    if bits == 4:
        assert sizes["base weights, 4 bits"] == pytest.approx(weights * bytes_a_weight, abs=1)
    else:
        assert sizes["base weights, 8 bits"] == weights + 4 * sum(m.out_features for m in layers)
    assert "base weights, " in run(f"--load-in-{bits}bit", "--dry-run").stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--load-in-4bit", "--load-in-8bit"], "exclude each other"),
        (["--load-in-4bit", "--use-dora"], "use_dora needs the norms"),
        (["--load-in-4bit", "--method", "s2ft"], "load_in_4bit=True is an option of methods lora and spiel"),
    ],
)
def test_what_does_not_go_together(options, message, run, tmp_path):
    result = run(*options)
    assert result.exit_code == 2 and message in result.stderr and not (tmp_path / "out").exists()


def test_without_bitsandbytes(run, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a))
    result = run("--load-in-4bit")
    assert result.exit_code == 2 and 'needs bitsandbytes: pip install "fastft[qlora]"' in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_quantised_already(run, tiny_model, tmp_path, fastft_command):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path / "nf4")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "nf4")
    assert run("--max-steps", "2", "--model", tmp_path / "nf4").exit_code == 0
    merge = ["merge", "--model", tmp_path / "nf4", "--adapter", tmp_path / "out" / "adapter", "--out", tmp_path / "merged"]
    result = fastft_command(*merge)
    assert result.exit_code == 2 and "its weight is quantised (bitsandbytes 4-bit)" in result.stderr.replace("\n", " ")
