"""SpIEL, LIFT and SparseMask on two processes: both choose the same entries, hold the same bits; fully_shard is refused."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import fastft
from tests.methods.models import llama, tokens

from .processes import results

ROWS = tokens(rows=4, length=9)
STEPS = 7
CYCLE = {"reselection_steps": 3, "selection_accumulation_steps": 2, "total_steps": 20}


def mask():
    generator = torch.Generator().manual_seed(5)
    shapes = {n: m.weight.shape for n, m in llama().named_modules() if n.endswith(("up_proj", "o_proj"))}
    return {name: torch.rand(shape, generator=generator) < 0.1 for name, shape in shapes.items()}


METHODS = {
    "mask": lambda: fastft.SparseMask(mask=mask()),
    "momentum": lambda: fastft.SpIEL(density=0.02, selection="momentum", **CYCLE),
    "accumulated": lambda: fastft.SpIEL(density=0.02, **CYCLE),
    "lift": lambda: fastft.LIFT(density=0.1, filter_rank=4, update_interval=3),
}


def train(handle, model, rows, accumulate=False):
    """Updates with clipped gradients; the losses of `rows` before each of them and afterwards."""
    optimizer, losses = handle.optimizer(lr=1e-2, weight_decay=0.1), []
    parts = rows.chunk(2) if accumulate else (rows,)
    for _ in range(STEPS):
        losses.append(0.0)
        for i, part in enumerate(parts):
            last = i + 1 == len(parts)
            with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
                loss = model(input_ids=part, labels=part).loss / len(parts)
                loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(handle.parameters(), 1.0)
        optimizer.step()
        handle.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return [*losses, model(input_ids=rows, labels=rows).loss.item()]


def outcome(handle, losses):
    held = {name: module.sparse["default"] for name, module in handle.targets.items()}
    return {
        "losses": losses,
        "entries": {name: one.entries.flat() for name, one in held.items()},
        "deltas": {name: one.delta.detach() for name, one in held.items()},
        "weights": {name: value.detach() for name, value in handle.model.named_parameters() if "sparse" not in name},
        "history": handle.method.history,
    }


def attach(method):
    return fastft.attach(llama(num_key_value_heads=2), METHODS[method]())


def job(rank):
    rows, found = ROWS.chunk(2)[rank], {}
    for method in METHODS:
        for accumulate in (False, True):
            handle = attach(method)
            model = DistributedDataParallel(handle.model)
            found[method, accumulate] = outcome(handle, train(handle, model, rows, accumulate))
    for method in OTHER_WEIGHTS:
        handle = fastft.attach(llama(seed=rank, num_key_value_heads=2), METHODS[method]())
        found[method, "own weights"] = outcome(handle, train(handle, DistributedDataParallel(handle.model), rows))
    handle = attach("lift")
    optimizer = ZeroRedundancyOptimizer(handle.parameters(), torch.optim.AdamW, lr=1e-2)
    DistributedDataParallel(handle.model)(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
    found["divided state"] = refusal(handle.step)
    found["wrapped"] = refusal(lambda: fastft.attach(DistributedDataParallel(llama()), METHODS["lift"]()))
    wrapper = DistributedDataParallel(llama())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fastft.attach(wrapper.module, METHODS["lift"]())
    found["around"] = " ".join(str(one.message) for one in told)
    handle = attach("mask")
    for layer in handle.model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    found["sharded"] = refusal(handle.optimizer)
    return found


def refusal(call):
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)


OTHER_WEIGHTS = "momentum", "lift"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What `job(rank)` gave in each of two processes."""
    return results(tmp_path_factory.mktemp("ranks"), job)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_both_processes_hold_the_same(ranks, method, accumulate):
    one, other = (rank[method, accumulate] for rank in ranks)
    for kind in ("entries", "deltas", "weights"):
        assert one[kind].keys() == other[kind].keys()
        assert all(torch.equal(value, other[kind][name]) for name, value in one[kind].items()), kind
    assert one["history"] == other["history"]
    if method != "mask":
        assert sum(choice["changed"] for choice in one["history"]) > 0
    counts = {name: len(entries) for name, entries in one["entries"].items()}
    assert counts == {name: count.entries for name, count in attach(method).method.counts.items()}


# Which candidates SpIEL-AG considers follows from one micro-batch, of one process or of rank 0.
@pytest.mark.parametrize("method", [method for method in METHODS if method != "accumulated"])
def test_two_processes_are_one(ranks, method):
    handle = attach(method)
    alone = outcome(handle, train(handle, handle.model, ROWS))
    for accumulate in (False, True):
        one, other = (rank[method, accumulate] for rank in ranks)
        assert [(a + b) / 2 for a, b in zip(one["losses"], other["losses"])] == pytest.approx(alone["losses"], rel=1e-3)
        same = sum(int(torch.isin(one["entries"][name], flat).sum()) for name, flat in alone["entries"].items())
        assert same >= 0.98 * sum(map(len, alone["entries"].values()))  # of nearly equal scores rounding decides


def test_sharded_weights_are_refused_with_what_to_use_instead(ranks):
    for rank in ranks:
        assert "DTensor" in rank["sharded"] and "use DistributedDataParallel" in rank["sharded"]


@pytest.mark.parametrize("method", OTHER_WEIGHTS)
def test_ranks_that_attached_to_other_weights_train_rank_0s(ranks, method):
    """As heads have that are new: DistributedDataParallel sends rank 0's, and what is kept as pristine follows."""
    one, other = (rank[method, "own weights"] for rank in ranks)
    for kind in ("entries", "deltas", "weights"):
        assert all(torch.equal(value, other[kind][name]) for name, value in one[kind].items()), kind


def test_what_would_train_ranks_apart_is_said(ranks):
    for rank in ranks:
        assert "ZeroRedundancyOptimizer divides the optimizer's state" in rank["divided state"]
        assert "wrapped in DistributedDataParallel already" in rank["wrapped"] and "then wrap it" in rank["wrapped"]
        assert "a DistributedDataParallel is around this model already" in rank["around"]
