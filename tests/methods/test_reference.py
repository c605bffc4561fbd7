"""`handle.reference()`: the base as a second model on the tensors of the first."""

import pytest
import torch

import fastft

from .models import assert_same, attached, gpt2, llama, logits, randomize, snapshot, tokens


@pytest.mark.parametrize("make", [llama, gpt2, lambda: llama(tie_word_embeddings=True)], ids=["llama", "gpt2", "tied"])
def test_it_is_the_base_on_the_same_tensors(make):
    expected, model = make(), make()
    attached(model)
    handle = attached(model, "second", lora_bias=True, bias="all", modules_to_save=["norm" if make is not gpt2 else "ln_f"])
    with_adapters = logits(model)
    model.train()
    before = snapshot(model)
    reference = handle.reference()
    assert_same(before, snapshot(model))
    assert torch.equal(logits(reference), logits(expected)) and torch.equal(logits(model), with_adapters)
    assert model.training and not any(module.training for module in reference.modules())
    assert {type(module) for module in reference.modules()} == {type(module) for module in expected.modules()}
    own = dict(model.named_parameters(remove_duplicate=False))
    found = dict(reference.named_parameters(remove_duplicate=False))
    assert found.keys() == dict(expected.named_parameters(remove_duplicate=False)).keys()
    assert all(parameter is own[name] and not parameter.requires_grad for name, parameter in found.items())


def test_training_does_not_reach_it():
    model = llama()
    handle = attached(model)
    reference, expected = handle.reference(), logits(llama())
    optimizer = handle.optimizer(lr=0.1)
    start = logits(model)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is None for parameter in reference.parameters())
    optimizer.step()
    assert not torch.equal(logits(model), start) and torch.equal(logits(reference), expected)
    handle.detach()
    assert torch.equal(logits(model), expected) and torch.equal(logits(reference), expected)


def test_packed_weights_stay_packed():
    model = llama()
    handle = attached(model, pack_weights=True)
    expected = logits(model)
    reference = handle.reference()
    assert all(state.packed for state in handle.groups)
    assert torch.equal(logits(reference), logits(llama())) and torch.equal(logits(model), expected)
    assert all(state.packed for state in handle.groups)


def test_what_stands_in_the_weights_is_refused():
    model = llama()
    handle = attached(model)
    other = attached(model, "second")
    other.merge()
    with pytest.raises(ValueError, match="'second' stands in the weights, .*unmerge it first"):
        handle.reference()
    other.unmerge()
    handle.reference()
    sliced = fastft.attach(llama(), fastft.S2FT(down_ratio=0.2))
    randomize(sliced)
    with pytest.raises(ValueError, match="copy the model before attaching"):
        sliced.reference()
