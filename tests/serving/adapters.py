"""Adapters of every served kind in folders, with the dense float64 delta of each linear."""

import json

import torch
from safetensors.torch import save_file

import fastft
from fastft.modules.merging import pristine
from tests.methods.models import llama, randomize

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {
    "lora": {"r": 3, "lora_alpha": 5, "target_modules": ALL},
    "rslora": {"r": 16, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "patterns": {
        "r": 2,
        "target_modules": [*ALL, "lm_head"],
        "rank_pattern": {"k_proj": 5, "layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"o_proj": 11, "lm_head": 3},
    },
}
S2FT = {
    "columns": {"down_ratio": 0.3, "o_ratio": 0.5},
    "rows": {"down_ratio": 0.0, "up_ratio": 0.3, "gate_ratio": 0.8, "v_ratio": 1.0},
}


def methods(model):
    """Method by name, for a model of `models.llama`."""
    found = {name: fastft.LoRA(**options) for name, options in LORA.items()}
    found |= {name: fastft.S2FT(**options) for name, options in S2FT.items()}
    found["spiel"] = fastft.SpIEL(density=0.1)
    generator = torch.Generator().manual_seed(7)
    shape = model.model.layers[1].mlp.down_proj.weight.shape
    dense = torch.ones(shape, dtype=torch.bool)
    masks = {"model.layers.1.mlp.down_proj": dense, "model.layers.0.self_attn.k_proj": torch.zeros(8, 16, dtype=torch.bool)}
    masks["model.layers.0.self_attn.k_proj"][3, 15] = True
    masks["model.layers.0.mlp.up_proj"] = (
        torch.rand(model.model.layers[0].mlp.up_proj.weight.shape, generator=generator) < 0.2
    )
    found["mask"] = fastft.SparseMask(mask=masks)
    return found


@fastft.testing.use("reference")  # the only one that knows float64
def write(folder, method, make=llama, absolute=False, seed=3, dtype=torch.float64):
    """Saves an adapter of random values; returns {module: its delta, float64 [N, K]}."""
    model = make().to(dtype)
    handle = fastft.attach(model, method)
    randomize(handle, seed=seed)
    deltas = deltas_of(handle)
    handle.save(folder, absolute=absolute)
    return deltas


def deltas_of(handle):
    deltas = {}
    handle.unmerge()  # what was changed in place is written when it is merged again
    handle.merge()
    for name, module in handle.targets.items():
        delta = module.weight.detach().double() - pristine(module, "weight").detach().double()
        deltas[name] = delta.t() if module.fan_in_fan_out else delta
    return deltas


@fastft.testing.use("reference")
def write_lift(folder, make=llama):
    """LIFT after a choice, so that entries which do not train any more keep what they have learnt."""
    model = make().double()
    handle = fastft.attach(model, fastft.LIFT(density=0.1, filter_rank=2, update_interval=1))
    optimizer = handle.optimizer(lr=0.1)
    for step in range(3):
        for number, parameter in enumerate(handle.parameters()):
            generator = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        optimizer.step()
        handle.step()
        with torch.no_grad():  # otherwise the same entries are the largest again
            for module in handle.targets.values():
                module.sparse["default"].delta.mul_(-1)
    randomize(handle)
    handle.save(folder)
    assert any(module.sparse["default"].kept is not None for module in handle.targets.values())
    return deltas_of(handle)


def write_sft(folder, name="model.layers.0.self_attn.o_proj", shape=(16, 16)):
    """As the SpIEL authors' fork of PEFT writes it."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(9, generator=generator)
    index = torch.randperm(shape[0] * shape[1], generator=generator)[:9].int()
    folder.mkdir()
    key = f"base_model.model.{name}.sft_delta"
    save_file({f"{key}.values": values, f"{key}.indices": index}, folder / "adapter_model.safetensors")
    config = {"peft_type": "SFT", "num_deltas": {name: 9}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    delta = torch.zeros(shape, dtype=torch.float64)
    delta.view(-1)[index.long()] = values.double()
    return {name: delta}
