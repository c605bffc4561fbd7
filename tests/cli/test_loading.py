"""A checkpoint whose weights are not its architecture's is refused: transformers would fill in random ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastft.cli.errors import UserError
from fastft.cli.loading import load, load_base


@pytest.fixture
def changed(tiny_model, tmp_path):
    """The path of a copy of the model with another configuration or weights, or with less of its file."""

    def make(config=(), weights=lambda key, value: {key: value}, keep=1.0):
        folder = tmp_path / "changed"
        shutil.copytree(tiny_model, folder)
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **dict(config)}))
        file = folder / "model.safetensors"
        tensors = {k: v for key, value in load_file(file).items() for k, v in weights(key, value).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
        return str(folder)

    return make


@pytest.mark.parametrize("bits", [None, 4])
def test_weights_that_are_not_there(changed, bits):
    if bits:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    folder = changed({"num_hidden_layers": 3})
    with pytest.raises(UserError, match=r"lack weights that LlamaForCausalLM has .*: model.layers.2.input.* and 6 more$"):
        load_base(folder, "cpu", torch.float32, bits)


def test_weights_of_other_names(changed):
    folder = changed(weights=lambda key, value: {key.replace("model.layers", "transformer.h"): value})
    with pytest.raises(UserError, match=r"lack weights .*model.layers.0.* \(it has others: transformer.h.0"):
        load("AutoModelForCausalLM", folder)


def test_weights_of_another_size(changed):
    with pytest.raises(UserError, match=r"mlp.down_proj.weight is \[32, 48\] in its file and \[32, 64\] in Llama"):
        load("AutoModelForCausalLM", changed({"intermediate_size": 64}))


def test_damaged_weights(changed):
    with pytest.raises(UserError, match="its weights are damaged or cut short: "):
        load("AutoModelForCausalLM", changed(keep=0.5))


def test_a_tokenizer_of_another_version(changed):
    folder = changed()
    file = Path(folder, "tokenizer.json")
    file.write_text(file.read_text().replace('"BPE"', '"BPE of tomorrow"'))
    with pytest.raises(UserError, match="AutoTokenizer cannot load it: "):
        load("AutoTokenizer", folder)


def test_weights_too_many_are_named(changed, capsys):
    folder = changed(weights=lambda key, value: {key: value, f"{key}.extra": value[:1].clone()})
    load("AutoModelForCausalLM", folder)
    assert "LlamaForCausalLM does not have are left out: model.embed_tokens.weight.extra, " in capsys.readouterr().out
