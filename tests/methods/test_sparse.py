"""SparseMask, and the contract of an attached model for all methods of single entries."""

import copy
import itertools
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastft
from fastft.methods import AdapterFileError, handles
from fastft.methods.sparse_files import in_steps, pack_index, unpack_index
from fastft.ops.entries import Entries

from .models import assert_same, llama, randomize, snapshot
from .sparse_net import (
    KINDS,
    NAMES,
    Net,
    assert_same_bits,
    attached,
    bits,
    chosen,
    deltas,
    held,
    inputs,
    loss_of,
    masks,
    outputs,
    train,
)  # fmt: skip

F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize("micro", [1, 2])
def test_a_step_is_dense_adamw_with_a_masked_gradient(decay, micro):
    net, handle = attached("mask")
    base, given = Net(), masks(Net())
    full = {name: torch.zeros_like(base.get_submodule(name).weight, requires_grad=True) for name in NAMES}
    dense = torch.optim.AdamW(full.values(), lr=0.05, weight_decay=decay)
    optimizer = handle.optimizer(lr=0.05, weight_decay=decay, eps=1e-8)
    for step in range(6):
        train(net, handle, 1, optimizer, start=step, micro=micro)
        dense.zero_grad()
        for part in range(micro):
            weights = {f"{n}.weight": base.get_submodule(n).weight.detach() + d for n, d in full.items()}
            (loss_of(lambda x, w=weights: torch.func.functional_call(base, w, (x,)), inputs(step, part)) / micro).backward()
        for name, delta in full.items():
            delta.grad[~given[name]] = 0
        dense.step()
    for name, delta in full.items():
        want = base.get_submodule(name).weight + delta
        torch.testing.assert_close(net.get_submodule(name).weight, want, rtol=1e-4, atol=2e-5)
        outside = ~given[name]
        assert torch.equal(net.get_submodule(name).weight[outside], base.get_submodule(name).weight[outside])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("how", ["restore", "load", "state_dict"])
def test_resume_bit_for_bit_in_mid_phase(kind, dtype, how, tmp_path):
    net, handle = attached(kind, dtype)
    optimizer = train(net, handle, 5)
    loss_of(net, inputs(5, 0, dtype=dtype)).backward()  # in the middle of an accumulation
    handle.save(tmp_path)
    state, model, grads = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict()), None
    grads, history = [p.grad.clone() for p in handle.parameters()], list(handle.method.history)

    def finish(net, handle, optimizer):
        loss_of(net, inputs(5, 1, dtype=dtype)).backward()
        optimizer.step(), optimizer.zero_grad(), handle.step()
        train(net, handle, 6, optimizer, start=6)

    other = Net(dtype)
    again = fastft.load(other, tmp_path) if how == "load" else attached(kind, dtype, net=other)[1]
    if how == "restore":
        train(other, again, 1)  # whatever it held before
        again.restore(tmp_path)
    if how == "state_dict":
        other.load_state_dict(model)
    theirs = again.optimizer(lr=0.05)
    theirs.load_state_dict(state)
    for parameter, grad in zip(again.parameters(), grads, strict=True):
        parameter.grad = grad
    if how != "state_dict":
        assert again.method.history == history
    assert_same_bits(bits(net), bits(other))
    finish(net, handle, optimizer), finish(other, again, theirs)
    assert_same_bits(bits(net), bits(other))
    if how != "state_dict":
        assert again.method.history == handle.method.history
    for one, two in zip(handle.parameters(), again.parameters(), strict=True):
        for key, value in optimizer.state[one].items():
            assert value.dtype == theirs.state[two][key].dtype and torch.equal(value, theirs.state[two][key])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_model_shows_the_pretrained_base(kind, dtype):
    net, handle = attached(kind, dtype)
    base = Net(dtype)
    train(net, handle, 5)
    y, state = outputs(net), net.state_dict()
    for key, value in base.state_dict().items():
        assert torch.equal(state[key], value), key
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(outputs(twin), y)
        one, two = handles(twin)["default"], copy.deepcopy(net)
        train(twin, one, 3, start=5), train(two, handles(two)["default"], 3, start=5)
        assert_same_bits(bits(twin), bits(two))
    half = copy.deepcopy(net).to(BF16)
    for name, delta in deltas(handle).items():
        assert held(handles(half)["default"])[name].delta.dtype == F32
        want = (base.get_submodule(name).weight.to(BF16).float() + delta).to(BF16)
        assert torch.equal(half.get_submodule(name).weight, want), name
    handle.unmerge()
    torch.testing.assert_close(outputs(net), y, rtol=1e-4 if dtype == F32 else 0.1, atol=1e-5 if dtype == F32 else 0.05)
    handle.merge()
    assert torch.equal(outputs(net), y)
    handle.set_active(False)
    assert torch.equal(outputs(net), outputs(base))
    handle.set_active(True)
    assert torch.equal(outputs(net), y)
    handle.detach()
    assert_same(snapshot(base)[:1] + snapshot(net)[1:], snapshot(net))


def test_detaching_in_any_order():
    """Three kinds of entries that overlap, slices, and a merged LoRA on the same linears."""
    target = ["down_proj"]
    makers = {
        "mask": lambda m: fastft.SparseMask(mask={n: masks_of(m, n) for n in names(m)}),
        "lift": lambda m: fastft.LIFT(rank_budget=1, filter_rank=2, target_modules=target),
        "slices": lambda m: fastft.S2FT(down_ratio=0.25, o_ratio=0.0),
        "lora": lambda m: fastft.LoRA(r=2, target_modules=target),
    }
    for order in itertools.islice(itertools.permutations(makers), 0, None, 4):
        model = llama()
        before, base = snapshot(model), copy.deepcopy(model)
        made = {name: fastft.attach(model, make(model), name) for name, make in makers.items()}
        for handle in made.values():
            randomize(handle)
        made["lora"].merge()
        module = model.get_submodule(names(model)[0])
        x = torch.randn(3, module.in_features)
        for name in order:
            want = base.get_submodule(names(model)[0])(x)
            for other in made.values():
                with torch.no_grad():
                    want = want + x @ delta_of(module, other).t()
            torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-4)
            made.pop(name).detach()
        assert_same(before, snapshot(model))


def names(model):
    return [name for name, _ in model.named_modules() if name.endswith("down_proj")]


def masks_of(model, name):
    return torch.rand(model.get_submodule(name).weight.shape, generator=torch.Generator().manual_seed(1)) < 0.3


def delta_of(module, handle):
    name = handle.name
    if name == "lora":
        return module.lora_B[name] @ module.lora_A[name] * module._settings[name].scale
    if name == "slices":
        part = module.part_of(name)
        return torch.zeros_like(module.weight).index_add(part.dim(), part.index, module.slice_delta[name])
    out = torch.zeros_like(module.weight)
    for entries, delta in module.entry_deltas(name):
        out[entries.rows(), entries.columns.long()] += delta
    return out


@pytest.mark.parametrize("kind", ["accumulated", "lift"])
def test_disabled_between_forward_and_backward(kind):
    net, handle = attached(kind)
    train(net, handle, 5)
    twin = copy.deepcopy(net)
    loss = loss_of(net, inputs(7))
    with torch.no_grad(), handle.disabled():
        assert torch.equal(net(inputs(7)), Net()(inputs(7)))
    loss.backward()
    loss_of(twin, inputs(7)).backward()
    for one, two in zip(handle.parameters(), handles(twin)["default"].parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


@pytest.mark.parametrize("optimizer", ["fused", "foreach", "sgd"])
@pytest.mark.parametrize("kind", ["mask", "lift"])
def test_any_optimizer(kind, optimizer):
    net, handle = attached(kind)
    other, again = attached(kind)
    options = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-6}
    if optimizer == "sgd":
        train(net, handle, 6, torch.optim.SGD(handle.parameters(), lr=0.5))
    else:
        train(net, handle, 6, torch.optim.AdamW(handle.parameters(), weight_decay=0.1, **options, **{optimizer: True}))
        train(other, again, 6, again.optimizer(weight_decay=0.1, **options))
        torch.testing.assert_close(outputs(net), outputs(other), rtol=1e-3, atol=1e-4)
    for name, delta in deltas(handle).items():
        assert torch.equal(net.get_submodule(name).weight, Net().get_submodule(name).weight + delta)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_files(kind, absolute, dtype, tmp_path):
    net, handle = attached(kind, dtype)
    train(net, handle, 5, lr=0.4)  # many values change their sign
    handle.save(tmp_path, absolute=absolute)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        assert not key.endswith("index") or tensor.dtype == torch.int32
        assert not key.endswith("value") or tensor.dtype == dtype
    other = Net(dtype)
    loaded = fastft.load(other, tmp_path)
    for name in NAMES:
        assert torch.equal(other.get_submodule(name).weight, net.get_submodule(name).weight), name
    if kind != "lift" or not absolute:
        again, fresh = attached(kind, dtype)
        fresh.restore(tmp_path)
        for name in NAMES:
            assert torch.equal(again.get_submodule(name).weight, net.get_submodule(name).weight), name
    if absolute:
        train(other, loaded, 4)


DAMAGE = [
    ("sparse_index", lambda t: t.flip(0), "ascend"),
    ("sparse_index", lambda t: t + 1000, "out of range"),
    ("sparse_index", lambda t: t.long(), "not torch.int32"),
    ("sparse_index", lambda t: t[:-1], "wrong shape"),
    ("sparse_delta", lambda t: t * float("nan"), "not finite"),
    ("sparse_delta", lambda t: t.int(), "torch.int32"),
    ("kept_index", lambda t: t.flip(0), "ascend"),
    ("kept_delta", lambda t: t.int(), "torch.int32"),
    ("sparse_first", lambda t: t.float(), "torch.float32"),
]


@pytest.mark.parametrize("key,damage,message", DAMAGE)
def test_damaged_files_are_refused(key, damage, message, tmp_path):
    net, handle = attached("lift")
    train(net, handle, 5)
    handle.save(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(k for k in tensors if k.endswith(key))
    save_file({**tensors, name: damage(tensors[name]).contiguous()}, path)
    other = Net()
    before = snapshot(other)
    with pytest.raises(AdapterFileError, match=message):
        fastft.load(other, tmp_path)
    assert_same(before, snapshot(other))
    before = bits(net)
    with pytest.raises(AdapterFileError, match=message):
        handle.restore(tmp_path)
    assert_same_bits(before, bits(net))


def test_damaged_configs_and_other_methods_are_refused(tmp_path):
    _, handle = attached("accumulated")
    handle.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change in ({"entries": {}}, {"entries": {"a": [1, 2]}}, {"entries": {"a": [-1, 0, 0]}}, {"surprise": 1}):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(AdapterFileError):
            fastft.load(Net(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "SPARSE_MASK"}))
    with pytest.raises(AdapterFileError):
        handle.restore(tmp_path)


def test_indices_of_a_weight_of_more_than_two_billion_elements():
    shape = (1 << 17, 1 << 16)
    entries = Entries.of_flat(torch.tensor([5, 2**31 + 3, 2**32 + 1, 2**33 - 1 - 2**31]), shape)
    packed = pack_index(entries)
    assert (
        in_steps(shape) and packed.dtype == torch.int32 and torch.equal(unpack_index(packed, shape).flat(), entries.flat())
    )
    with pytest.raises(ValueError, match="lie between"):
        pack_index(Entries.of_flat(torch.tensor([5, 2**32]), shape))
    with pytest.raises(ValueError, match="ascend"):
        unpack_index(packed * torch.tensor([1, 1, 0, 1], dtype=torch.int32), shape)
    assert not in_steps((1 << 15, (1 << 16) - 1))


def test_a_schedule_that_never_ran_is_told(tmp_path):
    net, handle = attached("lift")
    optimizer = handle.optimizer(lr=0.1)
    loss_of(net, inputs(0)).backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="never chosen anew"):
        handle.save(tmp_path)


def test_only_the_named_modules_train():
    """Also where another's name ends with a named one's."""
    model = torch.nn.Module()
    model.fc, model.block = torch.nn.Linear(3, 4), torch.nn.Module()
    model.block.fc = torch.nn.Linear(3, 4)
    handle = fastft.attach(model, fastft.SparseMask(indices={"fc": [0, 5]}))
    assert list(handle.targets) == ["fc"]


@pytest.mark.parametrize(
    "index", [[0.5], [240], [-1], [3, 3], [[0, 1]], torch.ones(3, dtype=torch.bool)], ids=lambda i: str(i)[:12]
)
def test_wrong_indices_are_refused(index):
    net = Net()
    before = snapshot(net)
    with pytest.raises(ValueError, match="a"):
        fastft.attach(net, fastft.SparseMask(indices={"a": index}))
    assert_same(before, snapshot(net))


@pytest.mark.parametrize("then", ["state", "inactive", "merged", "changed"])
def test_weights_that_come_after_attaching_are_the_base(then):
    """Also before the first forward."""
    net, handle = attached("mask")
    other, module = Net(seed=1), net.a
    with torch.no_grad():
        module.weight.copy_(other.a.weight)
        if then == "inactive":
            handle.set_active(False)
        elif then == "merged":
            fastft.attach(net, fastft.LoRA(r=2, target_modules=["a"]), "lora").merge()
        elif then == "changed":
            next(handle.parameters()).add_(1)
            handle.refresh()
    assert torch.equal(net.state_dict()["a.weight"], other.a.weight)
    handle.detach()
    assert then == "merged" or torch.equal(module.weight, other.a.weight)


def test_what_a_mask_may_be(tmp_path):
    with pytest.raises(TypeError, match="makes one of a list"):
        fastft.SparseMask(mask={"a": [[True]]})
    handle = fastft.attach(Net(), fastft.SparseMask(indices={"a": [], "b": [1]}))
    handle.save(tmp_path)
    with pytest.raises(ValueError, match="attach them by fastft.load"):
        fastft.attach(Net(), fastft.load(Net(), tmp_path).method)
    for options in ({"modules_to_save": ["b"]}, {"exclude_modules": ["b"]}):
        with pytest.raises(ValueError, match=r"entries are given for \['b'\], which don't get any"):
            fastft.attach(Net(), fastft.SparseMask(indices={"a": [0], "b": [1]}, **options))


def test_tied_weights_and_dora_are_refused():
    model = llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="shared"):
        fastft.attach(model, fastft.SparseMask(indices={"lm_head": [0]}))
    net, _ = attached("mask")
    with pytest.raises(ValueError, match="don't mix"):
        fastft.attach(net, fastft.LoRA(target_modules=["a"], use_dora=True), "dora")
    net = Net()
    fastft.attach(net, fastft.LoRA(target_modules=["a"], use_dora=True), "dora")
    with pytest.raises(ValueError, match="don't mix"):
        attached("mask", net=net)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["accumulated", "lift"])
def test_checkpointing_changes_nothing(kind, reentrant):
    from torch.utils.checkpoint import checkpoint

    plain, handle = attached(kind)
    train(plain, handle, 5)
    net, again = attached(kind)
    forward = net.forward
    net.forward = lambda x: checkpoint(forward, x.clone().requires_grad_(), use_reentrant=reentrant)
    train(net, again, 5)
    del net.forward
    assert_same_bits(bits(plain), bits(net))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_training_is_not_wrong(kind):
    plain, handle = attached(kind)
    net, again = attached(kind)
    compiled = torch.compile(net, backend="aot_eager")
    optimizer = again.optimizer(lr=0.05)
    for step in range(5):
        loss_of(compiled, inputs(step)).backward()
        optimizer.step(), optimizer.zero_grad(), again.step()
    train(plain, handle, 5)
    for name, mask in chosen(handle).items():
        assert torch.equal(mask, chosen(again)[name]), name
    torch.testing.assert_close(outputs(net), outputs(plain), rtol=1e-3, atol=1e-4)
