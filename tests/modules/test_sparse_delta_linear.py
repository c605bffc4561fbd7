"""`SparseDeltaLinear`: trained entries stand in the weight, whoever trains them; `state_dict` shows the pretrained one."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

import fastft

F32, BF16 = torch.float32, torch.bfloat16
N, K = 30, 40
OPTIMIZERS = {
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
}


def chosen():
    return torch.rand(N, K, generator=torch.Generator().manual_seed(1)) < 0.2


def layer(dtype=F32, **options):
    torch.manual_seed(0)
    return fastft.SparseDeltaLinear.from_linear(nn.Linear(K, N, dtype=dtype), **(options or {"mask": chosen()}))


def batch(dtype=F32, seed=0):
    return torch.randn(3, 5, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_delta(weight, delta):
    weight = weight.clone()
    weight[chosen()] = (weight[chosen()].to(delta.dtype) + delta).to(weight.dtype)
    return weight


def step(layer, optimizer, seed):
    layer(batch(layer.weight.dtype, seed)).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_any_optimizer_trains_the_entries_and_no_others(dtype, optimizer):
    one = layer(dtype)
    pretrained, optimizer = one.weight.detach().clone(), OPTIMIZERS[optimizer](one.parameters())
    assert [p is one.delta for p in one.parameters() if p.requires_grad] == [True]
    for seed in range(4):
        step(one, optimizer, seed)
        before = one.delta.detach().clone()
        x = batch(dtype, 9)
        want = F.linear(x, with_delta(pretrained, before), one.bias)
        assert torch.equal(one(x), want)
        with torch.no_grad():
            assert torch.equal(one(x), want)
    assert before.dtype == F32 and (before != 0).float().mean() > 0.9
    assert torch.equal(one.state_dict()["weight"], pretrained)
    one.restore()
    assert torch.equal(one.weight, pretrained)


def test_gradients_are_the_full_ones_at_the_entries():
    one, x = layer(), batch().requires_grad_()
    full = one.weight.detach().clone().requires_grad_()
    y, plain = one(x), F.linear(x, full, one.bias)
    dy = torch.randn_like(y)
    dx, delta = torch.autograd.grad(y, (x, one.delta), dy)
    want_x, want_w = torch.autograd.grad(plain, (x, full), dy)
    assert torch.equal(dx, want_x)
    torch.testing.assert_close(delta, want_w[chosen()], rtol=1e-5, atol=1e-5)


def test_indices_are_row_major_positions_in_any_order():
    index = chosen().flatten().nonzero().flatten()
    one = layer(indices=index.flip(0))
    assert torch.equal(one.entries.mask(), chosen()) and f"entries={len(index)}" in repr(one)


def test_copies_files_and_casts():
    one = layer()
    optimizer = torch.optim.AdamW([one.delta], lr=1e-2)
    for seed in range(3):
        step(one, optimizer, seed)
    x, pretrained = batch(), layer().weight
    want = one(x)
    twin = copy.deepcopy(one)
    assert torch.equal(twin(x), want) and twin.delta is not one.delta
    file = io.BytesIO()
    torch.save(one, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), want)
    loaded = fastft.SparseDeltaLinear(K, N, mask=chosen())
    loaded(x)
    loaded.load_state_dict(one.state_dict())
    assert torch.equal(loaded(x), want)
    other = fastft.SparseDeltaLinear(K, N, indices=torch.arange(int(chosen().sum())))
    other.load_state_dict(one.state_dict())  # entries come with the values
    assert torch.equal(other(x), want)
    delta = one.delta.detach().clone()
    one.to(BF16)
    assert one.delta.dtype == F32 and torch.equal(one.delta, delta)
    assert torch.equal(one.state_dict()["weight"], pretrained.to(BF16))
    assert torch.equal(one(x.to(BF16)), F.linear(x.to(BF16), with_delta(pretrained.to(BF16), delta), one.bias))


def test_the_delta_is_written_into_no_other_tensor():
    one, x = layer(), batch()
    with torch.no_grad():
        one.delta.add_(1.0)
    want, state = one(x), one.state_dict()
    with pytest.raises(RuntimeError, match=r"the weight is a Tensor .*give functional_call the delta alone"):
        functional_call(one, state, (x,))
    assert torch.equal(state["weight"], layer().weight)
    torch.testing.assert_close(functional_call(one, {"delta": torch.zeros_like(one.delta)}, (x,)), layer()(x))
    one.load_state_dict(state)
    assert torch.equal(one(x), want)
    parametrizations.weight_norm(one)
    with pytest.raises(RuntimeError, match="pruning and parametrizations"):
        one(x)


@pytest.mark.parametrize("inference", [False, True])
def test_each_new_delta_is_used(inference):
    """Also where it gets the id of the one before."""
    one, x, pretrained = layer(), batch(), layer().weight
    for _ in range(20):
        with torch.inference_mode(inference):
            fresh = torch.randn(len(one.entries))
            got = functional_call(one, {"delta": fresh}, (x,))
        assert torch.equal(got, F.linear(x, with_delta(pretrained, fresh), one.bias))
        del fresh
    assert torch.equal(one(x), layer()(x))


def test_swapped_tensors():
    """PyTorch refuses to swap tensors that a weak reference knows."""
    one, x = layer(), batch()
    nn.init.normal_(one.delta)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with torch.no_grad():
            want, state = one(x), one.state_dict()
            for dtype in (BF16, F32):
                one.to(dtype)(x.to(dtype))
        one.load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(one(x), want)


CHANGES = {
    "in place": lambda module, weight: module.weight.copy_(weight),
    "replaced": lambda module, weight: setattr(module, "weight", nn.Parameter(weight.clone(), requires_grad=False)),
    "data": lambda module, weight: setattr(module.weight, "data", weight.clone()),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_another_base_after_the_first_forward(change):
    one, x, base = layer(), batch(), torch.randn(N, K)
    one(x)
    CHANGES[change](one, base)
    assert torch.equal(one(x), F.linear(x, base, one.bias)) and torch.equal(one.state_dict()["weight"], base)
    one.delta.add_(1)
    want = one(x)
    assert torch.equal(want, F.linear(x, with_delta(base, one.delta), one.bias))
    CHANGES[change](one, one.weight.clone())  # the same values
    assert torch.equal(one(x), want)
    old = one.weight.clone()
    CHANGES[change](one, torch.randn(N, K))
    for use in (lambda: one(x), one.state_dict, one.restore):
        with pytest.raises(RuntimeError, match=r"by something else while a trained delta stands in it.*restore\(\)"):
            use()
    CHANGES[change](one, old)
    one.restore()
    CHANGES[change](one, base + 1)
    assert torch.equal(one(x), F.linear(x, with_delta(base + 1, one.delta), one.bias))
    CHANGES[change](one, torch.randn(N, K))
    one.load_state_dict({"weight": base}, strict=False)
    assert torch.equal(one(x), want)


@torch.no_grad()
def test_all_parameters_written_at_once_are_no_other_base():
    """As averages of models and DistributedDataParallel do."""
    one, other, x = layer(), layer(), batch()
    one.delta.add_(1)
    want = one(x)
    other(x)
    for _ in range(2):
        for mine, its in zip(other.parameters(), one.parameters()):
            mine.copy_(its)
        assert torch.equal(other(x), want) and torch.equal(other.state_dict()["weight"], layer().weight)
        one.delta.add_(1)
        want = one(x)


def test_wrong_arguments_say_what_is_wrong():
    for message, options in (
        ("either mask or indices", {}),
        ("either mask or indices", {"mask": chosen(), "indices": [0]}),
        (r"torch.bool \[30, 40\]", {"mask": chosen().t()}),
        (r"torch.bool \[30, 40\]", {"mask": chosen().float()}),
        ("entry 1200 is out of range", {"indices": [3, 1200]}),
        ("entry 3 is given twice", {"indices": [3, 1, 3]}),
        ("must be integers", {"indices": [1.5]}),
        ("must be integers", {"indices": [True, False]}),
    ):
        with pytest.raises(ValueError, match=message):
            fastft.SparseDeltaLinear(K, N, **options)
