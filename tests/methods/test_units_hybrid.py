"""Coupled units of linear and differential attentions and of gates fused with up; a block is in the way of its own alone."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastft
from fastft.methods.units import UnitSlice, coupled_units

from .models import assert_same, gpt2, snapshot, tokens
from .test_units import BUILDERS, GQA, Attention, Expert, build, output, permute, rows_of

LAYERS = {**GQA, "layer_types": ["linear_attention", "full_attention"]}
# Without the softmax attentions of these two, which do not run with grouped queries.
KDA = {"layer_types": ["linear_attention"] * 2, "linear_num_heads": 3, "linear_head_dim": 8, "linear_conv_kernel_dim": 2}
DENSE = {"mlp_layer_types": ["dense", "dense"], "num_local_experts": 2, "moe_intermediate_size": 8}
MLA = {"use_cache": False, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, **DENSE}
GATED = {"olmo_hybrid": "linear_attn", "kimi_linear": "self_attn", "bailing_hybrid": "self_attn"}


def model_of(kind):
    if kind == "olmo_hybrid":
        return build("OlmoHybrid", **LAYERS, linear_num_key_heads=2, linear_num_value_heads=4)
    if kind == "kimi_linear":
        return build("KimiLinear", **GQA, **MLA, **KDA)
    if kind == "bailing_hybrid":
        return build("BailingHybrid", **GQA, **MLA, head_dim=8, layer_types=KDA["layer_types"])
    if kind == "moshi":
        return build("Moshi", **GQA, head_dim=4, ffn_dim=24)
    if kind == "diffllama":
        return build("DiffLlama", **{**GQA, "num_attention_heads": 8, "num_key_value_heads": 4}, head_dim=4)
    return BUILDERS[kind]()


@pytest.mark.parametrize("kind,count,size", [("olmo_hybrid", 4, 12), ("kimi_linear", 3, 8), ("bailing_hybrid", 4, 8)])
@pytest.mark.parametrize("by_group", [False, True])
def test_a_linear_attention_has_its_own_heads(kind, count, size, by_group):
    block = f"model.layers.0.{GATED[kind]}"
    (found,) = [c for c in coupled_units(model_of(kind), by_group) if c.name == block]
    slices = {"o": UnitSlice(f"{block}.o_proj", "columns", size), "v": UnitSlice(f"{block}.v_proj", "rows", size)}
    assert (found.count, found.slices) == (count, slices)


@pytest.mark.parametrize("kind", [*GATED, "moshi", "llama", "phi3", "gpt2", "t5"])
def test_v_of_a_unit_reaches_o_of_this_unit_alone(kind):
    model = model_of(kind)
    blocks = [c for c in coupled_units(model, by_group=True) if "v" in c.slices]
    assert blocks
    for block in blocks:
        seen = []
        o, v = block.slices["o"], block.slices["v"]
        hook = model.get_submodule(o.module).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        output(model)
        kept, unit = [t if t is None else t.clone() for t in rows_of(model, v)], torch.tensor([1])
        for tensor in rows_of(model, v):
            if tensor is not None:
                tensor[v.features(unit)] = 0
        output(model)
        for tensor, old in zip(rows_of(model, v), kept):
            if tensor is not None:
                tensor.copy_(old)
        hook.remove()
        before, after = seen
        reached = torch.zeros(before.shape[-1], dtype=torch.bool)
        reached[o.features(unit)] = True
        assert torch.equal(after[..., ~reached], before[..., ~reached])
        assert (after[..., reached] == 0).all() and (before[..., reached] != 0).any()


def test_exchanged_heads_of_a_linear_attention_leave_the_function():
    model = build("OlmoHybrid", **LAYERS, linear_num_key_heads=4, linear_num_value_heads=4, linear_key_head_dim=3)
    before, units = output(model), torch.tensor([2, 0, 3, 1])
    (block,) = [c for c in coupled_units(model, by_group=True) if c.name.endswith("linear_attn")]
    at = model.get_submodule(block.name)
    for slice in block.slices.values():
        permute(model, slice, units)
    assert (output(model) - before).abs().max() > 1e-6  # the rest of a head has yet to follow
    for name, size in {"q_proj": 3, "k_proj": 3, "g_proj": 6, "a_proj": 1, "b_proj": 1}.items():
        permute(model, UnitSlice(f"{block.name}.{name}", "rows", size), units)
    channels = [UnitSlice("", "rows", size, start).features(units) for size, start in ((3, 0), (3, 12), (6, 24))]
    at.conv1d.weight.data = at.conv1d.weight.data[torch.cat(channels)]
    at.A_log.data, at.dt_bias.data = at.A_log.data[units], at.dt_bias.data[units]
    assert (output(model) - before).abs().max() < 1e-9


def alone(kind, name, **config):
    """A feed-forward block of transformers by itself."""
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    torch.manual_seed(0)
    return getattr(module, name)(SimpleNamespace(hidden_size=8, **config), *(["silu"] if kind.startswith("moon") else []))


@pytest.mark.parametrize(
    "kind,name,config",
    [
        ("moshi", "MoshiGatingMLP", {"ffn_dim": 12, "hidden_act": "silu"}),
        ("kyutai_speech_to_text", "KyutaiSpeechToTextGatingMLP", {"ffn_dim": 12, "hidden_act": "silu"}),
        ("moonshine", "MoonshineDecoderMLP", {"intermediate_size": 6}),
        ("moonshine_streaming", "MoonshineStreamingDecoderMLP", {"intermediate_size": 6}),
    ],
)
def test_a_gate_fused_in_fc1(kind, name, config):
    block = alone(kind, name, **config).double()
    (found,) = coupled_units(block, by_group=False)
    assert found.count == 6 and found.slices.keys() == {"down", "up", "gate"}
    x = torch.randn(1, 3, 8, dtype=torch.float64)
    weights = {role: rows_of(block, found.slices[role]) for role in ("gate", "up")}
    parts = {role: x @ w[found.slices[role].features(torch.arange(6))].t() for role, (w, _) in weights.items()}
    for role, (_, bias) in weights.items():
        parts[role] += 0 if bias is None else bias[found.slices[role].features(torch.arange(6))]
    want = block.fc2(nn.functional.silu(parts["gate"]) * parts["up"])
    assert (block(x) - want).abs().max() < 1e-12


def test_a_fused_gate_of_unknown_order_is_coupled_to_down_alone():
    block = nn.Module()
    block.fc1, block.fc2 = nn.Linear(4, 12), nn.Linear(6, 4)
    model = nn.ModuleDict({"m": block})
    (found,) = coupled_units(model, by_group=False)
    assert (found.count, found.slices.keys()) == (6, {"down"})
    for role in ("up", "gate"):
        with pytest.raises(ValueError, match=rf"{role}_ratio=0.5: 'm.fc1' is up and gate .* Set up_ratio=0"):
            fastft.attach(model, fastft.S2FT(down_ratio=0.5, **{f"{role}_ratio": 0.5}))
    assert list(fastft.attach(model, fastft.S2FT(down_ratio=0.5)).targets) == ["m.fc2"]


def test_exchanged_heads_of_a_differential_attention_leave_the_function():
    model = model_of("diffllama")
    before = output(model)
    for block in coupled_units(model, by_group=True):
        if block.family == "attention":
            assert (block.count, block.slices) == (2, {"o": UnitSlice(f"{block.name}.o_proj", "columns", 16)})
            units = torch.tensor([1, 0])
            # Heads and KV heads of one unit lie in both halves of their layer.
            halves = [("q_proj", 8, 0), ("q_proj", 8, 16), *((n, 4, at) for n in ("k_proj", "v_proj") for at in (0, 8))]
            for slice in (*block.slices.values(), *(UnitSlice(f"{block.name}.{n}", "rows", *rest) for n, *rest in halves)):
                permute(model, slice, units)
    assert (output(model) - before).abs().max() < 1e-9
    assert [c.count for c in coupled_units(model, by_group=False) if c.family == "attention"] == [4, 4]


@pytest.mark.parametrize("kind", ["diffllama", "neox"])
@pytest.mark.parametrize("targets", [None, ["v_proj", "query_key_value", "o_proj", "dense"]])
def test_values_without_rows_of_their_own_are_refused(kind, targets):
    model = model_of(kind).float()
    targets = targets and [t for t in targets if any(name.endswith(t) for name, _ in model.named_modules())]
    before = snapshot(model)
    with pytest.raises(ValueError, match="v_ratio=0.5: which rows of .*differential attention.* Set v_ratio=0"):
        fastft.attach(model, fastft.S2FT(down_ratio=0, v_ratio=0.5, o_ratio=0.5, target_modules=targets))
    assert_same(before, snapshot(model))
    handle = fastft.attach(model, fastft.S2FT(down_ratio=0, o_ratio=0.5))
    assert {name.rpartition(".")[2] for name in handle.targets} <= {"o_proj", "dense"}


@pytest.mark.parametrize("kind", [*GATED, "moshi", "diffllama"])
def test_they_train(kind):
    model = model_of(kind).float()
    v = {} if kind == "diffllama" else {"v_ratio": 0.5}
    handle = fastft.attach(model, fastft.S2FT(down_ratio=0.5, up_ratio=0.5, gate_ratio=0.5, o_ratio=0.5, **v))
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    grads = [parameter.grad for parameter in handle.parameters()]
    assert len(grads) >= 6 and all(grad is not None and grad.abs().sum() > 0 for grad in grads)


class Subclass(nn.Linear):
    pass


def misfits():
    """A feed-forward whose attention does not fit its sizes, and one that fits."""
    bad = nn.ModuleDict({"mlp": Expert(), "attn": Attention(num_heads=2, head_dim=3)})
    return nn.ModuleDict({"bad": bad, "good": nn.ModuleDict({"mlp": Expert(), "attn": Attention(num_heads=2)})})


def test_what_is_not_asked_for_is_not_checked():
    heads = {"down_ratio": 0, "o_ratio": 0.5}
    with pytest.raises(
        ValueError, match="'bad.attn.o_proj' reads 8 features, not 6: .*leave its layers out with exclude_mod"
    ):
        fastft.attach(misfits(), fastft.S2FT(**heads))
    for options in (
        {"down_ratio": 0.5},
        {**heads, "exclude_modules": ["bad.attn.o_proj"]},
        {**heads, "exclude_modules": "bad.*"},
    ):
        assert fastft.attach(misfits(), fastft.S2FT(**options)).targets
    handle = fastft.attach(misfits(), fastft.S2FT(**heads, target_modules=["good.attn.o_proj"]))
    assert list(handle.targets) == ["good.attn.o_proj"]


def test_a_subclass_is_refused_where_it_would_train():
    model = nn.ModuleDict({"m": Expert()})
    model["m"].up_proj = Subclass(4, 6)
    with pytest.raises(ValueError, match="'m.up_proj' is matched but is a .*Subclass; only .*Exclude it"):
        fastft.attach(model, fastft.S2FT(down_ratio=0.5, up_ratio=0.5))
    assert list(fastft.attach(model, fastft.S2FT(down_ratio=0.5)).targets) == ["m.down_proj"]


def test_a_ratio_of_layers_that_are_not_there():
    with pytest.raises(
        ValueError, match="gate_ratio=0.5, but no block .* in this GPT2LMHeadModel has .*down_ratio, o_ratio, up"
    ):
        fastft.attach(gpt2(), fastft.S2FT(gate_ratio=0.5))


def test_kv_heads_that_an_attention_itself_tells_are_kept_to():
    attention = Attention(num_heads=4)
    attention.config = SimpleNamespace(num_key_value_heads=2)  # softmax attentions around it have them
    (found,) = coupled_units(attention, by_group=True)
    assert (found.count, found.slices["v"].size) == (4, 2)
    attention.num_key_value_heads = 2
    with pytest.raises(ValueError, match="'v_proj' has 8 out-features, not 4"):
        coupled_units(attention, by_group=True)
