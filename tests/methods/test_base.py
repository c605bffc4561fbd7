"""The contract of an attached model."""

import copy
import threading

import pytest
import torch
from torch import nn

import fastft
from fastft.methods import handles

from .models import assert_same, attached, gpt2, llama, logits, randomize, snapshot, tokens, transformers

X = tokens()


def plain_deltas(model, handle):
    """The model with fp32 deltas written into its weights by hand: an independent statement of what LoRA is."""
    other = copy.deepcopy(model)
    reference = handles(other)[handle.name]
    for module in reference.targets.values():
        a, b = module.lora_A[handle.name].float(), module.lora_B[handle.name].float()
        delta = module._settings[handle.name].scale * (b @ a)
        with torch.no_grad():
            module.weight.copy_(module.weight.float() + (delta.t() if module.fan_in_fan_out else delta))
    reference.set_active(False)
    return other


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_attach_and_detach(make, bias):
    model = make()
    model.get_input_embeddings().weight.requires_grad_(False)  # so that detach has to restore a mixture
    calls = []
    model.get_submodule(next(n for n, m in model.named_modules() if n.endswith(("q_proj", "c_attn")))).register_forward_hook(
        lambda *args: calls.append(1)
    )
    before, plain = snapshot(model), logits(model)
    modules = dict(model.named_modules())
    handle = fastft.attach(model, fastft.LoRA(r=4, target_modules="all-linear", bias=bias))
    assert torch.equal(logits(model), plain)  # B is zero
    assert all(modules[name] is module for name, module in model.named_modules() if name in modules)
    randomize(handle)
    assert not torch.allclose(logits(model), plain)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {name for name, _ in handle.named_parameters()}
    assert {".lora_A." in name or ".lora_B." in name for name in names} == ({True} if bias == "none" else {True, False})
    with handle.disabled():
        assert torch.equal(logits(model), plain)
    calls.clear()
    logits(model)
    assert calls == [1]
    handle.detach()
    assert_same(before, snapshot(model))
    assert torch.equal(logits(model), plain)
    with pytest.raises(RuntimeError, match="detached"):
        handle.merge()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_forward_is_the_base_plus_the_delta(make):
    model = make()
    handle = attached(model)
    torch.testing.assert_close(logits(model), logits(plain_deltas(model, handle)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_merge_is_rounded_once_and_unmerge_exact(make, dtype):
    model = make().to(dtype)
    before = snapshot(model)
    plain = logits(model)
    handle = attached(model)
    assert all(p.dtype == torch.float32 for p in handle.parameters())
    expected = plain_deltas(model, handle).state_dict()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    apart = logits(model)
    for _ in range(3):
        handle.merge()
        handle.merge()  # once more does nothing
        assert handle.merged
        for name in handle.targets:
            assert torch.equal(model.get_submodule(name).weight, expected[f"{name}.weight"]), name
        torch.testing.assert_close(logits(model), apart, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
        with handle.disabled():
            assert torch.equal(logits(model), plain)
        seen = model.state_dict()
        assert seen.keys() == state.keys() and all(torch.equal(seen[key], state[key]) for key in state)
        handle.unmerge()
        assert torch.equal(logits(model), apart)
    handle.merge()
    handle.detach()
    assert_same(before, snapshot(model))


def test_merge_and_unload_gives_the_plain_model():
    model = llama()
    before = snapshot(model)
    handle = attached(model, modules_to_save=["lm_head", "norm"], bias="all")
    apart = logits(model)
    assert handle.merge_and_unload() is model
    after = snapshot(model)
    assert before[1:] == after[1:] and not handles(model)
    torch.testing.assert_close(logits(model), apart, rtol=1e-5, atol=1e-5)


def test_copies_of_a_merged_model_share_nothing_and_forget_nothing():
    model = llama().bfloat16()
    plain, handle = logits(model), attached(model)
    apart = logits(model)
    handle.merge()
    merged = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), merged)
    with handle.disabled():  # the original's handle doesn't speak for the copy
        assert torch.equal(logits(twin), merged)
    handles(twin)["default"].unmerge()
    assert torch.equal(logits(twin), apart) and torch.equal(logits(model), merged)
    handles(twin)["default"].detach()
    assert torch.equal(logits(twin), plain)
    wide = copy.deepcopy(model).double()  # exact, so the way back is too
    handles(wide)["default"].detach()
    assert torch.equal(logits(wide.bfloat16()), plain)


def test_state_dict_round_trip_while_merged():
    one, two = llama(), llama(seed=5)
    first, second = attached(one), attached(two, seed=9)
    apart = logits(one)
    second.merge()
    two.load_state_dict(one.state_dict())
    torch.testing.assert_close(logits(two), apart, rtol=1e-5, atol=1e-5)  # still merged, with the loaded values
    assert second.merged
    second.unmerge()
    assert torch.equal(logits(two), apart)
    first.merge()
    assert first.merged and not two.load_state_dict(one.state_dict()).missing_keys
    assert torch.equal(logits(two), apart)


def test_save_pretrained_while_merged_writes_the_pristine_base(tmp_path):
    model = llama()
    handle = attached(model)
    handle.merge()
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(llama()))


def test_disabled_belongs_to_its_thread():
    model = llama()
    handle = attached(model)
    apart, results = logits(model), []
    with handle.disabled():
        thread = threading.Thread(target=lambda: results.append(logits(model)))
        thread.start()
        thread.join()
        assert not torch.allclose(logits(model), apart)
    assert torch.equal(results[0], apart) and torch.equal(logits(model), apart)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("merged", [(), (0,), (1,), (0, 1), (1, 0)])
def test_two_adapters_in_any_order(dtype, order, merged):
    model = llama().to(dtype)
    before, plain = snapshot(model), logits(model)
    pair = [attached(model, "a", 1), attached(model, "b", 2, target_modules=["q_proj", "down_proj"], r=3)]
    both = logits(model)
    alone = []
    for other in (1, 0):
        pair[other].set_active(False)
        alone.append(logits(model))
        pair[other].set_active(True)
    assert torch.equal(logits(model), both)
    close = {"rtol": 0, "atol": 2e-5 if dtype == torch.float32 else 0.1}
    for index in merged:
        pair[index].merge()
    torch.testing.assert_close(logits(model), both, **close)
    with pair[0].disabled():
        torch.testing.assert_close(logits(model), alone[1], **close)
        with pair[1].disabled():
            assert torch.equal(logits(model), plain)
        torch.testing.assert_close(logits(model), alone[1], **close)  # still disabled
    first, last = order
    pair[first].detach()
    torch.testing.assert_close(logits(model), alone[last], **close)
    if last in merged:
        pair[last].unmerge()
    assert torch.equal(logits(model), alone[last])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n, _ in pair[last].named_parameters()}
    pair[last].detach()
    assert_same(before, snapshot(model))


def test_folding_one_adapter_keeps_the_other():
    model = llama()
    first, second = attached(model, "a", 1), attached(model, "b", 2)
    both = logits(model)
    second.merge()
    first.merge_and_unload()
    torch.testing.assert_close(logits(model), both, rtol=1e-5, atol=2e-5)
    second.unmerge()
    torch.testing.assert_close(logits(model), both, rtol=1e-5, atol=2e-5)
    assert list(handles(model)) == ["b"]


def test_modules_to_save_are_copies():
    model = llama()
    before, plain = snapshot(model), logits(model)
    handle = fastft.attach(model, fastft.LoRA(target_modules=["q_proj"], modules_to_save=["lm_head", "mlp"]))
    assert torch.equal(logits(model), plain)
    names = {name for name, _ in handle.named_parameters()}
    assert "lm_head.modules_to_save.default.weight" in names
    assert "model.layers.1.mlp.up_proj.modules_to_save.default.weight" in names
    optimizer = handle.optimizer(lr=0.1)
    model(X, labels=X).loss.backward()
    assert all(parameter.grad is not None for parameter in handle.parameters())
    optimizer.step()
    assert not torch.allclose(logits(model), plain)
    with handle.disabled():
        assert torch.equal(logits(model), plain)
    with pytest.raises(ValueError, match=r"'lm_head' is trained in full by the active adapter 'default'"):
        fastft.attach(model, fastft.LoRA(target_modules=["q_proj"], modules_to_save=["lm_head"]), "second")
    handle.set_active(False)
    second = fastft.attach(model, fastft.LoRA(target_modules=["q_proj"], modules_to_save=["lm_head"]), "second")
    assert torch.equal(logits(model), plain)
    with pytest.raises(ValueError, match="second"):
        handle.set_active(True)
    second.detach()
    handle.detach()
    assert_same(before, snapshot(model))


def test_buffers_of_saved_modules_are_copies_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    state = copy.deepcopy(model.state_dict())
    handle = fastft.attach(model, fastft.LoRA(r=2, target_modules=["0"], modules_to_save=["1"]))
    model(torch.randn(8, 4)).sum().backward()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    running = dict(model.named_buffers())["1.modules_to_save.default.running_mean"]
    assert running.abs().max() > 0
    handle.merge_and_unload()
    assert torch.equal(model[1].running_mean, running) and model[1].num_batches_tracked == 1


class Block(nn.Module):
    """A module with parameters of its own beside its children."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(input=x + self.bias)


def test_a_second_adapter_ignores_the_parts_of_the_first():
    model = nn.Sequential(Block(), Block())
    before, x = snapshot(model), torch.randn(3, 4)
    plain = model(x)
    first = fastft.attach(model, fastft.LoRA(r=2, target_modules="all-linear", bias="all"), "one")
    assert {name for name, _ in first.named_parameters()} >= {
        "0.modules_to_save.one.bias",
        "0.inner.modules_to_save.one.bias",
    }
    randomize(first)
    changed = model(x)
    assert not torch.allclose(changed, plain)
    first.set_active(False)
    second = fastft.attach(model, fastft.LoRA(r=2, target_modules="all-linear", bias="all"), "two")
    names = [[name for name, _ in handle.named_parameters()] for handle in (first, second)]
    assert [name.replace(".two", ".one") for name in names[1]] == names[0]
    assert torch.equal(model(x), plain)
    second.detach()
    first.set_active(True)
    assert torch.equal(model(x), changed)
    first.detach()
    assert_same(before, snapshot(model))


def test_bare_linear_and_eval_mode():
    model = nn.Sequential(nn.Linear(6, 5))
    handle = fastft.attach(model, fastft.LoRA(r=2, target_modules="all-linear", lora_dropout=0.5))
    randomize(handle)
    x = torch.randn(3, 6)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    assert model(x[0]).shape == (5,) and model(x[:0]).shape == (0, 5)
