"""Merging DoRA and a bias on B: rounded once, bits restored, whatever else is attached."""

import copy

import pytest
import torch
from torch import nn

import fastft

from .layers import NAMES, PAIRS, Conv1D, Layers, adapted, merged_weight
from .models import assert_same, snapshot


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.filterwarnings("ignore:fastft")  # float64 is the reference's
def test_merging_dora_rounds_once_and_unmerging_restores_bits(dtype):
    model, handle = adapted(dtype, use_dora=True)
    x = torch.randn(3, 12, dtype=dtype)
    before, y, wanted = snapshot(model), model(x), {name: merged_weight(getattr(model, name)) for name in NAMES}
    handle.merge()
    for name in NAMES:
        layer = getattr(model, name)
        got = layer.weight.t() if layer.fan_in_fan_out else layer.weight
        sums = 1e-13 if dtype == torch.float64 else 3e-6  # float32's own rounding of the terms, before the one to dtype
        bound = 0.5 * torch.finfo(dtype).eps * wanted[name].abs() + sums
        assert ((got.double() - wanted[name]).abs() <= bound).all()
        assert torch.equal(model.state_dict()[f"{name}.weight"], before[0][f"{name}.weight"])
    torch.testing.assert_close(model(x), y, **({"rtol": 0, "atol": 0.2} if dtype == torch.bfloat16 else {}))
    handle.unmerge()
    assert_same(before, snapshot(model))
    handle.detach()
    assert torch.equal(model(x), Layers(dtype)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_a_lora_bias(dtype):
    model, handle = adapted(dtype, lora_bias=True, target_modules=["a", "c"])
    x = torch.randn(3, 12, dtype=dtype)
    before, y = snapshot(model), model(x)
    bias = model.a.bias.double() + 1.5 * model.a.lora_bias["default"].detach().double()
    handle.merge()
    assert (model.a.bias.double() - bias).abs().max() <= torch.finfo(dtype).eps * bias.abs().max() and not model.a.bias.grad
    torch.testing.assert_close(model(x), y, **({"rtol": 0, "atol": 0.2} if dtype == torch.bfloat16 else {}))
    assert torch.equal(model.state_dict()["a.bias"], before[0]["a.bias"])
    with handle.disabled():
        assert torch.equal(model(x), Layers(dtype)(x))
    twin = copy.deepcopy(model)
    model.load_state_dict(before[0])  # while merged
    torch.testing.assert_close(model(x), y, **({"rtol": 0, "atol": 0.2} if dtype == torch.bfloat16 else {}))
    handle.unmerge()
    assert_same(before, snapshot(model))
    fastft.methods.handles(twin)["default"].unmerge()
    assert torch.equal(twin.state_dict()["a.bias"], before[0]["a.bias"])


def test_a_lora_bias_without_a_bias_to_merge_into():
    with pytest.warns(UserWarning, match="lora_bias: 'b' have no bias"):
        model, handle = adapted(lora_bias=True)
    before = snapshot(model)
    for merge in (handle.merge, handle.merge_and_unload):
        with pytest.raises(ValueError, match="can't merge.* 'b': there is no bias"):
            merge()
        assert_same(before, snapshot(model))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True, "target_modules": ["a", "c"]}])
@pytest.mark.parametrize("merged", [False, True])
def test_merge_and_unload(options, merged):
    model, handle = adapted(bias="lora_only", **options)
    x = torch.randn(3, 12)
    y = model(x)
    if merged:
        handle.merge()
        torch.testing.assert_close(model(x), y)
    plain = handle.merge_and_unload()
    assert {type(module) for module in plain.children()} == {nn.Linear, Conv1D}
    assert set(plain.state_dict()) == set(Layers().state_dict())
    torch.testing.assert_close(plain(x), y)


def test_what_can_not_be_taken_off_leaves_all_on():
    model, handle = adapted()
    nn.utils.parametrize.register_parametrization(model.c, "weight", nn.Identity())
    x = torch.randn(3, 12)
    y = model(x)
    for take_off in (handle.detach, handle.merge_and_unload):
        with pytest.raises(RuntimeError, match="changed the class of this Conv1D after adapters were attached"):
            take_off()
        assert handle.attached and torch.equal(model(x), y)
    nn.utils.parametrize.remove_parametrizations(model.c, "weight")
    handle.detach()
    assert {type(module) for module in model.children()} == {nn.Linear, Conv1D}


@pytest.mark.parametrize(("first", "second"), [*PAIRS, ({"lora_bias": True}, {"use_dora": True})])
def test_merging_some_of_several_adapters_changes_nothing(first, second):
    model, one = adapted(target_modules=["a", "c"], **first)
    model, two = adapted(seed=5, model=model, name="two", target_modules=["a", "c"], **second)
    x, plain = torch.randn(3, 12), Layers()(torch.ones(3, 12))
    before, y = snapshot(model), model(x)
    assert (y - model.c(torch.tanh(model.b(torch.tanh(Layers().a(x)))))).abs().max() > 0.1
    with one.disabled():
        only_two = model(x)
    for merged in ((one,), (two,), (one, two), (two, one)):
        for handle in merged:
            handle.merge()
        torch.testing.assert_close(model(x), y)
        with one.disabled():
            torch.testing.assert_close(model(x), only_two)
            with two.disabled():
                assert torch.equal(model(torch.ones(3, 12)), plain)
        for handle in merged:
            handle.unmerge()
        assert_same(before, snapshot(model))


def test_a_second_adapter_starts_from_the_weight_without_adapters():
    model, one = adapted()
    pristine = model.a.weight.detach().clone()
    one.merge()
    assert not torch.equal(model.a.weight, pristine)
    fastft.attach(model, fastft.LoRA(target_modules=NAMES, use_dora=True, bias="lora_only"), "two")
    torch.testing.assert_close(model.a.lora_magnitude["two"].data, pristine.norm(dim=1))


def test_copies_start_from_and_become_the_weight_without_adapters():
    model, one = adapted(target_modules=["a", "c"], lora_bias=True)
    pristine = {key: value.clone() for key, value in model.state_dict().items()}
    one.merge()
    two = fastft.attach(model, fastft.LoRA(target_modules=["b"], modules_to_save=["a"]), "two")
    copies = model.a.modules_to_save["two"]
    assert torch.equal(copies.weight, pristine["a.weight"]) and torch.equal(copies.bias, pristine["a.bias"])
    with torch.no_grad():
        copies.weight.mul_(2)
        copies.bias.mul_(2)
    x = torch.randn(3, 12)
    y = model(x)
    two.merge_and_unload()
    torch.testing.assert_close(model(x), y)
    one.unmerge()
    assert torch.equal(model.a.weight, 2 * pristine["a.weight"]) and torch.equal(model.a.bias, 2 * pristine["a.bias"])
    torch.testing.assert_close(model(x), y)
    one.detach()
    assert torch.equal(model.c.weight, pristine["c.weight"])


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_restoring_while_merged(options, tmp_path):
    model, handle = adapted(target_modules=["a", "c"], **options)
    x = torch.randn(3, 12)
    y = model(x)
    handle.save(tmp_path)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.mul_(1.5)
    handle.merge()
    assert not torch.allclose(model(x), y)
    handle.restore(tmp_path)
    torch.testing.assert_close(model(x), y)
    handle.unmerge()
    assert torch.equal(model(x), y)
    other = fastft.attach(Layers(), fastft.LoRA(target_modules=["a", "c"], r=4, lora_alpha=6))
    with pytest.raises(
        fastft.methods.AdapterFileError, match="lora_magnitude_vector" if "use_dora" in options else "B.bias"
    ):
        other.restore(tmp_path)
