"""The optimizers of entries: SM3 against its formula, ages, bfloat16 moments and their state_dict."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastft
from tests.methods.sparse_net import NAMES, Net, attached, held, inputs, loss_of, masks, train

F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize("stands", [True, False])
def test_sm3_is_its_formula(decay, stands):
    net, handle = attached("mask")
    if not stands:
        handle.unmerge()
    base, given, lr, eps = Net(), masks(Net()), 0.05, 1e-8
    optimizer = fastft.SparseSM3(
        list(handle.parameters()), {o.delta: (handle.targets[n], "default") for n, o in held(handle).items()}, lr=lr,
        eps=eps, weight_decay=decay,
    )  # fmt: skip
    deltas = {n: torch.zeros_like(base.get_submodule(n).weight).double() for n in NAMES}
    rows = {n: d.new_zeros(d.shape[0], 1) for n, d in deltas.items()}
    columns = {n: d.new_zeros(1, d.shape[1]) for n, d in deltas.items()}
    for step in range(5):
        twin = copy.deepcopy(base)
        for name, delta in deltas.items():
            twin.get_submodule(name).weight.data += delta.float()
        loss_of(twin, inputs(step)).backward()
        for name, delta in deltas.items():
            mask, g = given[name], twin.get_submodule(name).weight.grad.double()
            bound = torch.minimum(rows[name], columns[name]) + g**2
            delta.copy_(torch.where(mask, (1 - lr * decay) * delta - lr * g / (bound + eps).sqrt(), 0))
            bound = torch.where(mask, bound, 0)
            rows[name] = torch.maximum(rows[name], bound.amax(1, keepdim=True))
            columns[name] = torch.maximum(columns[name], bound.amax(0, keepdim=True))
        train(net, handle, 1, optimizer, start=step)
        for name, one in held(handle).items():
            torch.testing.assert_close(one.delta.double(), deltas[name][given[name]], rtol=1e-3, atol=1e-5)
            state = optimizer.state[one.delta]
            torch.testing.assert_close(state["row_max"].double(), rows[name].flatten(), rtol=1e-3, atol=1e-9)
            torch.testing.assert_close(state["column_max"].double(), columns[name].flatten(), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("moments", [F32, BF16])
def test_ages_and_moments_survive_a_state_dict(moments):
    """Also through PyTorch's cast of all state to the parameter's dtype."""
    net, handle = attached("accumulated")
    optimizer = train(net, handle, 4, moment_dtype=moments)
    kept = copy.deepcopy(optimizer.state_dict())
    other = handle.optimizer(moment_dtype=moments)
    other.load_state_dict(kept)
    for parameter in handle.parameters():
        state, theirs = optimizer.state[parameter], other.state[parameter]
        assert state["age"].dtype == torch.int32 and state["exp_avg"].dtype == state["exp_avg_sq"].dtype == moments
        assert state["age"].max() == 4, "advances for every dtype of the moments"
        for key, value in state.items():
            assert theirs[key].dtype == value.dtype and torch.equal(theirs[key], value), key


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_states_of_optimizers_with_other_options_are_refused(option):
    handle = attached("mask")[1]
    other = torch.optim.AdamW(handle.parameters(), **{option: True})
    with pytest.raises(ValueError, match=f"{option}, which SparseAdamW has not"):
        handle.optimizer().load_state_dict(other.state_dict())


@pytest.mark.parametrize("optimizer", [fastft.SliceAdamW, fastft.SparseAdamW, fastft.SparseSM3])
def test_full_copies_in_float16_stay_numbers(optimizer):
    """Where the gradient is 0, as of tokens that an embedding did not meet, and eps alone is left below the line."""
    whole, half = torch.ones(4), torch.ones(4, dtype=torch.float16)
    for parameter in (whole, half):
        parameter.grad = torch.tensor([0.0, 0.25, -0.5, 1.0]).to(parameter.dtype)
        optimizer([parameter], {}, lr=0.125, eps=1e-8).step()
    torch.testing.assert_close(half.float(), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("optimizer", [fastft.SliceAdamW, fastft.SparseAdamW, fastft.SparseSM3])
def test_a_learning_rate_may_be_a_tensor(optimizer):
    """As schedules under torch.compile make it: for full copies too."""
    results = []
    for lr in (0.125, torch.tensor(0.125)):
        parameter = torch.nn.Parameter(torch.ones(4))
        parameter.grad = torch.tensor([0.0, 0.25, -0.5, 1.0])
        optimizer([parameter], {}, lr=lr).step()
        results.append(parameter.detach())
    assert torch.equal(*results)


def test_steps_of_fake_and_of_real_tensors_share_no_table():
    module = SimpleNamespace(_parts={"default"}, update_site=lambda name: None, standing=lambda: [])
    for mode in (FakeTensorMode(), nullcontext(), FakeTensorMode()):
        with mode:
            parameter = torch.nn.Parameter(torch.zeros(4))
            parameter.grad = torch.ones(4)
            fastft.SparseAdamW([parameter], {parameter: (module, "default")}, lr=0.125, betas=(0.25, 0.5)).step()


def test_second_moments_of_bfloat16_decay():
    _, handle = attached("mask")
    optimizer = handle.optimizer(lr=1e-3, moment_dtype=BF16)
    for scale, count in ((1.0, 1), (0.0, 300)):
        for _ in range(count):
            for parameter in handle.parameters():
                parameter.grad = torch.full_like(parameter, scale)
            optimizer.step()
    for parameter in handle.parameters():
        got = optimizer.state[parameter]["exp_avg_sq"].float().mean() / 1e-3
        assert 0.6 < got < 0.9, "0.999³⁰⁰ = 0.74; rounded to nearest it would stay at 1"


def test_bytes_an_entry():
    for kind, most in (("accumulated", 28), ("lift", 24)):
        net, handle = attached(kind)
        optimizer = train(net, handle, 3)
        loss_of(net, inputs(3)).backward()
        for module in handle.targets.values():
            one = module.sparse["default"]
            by_entry = [one.delta, one.delta.grad, one.columns, module._pristine_part[: len(one.entries)]]
            state = optimizer.state[one.delta].values()
            held_bytes = sum(t.numel() * t.element_size() for t in (*by_entry, *(s for s in state if s.dim())))
            assert held_bytes <= most * len(one.entries)
            assert one.candidates is None or len(one.candidates) == len(one.entries)
