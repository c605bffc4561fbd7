"""S²FT on two processes: DistributedDataParallel gives the bits of one adapter on both; fully_shard is refused by name."""

from contextlib import nullcontext

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastft
from tests.methods.models import llama, tokens

from .processes import results

RATIOS = {"down_ratio": 0.2, "o_ratio": 0.5, "up_ratio": 0.1, "v_ratio": 0.5}
SELECTS = ("random", "activation")
ROWS = tokens(rows=4, length=9)


def attach(select, seed=0, layers=2):
    model = llama(num_key_value_heads=2, num_hidden_layers=layers)
    calibration = [{"input_ids": tokens(rows=3, seed=1)}] if select == "activation" else None
    return fastft.attach(model, fastft.S2FT(**RATIOS, select=select, calibration=calibration, seed=seed))


def train(handle, model, rows, accumulate=False):
    """Three updates with clipped gradients. The losses of `rows` before each of them and afterwards."""
    optimizer, losses = handle.optimizer(lr=1e-2, weight_decay=0.1), []
    parts = rows.chunk(2) if accumulate else (rows,)
    for _ in range(3):
        losses.append(0.0)
        for i, part in enumerate(parts):
            with model.no_sync() if i + 1 < len(parts) else nullcontext():
                loss = model(input_ids=part, labels=part).loss / len(parts)
                loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(handle.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        handle.step()
    with torch.no_grad():
        return [*losses, model(input_ids=rows, labels=rows).loss.item()]


def outcome(handle, losses):
    return {
        "losses": losses,
        "units": {name: module.slice_units["default"] for name, module in handle.targets.items()},
        "deltas": {name: value.detach() for name, value in handle.named_parameters()},
        "weights": {name: value.detach() for name, value in handle.model.named_parameters() if "slice_" not in name},
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What `job(rank)` gave in each of two processes."""
    return results(tmp_path_factory.mktemp("ranks"), job)


def job(rank):
    rows, found = ROWS.chunk(2)[rank], {}
    for select in SELECTS:
        for accumulate in (False, True):
            handle = attach(select)
            model = DistributedDataParallel(handle.model)
            found[select, accumulate] = outcome(handle, train(handle, model, rows, accumulate))
    handle = attach("random", seed=rank, layers=1)  # with more layers the counts differ, and DDP says so
    found["own seeds"] = outcome(handle, train(handle, DistributedDataParallel(handle.model), rows))
    found["sharded"] = {name: refusal(use) for name, use in SHARDED.items()}
    return found


def shard(model):
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


def step_of_another(handle):
    optimizer = torch.optim.AdamW(handle.parameters())
    handle.model(input_ids=ROWS, labels=ROWS).loss.backward()
    optimizer.step()


# What is done after fully_shard
SHARDED = {
    "optimizer": lambda handle: handle.optimizer(),
    "another optimizer": step_of_another,
    "state_dict": lambda handle: handle.model.state_dict(),
    "set_active": lambda handle: handle.set_active(False),
}


def refusal(use):
    handle = attach("random")
    shard(handle.model)
    try:
        use(handle)
    except RuntimeError as error:
        return str(error)


def test_two_processes_are_one(ranks):
    fresh = dict(llama(num_key_value_heads=2).named_parameters())
    for select in SELECTS:
        handle = attach(select)
        alone = outcome(handle, train(handle, handle.model, ROWS))
        for accumulate in (False, True):
            one, other = (rank[select, accumulate] for rank in ranks)
            for kind in ("units", "deltas", "weights"):
                assert one[kind].keys() == other[kind].keys() == alone[kind].keys()
                assert all(torch.equal(value, other[kind][name]) for name, value in one[kind].items()), (select, kind)
            assert all(torch.equal(value, alone["units"][name]) for name, value in one["units"].items())
            mean = [(a + b) / 2 for a, b in zip(one["losses"], other["losses"])]
            assert mean == pytest.approx(alone["losses"], rel=1e-6)
            assert mean[-1] < mean[0] - 0.01
            for name, value in one["deltas"].items():
                torch.testing.assert_close(value, alone["deltas"][name], rtol=1e-3, atol=1e-5)
            for name, value in one["weights"].items():
                changed = (value != fresh[name]).nonzero()
                module = handle.targets.get(name.removesuffix(".weight"))
                if module is None or name.endswith("bias"):
                    assert not len(changed), name
                else:
                    part = module.part_of("default")
                    assert changed[:, part.dim()].unique().tolist() == part.index.tolist(), name


def test_ranks_that_chose_differently_train_rank_0s_units(ranks):
    alone = attach("random", layers=1)
    losses = train(alone, alone.model, ROWS)
    one, other = (rank["own seeds"] for rank in ranks)
    for kind in ("units", "deltas", "weights"):
        assert all(torch.equal(value, other[kind][name]) for name, value in one[kind].items()), kind
    assert all(torch.equal(value, outcome(alone, losses)["units"][name]) for name, value in other["units"].items())
    assert [(a + b) / 2 for a, b in zip(one["losses"], other["losses"])] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("use", SHARDED)
def test_sharded_weights_are_refused_with_what_to_use_instead(ranks, use):
    for rank in ranks:
        message = rank["sharded"][use]
        assert message is not None and "DTensor" in message and "use DistributedDataParallel" in message
