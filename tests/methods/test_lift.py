"""LIFT: which entries it chooses, and what those that stop training keep."""

import copy

import pytest
import torch

import fastft
from fastft.modules.sparse import SparseEntries
from fastft.ops.entries import Entries

from .sparse_net import NAMES, Net, assert_same_bits, attached, bits, chosen, deltas, dense, held, train


def svd_mask(weight, rank, count):
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    scores = ((u[:, :rank] * s[:rank]) @ v[:rank]).abs().flatten()
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.topk(count).indices] = True
    return mask.view(weight.shape)


def test_chooses_what_an_svd_does():
    net, handle = attached("lift")
    first = chosen(handle)
    for name in NAMES:
        weight = Net().get_submodule(name).weight.detach()
        assert torch.equal(first[name], svd_mask(weight, 2, sum(weight.shape))), name
    optimizer = train(net, handle, 3)
    for step in (3, 5):
        train(net, handle, 1, optimizer, start=step)
        for name, mask in chosen(handle).items():
            weight = net.get_submodule(name).weight.detach()
            assert torch.equal(mask, svd_mask(weight, 2, sum(weight.shape))), f"{name}: of the weight as it stands"
        train(net, handle, 1, optimizer, start=step + 1)
    assert [h["update"] for h in handle.method.history] == [2, 4, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stops_training_stays(dtype, tmp_path):
    net, handle = attached("lift", dtype, update_interval=1)
    base, ever = Net(dtype), {name: mask.clone() for name, mask in chosen(handle).items()}
    optimizer, returned = handle.optimizer(lr=0.1), 0
    for step in range(8):
        before = chosen(handle), {n: net.get_submodule(n).weight.detach().clone() for n in NAMES}, deltas(handle)
        kept = {n: o.kept.mask() if o.kept is not None else torch.zeros_like(ever[n]) for n, o in held(handle).items()}
        states = {n: {k: v.clone() for k, v in optimizer.state[o.delta].items()} for n, o in held(handle).items()}
        train(net, handle, 1, optimizer, start=step)
        for name, one in held(handle).items():
            mask, weight = one.entries.mask(), net.get_submodule(name).weight
            assert len(one.entries) == sum(weight.shape)
            assert torch.equal(weight[~before[0][name]], before[1][name][~before[0][name]]), "what did not train: its bits"
            back = kept[name] & mask
            returned += int(back.sum())
            assert torch.equal(dense(one.entries, one.delta)[back], before[2][name][back]), "goes on from what it had"
            ever[name] |= mask
            untouched = ~ever[name]
            assert torch.equal(weight[untouched], base.get_submodule(name).weight[untouched])
            state = optimizer.state[one.delta]
            new = mask & ~before[0][name]
            for key in ("exp_avg", "exp_avg_sq"):
                assert not dense(one.entries, state[key])[new].any(), "new entries start at 0"
                assert state[key].any()
            assert state["step"] == step + 1 and states is not None
    assert returned, "entries have come back"
    weights = {name: net.get_submodule(name).weight.detach().clone() for name in NAMES}
    handle.unmerge()
    for name in NAMES:
        assert torch.equal(net.get_submodule(name).weight, base.get_submodule(name).weight)
    handle.merge()
    handle.save(tmp_path)
    other = Net(dtype)
    fastft.load(other, tmp_path)
    plain = copy.deepcopy(net)
    fastft.methods.handles(plain)["default"].merge_and_unload()
    for name, weight in weights.items():
        for model in (net, other, plain):
            assert torch.equal(model.get_submodule(name).weight, weight), name


def test_moments_of_what_stays_are_kept():
    net, handle = attached("lift")
    optimizer = train(net, handle, 1)
    torch.manual_seed(0)
    for parameter in handle.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    before = {
        n: (o.entries.mask(), {k: dense(o.entries, v) for k, v in optimizer.state[o.delta].items() if v.dim()})
        for n, o in held(handle).items()
    }
    handle.step()
    for name, one in held(handle).items():
        both = one.entries.mask() & before[name][0]
        assert 0 < both.sum() < len(one.entries)
        for key, value in before[name][1].items():
            assert torch.equal(dense(one.entries, optimizer.state[one.delta][key])[both], value[both])


def test_how_many_are_of_the_first():
    net, handle = attached("lift", update_interval=1)
    first, optimizer = chosen(handle), handle.optimizer(lr=0.1)
    for step in range(6):
        train(net, handle, 1, optimizer, start=step)
        overlap = sum(int((first[name] & mask).sum()) for name, mask in chosen(handle).items())
        assert handle.method.history[-1]["overlap_with_first"] == overlap


def test_first_entries_that_come_back_are_known_without_having_learnt():
    one, two = (Entries.of_flat(torch.tensor(index), (2, 3)) for index in ([0, 1], [1, 4]))
    entries = SparseEntries(one.copy(), torch.zeros(2))
    entries.all_first()
    for new, count in ((two, 1), (one, 2)):
        entries.succeed(new)
        assert entries.of_first() == count


def test_a_choice_that_fails_changes_nothing():
    net, handle = attached("lift", update_interval=1)
    optimizer = train(net, handle, 1)
    with torch.no_grad():
        net.c.weight.flatten()[(~chosen(handle)["c"]).flatten().nonzero()[0]] = float("nan")
    for parameter in handle.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    before = bits(net.a), bits(net.b)
    with pytest.raises(FloatingPointError, match="the weight of 'c' holds NaN .*earlier checkpoint"):
        handle.step()
    for one, two in zip(before, (bits(net.a), bits(net.b))):
        assert_same_bits(one, two)


def test_a_density_of_no_entry_at_all_is_refused():
    with pytest.raises(ValueError, match="density=1e-09 of each weight is no entry in any module, so nothing would train"):
        fastft.attach(Net(), fastft.LIFT(density=1e-9))


def test_budgets_may_be_nothing():
    net = Net()
    net.tiny = torch.nn.Linear(2, 2)
    handle = fastft.attach(net, fastft.LIFT(density=0.1, filter_rank=2, update_interval=1, target_modules=[*NAMES, "tiny"]))
    assert len(held(handle)["tiny"].entries) == 0
    train(net, handle, 2)
    assert [len(held(handle)[n].entries) for n in NAMES] == [24, 32, 16]
