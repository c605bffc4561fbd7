"""Entries in the corners: schedules that end early, odd weights, odd settings of PyTorch, states that don't fit."""

import pytest
from torch import nn

from fastft.methods import spiel

from .sparse_net import Net, assert_same_bits, attached, bits, held, train


def test_a_choice_at_the_end_would_replace_what_was_trained():
    net, handle = attached("accumulated", total_steps=2)
    train(net, handle, 2)
    assert [h["changed"] for h in handle.method.history] == [0] and all(
        one.delta.ne(0).all() for one in held(handle).values()
    )


def test_random_entries_are_drawn_once(monkeypatch):
    net, handle = attached("accumulated")
    monkeypatch.setattr(spiel, "random_entries", None)
    train(net, handle, 6)
    assert [h["update"] for h in handle.method.history] == [2, 6]


def test_a_density_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no entry in any module"):
        attached("accumulated", density=1e-6)


def test_a_weight_stored_by_columns_is_refused():
    net = Net()
    net.a.weight = nn.Parameter(net.a.weight.detach().t().contiguous().t())
    before = bits(net)
    for kind in ("accumulated", "lift"):
        with pytest.raises(ValueError, match="make it contiguous first"):
            attached(kind, net=net)
    assert type(net.a) is nn.Linear
    assert_same_bits(bits(net), before)
