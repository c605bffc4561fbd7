"""Grouped models train, switch, merge and save as ungrouped ones do."""

import copy

import pytest
import torch
from torch import nn

import fastft
from fastft.methods import handles
from tests.ops.test_lora_linear import saved_bytes

from .models import assert_same, llama, logits, randomize, snapshot, tokens, transformers

X = tokens()
SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MODELS = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM"),
    "Qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "Mistral": ("MistralConfig", "MistralForCausalLM"),
    "Gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
}


def made(kind):
    config, model = (getattr(transformers, name) for name in MODELS[kind])
    torch.manual_seed(0)
    model = model(config(**SMALL, attn_implementation="eager"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def attach(model, name="default", seed=3, **options):
    torch.manual_seed(seed)
    handle = fastft.attach(model, fastft.LoRA(**{"r": 4, "target_modules": "all-linear", **options}), name)
    randomize(handle, seed)
    return handle


def pair(make=llama, **options):
    """A model with groups, and the same one without."""
    model, twin = make(), make()
    return (
        model,
        attach(model, **options),
        twin,
        attach(twin, **{**options, "group_projections": False, "pack_weights": False}),
    )


def train(model, batch=X):
    torch.manual_seed(5)
    out = model(batch, labels=batch)
    out.loss.backward()
    return out.loss.detach(), out.logits.detach()


def assert_gradients(handle, other, rtol=1e-4, atol=1e-6):
    for (name, one), two in zip(handle.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def ops(calls):
    names = [call.op.removeprefix("lora_") for call in calls]
    return {name: names.count(name) for name in set(names)}


def reads(calls):
    """How often activations are multiplied with A's."""
    return sum(call.op in ("lora_shrink", "lora_add_") for call in calls)


def many_logits(model):
    """Of so many tokens that one read of them for several adapters pays."""
    with torch.no_grad():
        return model(tokens(5)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_models_compute_what_they_compute_ungrouped(kind, dtype):
    model, handle, twin, apart = pair(lambda: made(kind).to(dtype))
    assert all(parameter.dtype == torch.float32 for parameter in handle.parameters())
    attention = [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkv"]
    mlp = [f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up")]
    assert sorted(state.members for state in handle.groups) == sorted(
        [tuple(attention[:3]), tuple(attention[3:]), tuple(mlp[:2]), tuple(mlp[2:])]
    )
    with fastft.testing.record() as calls:
        loss, out = train(model)
    # o and down run alone; the first layer's input needs no gradient.
    assert ops(calls) == {"shrink": 8, "expand_": 14, "grad_sb": 14, "grad_a": 8, "grad_x_": 7}
    expected_loss, expected = train(twin)
    exact = dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 if exact else 2e-2)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5 if exact else 1e-2, atol=0)
    # In bfloat16 dX is rounded after each projection either way, though in another order.
    assert_gradients(handle, apart, *((1e-4, 1e-6) if exact else (5e-2, 2e-2)))
    assert all(state.grouped for state in handle.groups)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_encoder_and_decoder_with_cross_attention(reentrant):
    """Wrong guesses, if there are any, survive gradient checkpointing."""

    def bart():
        torch.manual_seed(0)
        config = transformers.BartConfig(
            vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, dropout=0.0,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
        )  # fmt: skip
        return transformers.BartForConditionalGeneration(config)

    model, handle, twin, apart = pair(bart, target_modules=["q_proj", "k_proj", "v_proj"])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for _ in range(2):
        torch.testing.assert_close(train(model), train(twin), rtol=1e-5, atol=1e-5)
    assert_gradients(handle, apart)
    assert [len(state.members) for state in handle.groups if "encoder_attn" in state.members[0]] == [2, 2]
    assert all(state.grouped for state in handle.groups)


def test_memory_saved_for_backward():
    t, k, r = 64, 256, 8
    block = nn.Module()
    for name, n in (("q_proj", 128), ("k_proj", 32), ("v_proj", 64)):
        block.add_module(name, nn.Linear(k, n))
    members = list(block.children())
    for p in (0.0, 0.1):
        handle = fastft.attach(block, fastft.LoRA(r=r, lora_dropout=p, target_modules=["q_proj", "k_proj", "v_proj"]))
        x = torch.randn(t, k, requires_grad=True)
        fixed = [m.weight for m in members]
        size, _ = saved_bytes(lambda x=x: [m(x) for m in members], *fixed, *handle.parameters())
        assert size == 4 * t * k + 3 * (4 * t * r + (t * k // 8 if p else 0)), "x once, S of all, a mask of each"
        handle.detach()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_with_dropout(reentrant):
    model, handle, twin, apart = pair(lora_dropout=0.3)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    torch.testing.assert_close(train(model), train(twin), rtol=1e-5, atol=1e-5)
    assert_gradients(handle, apart)
    assert all(state.grouped for state in handle.groups)


def test_training_with_accumulation_and_clipping():
    model, handle, twin, apart = pair()
    norms = []
    for one, own in ((model, handle), (twin, apart)):
        optimizer = own.optimizer(lr=1e-2)
        for step in range(3):
            for part in (0, 1):
                (one(tokens(seed=2 * step + part), labels=tokens(seed=2 * step + part)).loss / 2).backward()
            norms.append(nn.utils.clip_grad_norm_(own.parameters(), 0.1))
            optimizer.step()
            own.step()
            optimizer.zero_grad()
    torch.testing.assert_close(norms[:3], norms[3:], rtol=1e-4, atol=1e-6)
    for one, two in zip(handle.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    assert all(state.grouped for state in handle.groups)


@pytest.mark.parametrize("pack", [False, True])
def test_switches_and_merging(pack):
    model, handle, twin, apart = pair(pack_weights=pack)

    def same(count):
        with fastft.testing.record() as calls:
            out = many_logits(model)
        torch.testing.assert_close(out, many_logits(twin), rtol=1e-5, atol=1e-5)
        assert reads(calls) == count

    same(8)
    second, other = (
        attach(m, "second", 7, target_modules=["q_proj", "v_proj"], group_projections=g)
        for m, g in ((model, True), (twin, False))
    )
    assert [len(state.members) for state in second.groups] == [2, 2]
    same(12)  # q, k and v alone, two adapters on q and v reading it once; gate and up together
    for own in (handle, apart):
        own.set_active(False)
    same(2)  # the second adapter's groups
    for own in (handle, apart):
        own.set_active(True)
    with second.disabled(), other.disabled():
        same(8)
    with handle.disabled(), apart.disabled():
        same(2)
    for own in (second, other):
        own.merge()
    same(12)  # with something merged into q and v, these and k run alone
    for own in (second, other):
        own.unmerge()
        own.detach()
    same(8)
    for own in (handle, apart):
        own.merge()
    same(0)
    for own in (handle, apart):
        own.unmerge()
    same(8)
    assert all(state.grouped and state.packed == pack for state in handle.groups)


@pytest.mark.parametrize("pack", [False, True])
def test_detaching_restores_everything(pack):
    model = llama()
    before = snapshot(model)
    handle = attach(model, pack_weights=pack)
    second = attach(model, "second", pack_weights=pack, target_modules=["q_proj", "k_proj", "v_proj", "up_proj"])
    train(model)
    second.merge()
    handle.detach()
    assert handle.groups == []
    logits(model)
    second.detach()
    assert_same(before, snapshot(model))
    storages = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(storages)) == len(storages) and all(
        p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in model.parameters()
    )


def test_state_dict_and_copies():
    model, handle, twin, apart = pair()
    assert_same(snapshot(model)[:1], snapshot(twin)[:1])
    logits(model)
    other = copy.deepcopy(model)
    own = handles(other)["default"]
    handle.detach()
    assert len(own.groups) == 4 and handle.groups == []
    torch.testing.assert_close(train(other), train(twin), rtol=1e-5, atol=1e-5)
    assert_gradients(own, apart)
    other.to(torch.bfloat16), twin.to(torch.bfloat16)
    torch.testing.assert_close(logits(other), logits(twin), rtol=1e-2, atol=2e-2)
    assert all(state.grouped for state in own.groups)


def test_loading_groups(tmp_path):
    model, handle, *_ = pair()
    handle.save(tmp_path)
    other = llama()
    loaded = fastft.load(other, tmp_path)
    assert [state.members for state in loaded.groups] == [state.members for state in handle.groups]
    with fastft.testing.record() as calls:
        out = many_logits(other)
    assert reads(calls) == 8 and torch.equal(out, many_logits(model))
    with fastft.testing.record() as calls:
        out = logits(other)
    assert reads(calls) == 14 and torch.equal(out, logits(model)), "few tokens are read by each"
    config = (tmp_path / "adapter_config.json").read_text()
    assert "group_projections" not in config and "pack_weights" not in config


def test_generation():
    model, _, twin, _ = pair()
    model.eval(), twin.eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(X, **options), twin.generate(X, **options))


@pytest.mark.parametrize("pack", [False, True])
def test_compiled_into_one_graph(pack):
    model, handle, twin, apart = pair(pack_weights=pack)
    logits(model)
    mlp, other = model.model.layers[1].mlp, twin.model.layers[1].mlp
    x = torch.randn(3, 16)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    for one in (compiled, other):
        one(x).square().sum().backward()
    for name in ("gate_proj", "up_proj", "down_proj"):
        for part in ("lora_A", "lora_B"):
            one, two = (getattr(m.get_submodule(name), part)["default"].grad for m in (mlp, other))
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    handle.model.zero_grad(), apart.model.zero_grad()
    torch.testing.assert_close(train(model), train(twin), rtol=1e-5, atol=1e-5)
    assert all(state.grouped for state in handle.groups)
