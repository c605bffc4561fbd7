"""Which layers are grouped, and what is said of it."""

import pytest
import torch
from torch import nn

import fastft
from fastft.methods.grouping import siblings

from .models import llama
from .test_groups import attach


def test_only_targets_are_grouped():
    def members(**options):
        return [state.members for state in attach(llama(num_hidden_layers=1), **options).groups]

    name = "model.layers.0.{}_proj".format
    assert members(target_modules=["q_proj", "v_proj", "up_proj"]) == [(name("self_attn.q"), name("self_attn.v"))]
    assert members(target_modules=["o_proj", "down_proj"]) == []
    assert members(group_projections=False) == []


def test_other_names_and_cross_attention():
    def linears(*names, k=8):
        return {name: nn.Linear(k, 4) for name in names}

    bert = linears("a.self.query", "a.self.key", "a.self.value", "a.output.dense")
    assert siblings(bert) == [["a.self.query", "a.self.key", "a.self.value"]]
    assert siblings(linears("EncDecAttention.q", "EncDecAttention.k", "EncDecAttention.v")) == [
        ["EncDecAttention.k", "EncDecAttention.v"]
    ]
    assert siblings(linears("b.encoder_attn.q_proj", "b.encoder_attn.k_proj", "c.k_proj")) == []
    former = linears("crossattention.attention.query", "crossattention.attention.key", "crossattention.attention.value")
    assert siblings(former) == [["crossattention.attention.key", "crossattention.attention.value"]]
    assert siblings({**linears("q_proj"), **linears("k_proj", "v_proj", k=6)}) == [["k_proj", "v_proj"]]
    assert siblings(linears("ff.w1", "ff.w3", "ff.w2")) == [["ff.w1", "ff.w3"]]
    assert siblings(linears("m.q_a_proj", "m.kv_a_proj_with_mqa", "m.q_b_proj")) == [["m.q_a_proj", "m.kv_a_proj_with_mqa"]]


def test_an_unfit_layer_is_told():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.q_proj(x) + self.k_proj(x + 1)

    model = Odd()
    handle = fastft.attach(model, fastft.LoRA(target_modules=["q_proj", "k_proj"]))
    assert handle.groups[0].grouped
    model(torch.randn(2, 8))
    (state,) = handle.groups
    assert not state.grouped and state.reason == "k_proj did not follow q_proj with the same input"


def test_wrong_options():
    with pytest.raises(TypeError, match="group_projections='yes'"):
        fastft.LoRA(group_projections="yes")
    with pytest.raises(ValueError, match="needs group_projections=True"):
        fastft.LoRA(group_projections=False, pack_weights=True)


def test_packing_without_a_group_warns():
    with pytest.warns(UserWarning, match="pack_weights is ignored"):
        handle = fastft.attach(
            nn.ModuleDict({"q_proj": nn.Linear(4, 4)}), fastft.LoRA(pack_weights=True, target_modules=["q_proj"])
        )
    assert handle.groups == []
