"""Layers of which parts train, and who else changes their tensors: deltas made anew, swaps, fused optimizers, casts."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

import fastft
from tests.methods.models import randomize
from tests.modules.replicas import replica
from tests.modules.test_sparse_delta_linear import CHANGES

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x):
        return self.down_proj(torch.tanh(self.gate_proj(x)) * self.up_proj(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = MLP()

    def forward(self, x):
        return x + self.mlp(x)


def net(merged=True, dtype=F32, seed=0):
    """One slice, of down_proj."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    handle = fastft.attach(model, fastft.S2FT(down_ratio=0.25, o_ratio=0, seed=seed))
    if not merged:
        handle.unmerge()
    return model, handle, torch.randn(5, 12).to(dtype)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("merged, dtype", [(True, F32), (False, F32), (False, BF16)])
def test_each_new_delta_is_used(merged, dtype, inference):
    """Also where it gets the id of the one before."""
    model, handle, x = net(merged, dtype)
    ((name, delta),) = handle.named_parameters()
    twin = copy.deepcopy(model)
    own = twin.get_parameter(name)
    for _ in range(20):
        with torch.inference_mode(inference):
            fresh = torch.randn(delta.shape)
            got = functional_call(model, {name: fresh}, (x,))
        with torch.no_grad():
            own.copy_(fresh)
            assert torch.equal(got, twin(x))
        del fresh
    with torch.no_grad():
        own.copy_(delta)
        assert torch.equal(model(x), twin(x))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("merged", [True, False])
def test_forward_mode_is_refused(merged, gradients):
    """Its tangents would end in our kernels without a word."""
    model, handle, x = net(merged)
    ((name, delta),) = handle.named_parameters()

    def output(delta):
        return functional_call(model, {name: delta}, (x,))

    with torch.set_grad_enabled(gradients), pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(output, (delta.detach(),), (torch.ones_like(delta),))


@pytest.mark.parametrize("merged", [True, False])
def test_swapped_tensors(merged):
    """PyTorch refuses to swap tensors that a weak reference knows."""
    model, handle, x = net(merged)
    randomize(handle)
    with torch.no_grad():
        want, state = model(x), model.state_dict()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for dtype in (BF16, F16, BF16):
            model.to(dtype)
            with torch.no_grad():
                model(x.to(dtype))
        model.to(F32).load_state_dict(state)
        with torch.no_grad():
            assert torch.equal(model(x), want)
        model.load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(model(x), want)


def test_evaluation_beside_the_weight_follows_fused_optimizers():
    """Which count no change; also where no handle sees their step, as long as the gradient is there."""
    model, handle, x = net(merged=False, dtype=BF16)
    (delta,) = handle.parameters()
    optimizer = torch.optim.SGD([delta], lr=1.0, fused=True)
    with torch.no_grad():
        seen = [model(x)]
    for hidden in (False, True):
        model(x).float().square().sum().backward()
        if hidden:
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(delta):
                delta.add_(1)
        else:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            seen.append(model(x))
        assert torch.equal(seen[-1], model(x)) and not torch.equal(seen[-1], seen[-2])
    optimizer.zero_grad()
    delta.data.add_(1)
    handle.refresh()
    with torch.no_grad():
        assert not torch.equal(model(x), seen[-1])


@pytest.mark.parametrize("base, other", [(F16, BF16), (BF16, F16)])
def test_evaluation_beside_the_weight_in_another_dtype(base, other):
    model, handle, x = net(merged=False, dtype=base)
    randomize(handle)

    def check(x):
        want = model(x)
        with torch.no_grad():
            assert torch.equal(model(x), want)

    check(x)
    with torch.autocast("cpu", other):
        check(x)
    check(x)
    model.to(other)
    check(x.to(other))


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("method", [fastft.S2FT(down_ratio=0.25, o_ratio=0), fastft.SpIEL(density=0.1, total_steps=9)])
@pytest.mark.parametrize("cast", [lambda m: m.to(BF16), lambda m: m.bfloat16()])
def test_a_cast_to_the_dtype_that_a_model_has_leaves_deltas_as_they_are(cast, method, merged):
    model = Net().to(BF16)
    handle = fastft.attach(model, method)
    if not merged:
        handle.unmerge()
    randomize(handle)
    x = torch.randn(5, 12, dtype=BF16)
    with torch.no_grad():
        before, want = [p.clone() for p in handle.parameters()], model(x)
        for _ in range(2):
            cast(model)
            assert torch.equal(model(x), want)
            for found, value in zip(handle.parameters(), before, strict=True):
                assert found.dtype == F32 and torch.equal(found, value)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("method", [fastft.S2FT(down_ratio=0.25, o_ratio=0), fastft.SpIEL(density=0.1, total_steps=9)])
def test_data_parallel_is_refused_by_name(method, gradients, merged):
    """Before anything changes that the replicas share with the model."""
    model = Net()
    handle = fastft.attach(model, method)
    if not merged:
        handle.unmerge()
    x = torch.randn(5, 12)
    want = model(x)
    with torch.set_grad_enabled(gradients), pytest.raises(RuntimeError, match=r"nn\.DataParallel.*torchrun.*CUDA_VISIBLE"):
        replica(model)(x)
    assert torch.equal(model(x), want)
    handle.detach()


def full(layer, delta):
    """The slice's delta in the shape of the weight."""
    part = layer.part_of("default")
    return torch.zeros_like(layer.weight).index_add_(part.dim(False), part.index, delta.detach())


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_another_base_after_attaching(change, ours):
    model, handle, x = net()
    layer, (delta,), base = model.mlp.down_proj, handle.parameters(), torch.randn(12, 24)
    optimizer = handle.optimizer(lr=0.1) if ours else torch.optim.AdamW([delta], lr=0.1)

    def step():
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    with torch.no_grad():
        CHANGES[change](layer, base)
    for _ in range(2):
        step()
        assert torch.equal(layer.weight, base + full(layer, delta))
    with torch.no_grad():
        want = model(x)
        CHANGES[change](layer, layer.weight.clone())  # the same values
        assert torch.equal(model(x), want)
        CHANGES[change](layer, base + 1)
    for use in (lambda: model(x), model.state_dict, handle.detach, lambda: layer.to(BF16)):
        with pytest.raises(RuntimeError, match=r"by something else while a trained delta stands in it.*unmerge\(\)"):
            use()
    model.load_state_dict({"mlp.down_proj.weight": base}, strict=False)
    assert torch.equal(model(x), want)
    handle.unmerge()
    with torch.no_grad():
        CHANGES[change](layer, base + 1)
    handle.merge()
    assert torch.equal(layer.weight, base + 1 + full(layer, delta))
    handle.detach()
    assert torch.equal(layer.weight, base + 1)


def test_our_optimizer_asks_before_it_writes():
    model, handle, x = net()
    optimizer = handle.optimizer(lr=0.1)
    for _ in range(2):
        model(x).square().sum().backward()
        if next(handle.parameters()).any():
            with torch.no_grad():
                model.mlp.down_proj.weight.add_(1)
            with pytest.raises(RuntimeError, match="written by something else"):
                optimizer.step()
            return
        optimizer.step()


@pytest.mark.parametrize("writer", ["ours", "torch", "unmerge", "merge"])
@pytest.mark.parametrize("method", [fastft.S2FT(down_ratio=0.25), fastft.SpIEL(density=0.1, total_steps=9)])
def test_backward_through_weights_that_were_written_since_is_refused(method, writer):
    model = Net()
    handle = fastft.attach(model, method)
    randomize(handle)
    if writer == "merge":
        handle.unmerge()
    optimizer = handle.optimizer(lr=0.1) if writer == "ours" else torch.optim.AdamW(handle.parameters(), lr=0.1)
    x = torch.randn(5, 12, requires_grad=True)
    before = model(x).sum()
    model(x).sum().backward()
    if writer in ("ours", "torch"):
        optimizer.step()
    else:
        getattr(handle, writer)()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.backward()


@torch.no_grad()
def test_all_parameters_written_at_once_are_no_other_base():
    """As averages of models and DistributedDataParallel do; a copy, and one that was attached by itself."""
    model, handle, x = net()
    base, others = model.state_dict()["mlp.down_proj.weight"].clone(), [copy.deepcopy(model), net()[0]]
    for _ in range(2):
        randomize(handle)
        want = model(x)
        for other in others:
            other(x)
            for mine, its in zip(other.parameters(), model.parameters(), strict=True):
                mine.copy_(its)
            assert torch.equal(other(x), want) and torch.equal(other.state_dict()["mlp.down_proj.weight"], base)
        for parameter in handle.parameters():
            parameter.mul_(2)


@torch.no_grad()
def test_indices_that_are_written_over():
    """DistributedDataParallel sends rank 0's, with the deltas, the weights and what these were before."""
    (model, handle, x), (first, its, _) = net(), net(seed=1)
    base = first.state_dict()["mlp.down_proj.weight"].clone()
    randomize(its)
    want = first(x)
    model(x)
    tensors = [[*m.parameters(), *m.buffers()] for m in (model, first)]
    for mine, sent in zip(*tensors, strict=True):
        mine.copy_(sent)
    assert torch.equal(model(x), want)
    for own in (handle, its):
        next(own.parameters()).mul_(2)
    assert torch.equal(model(x), first(x))
    handle.detach()
    assert torch.equal(model.mlp.down_proj.weight, base)


def test_moves_leave_what_is_seen():
    """A base that comes after a move is still the base, and no second write is needed."""
    model, handle, x = net()
    model.to("cpu").share_memory()
    version = model.mlp.down_proj.weight._version
    with torch.no_grad():
        model(x)
        assert model.mlp.down_proj.weight._version == version
        model.mlp.down_proj.weight.fill_(1)
        next(handle.parameters()).add_(1)
        model(x)
    handle.detach()
    assert torch.equal(model.mlp.down_proj.weight, torch.ones(12, 24))
