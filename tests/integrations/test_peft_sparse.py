"""Accelerated SHiRA and Super-Tuning layers compute what PEFT's compute, and never a dense delta or gradient."""

import copy
import threading

import pytest
import torch
from torch import nn

import fastft
from tests.golden import assert_close
from tests.methods.models import llama, tokens

peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
TARGETS = {"target_modules": ["0", "2"], "init_weights": False}
KINDS = {
    "shira": lambda **options: peft.ShiraConfig(r=2, **{**TARGETS, **options}),
    "super": lambda **options: peft.SupertuningConfig(sparsity=0.9, **{**TARGETS, **options}),
    "supra": lambda **options: peft.SupertuningConfig(sparsity=0.9, r=3, lora_alpha=4, **{**TARGETS, **options}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def model(kind, dtype=F32):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 40)).to(dtype)
    torch.manual_seed(1)
    return peft.get_peft_model(base, KINDS[kind]())


def accelerated(kind, dtype=F32, **options):
    return fastft.accelerate(model(kind, dtype), **options)


def x(dtype=F32, seed=2):
    return torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(lin, x):
    """Output and gradients of one layer."""
    lin.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    y = lin(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in lin.named_parameters() if p.grad is not None}}


def layer(m):
    return m.base_model.model[0]


@pytest.mark.parametrize("dtype", [F32, BF16])
@each_kind
def test_outputs_and_gradients_are_pefts(kind, dtype):
    plain, fast = model(kind, dtype), accelerated(kind, dtype, strict=True)
    with torch.no_grad():  # rounded, so that the float64 model has the values that PEFT computes with
        for p, q in zip(plain.parameters(), fast.parameters()):
            p.copy_(p.to(dtype))
            q.copy_(p)
    wide = copy.deepcopy(plain).double()
    want, theirs = run(layer(wide), x(dtype).double()), run(layer(plain), x(dtype))
    with fastft.testing.record() as calls:
        ours = run(layer(fast), x(dtype))
    assert {"add_sparse_product_", "sampled_product_"} <= {call.op for call in calls}
    assert {call.backend for call in calls} == {"cpu"}
    for parameter in wide.parameters():
        parameter.data.abs_()
    sizes = run(layer(wide), x(dtype).double().abs())
    assert ours.keys() == theirs.keys() == want.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert_close(value, want[name], theirs[name], sizes[name].abs() + 1, name)
    assert [row.path for row in fastft.report(fast)] == ["fused", "fused"]


@pytest.mark.parametrize("kind", ["super", "supra"])
def test_super_tuning_rounds_its_values_to_the_bases_dtype(kind):
    lin = layer(accelerated(kind, BF16))
    values = lin.supertuning_values["default"]
    with torch.no_grad():
        y = lin(x(BF16))
        values.mul_(1 + 2**-10)  # less than a rounding
        assert values.dtype is F32 and torch.equal(lin(x(BF16)), y)


@each_kind
def test_everything_else_stays_pefts(kind):
    plain, fast = model(kind), accelerated(kind, strict=True)
    state = {key: value.clone() for key, value in fast.state_dict().items()}
    want = plain(x())
    got = fast(x())
    torch.testing.assert_close(got, want)
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, fast.state_dict()[key]) for key, value in state.items()), "nothing stands in the weights"
    assert torch.equal(copy.deepcopy(fast)(x()), got)
    with fast.disable_adapter(), plain.disable_adapter():
        assert torch.equal(fast(x()), plain(x()))
    merged = copy.deepcopy(fast)
    merged.merge_adapter()
    torch.testing.assert_close(merged(x()), want, rtol=1e-4, atol=1e-4)
    assert type(layer(fast)).__name__ == type(layer(plain)).__name__
    fastft.restore(fast)
    assert type(layer(fast)) is type(layer(plain)) and torch.equal(fast(x()), plain(x()))
    assert [row.reason for row in fastft.report(fast)] == ["not accelerated: call fastft.accelerate"] * 2


@pytest.mark.parametrize("kind", ["shira", "super"])
def test_several_adapters_and_other_indices(kind):
    plain, fast = model(kind), accelerated(kind, strict=True)
    for m in (plain, fast):
        torch.manual_seed(3)
        m.add_adapter("two", KINDS[kind]())
        m.base_model.set_adapter(["default", "two"])
    torch.testing.assert_close(fast(x()), plain(x()))
    for m in (plain, fast):  # PEFT replaces tensors as it likes; a change in place counts as well
        held = layer(m).shira_indices if kind == "shira" else layer(m).supertuning_indices
        index = held["default"]
        index[..., :2] = index[..., :2].flip(-1)
        held["two"] = held["two"].flip(-1)
    torch.testing.assert_close(fast(x()), plain(x()))


@each_kind
def test_training_lowers_the_loss_and_checks_itself(kind):
    fast = model(kind)

    def loss(m):
        return m(x()).square().mean()

    fastft.accelerate(fast, strict=True, check=loss)
    optimizer = torch.optim.AdamW([p for p in fast.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(loss(fast))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@each_kind
def test_the_check_knows_how_these_layers_round(kind):
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"], "init_weights": False}
    base = llama(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)
    whole = peft.get_peft_model(base, KINDS[kind](**targets))
    fastft.accelerate(whole, check={"input_ids": tokens(4, 16), "labels": tokens(4, 16)})


@pytest.mark.parametrize("kind", ["shira", "super"])
def test_adapters_that_are_added_later(kind):
    torch.manual_seed(0)
    fast = peft.get_peft_model(nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 40)), KINDS[kind](target_modules=["0"]))
    fastft.accelerate(fast, strict=True)
    fast.add_adapter("later", KINDS[kind](target_modules=["1"], init_weights=False))
    fast.set_adapter("later")
    plain = fastft.restore(copy.deepcopy(fast))
    torch.testing.assert_close(fast(x()), plain(x()))
    assert [row.path for row in fastft.report(fast)] == ["peft", "fused"]
    fast.base_model.model[1].base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(fastft.integrations.peft.FallbackError, match="strict=True forbids"):
        fast(x())


@each_kind
def test_a_first_forward_in_inference_mode_is_no_obstacle_to_training(kind):
    plain, fast = model(kind), accelerated(kind, strict=True)
    with torch.inference_mode():
        fast(x())
    torch.testing.assert_close(run(layer(fast), x()), run(layer(plain), x()))


@each_kind
def test_nothing_dense_is_kept(kind):
    fast, sizes = accelerated(kind, strict=True), []
    weights = {p.data_ptr() for p in fast.parameters()}

    def note(t):
        if t.data_ptr() not in weights:
            sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        layer(fast)(x().requires_grad_())
    assert max(sizes) < 32 * 48  # the weight's


@each_kind
def test_other_paths_say_why(kind):
    fast = accelerated(kind)
    layer(fast).base_layer.register_forward_hook(lambda *_: None)
    fast(x())
    row = fastft.report(fast)[next(n for n, m in fast.named_modules() if m is layer(fast))]
    assert row.path == "peft" and "hooked" in row.reason and row.calls["peft"] == 1
    fastft.accelerate(fast, strict=True)
    with pytest.raises(fastft.integrations.peft.FallbackError, match="strict=True forbids"):
        fast(x())


def test_two_threads():
    fast = accelerated("shira", strict=True)
    want, wrong = fast(x()).detach(), []

    def call():
        for _ in range(200):
            with torch.no_grad():
                if not torch.equal(fast(x()), want):
                    wrong.append(1)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="SHiRA or Super-Tuning"):
        fastft.accelerate(nn.Linear(3, 4))
