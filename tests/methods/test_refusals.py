"""What attach refuses; the model is left as it was."""

import pytest
import torch
from torch import nn

import fastft
from fastft.modules.adapted_linear import Adapted

from .models import assert_same, attached, llama, randomize, snapshot


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_prj"]}, r"no module is named 'q_prj'; near matches: 'q_proj'"),
        ({"target_modules": ["q_proj", "nothing"]}, "no module is named 'nothing'"),
        ({"target_modules": r".*\.query"}, "no module matches"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "no module matches"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, "no module matches"),
        ({"target_modules": []}, "no module matches"),
        ({"target_modules": "q" * 5000}, r"^no module matches target_modules='q{,100}\.\.\.q{,100}'.{,1000}$"),
        ({"target_modules": ["q" * 5000]}, r"^target_modules: no module is named 'q{,100}\.\.\.q{,100}'.{,1000}$"),
        ({"target_modules": ["self_attn"]}, "'model.layers.0.self_attn' is matched but is a .*LlamaAttention"),
        ({"target_modules": ["embed_tokens"]}, "Embedding"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_heed"]}, "'lm_heed'; near matches: 'lm_head'"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["proj"]}, "both target_modules and modules_to_save"),
        (
            {"target_modules": "q_proj"},
            r"a string is a regular expression .*write target_modules=\['q_proj'\]",
        ),
        ({"target_modules": ["q_proj"], "adapter_dtype": torch.bfloat16}, "bfloat16 on the torch.float32 weight"),
    ],
)
def test_refusals_leave_the_model_alone(options, message):
    model = llama()
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=message):
        fastft.attach(model, fastft.LoRA(**options))
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": 3}, "target_modules is 3"),
        ({"lora_dropout": "0.1"}, "lora_dropout='0.1'"),
        ({"use_rslora": "no"}, "use_rslora='no'"),
        ({"target_modules": ["q_proj"], "layers_to_transform": "0"}, "layers_to_transform is '0'"),
    ],
)
def test_options_of_the_wrong_type(options, message):
    with pytest.raises(TypeError, match=message):
        fastft.LoRA(**options)


def test_a_model_is_a_module():
    with pytest.raises(TypeError, match="must be an nn.Module, not str"):
        fastft.attach("llama", fastft.LoRA(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="must be an nn.Module, not str"):
        fastft.load("llama", ".")


def test_layers_that_their_owner_reads_without_a_call():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(ValueError, match="'linear1' belongs to an nn.TransformerEncoderLayer"):
        fastft.attach(model, fastft.LoRA(target_modules=["linear1"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"modules_to_save": ["layer"]},
            r"modules_to_save selects 'layer.self_attn', which is or lies in an .*longer",
        ),
        ({"modules_to_save": ["norm1"]}, r"modules_to_save selects 'layer.norm1', which is or lies in an nn.Transformer"),
        (
            {"modules_to_save": ["attention"]},
            "selects 'attention.out_proj', which belongs to an nn.MultiheadAttention",
        ),
        ({"bias": "all"}, r"bias selects 'attention.out_proj', which .*; use bias=\"none\" or \"lora_only\""),
    ],
)
def test_copies_that_the_owner_would_pass_over(options, message):
    parts = {"inp": nn.Linear(8, 8), "layer": nn.TransformerEncoderLayer(8, 2, 16), "attention": nn.MultiheadAttention(8, 2)}
    if options == {"bias": "all"}:
        del parts["layer"]
    model = nn.ModuleDict(parts)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        fastft.attach(model, fastft.LoRA(target_modules=["inp"], **options))
    assert_same(before, snapshot(model))
    fastft.attach(model, fastft.LoRA(target_modules=["inp"], bias="lora_only"))


def test_refused_modules():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    with pytest.raises(ValueError, match=r"'2.out_proj' is matched but is a .*NonDynamicallyQuantizableLinear"):
        fastft.attach(model, fastft.LoRA(target_modules="all-linear"))
    model[0].forward = model[0].forward
    with pytest.raises(ValueError, match="replaced on the instance"):
        fastft.attach(model, fastft.LoRA(target_modules=["0"]))
    model[1].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"'1' is a Parameter of torch.int8"):
        fastft.attach(model, fastft.LoRA(target_modules=["1"]))
    with pytest.raises(ValueError, match="meta device"):
        fastft.attach(nn.Sequential(nn.Linear(4, 4, device="meta")), fastft.LoRA(target_modules=["0"]))
    with pytest.raises(TypeError, match="attach needs a method"):
        fastft.attach(model, {"r": 8})
    assert not any(isinstance(module, Adapted) for module in model.modules())


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "x" * 65, "keys", "training", "_buffers", 3])
@pytest.mark.parametrize("method", [fastft.LoRA(target_modules=["q_proj"]), fastft.S2FT(down_ratio=0.1)], ids=str)
def test_adapter_names(method, name):
    model = llama()
    with pytest.raises(ValueError, match="adapter name"):
        fastft.attach(model, method, name)
    assert not any(isinstance(module, Adapted) for module in model.modules())


def test_an_adapter_name_is_used_once():
    model = llama()
    attached(model)
    with pytest.raises(ValueError, match="attached already"):
        attached(model)


@pytest.mark.parametrize("name", ["default", "b"])
@pytest.mark.parametrize("inner_first", [False, True])
def test_a_part_and_the_whole_of_a_model(name, inner_first):
    """Each would freeze the other's adapter, and detaching bring back the wrong flags."""
    model = llama()
    first, second = (model.model, model) if inner_first else (model, model.model)
    handle = attached(first)
    with pytest.raises(ValueError, match="to a part of this model or to a whole|attached already"):
        attached(second, name)
    assert all(p.requires_grad for p in handle.parameters())
    handle.detach()
    assert all(p.requires_grad for p in model.parameters())
    attached(second, name)


def test_tied_weights():
    model = llama(tie_word_embeddings=True)
    before = snapshot(model)
    for options in ({"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}):
        with pytest.raises(ValueError, match=r"lm_head.weight is shared with model.embed_tokens.weight"):
            fastft.attach(model, fastft.LoRA(**options))
        assert_same(before, snapshot(model))
        handle = fastft.attach(model, fastft.LoRA(**options, allow_tied_weights=True))
        randomize(handle)
        with pytest.raises(ValueError, match=r"shared with model.embed_tokens.weight"):
            handle.merge_and_unload()
        handle.detach()
        assert_same(before, snapshot(model))


def test_parts_of_tensors_are_neither_saved_nor_restored(tmp_path):
    """FSDP leaves flat pieces of parameters in a process, ZeRO-3 nothing."""
    handle = attached(llama())
    handle.save(tmp_path / "whole")
    parameter = next(handle.parameters())
    for part in (parameter.data.flatten()[:3].clone(), torch.empty(0)):
        parameter.data = part
        for call in (handle.save, handle.restore):
            with pytest.raises(ValueError, match=r"1 tensors of adapter 'default' are not whole here, .*q_proj.lora_A"):
                call(tmp_path / "whole")
    weight = handle.model.lm_head.weight
    weight.ds_shape, weight.data = weight.shape, torch.empty(0)
    with pytest.raises(ValueError, match="the weight of 'lm_head' is divided among processes already"):
        fastft.attach(handle.model, fastft.LoRA(target_modules=["lm_head"]), "second")
