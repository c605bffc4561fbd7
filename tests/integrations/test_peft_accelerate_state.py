"""What PEFT does to its models it does to accelerated ones: files, copies, adapters' switching, merging, unloading."""

import copy
import io
import json
import pickle

import pytest
import torch
from torch import nn

import fastft
from tests.integrations.peft_models import (
    accelerated,
    assert_same_step,
    layer,
    one,
    paths,
    peft,
    peft_llama,
    randomize,
    step,
)
from tests.methods.models import assert_same, llama, snapshot, tokens

TWO = ("default", "b")


def output(model):
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def pair(adapters=TWO, **config):
    """A model of PEFT's and its accelerated copy, in evaluation mode."""
    model = peft_llama(adapters, **config).eval()
    return model, accelerated(model)


def both(pair, act):
    """Do the same to both; their outputs must stay alike."""
    results = [act(model) for model in pair]
    torch.testing.assert_close(output(pair[1]), output(pair[0]), rtol=1e-4, atol=1e-5)
    return results


def test_nothing_but_classes_changes_and_restore_brings_them_back():
    model = peft_llama(TWO, use_dora=False, lora_dropout=0.1)
    before, printed, keys, name = snapshot(model), repr(model), list(model.state_dict()), type(model).__name__
    assert fastft.accelerate(model) is model and fastft.accelerate(model) is model
    assert repr(model) == printed and list(model.state_dict()) == keys
    assert isinstance(model, peft.PeftModel) and type(model).__name__ == name
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(layers) == 14 and all(isinstance(m, peft.tuners.lora.Linear) for m in layers)
    step(model)
    model.zero_grad(set_to_none=True)
    assert fastft.restore(model) is model
    assert_same(before, snapshot(model))
    fastft.restore(model)  # once more is nothing


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_stay_accelerated(how):
    model = fastft.accelerate(peft_llama(TWO, use_dora=False, lora_bias=True))
    want = step(model)
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    before = paths(copied)["fused"]
    assert_same_step(step(copied), want)
    assert paths(copied) == {"fused": before + 14}
    assert type(fastft.restore(copied).base_model) is peft.LoraModel
    assert_same_step(step(copied), want)
    assert paths(model) == {"fused": 14}  # not the copy's


def test_files(tmp_path):
    model, fast = pair()
    model.save_pretrained(tmp_path / "plain")
    fast.save_pretrained(tmp_path / "fast")
    for name in ("adapter_model.safetensors", "b/adapter_model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "fast" / name).read_bytes()
    plain, own = (json.loads((tmp_path / which / "adapter_config.json").read_text()) for which in ("plain", "fast"))
    assert set(plain.pop("target_modules")) == set(own.pop("target_modules")) and plain == own  # (a set's order varies)
    loaded = fastft.accelerate(peft.PeftModel.from_pretrained(llama(), tmp_path / "fast")).eval()
    torch.testing.assert_close(output(loaded), output(model))
    both((model, fast), lambda m: m.load_adapter(tmp_path / "plain" / "b", "again"))
    both((model, fast), lambda m: m.set_adapter("again"))
    state = model.state_dict()
    fast.load_state_dict(state)
    torch.testing.assert_close(output(fast), output(model))


def test_switching():
    models = pair()
    both(models, lambda m: m.set_adapter("b"))
    both(models, lambda m: m.base_model.set_adapter(["default", "b"]))
    with models[0].disable_adapter(), models[1].disable_adapter():
        both(models, lambda m: None)
    both(models, lambda m: m.delete_adapter("default"))

    def add(model):
        torch.manual_seed(2)
        model.add_adapter("c", peft.LoraConfig(r=3, target_modules=["k_proj", "lm_head"]))
        model.set_adapter("c")
        randomize(model, 9)

    both(models, add)
    report = fastft.report(models[1])
    assert report["base_model.model.lm_head"].path == "fused"  # a layer that came later
    for kind in ("linear", "cat", "svd"):
        both(models, lambda m, kind=kind: m.add_weighted_adapter(["c", "c"], [0.5, -2.0], kind, combination_type=kind))
        both(models, lambda m, kind=kind: m.set_adapter(kind))


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_bias": True, "bias": "lora_only"}], ids=str)
def test_merging(config):
    models = pair(("default",), **config)
    both(models, lambda m: m.merge_adapter())
    assert {row.reason for row in fastft.report(models[1])} == {"merged into the base weight"}
    both(models, lambda m: m.unmerge_adapter())
    for model in models:  # DoRA's norms of the base must not be those from before
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "base_layer.weight" in name:
                    parameter.mul_(1.5)
    both(models, lambda m: None)
    both(models, lambda m: m.merge_adapter())
    both(models, lambda m: m.unmerge_adapter())
    plain, merged = (copy.deepcopy(m).merge_and_unload() for m in models)
    assert {type(m) for m in plain.modules()} == {type(m) for m in merged.modules()}
    torch.testing.assert_close(output(merged), output(plain), rtol=1e-4, atol=1e-5)
    plain, unloaded = (m.unload() for m in models)
    assert repr(plain) == repr(unloaded) and {type(m) for m in unloaded.modules()} == {type(m) for m in plain.modules()}
    assert not [key for m in unloaded.modules() for key in m.__dict__ if "fastft" in key]


def test_hot_swap(tmp_path):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    other = peft_llama(("default",), r=8, lora_alpha=3)
    randomize(other, seed=11).save_pretrained(tmp_path)
    models = pair(("default",))
    for model in models:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    both(models, lambda m: None)
    both(models, lambda m: hotswap_adapter(m, tmp_path, adapter_name="default"))
    torch.testing.assert_close(output(models[1]), output(other.eval()), rtol=1e-4, atol=1e-5)
    assert set(paths(models[1])) == {"fused"}


def test_parameters_that_are_replaced():
    """Nothing of an adapter is held on to: PEFT re-assigns parameters when it casts, initialises or loads them."""
    model, x = layer(), torch.randn(3, 24)
    fast = accelerated(model)
    one(fast)(x)
    for m in (model, fast):
        one(m).lora_A["default"].weight = nn.Parameter(torch.ones(5, 24))
        one(m).lora_B["default"] = nn.Linear(5, 40, bias=False)
        nn.init.constant_(one(m).lora_B["default"].weight, 0.3)
        one(m).set_scale("default", 5.0)
    torch.testing.assert_close(one(fast)(x), one(model)(x))
    for m in (model, fast):
        m.base_model.scale_layer(0.5) if hasattr(m.base_model, "scale_layer") else one(m).scale_layer(0.5)
        one(m).base_layer = nn.Linear(24, 40)
        nn.init.constant_(one(m).base_layer.weight, -0.1)
        nn.init.constant_(one(m).base_layer.bias, 2.0)
    torch.testing.assert_close(one(fast)(x), one(model)(x))
    assert paths(fast) == {"fused": 3}


def test_other_kinds_of_models():
    base = llama()
    mixed = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"]), "default", mixed=True)
    mixed.add_adapter("other", peft.LoHaConfig(r=4, target_modules=["q_proj", "v_proj"], init_weights=False))
    mixed.set_adapter(["default", "other"])
    mixed.eval()
    want = output(randomize(mixed))
    fastft.accelerate(mixed)
    torch.testing.assert_close(output(mixed), want)
    mixed.add_adapter("third", peft.LoraConfig(r=4, target_modules=["up_proj", "v_proj"]))
    assert {row.path for row in fastft.report(mixed)} <= {"fused", "low-rank part", "peft"}
    mixed.set_adapter(["default", "other", "third"])
    reason = fastft.report(mixed)["base_model.model.model.layers.0.self_attn.v_proj"].reason
    assert reason == "the base layer is a peft.tuners.loha.layer.Linear"
    injected = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj"]), llama())
    want = step(randomize(injected))
    assert_same_step(step(fastft.accelerate(injected)), want)
    assert paths(injected) == {"fused": 2}
    with pytest.raises(ValueError, match="no LoRA layer of PEFT in this model, nor one of SHiRA"):
        fastft.accelerate(llama())
    saved = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    want = step(randomize(saved))
    assert_same_step(step(fastft.accelerate(saved)), want)


def test_a_class_that_somebody_else_changed():
    model = fastft.accelerate(layer())
    lin = one(model)
    plain = type(lin)
    lin.__class__ = type("FSDPLinear", (plain,), {})
    lin(torch.randn(2, 24))
    assert paths(model) == {"fused": 1}
    with pytest.raises(RuntimeError, match="the class of this Linear was changed to FSDPLinear after it was accelerated"):
        fastft.restore(model)
    lin.__class__ = plain
    fastft.restore(model)
