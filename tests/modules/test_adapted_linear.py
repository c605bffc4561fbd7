"""Adapted linears under what else PyTorch does to modules: casts, inference mode, parametrizations, functional_call."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

import fastft
from tests.methods.models import randomize
from tests.methods.sparse_net import attached, inputs, loss_of
from tests.modules.replicas import replica

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def net(method=fastft.LoRA, dtype=F32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)
    handle = fastft.attach(model, method(**{"r": 2, "target_modules": ["0", "2"], **options}))
    randomize(handle)
    return model, handle, torch.randn(3, 6, dtype=dtype)


@pytest.mark.parametrize("use_dora", [False, True])
def test_what_was_merged_in_inference_mode_is_loaded_and_unmerged_outside(use_dora):
    model, handle, x = net(use_dora=use_dora)
    want = model(x)
    with torch.inference_mode():
        handle.merge()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    torch.testing.assert_close(model(x), want)
    handle.unmerge()
    torch.testing.assert_close(model(x), want)
    assert not any(t.is_inference() for t in model.state_dict().values())


def test_a_layer_merged_in_inference_mode_shows_its_weight_outside():
    layer = fastft.LoRALinear(4, 3, lora_bias=True)
    with torch.inference_mode():
        layer.merge()
    assert not any(t.is_inference() for t in layer.state_dict().values())


@pytest.mark.parametrize("swap", [False, True])
def test_a_cast_leaves_magnitudes_wide(swap):
    model, _, x = net(use_dora=True)
    layer = fastft.LoRALinear(6, 4, use_dora=True)
    with torch.no_grad():  # norms are kept from here on
        model(x), layer(x)
    before = [p.detach().clone() for m in (model[0], layer) for p in _magnitudes(m)]
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for dtype, wide in ((BF16, F32), (F32, F32), (F16, F32), (F64, F64), (BF16, F32)):
            for module, held in ((model, model[0]), (layer, layer)):
                module.to(dtype)
                assert held.weight.dtype == dtype and [p.dtype for p in _magnitudes(held)] == [wide]
                if dtype != F64:  # which has no kernels
                    module(x.to(dtype)).sum().backward()
                    module.zero_grad()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for held, value in zip((model[0], layer), before, strict=True):
        assert torch.equal(*_magnitudes(held), value), "to the last bit"
    assert all(p.is_meta for m in (model.to("meta")[0], layer.to("meta")) for p in _magnitudes(m))


def _magnitudes(module):
    return [p for name, p in module.named_parameters() if "lora_magnitude" in name]


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.rnn, self.norm, self.head = nn.Linear(4, 4), nn.LSTM(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.norm(self.rnn(self.proj(x))[0]))


def tagger():
    """With copies that differ from what they replace."""
    torch.manual_seed(0)
    model = Tagger().eval()
    options = {"r": 2, "target_modules": ["proj"], "modules_to_save": ["rnn", "norm", "head"], "bias": "all"}
    handle = fastft.attach(model, fastft.LoRA(**options))
    randomize(handle)
    return model, handle, torch.randn(3, 4)


def test_replicas_of_data_parallel_use_and_train_the_copies():
    model, handle, x = tagger()
    with handle.disabled():
        base = model(x)
    want, copied = model(x), replica(model)
    found = copied(x)
    assert torch.equal(found, want) and not torch.allclose(want, base)
    names, parameters = zip(*handle.named_parameters())
    for name, one, two in zip(names, *(torch.autograd.grad(y.sum(), parameters) for y in (found, want)), strict=True):
        assert torch.equal(one, two), name
    with handle.disabled():
        assert torch.equal(copied(x), base)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_of_recurrent_layers(copied):
    """Their class leaves weak references out of the state."""
    model, handle, x = tagger()
    want = model(x)
    other = copied(model)
    assert torch.equal(other(x), want)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.zero_()
    assert torch.equal(other(x), want) and not torch.equal(model(x), want)
    fastft.methods.handles(other)["default"].detach()
    handle.detach()
    assert torch.equal(other(x), model(x)) and type(other.rnn) is nn.LSTM


@pytest.mark.parametrize("change", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_detaching_waits_until_a_parametrization_is_removed(change):
    model, handle, x = net()
    change(model[0])
    with pytest.raises(RuntimeError, match="remove_parametrizations"):
        handle.detach()
    want = model(x)
    torch.testing.assert_close(model(x), want)
    parametrize.remove_parametrizations(model[0], "weight")
    handle.detach()
    assert type(model[0]) is nn.Linear and model(x).shape == want.shape


@pytest.mark.parametrize("removed", [False, True])
def test_detaching_under_hooks_of_accelerate(removed):
    """They keep the forward that they found, and leave it on the module."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, handle, x = net()
    want = model(x)
    for layer in model:
        hooks.add_hook_to_module(layer, hooks.ModelHook())
    torch.testing.assert_close(model(x), want)
    if removed:
        hooks.remove_hook_from_submodules(model)
    handle.merge_and_unload()
    torch.testing.assert_close(model(x), want)


def test_no_layer_is_detached_where_one_of_them_can_not_be():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    handle = fastft.attach(model, fastft.LoRA(target_modules=["0", "1"]))
    kinds = [type(layer) for layer in model]
    parametrizations.weight_norm(model[1])
    for refused in (handle.detach, handle.merge_and_unload):
        with pytest.raises(RuntimeError, match="remove_parametrizations"):
            refused()
        assert handle.attached and type(model[0]) is kinds[0] and not handle.merged
    parametrize.remove_parametrizations(model[1], "weight")
    handle.detach()
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("kind", ["mask", "lift"])
@pytest.mark.parametrize("change", [lambda m: prune.l1_unstructured(m, "weight", 0.5), parametrizations.weight_norm])
def test_a_weight_that_is_computed_is_named_as_the_obstacle(kind, change):
    model, handle = attached(kind)
    change(model.a)
    with pytest.raises(RuntimeError, match="pruning and parametrizations"):
        handle.refresh()


def test_functional_call_on_parts():
    model, handle = attached("mask")
    want, x = loss_of(model, inputs(0)), inputs(0)
    moved = {name: (p + 0.1).detach() for name, p in handle.named_parameters()}
    with pytest.raises(RuntimeError, match="functional_call put it there"):
        functional_call(model, {**model.state_dict(), **moved}, (x,))
    changed = functional_call(model, moved, (x,))
    torch.testing.assert_close(loss_of(model, x), want)
    with torch.no_grad():
        for name, parameter in handle.named_parameters():
            parameter.copy_(moved[name])
    torch.testing.assert_close(model(x), changed)


@pytest.mark.parametrize("no_grad", [False, True])
def test_functional_call_with_the_base_alone_does_not_pass_over_the_delta(no_grad):
    model, handle = attached("mask")
    adapter = {name for name, _ in handle.named_parameters()}
    base = {name: value for name, value in model.state_dict().items() if name not in adapter}
    with torch.set_grad_enabled(not no_grad), pytest.raises(RuntimeError, match="functional_call put it there"):
        functional_call(model, base, (inputs(0),))


def test_functional_call_never_writes_into_what_is_kept():
    """With a merged LoRA beside, all of the weight is kept, and ``state_dict`` shows just that tensor."""
    model, handle = attached("mask")
    beside = fastft.attach(model, fastft.LoRA(r=2, target_modules=["a", "b"]), "beside")
    randomize(beside)
    beside.merge()
    want, before = model(inputs(0)), {name: value.clone() for name, value in model.state_dict().items()}
    moved = {name: (p + 0.1).detach() for name, p in handle.named_parameters()}
    with pytest.raises(RuntimeError, match="functional_call put it there"):
        functional_call(model, {**model.state_dict(), **moved}, (inputs(0),))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model(inputs(0)), want)


@pytest.mark.parametrize("copied", [lambda t: t, lambda t: t.clone(), lambda t: t.clone().requires_grad_()])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_functional_call_on_merged_layers(options, copied):
    model, handle, x = net(**options)
    handle.merge()
    want = model(x)
    state = {name: copied(value) for name, value in model.state_dict().items()}
    torch.testing.assert_close(functional_call(model, state, (x,)), want)
    own = {name: value.detach() for name, value in model.named_parameters()}
    assert torch.equal(functional_call(model, own, (x,)), want)
    moved = {**state, "0.weight": state["0.weight"].detach().clone().requires_grad_()}
    (grad,) = torch.autograd.grad(functional_call(model, moved, (x,)).sum(), moved["0.weight"])
    assert grad.any()
    handle.unmerge()
    torch.testing.assert_close(functional_call(model, state, (x,)), want)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_functional_call_on_a_merged_layer_of_its_own(options):
    layer, x = fastft.LoRALinear(6, 4, **options), torch.randn(3, 6)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    layer.merge()
    torch.testing.assert_close(functional_call(layer, layer.state_dict(), (x,)), layer(x))
    assert torch.equal(functional_call(layer, {name: p.detach() for name, p in layer.named_parameters()}, (x,)), layer(x))


def test_transforms_of_merged_weights():
    model, handle, x = net()
    handle.merge()
    merged = {name: value.detach() for name, value in model.named_parameters() if name.endswith("weight")}
    loss = lambda weights: functional_call(model, weights, (x,)).square().sum()  # noqa: E731
    with torch.no_grad():
        want = model(x).square().sum()
    grads, value = torch.func.grad_and_value(loss)(merged)
    torch.testing.assert_close(value, want)
    assert all(grad.any() for grad in grads.values())
    with pytest.raises(RuntimeError, match=r"unmerge\(\) it first"):
        torch.func.vmap(loss)({name: torch.stack([value] * 2) for name, value in merged.items()})


def test_an_unfrozen_weight_in_which_parts_train_is_warned_of():
    model, handle = attached("mask")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(model, inputs(0)).backward()
        model.a.weight.requires_grad_()
        with torch.no_grad():
            model(inputs(0))
        handle.unmerge()
        loss_of(model, inputs(0)).backward()  # nothing is written then
    handle.merge()
    with pytest.warns(UserWarning, match="requires_grad_") as found:
        model(inputs(0))
    assert len(found) == 1
