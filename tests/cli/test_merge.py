"""`fastft merge`: a plain checkpoint with the attached model's logits, or an explanation and nothing written."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastft


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """(adapter folder, logits of the model it is attached to)."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    handle = fastft.attach(model, fastft.LoRA(r=4, lora_alpha=8, target_modules="all-linear"))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.2)
        logits = model(input_ids=torch.arange(20)[None]).logits
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    handle.save(folder)
    return folder, logits


def test_merged_checkpoint_gives_the_same_logits(tiny_model, trained, tmp_path, fastft_command):
    adapter, expected = trained
    result = fastft_command("merge", "--model", tiny_model, "--adapter", adapter, "--out", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    base = AutoModelForCausalLM.from_pretrained(tiny_model)(input_ids=torch.arange(20)[None]).logits
    logits = merged(input_ids=torch.arange(20)[None]).logits
    assert (base - expected).abs().max() > 0.01
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "merged")("def f").input_ids
        == AutoTokenizer.from_pretrained(tiny_model)("def f").input_ids
    )
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]
    assert len({p.stat().st_mode for p in (tmp_path / "merged").iterdir()}) == 1  # all as the umask says


def test_dtype_and_overwrite(tiny_model, trained, tmp_path, fastft_command):
    adapter, _ = trained
    command = ["merge", "--model", tiny_model, "--adapter", adapter, "--out", tmp_path / "merged", "--dtype", "bfloat16"]
    assert fastft_command(*command).exit_code == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16
    again = fastft_command(*command)
    assert again.exit_code == 2 and "exists; use --overwrite" in again.stderr
    assert fastft_command(*command, "--overwrite").exit_code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    refused = fastft_command(*command, "--overwrite")
    assert refused.exit_code == 2 and "holds more than a checkpoint (notes.txt)" in refused.stderr
    assert (tmp_path / "merged" / "notes.txt").read_text() == "mine"


def test_several_chat_templates(tiny_model, trained, tmp_path, fastft_command):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "additional_chat_templates").mkdir()
    shutil.copy(model / "chat_template.jinja", model / "additional_chat_templates" / "tool_use.jinja")
    command = ["merge", "--model", model, "--adapter", trained[0], "--out", tmp_path / "merged"]
    for more in ((), ("--overwrite",)):
        result = fastft_command(*command, *more)
        assert result.exit_code == 0, result.output
    assert set(AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template) == {"default", "tool_use"}


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_an_empty_folder_is_filled_where_it_stands(more, tiny_model, trained, tmp_path, fastft_command, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    place = out.stat().st_ino
    result = fastft_command("merge", "--model", tiny_model, "--adapter", trained[0], "--out", ".", *more)
    assert result.exit_code == 0 and result.stdout.startswith(".: plain"), result.output
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32
    assert out.stat().st_ino == place and not list(out.glob(".*")) and list(tmp_path.iterdir()) == [out]


def test_a_mount_with_a_checkpoint_is_refused_before_the_work(tiny_model, trained, tmp_path, fastft_command, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(tiny_model, out)
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    monkeypatch.setattr("fastft.cli.merge.load", None)
    result = fastft_command("merge", "--model", tiny_model, "--adapter", trained[0], "--out", out, "--overwrite")
    assert result.exit_code == 2 and f"out {out} is a mount, which can't be renamed" in result.stderr


def test_a_full_disk_names_the_folder_and_leaves_nothing(tiny_model, trained, tmp_path, fastft_command, largest_file):
    with largest_file(2**16):
        result = fastft_command("merge", "--model", tiny_model, "--adapter", trained[0], "--out", tmp_path / "merged")
    assert result.exit_code == 2 and f"out {tmp_path / 'merged'}: cannot be written: " in result.stderr
    assert not list(tmp_path.iterdir())


def test_merging_into_the_model_or_the_adapter_is_refused(tiny_model, trained, fastft_command):
    adapter, _ = trained
    for out, what in ((tiny_model, "model"), (Path(tiny_model).parent, "model"), (adapter, "adapter")):
        command = ["merge", "--model", tiny_model, "--adapter", adapter, "--out", out, "--overwrite"]
        result = fastft_command(*command)
        assert result.exit_code == 2 and f"is or contains the {what}" in result.stderr


def test_wrong_input_is_explained_and_writes_nothing(tiny_model, trained, tmp_path, fastft_command):
    adapter, _ = trained
    out = tmp_path / "merged"
    (tmp_path / "damaged").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "damaged" / name).write_bytes((adapter / name).read_bytes()[:-100])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("keep")
    for change, message in [
        ({"--model": "./nowhere"}, "no such folder"),
        ({"--adapter": str(tmp_path)}, "no adapter_config.json there\n"),
        ({"--adapter": str(adapter.parent)}, f"no adapter_config.json there; did you mean {adapter}?"),
        ({"--adapter": str(tmp_path / "damaged")}, "adapter_config.json"),
        ({"--dtype": "int8"}, "dtype must be one of"),
        ({"--out": str(tmp_path / "other")}, "use --overwrite"),
    ]:
        options = {"--model": tiny_model, "--adapter": str(adapter), "--out": str(out), **change}
        result = fastft_command("merge", *(word for pair in options.items() for word in pair))
        assert result.exit_code == 2 and message in result.stderr, (change, result.output)
        assert not out.exists()
    result = fastft_command("merge", "--model", tiny_model, "--adapter", adapter, "--out", tmp_path / "other", "--overwrite")
    assert result.exit_code == 2 and (tmp_path / "other" / "mine.txt").read_text() == "keep"
