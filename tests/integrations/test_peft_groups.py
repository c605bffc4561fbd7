"""Accelerated layers of PEFT that read one input share the read of it: the numbers stay PEFT's, whatever the model does."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import fastft
from tests.integrations.peft_models import accelerated, assert_same_step, peft, peft_llama, randomize, step
from tests.methods.models import tokens

LAYERS = 2


def counts(model, **options):
    """How often each op ran in a training step."""
    with fastft.testing.record() as calls:
        step(model, **options)
    ops = [call.op for call in calls]
    return {op: ops.count(f"lora_{op}") for op in ("shrink", "expand_", "grad_sb", "grad_a", "grad_x_")}


def groups(model):
    found = {id(m._fastft.group): m._fastft.group for m in model.modules() if hasattr(m, "lora_A") and m._fastft.group}
    return list(found.values())


def members(group):
    return [known() for known in group.members]


def test_q_k_and_v_and_gate_and_up_share():
    plain = peft_llama()
    fast = accelerated(plain)
    assert sorted(len(group.members) for group in groups(fast)) == sorted([3, 2] * LAYERS)
    assert_same_step(step(fast), step(plain))
    each, shared = 7 * LAYERS, 4 * LAYERS
    found = counts(fast)
    assert found["shrink"] == found["grad_a"] == shared and found["expand_"] == found["grad_sb"] == each
    assert shared - 1 <= found["grad_x_"] <= shared  # the first layer's input needs no gradient if embeddings don't
    assert all(group.reason is None for group in groups(fast))


def test_dropout_is_that_of_layers_apart():
    plain = peft_llama(lora_dropout=0.3).train()
    fast, apart = accelerated(plain), accelerated(plain)
    for module in apart.modules():
        if hasattr(module, "lora_A"):
            module._fastft.group = None
    torch.manual_seed(4)
    got = step(fast)
    torch.manual_seed(4)
    assert_same_step(got, step(apart))
    assert counts(fast)["shrink"] == 4 * LAYERS < counts(apart)["shrink"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    plain = peft_llama(lora_dropout=0.3).train()
    fast, kept = accelerated(plain), accelerated(plain)
    for model in (fast, kept):
        model.enable_input_require_grads()
    fast.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for _ in range(2):
        torch.manual_seed(4)
        got = step(fast)
        torch.manual_seed(4)
        assert_same_step(got, step(kept))
    assert all(group.reason is None for group in groups(fast))


@pytest.mark.parametrize("change", ["another adapter", "disabled", "merged", "dropout", "hook", "frozen A", "a dtype"])
def test_members_that_differ(change):
    plain = peft_llama(("default", "b")).train()
    fast = accelerated(plain)
    for model in (plain, fast):
        attention = model.base_model.model.model.layers[1].self_attn
        q, k = attention.q_proj, attention.k_proj
        if change == "another adapter":  # which k does not have
            q.set_adapter("b")
        elif change == "disabled":
            k.enable_adapters(False)
        elif change == "merged":
            k.merge()
        elif change == "dropout":
            k.lora_dropout["default"] = nn.Dropout(0.0).eval()
        elif change == "hook":
            k.lora_A["default"].register_forward_hook(lambda module, args, out: out * 2)
        elif change == "frozen A":
            k.lora_A["default"].weight.requires_grad_(False)
        elif change == "a dtype":
            k.lora_A["default"].double()
            k.lora_B["default"].double()
    assert_same_step(step(fast), step(plain))
    assert_same_step(step(fast), step(plain))


def test_another_adapter_for_all():
    plain = peft_llama()
    plain.add_adapter("b", peft.LoraConfig(r=3, target_modules="all-linear"))
    randomize(plain)
    fast = accelerated(plain)
    for name in ("b", "default"):
        for model in (plain, fast):
            model.set_adapter(name)
        assert_same_step(step(fast), step(plain))
        assert counts(fast)["shrink"] == 4 * LAYERS


class Crossed(nn.Module):
    """Queries of one sequence, keys and values of another."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x, y):
        return self.q_proj(x).sin() + self.k_proj(y).cos() * self.v_proj(y)


def test_a_wrong_guess_is_dropped():
    torch.manual_seed(0)
    plain = peft.inject_adapter_in_model(
        peft.LoraConfig(r=3, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False), Crossed()
    )
    fast = fastft.accelerate(copy.deepcopy(plain))
    x, y = torch.randn(5, 12), torch.randn(5, 12)
    (group,) = groups(fast)
    for _ in range(2):
        found = []
        for model in (plain, fast):
            model.zero_grad(set_to_none=True)
            out = model(x, y)
            out.square().sum().backward()
            found.append((out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        assert_same_step(found[1], found[0])
    assert "did not follow q_proj" in group.reason


def test_adapters_that_come_later_copies_and_undoing():
    plain = peft_llama(target_modules=["q_proj", "up_proj"])
    fast = accelerated(plain)
    assert not groups(fast)
    for model in (plain, fast):
        torch.manual_seed(5)
        model.add_adapter("later", peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
        randomize(model).set_adapter("later")
    (first, *_) = kept = groups(fast)
    assert [len(group.members) for group in kept] == [2] * LAYERS
    assert_same_step(step(fast), step(plain))
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        own = groups(other)
        assert [group.names for group in own] == [group.names for group in kept] and own[0] is not first
        assert_same_step(step(other), step(plain))  # in which the copies' members join
        assert all(member in list(other.modules()) for member in members(own[0]))
        assert counts(other)["shrink"] == LAYERS  # of q and v; this adapter is on nothing else
    fastft.accelerate(fast)
    assert [id(group) for group in groups(fast)] == [id(group) for group in kept]
    fastft.restore(fast)
    assert not any(hasattr(module, "_fastft") for module in fast.modules())


def test_without_gradients():
    plain = peft_llama().eval()
    fast = accelerated(plain)
    for many in (tokens().repeat(4, 1), tokens()[:1]):
        with torch.no_grad():
            with fastft.testing.record() as calls:
                got = fast(input_ids=many).logits
            torch.testing.assert_close(got, plain(input_ids=many).logits)
        few = many.numel() <= 32  # then one read of x by q, k and v, or gate and up, saves nothing
        assert sum(call.op == "lora_shrink" for call in calls) == (0 if few else 2 * LAYERS)
        assert sum(call.op == "lora_add_" for call in calls) == (7 if few else 2) * LAYERS
        with torch.inference_mode():
            torch.testing.assert_close(fast(input_ids=many).logits, got)


def test_parts_of_a_model_that_are_restored_and_accelerated_again():
    plain = peft_llama()
    fast = accelerated(plain)
    attention = fast.base_model.model.model.layers[0].self_attn
    fastft.restore(attention.v_proj)
    assert_same_step(step(fast), step(plain))
    fastft.accelerate(fast)
    assert_same_step(step(fast), step(plain))
    assert counts(fast)["shrink"] == 4 * LAYERS
    with torch.no_grad():
        attention.q_proj(torch.randn(33, attention.q_proj.in_features))  # and no others
    step(fast)
    assert counts(fast)["shrink"] > 4 * LAYERS
    assert "alone: " in fastft.report(fast)[attention.q_proj._fastft.name].reason
    fastft.accelerate(fast)
    assert counts(fast)["shrink"] == 4 * LAYERS
    assert not fastft.report(fast)[attention.q_proj._fastft.name].reason
    attention.k_proj = attention.k_proj.base_layer
    attention.v_proj = attention.v_proj.base_layer
    fastft.accelerate(fast)
    assert attention.q_proj._fastft.group is None


def test_without_groups():
    plain = peft_llama()
    fast = fastft.accelerate(copy.deepcopy(plain), group_projections=False)
    fast.add_adapter("later", peft.LoraConfig(r=3, target_modules=["q_proj", "k_proj"]))
    assert not groups(fast)
    assert_same_step(step(fast), step(plain))
    attention = fast.base_model.model.model.layers[0].self_attn
    x = torch.randn(3, attention.q_proj.in_features)
    q, k = attention.q_proj(x), attention.k_proj(x)
    q.sum().backward(), k.sum().backward()  # one by one


def test_layers_do_not_keep_each_other_alive():
    fast = accelerated(peft_llama())
    step(fast)
    layer = fast.base_model.model.model.layers[0].self_attn.q_proj
    size = len(pickle.dumps(layer))
    assert size < 1.5 * len(pickle.dumps(fastft.restore(copy.deepcopy(layer))))
    kept = weakref.ref(layer)
    gc.collect()
    gc.disable()
    try:
        del layer
        fast.unload()
        assert kept() is None
    finally:
        gc.enable()


def test_a_round_ends_with_the_forward():
    """Or who comes late, in another forward on the same buffer, would take what its first contents gave."""

    class Alternating(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, name):
            return self.get_submodule(name)(x)

    plain = randomize(peft.get_peft_model(Alternating(), peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"])))
    fast = accelerated(plain)
    for m in (plain, fast):
        buffer = torch.ones(2, 8)
        with torch.no_grad():
            m(buffer, "q_proj")
            buffer.numpy()[:] = 5  # counts no version
            found = m(buffer, "k_proj")
        if m is plain:
            want = found
    torch.testing.assert_close(found, want)
