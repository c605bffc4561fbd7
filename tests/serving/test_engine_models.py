"""Models that an engine refuses before it starts, and one whose weights are quantised."""

import pytest
import torch

import fastft
from fastft.cli.loading import load_base
from fastft.serving import Engine
from tests.serving.tiny import llama, prompt, save_adapter, worst_gap


def test_a_model_on_several_devices_is_refused():
    spread = llama()
    spread.model.layers[1].to("meta")  # as offloading leaves it, and in place of another GPU
    with pytest.raises(ValueError, match=r"lies on several devices \(cpu, meta\).*serves one that lies on one"):
        Engine(spread)
    mapped = llama()
    mapped.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "lm_head": 1}
    with pytest.raises(ValueError, match=r"lies on several devices \(0, 1, cpu\).*device_map=\{'': 0\}"):
        Engine(mapped)
    mapped.hf_device_map = {"": "cpu"}
    Engine(mapped).close()


def test_a_quantised_model_serves_what_the_same_model_gives_with_each_adapter(tmp_path):
    pytest.importorskip("bitsandbytes")
    llama().save_pretrained(tmp_path / "base")
    kinds = {"low-rank": "lora16", "entries": "spiel"}
    for name, kind in kinds.items():
        save_adapter(tmp_path / "adapters" / name, kind, seed=1)

    def base():
        return load_base(str(tmp_path / "base"), "cpu", torch.float32, bits=4).eval()

    assert type(base().model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    names = [None, *kinds] * 2
    with Engine(base(), adapter_dir=tmp_path / "adapters") as engine:
        found = engine.generate([prompt(9, i) for i in range(len(names))], adapters=names, max_tokens=8)
    for name, completion in zip(names, found):
        model = base()
        if name is not None:
            fastft.load(model, tmp_path / "adapters" / name)
        assert worst_gap(model.eval(), completion) < 1e-3, name
    assert len({tuple(completion.tokens) for completion in found}) == len(found)
