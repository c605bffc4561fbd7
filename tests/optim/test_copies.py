"""Optimizers that write into weights, copied or pickled together with their models."""

import copy
import io

import pytest
import torch

import fastft
from tests.methods.models import llama
from tests.methods.sparse_net import assert_same_bits, attached, bits, inputs, loss_of


def pickled(objects):
    file = io.BytesIO()
    torch.save(objects, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def slices():
    model = llama()
    return model, fastft.attach(model, fastft.S2FT(down_ratio=0.25)), lambda net, x: net(input_ids=x, labels=x).loss


def entries():
    return *attached("mask"), loss_of


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("made, options", [(entries, {"moment_dtype": torch.bfloat16, "ages": False}), (slices, {})])
@pytest.mark.parametrize("before", [0, 2])
def test_a_copy_trains_its_own_model_as_the_original_does(made, options, copied, before):
    net, handle, loss = made()
    optimizer = handle.optimizer(lr=0.05, **options)
    x = torch.arange(12)[None] if made is slices else inputs(0)

    def update(net, optimizer):
        loss(net, x).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(before):
        update(net, optimizer)
    twin, _, other = copied((net, handle, optimizer))
    for _ in range(2):
        update(net, optimizer)
        update(twin, other)
    assert_same_bits(bits(net), bits(twin))
