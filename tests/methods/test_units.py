"""Coupled units: every known layout, and the proof that the units found are coupled."""

import types

import pytest
import torch
from torch import nn

import fastft
from fastft.methods.units import Coupled, UnitSlice, coupled_units
from fastft.modules.adapted_linear import is_transposed

from .models import _with_biases, gpt2, llama, tokens, transformers

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES.update(max_position_embeddings=32, pad_token_id=0, bos_token_id=None, eos_token_id=None)
GQA = {**SIZES, "num_key_value_heads": 2}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 4}


def build(kind, head="ForCausalLM", **sizes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    return _with_biases(getattr(transformers, f"{kind}{head}")(config)).double().eval()


BUILDERS = {
    "llama": lambda: llama(num_attention_heads=4, num_key_value_heads=2).double().eval(),
    "mistral": lambda: build("Mistral", **GQA),
    "qwen2": lambda: build("Qwen2", **GQA),
    "qwen3": lambda: build("Qwen3", **GQA, head_dim=8),
    "gemma": lambda: build("Gemma", **GQA, head_dim=8),
    "phi3": lambda: build("Phi3", **GQA),
    "gpt2": lambda: gpt2(n_head=4).double().eval(),
    "neox": lambda: build("GPTNeoX", **SIZES),
    "opt": lambda: build("OPT", **SIZES, ffn_dim=24, word_embed_proj_dim=16),
    "bert": lambda: build("Bert", "Model", **SIZES),
    "roberta": lambda: build("Roberta", "Model", **{**SIZES, "max_position_embeddings": 40}),
    "distilbert": lambda: build("DistilBert", "Model", vocab_size=50, dim=16, hidden_dim=24, n_heads=4, n_layers=2),
    "t5": lambda: build("T5", "Model", **T5),
    "t5 gated": lambda: build("T5", "Model", **T5, feed_forward_proj="gated-gelu"),
}
# The layers' name; feed-forward and attention, each its name in there and the slices' (layer, size, offset); KV groups.
LLAMA_FFN = {"down": ("down_proj", 1, 0), "up": ("up_proj", 1, 0), "gate": ("gate_proj", 1, 0)}
GROUPED = ("self_attn", {"o": ("o_proj", 8, 0), "v": ("v_proj", 4, 0)}, 2)
WIDE = ("self_attn", {"o": ("o_proj", 16, 0), "v": ("v_proj", 8, 0)}, 2)
ENCODER_FFN = ("", {"down": ("output.dense", 1, 0), "up": ("intermediate.dense", 1, 0)})
ENCODER_ATTENTION = ("attention", {"o": ("output.dense", 4, 0), "v": ("self.value", 4, 0)}, 4)
EXPECTED = {
    "llama": ("model.layers.{}", ("mlp", LLAMA_FFN), GROUPED),
    "mistral": ("model.layers.{}", ("mlp", LLAMA_FFN), GROUPED),
    "qwen2": ("model.layers.{}", ("mlp", LLAMA_FFN), GROUPED),
    "qwen3": ("model.layers.{}", ("mlp", LLAMA_FFN), WIDE),
    "gemma": ("model.layers.{}", ("mlp", LLAMA_FFN), WIDE),
    "phi3": (
        "model.layers.{}",
        ("mlp", {"down": ("down_proj", 1, 0), "up": ("gate_up_proj", 1, 24), "gate": ("gate_up_proj", 1, 0)}),
        ("self_attn", {"o": ("o_proj", 8, 0), "v": ("qkv_proj", 4, 24)}, 2),
    ),
    "gpt2": (
        "transformer.h.{}",
        ("mlp", {"down": ("c_proj", 1, 0), "up": ("c_fc", 1, 0)}),
        ("attn", {"o": ("c_proj", 4, 0), "v": ("c_attn", 4, 32)}, 4),
    ),
    "neox": (
        "gpt_neox.layers.{}",
        ("mlp", {"down": ("dense_4h_to_h", 1, 0), "up": ("dense_h_to_4h", 1, 0)}),
        ("attention", {"o": ("dense", 4, 0)}, 4),
    ),
    "opt": (
        "model.decoder.layers.{}",
        ("", {"down": ("fc2", 1, 0), "up": ("fc1", 1, 0)}),
        ("self_attn", {"o": ("out_proj", 4, 0), "v": ("v_proj", 4, 0)}, 4),
    ),
    "bert": ("encoder.layer.{}", ENCODER_FFN, ENCODER_ATTENTION),
    "roberta": ("encoder.layer.{}", ENCODER_FFN, ENCODER_ATTENTION),
    "distilbert": (
        "transformer.layer.{}",
        ("ffn", {"down": ("lin2", 1, 0), "up": ("lin1", 1, 0)}),
        ("attention", {"o": ("out_lin", 4, 0), "v": ("v_lin", 4, 0)}, 4),
    ),
    "t5": (
        "encoder.block.{}.layer",
        ("1.DenseReluDense", {"down": ("wo", 1, 0), "up": ("wi", 1, 0)}),
        ("0.SelfAttention", {"o": ("o", 8, 0), "v": ("v", 8, 0)}, 4),
    ),
    "t5 gated": (
        "encoder.block.{}.layer",
        ("1.DenseReluDense", {"down": ("wo", 1, 0), "up": ("wi_1", 1, 0), "gate": ("wi_0", 1, 0)}),
        ("0.SelfAttention", {"o": ("o", 8, 0), "v": ("v", 8, 0)}, 4),
    ),
}


@pytest.mark.parametrize("kind", BUILDERS)
def test_layouts(kind):
    model = BUILDERS[kind]()
    layer, (ffn, ffn_slices), (attention, attention_slices, groups) = EXPECTED[kind]
    found = {c.key: c for c in coupled_units(model, by_group=True)}
    for i in range(2):
        for family, own, slices, count in (
            ("ffn", ffn, ffn_slices, None),
            ("attention", attention, attention_slices, groups),
        ):
            name = ".".join(filter(None, (layer.format(i), own)))
            made = {
                role: UnitSlice(f"{name}.{module}", "columns" if role in ("down", "o") else "rows", size, offset)
                for role, (module, size, offset) in slices.items()
            }
            count = count or features(model, made["down"])
            assert found.pop(f"{name}:{family}") == Coupled(
                name, family, count, made, made["down" if family == "ffn" else "o"]
            )
    assert all(name.startswith("decoder.block") for name in found) and bool(found) == kind.startswith("t5")
    assert not any("EncDec" in name for name in found)


def features(model, slice):
    shape = model.get_submodule(slice.module).weight.shape
    return shape[int((slice.kind == "columns") != is_transposed(model.get_submodule(slice.module)))]


def test_units_of_query_heads():
    grouped = [c for c in coupled_units(BUILDERS["llama"](), by_group=False) if c.family == "attention"]
    assert [(c.count, c.slices.keys(), c.slices["o"].size) for c in grouped] == [(4, {"o"}, 4)] * 2
    alone = [c for c in coupled_units(llama(num_key_value_heads=2), by_group=False) if c.family == "attention"]
    assert [(c.count, c.slices.keys()) for c in alone] == [(2, {"o", "v"})] * 2


def rows_of(model, slice):
    """The weight's [N, K] view (a parameter's memory) and the bias, if the slice is of rows."""
    module = model.get_submodule(slice.module)
    weight = module.weight.data.t() if is_transposed(module) else module.weight.data
    return weight, module.bias.data if slice.kind == "rows" and module.bias is not None else None


def permute(model, slice, units):
    source, target = slice.features(units), slice.features(torch.arange(len(units)))
    weight, bias = rows_of(model, slice)
    if slice.kind == "columns":
        weight[:, target] = weight[:, source]
    else:
        weight[target] = weight[source]
    if bias is not None:
        bias[target] = bias[source]


def output(model):
    inputs = {"decoder_input_ids": tokens(seed=1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(tokens().clamp(min=1), **inputs)[0]


@pytest.mark.parametrize("kind", BUILDERS)
def test_exchanged_channels_leave_the_function(kind):
    model = BUILDERS[kind]()
    before, generator = output(model), torch.Generator().manual_seed(0)
    blocks = [c for c in coupled_units(model, by_group=True) if c.family == "ffn"]
    for block in blocks:
        units = torch.randperm(block.count, generator=generator)
        for slice in block.slices.values():
            permute(model, slice, units)
    assert (output(model) - before).abs().max() < 1e-9
    permute(model, blocks[0].slices["down"], units.flip(0))  # alone, it would not
    assert (output(model) - before).abs().max() > 1e-6


QUERIES_AND_KEYS = {  # of a block with two or four KV groups: (layer, features of a group, offset)
    "llama": (("q_proj", 8, 0), ("k_proj", 4, 0)),
    "qwen2": (("q_proj", 8, 0), ("k_proj", 4, 0)),
    "qwen3": (("q_proj", 16, 0), ("k_proj", 8, 0)),
    "phi3": (("qkv_proj", 8, 0), ("qkv_proj", 4, 16)),
    "gpt2": (("c_attn", 4, 0), ("c_attn", 4, 16)),
    "neox": (("query_key_value", 12, 0),),
    "opt": (("q_proj", 4, 0), ("k_proj", 4, 0)),
    "bert": (("self.query", 4, 0), ("self.key", 4, 0)),
    "distilbert": (("q_lin", 4, 0), ("k_lin", 4, 0)),
}


@pytest.mark.parametrize("kind", QUERIES_AND_KEYS)
def test_exchanged_groups_leave_the_function(kind):
    model = BUILDERS[kind]()
    before = output(model)
    for block in coupled_units(model, by_group=True):
        if block.family == "attention":
            units = torch.arange(block.count).roll(1)
            others = [UnitSlice(f"{block.name}.{name}", "rows", *rest) for name, *rest in QUERIES_AND_KEYS[kind]]
            for slice in (*block.slices.values(), *others):
                permute(model, slice, units)
    assert (output(model) - before).abs().max() < 1e-9


@pytest.mark.parametrize("kind", [kind for kind in BUILDERS if kind != "neox"])
def test_only_o_reads_what_v_writes(kind):
    """With any invertible M for each unit, v → M v and o → o M⁻¹ (for each of the heads that share v) cancel."""
    model = BUILDERS[kind]()
    before, generator = output(model), torch.Generator().manual_seed(0)
    for block in coupled_units(model, by_group=True):
        for unit in torch.arange(block.count if block.family == "attention" else 0):
            v, o = block.slices["v"], block.slices["o"]
            m = torch.randn(v.size, v.size, dtype=torch.float64, generator=generator) + 4 * torch.eye(v.size)
            weight, bias = rows_of(model, v)
            at = v.features(unit[None])
            weight[at] = m @ weight[at]
            if bias is not None:
                bias[at] = m @ bias[at]
            weight, _ = rows_of(model, o)
            for at in o.features(unit[None]).split(v.size):
                weight[:, at] = weight[:, at] @ m.inverse()
    assert (output(model) - before).abs().max() < 1e-9


def test_features():
    slice = UnitSlice("m", "rows", 3, 10)
    found = slice.features(torch.tensor([0, 2], dtype=torch.int32))
    assert found.dtype == torch.int64 and found.tolist() == [10, 11, 12, 16, 17, 18]
    assert slice.features(torch.tensor([], dtype=torch.int64)).shape == (0,)


class Expert(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, width), nn.Linear(4, width), nn.Linear(width, 4)

    def forward(self, x):
        return self.down_proj(self.gate_proj(x).sigmoid() * self.up_proj(x))


class Attention(nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        self.v_proj, self.o_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        for name, size in sizes.items():
            setattr(self, name, size)


def test_experts_and_a_block_by_itself():
    experts = nn.ModuleDict({"experts": nn.ModuleList([Expert(6), Expert(5)]), "shared": Expert(7)})
    found = coupled_units(experts, by_group=False)
    assert [(c.name, c.count) for c in found] == [("experts.0", 6), ("experts.1", 5), ("shared", 7)]
    (alone,) = coupled_units(Expert(), by_group=False)
    assert alone.name == "" and alone.key == ":ffn" and alone.slices["down"] == UnitSlice("down_proj", "columns", 1)


def test_adapters_do_not_matter():
    model = llama()
    before = coupled_units(model, by_group=True)
    handle = fastft.attach(model, fastft.LoRA(r=2, target_modules="all-linear"))
    assert coupled_units(model, by_group=True) == before
    handle.detach()


def test_a_layers_own_sizes_come_first():
    sizes = {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 20}
    model = build("Bart", "Model", **sizes, decoder_ffn_dim=24, encoder_attention_heads=4, decoder_attention_heads=2)
    found = [(c.name, c.count) for c in coupled_units(model, by_group=False)]
    assert found == [
        ("encoder.layers.0", 20),
        ("encoder.layers.0.self_attn", 4),
        ("decoder.layers.0", 24),
        ("decoder.layers.0.self_attn", 2),
    ]


def test_cross_attention_is_left_out():
    names = [c.name for c in coupled_units(gpt2(add_cross_attention=True, n_layer=1), by_group=False)]
    assert names == ["transformer.h.0.attn", "transformer.h.0.mlp"]


def test_shared_keys_and_values_have_no_rows():
    attention = Attention(num_heads=2)
    (found,) = coupled_units(attention, by_group=True)
    assert found.slices.keys() == {"o", "v"}
    attention.config = types.SimpleNamespace(num_kv_shared_layers=1)
    (found,) = coupled_units(attention, by_group=True)
    assert found.slices.keys() == {"o"}


@pytest.mark.parametrize(
    "module,message",
    [
        (nn.ModuleDict({"a": nn.Linear(4, 4)}), r"in a ModuleDict; known are .*gate_proj \+ up_proj \+ down_proj"),
        (Attention(), "neither the attention 'm' nor a config"),
        (Attention(num_heads=2, head_dim=3), "'m.o_proj' reads 8 features, not 6: the attention 'm' has 2 heads of 3"),
        (Attention(num_heads=4, num_key_value_heads=2), "'m.v_proj' has 8 out-features, not 4: .* 2 of them KV heads"),
        (Attention(num_heads=4, num_key_value_heads=3), "'m' has 4 heads, which 3 KV heads can't share"),
    ],
)
def test_refusals(module, message):
    with pytest.raises(ValueError, match=message):
        coupled_units(nn.ModuleDict({"m": module}), by_group=True)


def test_shapes_that_do_not_fit():
    model = Expert()
    model.down_proj = nn.Linear(5, 4)
    with pytest.raises(ValueError, match="'gate_proj' has 6 out-features, not 5: 'down_proj' reads 5"):
        coupled_units(model, by_group=False)
    model.gate_proj = nn.Linear(4, 5)
    with pytest.raises(ValueError, match="'up_proj' has 6 out-features, not 5"):
        coupled_units(model, by_group=False)
    model = BUILDERS["phi3"]()
    model.model.layers[1].mlp.gate_up_proj = nn.Linear(16, 47)
    with pytest.raises(ValueError, match=r"layers.1.mlp.gate_up_proj' has 47 out-features, not 48: .*it is up and gate"):
        coupled_units(model, by_group=False)
