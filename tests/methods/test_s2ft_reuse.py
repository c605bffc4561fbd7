"""S²FT: the method of a handle keeps its choice when it is attached to another model."""

import pytest
import torch

import fastft
from tests.methods.models import assert_same, llama, snapshot

RATIOS = {"down_ratio": 0.2, "o_ratio": 0.5}


@pytest.mark.parametrize("select", ["random", "weight"])
def test_another_model_of_the_same_shapes_gets_the_same_units(select):
    first = fastft.attach(llama(), fastft.S2FT(**RATIOS, select=select))
    second = fastft.attach(llama(seed=1), first.method)
    assert first.targets.keys() == second.targets.keys()
    for name, module in first.targets.items():
        assert torch.equal(module.slice_units["default"], second.targets[name].slice_units["default"])


def test_units_that_another_model_does_not_have_are_refused():
    first = fastft.attach(llama(), fastft.S2FT(**RATIOS, largest=True, select="weight"))
    small = llama(intermediate_size=12)
    before = snapshot(small)
    with pytest.raises(ValueError, match="don't fit"):
        fastft.attach(small, first.method)
    assert_same(before, snapshot(small))
    with pytest.raises(ValueError, match=r"this one has no modules \['model.layers.1.mlp.down_proj'"):
        fastft.attach(llama(num_hidden_layers=1), first.method)
