"""Adapters of entries that others wrote load, compute the same, and are saved as fastft's own."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastft
from tests.methods.models import gpt2

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(4))


def base():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


def sft(folder, config=None, **tensors):
    """A folder as the SpIEL authors' fork of PEFT writes it."""
    generator = torch.Generator().manual_seed(2)
    values = {
        "base_model.model.0.sft_delta.values": torch.randn(7, generator=generator),
        "base_model.model.0.sft_delta.indices": torch.randperm(48, generator=generator)[:7].int(),
    }
    folder.mkdir(exist_ok=True)
    save_file({**values, **tensors}, folder / "adapter_model.safetensors")
    known = {"peft_type": "SFT", "num_deltas": {"0": 7}, "density": 0.01, "selection_algorithm": "rigl"}
    (folder / "adapter_config.json").write_text(json.dumps({**known, "dtype": "float32", **(config or {})}))
    return values


def test_files_of_the_spiel_authors(tmp_path):
    values, index = sft(tmp_path / "given").values()
    model = base()
    handle = fastft.load(model, tmp_path / "given")
    want = base()[0].weight.detach().clone()
    want.view(-1)[index.long()] += values
    assert torch.equal(model[0].weight, want) and isinstance(handle.method, fastft.SparseMask)
    assert torch.equal(model[2].weight, base()[2].weight)
    handle.save(tmp_path / "own")
    again = base()
    fastft.load(again, tmp_path / "own")
    assert torch.equal(again(X), model(X))


def test_files_of_peft_shira(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    theirs = peft.get_peft_model(base(), peft.ShiraConfig(r=1, target_modules=["0", "2"], init_weights=False))
    theirs.save_pretrained(tmp_path)
    model = base()
    handle = fastft.load(model, tmp_path)
    torch.testing.assert_close(model(X), theirs(X))
    assert sum(p.numel() for p in handle.parameters()) == 14 + 10
    handle.unmerge()
    torch.testing.assert_close(model(X), theirs(X))


def test_shira_on_weights_that_are_stored_transposed(tmp_path):
    model = gpt2()
    name = "transformer.h.0.mlp.c_fc"
    layer = model.get_submodule(name)
    k, n = layer.weight.shape
    flat = torch.randperm(n * k, generator=torch.Generator().manual_seed(3))[: n + k]
    index, values = torch.stack([flat // k, flat % k]).int(), torch.randn(n + k)
    tensors = {f"base_model.model.{name}.shira_weight": values, f"base_model.model.{name}.shira_indices": index}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "SHIRA", "r": 1, "target_modules": [name]}))
    want = layer.weight.detach().clone()
    want[index[1].long(), index[0].long()] += values
    fastft.load(model, tmp_path)
    assert torch.equal(layer.weight, want)


def test_what_does_not_fit_is_refused(tmp_path):
    key = "base_model.model.0.sft_delta."
    for i, (message, config, tensors) in enumerate(
        (
            ("no num_deltas", {"num_deltas": None}, {}),
            ("not supported: {'l1_reg': 1.0}", {"l1_reg": 1.0}, {}),
            ("out of range", {}, {key + "indices": torch.tensor([0, 1, 2, 3, 4, 5, 48], dtype=torch.int32)}),
            ("given twice", {}, {key + "indices": torch.zeros(7, dtype=torch.int32)}),
            ("wrong shape", {}, {key + "values": torch.zeros(6)}),
            ("not finite", {}, {key + "values": torch.full((7,), float("nan"))}),
        )
    ):
        sft(tmp_path / str(i), config, **tensors)
        model = base()
        with pytest.raises(fastft.methods.AdapterFileError, match=message):
            fastft.load(model, tmp_path / str(i))
        assert torch.equal(model[0].weight, base()[0].weight)


def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path):
    sft(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="convert it with PEFT"):
        fastft.load(base(), tmp_path)


def test_a_handle_restores_its_own_files_only(tmp_path):
    sft(tmp_path)
    handle = fastft.load(base(), tmp_path)
    with pytest.raises(fastft.methods.AdapterFileError, match="an adapter of SFT"):
        handle.restore(tmp_path)
