"""DistributedDataParallel in two processes (see `processes`): each sees half of the rows, together they are one."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import fastft

from .ranks import ROWS, assert_trained_alike, train


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True, "static_graph": True}])
def test_trains_as_one_process(rank, make, options):
    expected = train(make(), ROWS)
    made = make()
    made.wrapped = DistributedDataParallel(made.model, **options)
    with fastft.testing.record() as calls:
        found = train(made, ROWS.chunk(2)[rank])
    assert_trained_alike(found, expected)
    assert {call.backend for call in calls} == {"cpu"} and "lora_grad_sb" in {call.op for call in calls}


def test_both_ranks_hold_the_same_bits(rank, make):
    made = make()
    made.wrapped = DistributedDataParallel(made.model)
    *_, parameters = train(made, ROWS.chunk(2)[rank])
    for name, parameter in parameters.items():
        other = parameter.clone()
        torch.distributed.broadcast(other, 0)
        assert torch.equal(parameter, other), name
