"""pack_weights=True: base weights of a group in one buffer, for as long as nobody takes them out of it."""

import copy
import pickle

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import fastft
from fastft.methods import handles
from fastft.modules import packed
from fastft.ops import lora_inference

from .models import assert_same, llama, logits, snapshot, tokens, transformers
from .test_groups import MODELS, assert_gradients, attach, made, pair, train


@pytest.fixture(autouse=True)
def one_gemm_on_cpus(monkeypatch):
    """CPUs compute the layers of a packed group apart, which is faster there; these tests are about the one GEMM."""
    monkeypatch.setattr(packed, "ONE_GEMM_DEVICES", {"cpu", "cuda"})


def states(handle):
    return {(state.packed, state.unpacked) for state in handle.groups}


def gemms(monkeypatch, function):
    """The numbers of out-features of all F.linear."""
    seen, linear = [], F.linear

    def counting(x, weight, bias=None):
        seen.append(weight.shape[0])
        return linear(x, weight, bias)

    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", counting)
        patch.setattr(lora_inference, "linear", counting)
        function()
    return seen


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(kind, dtype, monkeypatch):
    model, handle, twin, apart = pair(lambda: made(kind).to(dtype), pack_weights=True, lora_dropout=0.2)
    assert states(handle) == {(True, None)}
    exact = dtype == torch.float32
    one, two = train(model), train(twin)
    torch.testing.assert_close(one, two, rtol=1e-5 if exact else 1e-2, atol=1e-5 if exact else 2e-2)
    assert_gradients(handle, apart, *((1e-4, 1e-6) if exact else (5e-2, 2e-2)))
    counts = gemms(monkeypatch, lambda: logits(model))
    assert len(counts) == 2 * 4 + 1 and {32, 48} <= set(counts), "q, k, v and gate, up at once; o, down and the head"
    assert states(handle) == {(True, None)}


def test_parameters_keep_their_identity():
    model = llama()
    before = dict(model.named_parameters())
    handle = attach(model, pack_weights=True)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    q, k = (model.model.layers[0].self_attn.get_submodule(name).weight for name in ("q_proj", "k_proj"))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() and q.is_contiguous()
    assert k.data_ptr() == q.data_ptr() + q.numel() * 4
    handle.detach()
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in before.items())


def test_outputs_can_be_changed_in_place():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(8, 6), nn.Linear(8, 6)

        def forward(self, x):
            return F.relu(self.gate_proj(x), inplace=True) + self.up_proj(x).sigmoid_()

    torch.manual_seed(0)
    block = Block()
    twin = copy.deepcopy(block)
    handles_ = [
        attach(m, pack_weights=p, group_projections=p, target_modules=["gate_proj", "up_proj"])
        for m, p in ((block, True), (twin, False))
    ]
    x = torch.randn(5, 8)
    for m in (block, twin):
        m(x).sum().backward()
    torch.testing.assert_close(block(x), twin(x))
    assert_gradients(*handles_)
    assert states(handles_[0]) == {(True, None)}


def test_state_dicts_hold_tensors_of_their_own(tmp_path):
    model, _, twin, _ = pair(pack_weights=True)
    assert_same(snapshot(model)[:1], snapshot(twin)[:1])
    values = model.state_dict()
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in values.values())
    kept = model.state_dict(keep_vars=True)
    assert all(kept[name] is parameter for name, parameter in model.named_parameters())
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    file = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert file.keys() == values.keys()
    other = llama(seed=5)
    own = attach(other, seed=9, pack_weights=True)
    assert not torch.allclose(logits(other), logits(model))
    safetensors.torch.load_model(other, str(tmp_path / "model.safetensors"))
    torch.testing.assert_close(logits(other), logits(twin), rtol=1e-5, atol=1e-5)
    assert states(own) == {(True, None)}, "values went into the buffer"
    third = llama(seed=5)
    own = attach(third, seed=9, pack_weights=True)
    third.load_state_dict({key: value.clone() for key, value in values.items()}, assign=True)
    third.requires_grad_(False)
    torch.testing.assert_close(logits(third), logits(twin), rtol=1e-5, atol=1e-5)
    assert states(own) == {(True, None)}, "packed again"


@pytest.mark.parametrize("merge", [False, True])
def test_save_pretrained(tmp_path, merge):
    model, handle, *_ = pair(pack_weights=True)
    if merge:
        handle.merge()
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    for name, parameter in llama().named_parameters():
        assert torch.equal(base.get_parameter(name), parameter), name
    reread = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.equal(reread[key], value) for key, value in model.state_dict().items())


def test_copies_and_moves_are_packed_again(monkeypatch):
    model, handle, twin, apart = pair(pack_weights=True)
    want = logits(twin)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = handles(other)["default"]
        assert states(own) == {(False, "the weights left their buffer; the next forward packs them again")}
        torch.testing.assert_close(logits(other), want, rtol=1e-5, atol=1e-5)
        assert states(own) == {(True, None)}
        torch.testing.assert_close(train(other), train(twin), rtol=1e-5, atol=1e-5)
        assert_gradients(own, apart)
        twin.zero_grad()
        other.to(torch.bfloat16)
        assert len(gemms(monkeypatch, lambda other=other: logits(other))) == 9
        assert states(own) == {(True, None)}
        assert other.model.layers[0].self_attn._modules["q_proj"].weight.dtype == torch.bfloat16
    assert states(handle) == {(True, None)}
    assert handles(copy.deepcopy(model))["default"]._groups[0].packed.weight is None, (
        "no copy of the buffer beside the weights"
    )


def test_weights_that_leave_again_and_again_stay_out(monkeypatch):
    monkeypatch.setattr(packed, "MAX_REPACKS", 2)
    model, handle, twin, _ = pair(pack_weights=True)
    for _ in range(4):
        logits(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-5, atol=1e-5)
    assert states(handle) == {(False, "the weights left their buffer 3 times")}
    assert all(state.grouped for state in handle.groups)


def test_obstacles_are_told():
    model, handle, twin, _ = pair(pack_weights=True)

    def same(reason):
        torch.testing.assert_close(logits(model), logits(twin), rtol=1e-5, atol=1e-5)
        assert handle.groups[0].unpacked == reason and handle.groups[0].packed == (reason is None)
        assert handle.groups[1].packed and handle.groups[0].grouped

    for m in (model, twin):
        m.model.layers[0].self_attn.v_proj.weight.requires_grad_(True)
    same("the weights are not all plain frozen Parameters")
    train(model), train(twin)
    gradients = [m.model.layers[0].self_attn.v_proj.weight.grad for m in (model, twin)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    for m in (model, twin):
        m.model.layers[0].self_attn.v_proj.weight.requires_grad_(False)
    same(None)
    for m in (model, twin):
        attention = m.model.layers[0].self_attn
        attention.k_proj.bias = None
    same("some have a bias and some have none")
    for m in (model, twin):
        attention = m.model.layers[0].self_attn
        attention.q_proj.bias = attention.v_proj.bias = None
    same(None)


def test_a_weight_that_a_hook_replaces_is_used():
    model, handle, twin, _ = pair(pack_weights=True)
    for m in (model, twin):
        attention = m.model.layers[0].self_attn
        ones = nn.Parameter(torch.ones_like(attention.k_proj.weight), requires_grad=False)
        attention.k_proj.register_forward_pre_hook(lambda module, _, ones=ones: setattr(module, "weight", ones))
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-5, atol=1e-5)
    assert handle.groups[0].grouped


def test_conv1d_stays_as_it_is():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w3 = (transformers.pytorch_utils.Conv1D(6, 8) for _ in range(2))

        def forward(self, x):
            return self.w1(x) * self.w3(x)

    block = Block()
    twin = copy.deepcopy(block)
    handle, _ = (
        attach(m, pack_weights=p, group_projections=p, target_modules=["w1", "w3"])
        for m, p in ((block, True), (twin, False))
    )
    x = torch.randn(3, 8)
    with fastft.testing.record() as calls:
        torch.testing.assert_close(block(x), twin(x))
    assert [call.op for call in calls].count("lora_shrink") == 3, "one for the group, two for its twin"
    (state,) = handle.groups
    assert state.grouped and not state.packed and "Conv1D" in state.unpacked


def test_trained_copies_compute_apart(monkeypatch):
    """bias="lora_only" trains copies of the biases, which are not in the buffer."""
    model, handle, twin, apart = pair(pack_weights=True, bias="lora_only")
    torch.testing.assert_close(train(model), train(twin), rtol=1e-5, atol=1e-5)
    assert_gradients(handle, apart)
    assert len(gemms(monkeypatch, lambda: logits(model))) == 15


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_dora_and_a_bias_on_b(options, monkeypatch):
    model, handle, twin, apart = pair(pack_weights=True, lora_dropout=0.2, **options)
    for _ in range(2):
        torch.testing.assert_close(train(model), train(twin), rtol=1e-5, atol=1e-5)
    assert_gradients(handle, apart)
    told = None if "use_dora" in options else "lora_bias would have to be in the packed bias"
    assert len(gemms(monkeypatch, lambda: logits(model))) == (9 if told is None else 15)
    assert states(handle) == {(told is None, told)} and all(state.grouped for state in handle.groups)


def test_autocast(monkeypatch):
    model, _, twin, _ = pair(pack_weights=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits(model), logits(twin), rtol=2e-2, atol=2e-2)
        assert len(gemms(monkeypatch, lambda: logits(model))) == 15, "each weight is cast anyway"


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing(reentrant):
    model, handle, twin, apart = pair(pack_weights=True, lora_dropout=0.3)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    torch.testing.assert_close(train(model), train(twin), rtol=1e-5, atol=1e-5)
    assert_gradients(handle, apart)


def test_two_adapters_share_the_buffer_of_the_same_layers():
    model = llama(num_hidden_layers=1)
    first = attach(model, pack_weights=True)
    second = attach(model, "second", pack_weights=True, target_modules=["q_proj", "v_proj", "gate_proj", "up_proj"])
    assert states(first) == {(True, None)}
    qv, mlp = second.groups
    assert not qv.packed and qv.unpacked.startswith("adapter 'default' packs model.layers.0.self_attn.q_proj")
    assert mlp.packed and second._groups[1].packed is first._groups[1].packed
    first.detach()
    assert second.groups[1].packed
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.untyped_storage().nbytes() == attention.q_proj.weight.numel() * 4
    second.detach()
    assert_same(snapshot(llama(num_hidden_layers=1))[:2], snapshot(model)[:2])


def test_merge_and_unload():
    model, handle, twin, apart = pair(pack_weights=True)
    handle.merge()
    assert_same(snapshot(model)[:1], snapshot(twin)[:1])
    apart.merge()
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-5, atol=1e-5)
    plain, other = handle.merge_and_unload(), apart.merge_and_unload()
    for (name, one), two in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name
        assert one.untyped_storage().nbytes() == one.numel() * one.element_size(), name


def test_tied_weights_are_refused():
    model = llama(num_hidden_layers=1, num_key_value_heads=2)
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight = attention.q_proj.weight
    before = snapshot(model)
    options = {"target_modules": ["q_proj", "k_proj"], "allow_tied_weights": True}
    with pytest.raises(ValueError, match=r"pack_weights: .*q_proj\.weight is shared with .*k_proj\.weight"):
        fastft.attach(model, fastft.LoRA(pack_weights=True, **options))
    assert_same(before, snapshot(model))
    assert fastft.attach(model, fastft.LoRA(**options)).groups[0].grouped
    tied = llama(tie_word_embeddings=True)
    options = {"target_modules": ["q_proj", "k_proj", "lm_head"], "allow_tied_weights": True}
    assert states(fastft.attach(tied, fastft.LoRA(pack_weights=True, **options))) == {(True, None)}
    tied(tokens())


def test_cpus_compute_apart_what_is_packed(monkeypatch):
    monkeypatch.undo()
    model, handle, *_ = pair(pack_weights=True)
    assert states(handle) == {(True, None)}
    assert len(gemms(monkeypatch, lambda: logits(model))) == 2 * 7 + 1
