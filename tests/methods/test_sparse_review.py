"""Entries in the corners: schedules that end early, odd weights, odd settings of PyTorch, states that don't fit."""

import pytest
import torch
from torch import nn

import fastft
from fastft.methods import SftFile, processes, spiel
from fastft.methods.targets import match
from fastft.ops.entries import Entries
from fastft.ops.sparse_linear import sparse_linear

from .sparse_net import Net, assert_same_bits, attached, bits, held, inputs, loss_of, train


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


def test_ranks_agree_on_candidates_where_a_module_is_not_used_by_all(monkeypatch):
    """Two nets take turns as ranks 0 and 1; rank 0 uses the module from the second update on, rank 1 in the first alone."""
    nets = [attached("accumulated", reselection_steps=8, selection_accumulation_steps=6) for _ in range(2)]
    ranks, now, sent = [held(handle)["a"] for _, handle in nets], 0, []

    def from_first(*tensors):
        for tensor in tensors:
            sent.append(tensor.clone()) if now == 0 else tensor.copy_(sent.pop(0))

    monkeypatch.setattr(spiel, "several", lambda: True)
    monkeypatch.setattr(spiel, "rank", lambda: now)
    monkeypatch.setattr(spiel, "from_first", from_first)
    monkeypatch.setattr(spiel, "mean", lambda tensor: None)
    for update, used in enumerate(((1,), (0,), (0,))):
        for now in range(2):
            if now in used:
                loss_of(nets[now][0], inputs(update)).backward()
            spiel.see_update(ranks[now])
            assert (ranks[now].candidates is not None) == (update > 0)
            assert ranks[now].observed == (update == 2)
        assert not sent
    assert torch.equal(ranks[0].candidate_columns, ranks[1].candidate_columns)
    assert ranks[0].candidate_sum.any() and not ranks[1].candidate_sum.any()


def test_what_is_on_the_cpu_is_sent_by_way_of_the_gpu_where_it_must(monkeypatch):
    sent, ours = [], torch.zeros(2)
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, source: sent.append(tensor.add_(1)))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self.clone())
    for backends, copied in (("cpu:gloo,cuda:nccl", False), ("cuda:nccl", True), ("cpu:gloo,cuda:gloo", False)):
        monkeypatch.setattr(torch.distributed, "get_backend_config", lambda names=backends: names)
        before = ours.clone()
        processes.from_first(ours)
        assert torch.equal(ours, before + 1) and (sent.pop() is not ours) == copied


def test_a_state_with_another_number_of_entries_leaves_everything_as_it_is():
    net, handle = attached("mask")
    train(net, handle, 2)
    before, other = bits(net), attached("mask", net=Net(seed=1), share=0.3)[0]
    own = {name: value for name, value in other.state_dict().items() if "sparse" in name}
    with pytest.raises(RuntimeError, match="entries in the checkpoint"):
        net.load_state_dict(own, strict=False)
    assert_same_bits(bits(net), before)


@pytest.mark.parametrize("kind, steps", [("accumulated", 1), ("lift", 5)])
def test_a_state_without_what_came_while_training_is_refused(kind, steps):
    """torch.distributed.checkpoint reads what the state dict of a model just attached names, and that is not all."""
    net, handle = attached(kind)
    train(net, handle, steps)
    fresh = attached(kind)[0]
    before, saved = bits(fresh), net.state_dict()
    own = [name for name in before if name.startswith("a.sparse")]
    assert saved.keys() > fresh.state_dict().keys()
    with pytest.raises(RuntimeError, match="0 entries were read, but .* saved"):
        fresh.load_state_dict({name: saved[name] for name in fresh.state_dict()})
    after = bits(fresh)
    assert_same_bits({name: before[name] for name in own}, {name: after[name] for name in after if name in own})
    fresh.load_state_dict(saved)
    assert_same_bits(bits(fresh), bits(net))


def test_a_layer_is_used_twice_while_gradients_accumulate():
    torch.manual_seed(0)
    linear, x = nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    layer = fastft.SparseDeltaLinear.from_linear(linear, mask=torch.rand(8, 8) < 0.3)
    for count in (1, 2):
        layer(layer(x)).sum().backward()
        if count == 1:
            once = layer.delta.grad.clone()
    torch.testing.assert_close(layer.delta.grad, 2 * once)


@pytest.mark.parametrize("kind", ["accumulated", "lift"])
def test_pytorchs_default_dtype_decides_nothing(kind):
    found = []
    for default in (torch.float32, torch.bfloat16):
        net, batches = Net(), [inputs(step) for step in range(3)]
        try:
            torch.set_default_dtype(default)
            handle = attached(kind, net=net)[1]
            optimizer = handle.optimizer(lr=0.05)
            for x in batches:
                net(x).square().mean().backward()
                optimizer.step(), optimizer.zero_grad(), handle.step()
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(optimizer.state[one.delta]["step"].dtype == torch.float32 for one in held(handle).values())
        found.append(bits(net))
    assert_same_bits(*found)


def test_optimizers_with_8_bit_states_are_refused_at_the_first_choice():
    net, handle = attached("accumulated")
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    train(net, handle, 1, optimizer)
    for one in held(handle).values():
        optimizer.state[one.delta]["state1"] = torch.zeros_like(one.delta, dtype=torch.uint8)
    before = {name: one.entries.mask() for name, one in held(handle).items()}
    with pytest.raises(RuntimeError, match="moment_dtype"):
        train(net, handle, 1, optimizer, start=1)
    assert all(torch.equal(one.entries.mask(), before[name]) for name, one in held(handle).items())


def test_nothing_is_collected_for_an_adapter_that_does_not_train():
    net, handle = attached("accumulated")
    for parameter in handle.parameters():
        parameter.requires_grad_(False)
    loss_of(net, inputs(0).requires_grad_()).backward()
    assert all(one.candidates is None for one in held(handle).values())


def test_entries_of_a_spiel_file_are_of_the_named_module_alone():
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "inner": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    one = SftFile.from_config({"peft_type": "SFT", "num_deltas": {"q": 3}})
    assert list(match(model, one).targets) == ["q"]


@pytest.mark.parametrize("kind", ["accumulated", "lift"])
def test_distributed_data_parallel_leaves_buffers_alone_that_come_with_a_resumed_state(kind):
    net, handle = attached(kind)
    train(net, handle, 5 if kind == "accumulated" else 2)
    resumed, again = attached(kind)
    resumed.load_state_dict(net.state_dict())
    names = {name for name, _ in resumed.named_buffers() if ".sparse." in name}
    assert any("candidate" in name or "kept" in name for name in names)
    assert names <= set(resumed._ddp_params_and_buffers_to_ignore)
    again.detach()
    assert not hasattr(resumed, "_ddp_params_and_buffers_to_ignore")


@pytest.mark.parametrize("stored_by_inputs", [False, True])
def test_a_weight_that_trains_beside_its_entries_gets_a_gradient(stored_by_inputs):
    x, weight = torch.randn(3, 4), torch.randn((4, 6) if stored_by_inputs else (6, 4), requires_grad=True)
    entries, delta = Entries.of_flat(torch.tensor([1, 5]), weight.shape), torch.zeros(2, requires_grad=True)
    y = sparse_linear(x, weight, None, entries, delta, fan_in_fan_out=stored_by_inputs)
    want = torch.autograd.grad((x @ (weight if stored_by_inputs else weight.t())).square().sum(), weight)[0]
    found = torch.autograd.grad(y.square().sum(), (weight, delta))
    torch.testing.assert_close(found[0], want)
    torch.testing.assert_close(found[1], want.flatten()[[1, 5]])
