"""Adapters of entries over several runs of training: begun anew, gone on with, gone back to, and broken off."""

import warnings
from types import SimpleNamespace

import pytest
import torch

import fastft
from fastft.methods.calibration import visit_gradients

from .models import llama, tokens
from .sparse_net import NAMES, Net, assert_same_bits, attached, bits, chosen, held, inputs, loss_of, train

SHORT = {"total_steps": 10}  # choices after updates 2, 6, 10


def updates(handle):
    return [h["update"] for h in handle.method.history]


@pytest.mark.parametrize("kind", ["accumulated", "momentum"])
def test_another_run_chooses_as_the_first_did(kind, tmp_path):
    net, handle = attached(kind, **SHORT)
    train(net, handle, 10)
    assert updates(handle) == [2, 6, 10]
    handle.save(tmp_path)
    with pytest.warns(UserWarning, match=r"SpIEL's run of 10 updates is over.*handle.new_run\(total_steps=...\)"):
        train(net, handle, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net, handle, 3)  # said once
    again = Net()
    handle = fastft.load(again, tmp_path)
    handle.new_run(total_steps=14)
    train(again, handle, 7)
    assert updates(handle) == [2, 6] and handle.method.history[1]["changed"] > 0
    handle.save(tmp_path)
    third = Net()
    resumed = fastft.load(third, tmp_path)  # the run's new length is in its file
    train(third, resumed, 7, start=7)
    assert updates(resumed) == [2, 6, 10, 14]


def test_another_run_of_lift():
    net, handle = attached("lift")
    train(net, handle, 3)
    handle.new_run()
    train(net, handle, 2)
    assert updates(handle) == [2] and all(one.updates == 2 for one in held(handle).values())


def test_a_trainer_begins_another_run_but_not_where_it_resumes():
    net, handle = attached("accumulated", **SHORT)
    callback = handle.callback()
    begin = lambda **state: callback.on_train_begin(SimpleNamespace(), SimpleNamespace(**state), None)  # noqa: E731
    begin(max_steps=12, global_step=0)
    assert handle.method.total_steps == 10  # what was asked for
    train(net, handle, 7)
    begin(max_steps=12, global_step=7)
    assert updates(handle) == [2, 6] and handle.method.total_steps == 10
    begin(max_steps=12, global_step=0)
    train(net, handle, 11)
    assert updates(handle) == [2, 6, 10]
    handle.new_run()
    handle.total_steps = None
    with pytest.raises(RuntimeError, match=r"handle.new_run\(total_steps=...\)"):
        train(net, handle, 1)


IN_PLACE = [fastft.S2FT(down_ratio=0.25), fastft.SpIEL(density=0.1, total_steps=9), fastft.LIFT(density=0.1)]


@pytest.mark.parametrize("method", [*IN_PLACE, fastft.LoRA(r=2)], ids=lambda method: type(method).__name__)
def test_a_trainer_with_deepspeed_or_data_parallel_is_refused_where_weights_train_in_place(method):
    model = llama()
    callback = fastft.attach(model, method).callback()

    def begin(**arguments):
        state = SimpleNamespace(max_steps=9, global_step=0)
        callback.on_train_begin(SimpleNamespace(**arguments), state, None, model=model)

    begin(n_gpu=1, deepspeed=None, deepspeed_plugin=None)
    refused = (
        (
            {"deepspeed": "zero1.json"},
            "DeepSpeed .* the weights would not follow adapter 'default'.*DistributedDataParallel",
        ),
        ({"deepspeed_plugin": object()}, "DeepSpeed"),
        ({"n_gpu": 2}, r"nn.DataParallel.*torchrun.*args\._n_gpu = 1"),
    )
    for arguments, words in refused:
        if isinstance(method, fastft.LoRA):
            begin(**arguments)
        else:
            with pytest.raises(RuntimeError, match=words):
                begin(**arguments)
    model.is_loaded_in_4bit = True  # then Trainer makes no replicas
    begin(n_gpu=2)


@pytest.mark.parametrize("method", IN_PLACE, ids=lambda method: type(method).__name__)
def test_updates_that_no_optimizer_or_count_tells_of_are_warned_of(method):
    """As DeepSpeed's, whose optimizers hold one flat tensor, of which the parameters are views."""
    model = llama()
    handle = fastft.attach(model, method)
    flat = torch.cat([p.detach().flatten() for p in handle.parameters()])
    for p, piece in zip(handle.parameters(), flat.split([p.numel() for p in handle.parameters()]), strict=True):
        p.data = piece.view_as(p)
    handle.refresh()
    optimizer = torch.optim.SGD([flat], lr=0.1)

    def step(scale):
        model(tokens(), labels=tokens()).loss.backward()
        flat.grad = scale * torch.cat([p.grad.flatten() for p in handle.parameters()])
        optimizer.step()
        model.zero_grad()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(0.0)
        handle.step()
    step(1.0)
    with pytest.warns(UserWarning, match="values of adapter 'default' have changed.*weights.* don't follow"):
        handle.step()
    before = model(tokens()).logits
    handle.refresh()
    assert not torch.equal(model(tokens()).logits, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.step()


def test_new_runs_are_nothing_to_lora():
    handle = fastft.attach(net := Net(), fastft.LoRA(r=2, target_modules=NAMES))
    before = bits(net)
    handle.new_run(total_steps=3)
    assert_same_bits(bits(net), before)


def test_going_back_from_the_end_of_a_run_chooses_the_same_again(tmp_path):
    net, handle = attached("accumulated", total_steps=6)
    handle.save(tmp_path)
    train(net, handle, 6)
    assert all(one.observer is None for one in held(handle).values())
    found, history = chosen(handle), list(handle.method.history)
    handle.restore(tmp_path)
    train(net, handle, 6)
    assert handle.method.history == history and all(torch.equal(mask, found[name]) for name, mask in chosen(handle).items())


@pytest.mark.parametrize("leave", ["merge_and_unload", "detach"])
def test_an_optimizer_says_that_its_adapter_is_gone(leave):
    net, handle = attached("lift")
    optimizer = handle.optimizer(lr=0.01)
    loss_of(net, inputs(0)).backward()
    getattr(handle, leave)()
    with pytest.raises(RuntimeError, match="adapter 'default' is no longer on the model"):
        optimizer.step()


@pytest.mark.parametrize("option", ["foreach", "differentiable", "fused"])
def test_one_way_of_adamw_is_taken(option):
    handle = fastft.attach(Net(), fastft.LoRA(r=2, target_modules=NAMES))
    assert handle.optimizer(lr=0.01, **{option: True}).param_groups[0][option]
    assert handle.optimizer().param_groups[0]["fused"]


def test_scores_by_gradients_beside_a_trained_part_warn_of_nothing():
    net, handle = attached("lift")
    train(net, handle, 1)

    class WithLoss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return loss_of(self.net, x)

    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        visit_gradients(WithLoss(), ["net.a"], [(inputs(0),)], lambda name, grad: found.append(grad))
    assert found[0].shape == net.a.weight.shape


@pytest.mark.parametrize(("kind", "rate"), [("accumulated", 1e-4), ("momentum", 1e-3), ("lift", 1e-4)])
def test_learning_rates_by_default(kind, rate):
    _, handle = attached(kind)
    assert handle.optimizer().param_groups[0]["lr"] == rate and handle.optimizer(lr=0.5).param_groups[0]["lr"] == 0.5
