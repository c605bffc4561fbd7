"""S²FT through `attach`: gradients, bits, memory, switching, fusing, files. Its choice of units is in `test_selection`."""

import copy

import pytest
import torch

import fastft
from fastft.optim.slice_adamw import SliceAdamW

from .models import assert_same, gpt2, llama, logits, randomize, snapshot, tokens, transformers

X = tokens()
ALL = {"down_ratio": 0.25, "o_ratio": 0.5, "up_ratio": 0.25, "v_ratio": 0.5, "gate_ratio": 0.25}


def qwen2(seed=0, **options):
    torch.manual_seed(seed)
    config = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config.update(num_key_value_heads=2, max_position_embeddings=32, bos_token_id=None, eos_token_id=None)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**config, **options}))


def bert(seed=0):
    torch.manual_seed(seed)
    config = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config.update(max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**config))


MODELS = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2, "bert": bert}


def attached(model, name="default", seed=3, units=0, **options):
    """With values that matter; `units` seeds the choice."""
    handle = fastft.attach(model, fastft.S2FT(**{"down_ratio": 0.25, "o_ratio": 0.5, "seed": units, **options}), name)
    if seed is not None:
        randomize(handle, seed)
    return handle


def train(model, handle, steps=3, optimizer=None, lr=1e-2, **options):
    optimizer = optimizer or handle.optimizer(lr=lr, **options)
    for step in range(steps):
        model(input_ids=tokens(seed=step), labels=tokens(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.step()
    return optimizer


def weights(handle):
    return {name: module.weight.detach().clone() for name, module in handle.targets.items()}


def outside(handle, name, weight):
    """The entries of a weight that are not in the adapter's slice."""
    module = handle.targets[name]
    part = module.part_of(handle.name)
    rest = torch.ones(weight.shape[part.dim(module.fan_in_fan_out)], dtype=torch.bool)
    rest[part.index.long()] = False
    return weight.select(0, 0)[:0] if not rest.any() else weight.index_select(
        part.dim(module.fan_in_fan_out), rest.nonzero().flatten()
    )  # fmt: skip


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_moves_the_slices_and_nothing_else(family, dtype):
    options = {k: v for k, v in ALL.items() if k != "gate_ratio" or family in ("llama", "qwen2")}
    model = MODELS[family]().to(dtype)
    before, y = {name: p.detach().clone() for name, p in model.named_parameters()}, logits(model)
    handle = attached(model, seed=None, **options)
    assert torch.equal(logits(model), y), "identical before training"
    kinds = {one.kind for one in handle.method.chosen.values()}
    assert kinds == {"rows", "columns"}
    train(model, handle)
    moved = 0
    for name, parameter in model.named_parameters():
        if name not in before:
            continue
        owner = name.rpartition(".")[0]
        if owner in handle.targets and name.endswith("weight"):
            old, new = (outside(handle, owner, t.detach()) for t in (before[name], parameter))
            assert torch.equal(old, new), f"{name}: unselected entries keep their bits"
            moved += not torch.equal(before[name], parameter)
        else:
            assert torch.equal(before[name], parameter), name
    assert moved == len(handle.targets) and not torch.equal(logits(model), y)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("how", ["plain", "accumulated", "checkpointed", "reentrant", "clipped", "autocast", "unmerged"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradients_are_the_slices_of_autograds(family, how):
    options = {k: v for k, v in ALL.items() if k != "gate_ratio" or family in ("llama", "qwen2")}
    model = MODELS[family]()
    twin = copy.deepcopy(model)
    handle = attached(model, seed=None, **options)
    if how == "unmerged":
        handle.unmerge()
    if how in ("checkpointed", "reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        model.train(), twin.train()
        model.enable_input_require_grads()
    halves = [X[:1], X[1:]] if how == "accumulated" else [X]
    for ids in halves:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            loss, other = model(input_ids=ids, labels=ids).loss, twin(input_ids=ids, labels=ids).loss
        loss.backward(), other.backward()
    if how == "clipped":
        torch.nn.utils.clip_grad_norm_(list(handle.parameters()), 1e-3)
        slices = [take(handle, name, twin.get_submodule(name).weight.grad) for name in handle.targets]
        scale = min(1.0, 1e-3 / torch.cat([g.flatten() for g in slices]).norm())
    rtol = 5e-2 if how == "autocast" else 1e-4
    for name, module in handle.targets.items():
        want = take(handle, name, twin.get_submodule(name).weight.grad) * (scale if how == "clipped" else 1)
        got = module.slice_delta["default"].grad
        assert (got - want).norm() <= rtol * want.norm() + 1e-7, f"{name}: {(got - want).norm() / want.norm()}"


def take(handle, name, full):
    module = handle.targets[name]
    part = module.part_of(handle.name)
    return full.index_select(part.dim(module.fan_in_fan_out), part.index)


def test_a_step_is_dense_adamw_with_a_masked_gradient():
    model = llama()
    twin = copy.deepcopy(model)
    handle = attached(model, seed=None)
    train(model, handle, steps=5)
    dense = [twin.get_submodule(name).weight for name in handle.targets]
    optimizer = torch.optim.AdamW(dense, lr=1e-2, weight_decay=0.0)
    for step in range(5):
        twin(input_ids=tokens(seed=step), labels=tokens(seed=step)).loss.backward()
        for name, weight in zip(handle.targets, dense, strict=True):
            mask = torch.zeros_like(weight)
            part = handle.targets[name].part_of("default")
            mask.index_fill_(part.dim(), part.index.long(), 1.0)
            weight.grad *= mask
        optimizer.step()
        twin.zero_grad()
    for name, weight in zip(handle.targets, dense, strict=True):
        torch.testing.assert_close(model.get_submodule(name).weight, weight, rtol=2e-5, atol=2e-6)


def test_weight_decay_pulls_towards_the_pretrained_weight():
    model = llama()
    handle = attached(model)
    optimizer = handle.optimizer(lr=0.1, weight_decay=1.0)
    before = {name: module.slice_delta["default"].detach().clone() for name, module in handle.targets.items()}
    for parameter in handle.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, module in handle.targets.items():
        torch.testing.assert_close(module.slice_delta["default"].detach(), 0.9 * before[name])


def test_memory():
    """Beyond the frozen model: T·|C| elements a layer, and at most 20 bytes of state an entry."""
    model = llama(num_hidden_layers=3, attention_bias=False, mlp_bias=False)
    handle = attached(model, seed=None, down_ratio=0.25, o_ratio=0.0)
    optimizer = train(model, handle, steps=1)
    model(input_ids=X, labels=X).loss.backward()
    entries = state = 0
    for module in handle.targets.values():
        delta = module.slice_delta["default"]
        held = [delta, delta.grad, *(s for s in optimizer.state[delta].values() if s.dim()), module._pristine_part]
        entries += delta.numel()
        state += sum(t.untyped_storage().nbytes() for t in held)
    assert entries == sum(p.numel() for p in handle.parameters()) and state <= 20 * entries

    for module in handle.targets.values():
        x = torch.randn(9, module.in_features)
        kept = {}

        def pack(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            _y = module(x)
        assert sum(kept.values()) == 4 * 9 * len(module.part_of("default").index)


def test_backward_ends_at_the_lowest_selected_unit(monkeypatch):
    model = llama(num_hidden_layers=3)
    attached(model, seed=None, layers_to_transform=[2], target_modules=["down_proj"], o_ratio=0.0)
    seen = []
    for i, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_full_backward_hook(lambda m, gi, go, i=i: seen.append((i, gi[0] is not None)))
    model(input_ids=X, labels=X).loss.backward()
    assert seen == [(2, False)], "neither below the layer nor into its own input"


@pytest.mark.parametrize("family", MODELS)
def test_merged_is_unmerged(family):
    model = MODELS[family]()
    base = copy.deepcopy(model)
    handle = attached(model)
    merged = logits(model)
    handle.unmerge()
    assert not handle.merged
    for name, module in handle.targets.items():
        assert torch.equal(module.weight, base.get_submodule(name).weight), "the pretrained bits"
    torch.testing.assert_close(logits(model), merged, rtol=1e-4, atol=1e-5)
    assert not torch.equal(logits(model), logits(base))
    handle.merge()
    assert handle.merged and torch.equal(logits(model), merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switching_restores_bits(dtype):
    model = llama().to(dtype)
    base = weights(fastft.attach(copy.deepcopy(model), fastft.S2FT(down_ratio=0.25, o_ratio=0.5)))
    a, b = attached(model, "a"), attached(model, "b", seed=4, units=1)
    assert (
        not torch.equal(*(torch.as_tensor(sorted(h.targets)[0] == "") for h in (a, b)))
        or a.targets.keys() & b.targets.keys()
    )
    a.switch()
    only_a, y = weights(a), logits(model)
    b.switch()
    assert not torch.equal(logits(model), y)
    a.switch()
    for name, weight in weights(a).items():
        assert torch.equal(weight, only_a[name]), name
    assert torch.equal(logits(model), y)
    a.set_active(False)
    for name, weight in weights(a).items():
        assert torch.equal(weight, base[name]), name


def test_a_switch_touches_only_the_slices(monkeypatch):
    """O(slice): no tensor of a whole weight is made or written."""
    model = llama()
    a, b = attached(model, "a"), attached(model, "b", seed=4, units=1)
    a.switch()
    largest = max(p.numel() for p in (*a.parameters(), *b.parameters()))
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            name = func.name()
            if isinstance(out, torch.Tensor) and "detach" not in name and not name.startswith("fastft"):
                sizes.append((out.numel(), name))
            return out

    with Watch():
        b.switch()
    assert sizes and max(sizes)[0] <= largest, max(sizes)


def test_fused_is_the_sum_of_the_deltas():
    model = llama()
    base = copy.deepcopy(model)
    a, b = attached(model, "a"), attached(model, "b", seed=4, units=1)
    deltas = {}
    for handle in (a, b):
        handle.switch()
        now = weights(handle)
        deltas[handle.name] = {name: w.double() - base.get_submodule(name).weight.double() for name, w in now.items()}
    fused = fastft.fuse(model, {"a": 0.5, "b": -2.0}, "sum")
    assert not a._adapter.active and not b._adapter.active
    for name in {*a.targets, *b.targets}:
        want = base.get_submodule(name).weight.double()
        for handle, factor in ((a, 0.5), (b, -2.0)):
            want = want + factor * deltas[handle.name].get(name, 0)
        torch.testing.assert_close(model.get_submodule(name).weight.double(), want, rtol=0, atol=1e-6)
    fused.detach()
    for handle in (a, b):
        handle.set_active(True)
    both = logits(model)
    fastft.fuse(model, {"a": 1.0, "b": 1.0}, "both")
    torch.testing.assert_close(logits(model), both, rtol=1e-5, atol=1e-6)


def test_a_fused_adapter_is_in_the_models_order(tmp_path):
    """Optimizers' states know parameters by their places, and a loaded adapter has the model's."""
    model = llama()
    for name, layer in (("a", 1), ("b", 0)):
        attached(model, name, o_ratio=0.0, target_modules=[f"layers.{layer}.mlp.down_proj"])
    fused = fastft.fuse(model, {"a": 1.0, "b": 1.0}, "sum")
    fused.save(tmp_path)
    assert [*fused.targets] == [*fastft.load(llama(), tmp_path).targets]


def test_what_can_not_be_fused():
    model = llama()
    attached(model, "a")
    attached(model, "rows", down_ratio=0.0, o_ratio=0.0, up_ratio=0.5)
    fastft.attach(model, fastft.LoRA(target_modules="all-linear"), "lora")
    before = snapshot(model)
    for names, message in (
        ({}, "at least one"),
        ({"c": 1.0}, "no adapter 'c'"),
        ({"lora": 1.0}, "only S²FT"),
        ({"a": float("nan")}, "factor"),
    ):
        with pytest.raises(ValueError, match=message):
            fastft.fuse(model, names)
    with pytest.raises(ValueError, match="attached already"):
        fastft.fuse(model, {"a": 1.0}, "a")
    assert_same(before, snapshot(model))


class Named(torch.nn.Module):
    """Two feed-forwards, of which one's names are the ends of the other's."""

    def __init__(self):
        super().__init__()
        self.mlp, self.draft = self.feed_forward(), torch.nn.ModuleDict({"mlp": self.feed_forward()})

    def feed_forward(self):
        return torch.nn.ModuleDict({"up_proj": torch.nn.Linear(8, 16), "down_proj": torch.nn.Linear(16, 8)})

    def forward(self, x):
        return self.mlp["down_proj"](self.mlp["up_proj"](x).relu())


def test_names_that_end_others_mean_one_module(tmp_path):
    import json

    model, other = Named(), Named()
    other.load_state_dict(model.state_dict())
    handle = fastft.attach(model, fastft.S2FT(down_ratio=0.5, target_modules=["down_proj"], exclude_modules=r"draft\..*"))
    assert list(handle.targets) == ["mlp.down_proj"]
    randomize(handle)
    handle.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["mlp.down_proj"]
    x = torch.randn(3, 8)
    assert list(fastft.load(other, tmp_path).targets) == ["mlp.down_proj"] and torch.equal(other(x), model(x))
    assert list(fastft.fuse(model, {"default": 2.0}).targets) == ["mlp.down_proj"]


def test_chosen_layers_are_kept_to_without_target_modules():
    handle = fastft.attach(llama(num_hidden_layers=3), fastft.S2FT(down_ratio=0.25, layers_to_transform=[0, 2]))
    assert list(handle.targets) == ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    with pytest.raises(ValueError, match=r"layers_to_transform=9: no slice lies in these layers.*'model.layers.0.mlp.down_"):
        fastft.attach(llama(), fastft.S2FT(down_ratio=0.25, layers_to_transform=9))


@pytest.mark.parametrize("optimizer", ["ours", "fused", "foreach", "sgd", "by hand", "data"])
def test_any_optimizer(optimizer):
    """The weights follow whatever changes the deltas."""
    model = llama()
    handle = attached(model, seed=None)
    parameters = list(handle.parameters())
    made = {
        "ours": lambda: handle.optimizer(lr=1e-2),
        "fused": lambda: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0, fused=True),
        "foreach": lambda: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0, foreach=True),
        "sgd": lambda: torch.optim.SGD(parameters, lr=1e-1),
    }
    if optimizer in made:
        train(model, handle, optimizer=made[optimizer]())
    elif optimizer == "by hand":
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.1)
    else:
        for parameter in parameters:
            parameter.data = parameter.data + 0.1
        handle.refresh()
    y = logits(model)
    for module in handle.targets.values():
        part = module.part_of("default")
        slice = module.weight.detach().index_select(part.dim(), part.index)
        assert torch.equal(slice, module._pristine_part + module.slice_delta["default"].detach())
    if optimizer in ("ours", "foreach"):
        other = llama()
        train(other, attached(other, seed=None))
        torch.testing.assert_close(logits(other), y, rtol=1e-4, atol=1e-5)


def test_our_optimizer_runs_one_op_a_slice_and_trains_other_parameters():
    model = llama()
    handle = attached(model, seed=None, modules_to_save=["lm_head"], bias="lora_only")
    optimizer = handle.optimizer(lr=1e-2)
    assert isinstance(optimizer, SliceAdamW)
    head = handle.modules["lm_head"].modules_to_save["default"].weight
    before = head.detach().clone()
    with fastft.testing.record() as calls:
        train(model, handle, steps=1, optimizer=optimizer)
    names = [call.op for call in calls]
    assert names.count("slice_adamw_") == len(handle.targets) and "write_slice_" not in names
    assert not torch.equal(head, before)
    twin = torch.nn.Parameter(before.clone())
    assert optimizer.state[head]["step"] == 1 and twin.shape == head.shape


def test_state_dicts_of_both_optimizers_are_interchangeable():
    model = llama()
    handle = attached(model, seed=None)
    ours = train(model, handle, steps=2)
    torchs = torch.optim.AdamW(handle.parameters(), lr=1e-2, weight_decay=0.0)
    torchs.load_state_dict(copy.deepcopy(ours.state_dict()))
    twin = copy.deepcopy(model)
    train(model, handle, steps=1, optimizer=ours)
    other = fastft.methods.handles(twin)["default"]
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)
    theirs.load_state_dict(torchs.state_dict())
    train(twin, other, steps=1, optimizer=theirs)
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_bit_for_bit(tmp_path, dtype):
    def fresh():
        model = llama().to(dtype)
        return model, attached(model, seed=None, **ALL)

    model, handle = fresh()
    train(model, handle, steps=3)
    optimizer = handle.optimizer(lr=1e-2)
    train(model, handle, steps=1, optimizer=optimizer)
    handle.save(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, handle, steps=2, optimizer=optimizer)

    other, resumed = fresh()
    resumed.restore(tmp_path)
    optimizer = resumed.optimizer(lr=1e-2)
    optimizer.load_state_dict(state)
    train(other, resumed, steps=2, optimizer=optimizer)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_files(tmp_path):
    model = llama()
    handle = attached(model, **ALL)
    handle.save(tmp_path)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(handle.targets)
    assert {t.dtype for t in tensors.values()} == {torch.float32, torch.int32}
    other = llama()
    loaded = fastft.load(other, tmp_path, "again")
    assert torch.equal(logits(other), logits(model)) and loaded.method.chosen == handle.method.chosen
    loaded.save(tmp_path / "second")
    assert load_file(tmp_path / "second" / "adapter_model.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("units", lambda u: u.flip(0), "ascend"),
        ("units", lambda u: torch.zeros_like(u), "ascend"),
        ("units", lambda u: u + 1000, r"within \[0, 24\)"),
        ("units", lambda u: u - 1000, "ascend"),
        ("units", lambda u: u.float(), "not torch.int32"),
        ("units", lambda u: u[:-1], "wrong shape"),
        ("delta", lambda d: d.fill_(float("nan")), "not finite"),
        ("delta", lambda d: d[:-1], "wrong shape"),
    ],
)
def test_damaged_files_are_refused(tmp_path, key, value, message):
    from safetensors.torch import load_file, save_file

    attached(llama(), down_ratio=0.5, o_ratio=0.0).save(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(k for k in tensors if k.endswith(key))
    save_file({**tensors, name: value(tensors[name]).contiguous()}, path)
    model = llama()
    before = snapshot(model)
    with pytest.raises(fastft.methods.AdapterFileError, match=message):
        fastft.load(model, tmp_path)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"slices": {}}, "no slices"),
        ({"slices": {"model.layers.0.mlp.down_proj": {"kind": "rows"}}}, "is {'kind': 'rows'}"),
        ({"surprise": 1}, "not supported"),
        ({"down_ratio": 2.0}, r"\[0, 1\]"),
    ],
)
def test_damaged_configs_are_refused(tmp_path, change, message):
    import json

    attached(llama()).save(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(fastft.methods.AdapterFileError, match=message):
        fastft.load(llama(), tmp_path)


def test_detaching_restores_everything_in_any_order():
    for first in ("a", "b", "lora"):
        model = llama()
        before = snapshot(model)
        handles = {
            "a": attached(model, "a"),
            "b": attached(model, "b", seed=4, units=1, up_ratio=0.3),
            "lora": fastft.attach(model, fastft.LoRA(target_modules="all-linear"), "lora"),
        }
        randomize(handles["lora"])
        handles["lora"].merge()
        handles.pop(first).detach()
        for handle in handles.values():
            handle.detach()
        assert_same(before, snapshot(model))


def test_on_one_linear_with_lora():
    """LoRA and two slices, one of rows and one of columns, on the same weights: any of them merged or beside."""
    model = llama()
    base = copy.deepcopy(model)
    a = attached(model, "a", o_ratio=0.0)
    lora = fastft.attach(model, fastft.LoRA(r=2, target_modules=["down_proj"]), "lora")
    randomize(lora)
    name = "model.layers.0.mlp.down_proj"
    module = a.targets[name]
    delta = module.lora_B["lora"] @ module.lora_A["lora"] * lora.method.scale(name)
    want = base.get_submodule(name).weight.index_add(1, module.part_of("a").index, module.slice_delta["a"]) + delta
    x = torch.randn(5, module.in_features)
    expected = torch.nn.functional.linear(x, want, module.bias)
    for states in ((True, False), (True, True), (False, True), (False, False)):
        for handle, merged in zip((a, lora), states, strict=True):
            handle.merge() if merged else handle.unmerge()
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
        with lora.disabled():
            sliced = want - delta
            torch.testing.assert_close(module(x), torch.nn.functional.linear(x, sliced, module.bias), rtol=1e-4, atol=1e-5)
        with lora.disabled(), a.disabled():
            assert torch.equal(module(x), base.get_submodule(name)(x)), "the base's bits"
    trained = [*lora.parameters(), *a.parameters()]
    model(input_ids=X, labels=X).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in trained)


def test_two_slices_of_one_weight_add_up():
    model = llama()
    base = copy.deepcopy(model)
    a, b = attached(model, "a", down_ratio=0.5), attached(model, "b", seed=4, units=1, down_ratio=0.5)
    both = logits(model)
    for name in a.targets.keys() & b.targets.keys():
        module = a.targets[name]
        want = base.get_submodule(name).weight
        for handle in (a, b):
            want = want.index_add(1, module.part_of(handle.name).index, module.slice_delta[handle.name])
        torch.testing.assert_close(module.weight, want, rtol=1e-6, atol=1e-6)
    train(model, a, steps=1, lr=1e-6)
    torch.testing.assert_close(logits(model), both, rtol=1e-3, atol=1e-3)
    assert a.targets and "write_slice_" in _ops(lambda: train(model, a, steps=1))
    a.detach(), b.detach()
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


def _ops(f):
    with fastft.testing.record() as calls:
        f()
    return {call.op for call in calls}


@pytest.mark.filterwarnings("ignore::fastft.testing.FallbackWarning")  # float64 is the reference's
def test_the_model_shows_the_pretrained_base():
    """state_dict, deepcopy, pickle, .to() and load_state_dict: never a delta twice."""
    import pickle

    model = llama()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    handle = attached(model, **ALL)
    y, state = logits(model), model.state_dict()
    for key, value in base.items():
        assert torch.equal(state[key], value), key
    assert torch.equal(logits(copy.deepcopy(model)), y)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), y)
    other = llama(seed=9)
    attached(other, seed=None, **ALL)
    other.load_state_dict(state)
    assert torch.equal(logits(other), y)
    model.to(torch.float64).to(torch.float32)
    assert torch.equal(logits(model), y)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert {p.dtype for p in fastft.methods.handles(half)["default"].parameters()} == {torch.float32}
    for name, module in fastft.methods.handles(half)["default"].targets.items():
        part = module.part_of("default")
        want = take(handle, name, base[f"{name}.weight"]).bfloat16().float() + handle.targets[name].slice_delta["default"]
        assert torch.equal(module.weight.index_select(part.dim(), part.index), want.bfloat16())
    handle.detach()
    for key, value in base.items():
        assert torch.equal(model.state_dict()[key], value)


def test_loading_other_units_moves_the_slices():
    model, other = llama(), llama()
    base = copy.deepcopy(model)
    attached(model, units=1, multiple=2), attached(other, units=0, multiple=2)
    ours, theirs = (fastft.methods.handles(m)["default"] for m in (model, other))
    if ours.method.chosen != theirs.method.chosen:
        pytest.skip("the two seeds give the layers different numbers")
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model), logits(other))
    ours.detach()
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_disabled_between_forward_and_backward_matches_two_models():
    model = llama()
    base, handle = copy.deepcopy(model), attached(model)
    policy = copy.deepcopy(model)
    out = model(X).logits.log_softmax(-1)
    with torch.no_grad(), handle.disabled():
        reference = model(X).logits.log_softmax(-1)
    assert torch.equal(reference, logits(base).log_softmax(-1)), "the base's bits"
    torch.nn.functional.logsigmoid(out - reference).mean().backward()
    torch.nn.functional.logsigmoid(policy(X).logits.log_softmax(-1) - reference).mean().backward()
    for one, two in zip(handle.parameters(), fastft.methods.handles(policy)["default"].parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


def test_writing_between_forward_and_backward_is_noticed():
    model = llama()
    a, b = attached(model, "a"), attached(model, "b", units=1)
    loss = model(input_ids=X, labels=X).loss
    a.switch(), b.switch()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_merge_and_unload_gives_a_plain_model():
    model = llama()
    kept = attached(model, "kept", units=1)
    handle = attached(model, **ALL)
    y = logits(model)
    handle.merge_and_unload()
    torch.testing.assert_close(logits(model), y, rtol=1e-5, atol=1e-6)
    kept.merge_and_unload()
    torch.testing.assert_close(logits(model), y, rtol=1e-5, atol=1e-6)
    assert all(type(m) is torch.nn.Linear for n, m in model.named_modules() if n.endswith("proj"))


def test_merge_and_unload_of_an_inactive_adapter():
    model = llama()
    handle = attached(model, **ALL)
    randomize(handle)
    y = logits(model)
    handle.set_active(False)
    assert not torch.allclose(logits(model), y)
    handle.merge_and_unload()
    torch.testing.assert_close(logits(model), y, rtol=1e-5, atol=1e-6)


def test_compiles_without_graph_breaks():
    model = llama(num_hidden_layers=1)
    attached(model)
    y = logits(model)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(X).logits, y)


def test_presets_and_refused_options():
    assert fastft.S2FT.preset("llama-3-8b").ratios() == {"down": 0.03}
    assert fastft.S2FT.preset("llama-2-7b", multiple=64).ratios() == {"down": 0.02, "o": 0.052}
    for options, message in (
        ({"down_ratio": 1.5}, "down_ratio=1.5"),
        ({"down_ratio": 0.0}, "nothing would train"),
        ({"select": "best"}, "random, weight"),
        ({"multiple": 0}, "multiple=0"),
        ({"allow_tied_weights": True}, "in place"),
    ):
        with pytest.raises(ValueError, match=message):
            fastft.S2FT(**options)
    with pytest.raises(ValueError, match="llama-3-8b"):
        fastft.S2FT.preset("gpt-5")


def test_refused_models():
    model = llama()
    before = snapshot(model)
    for method, message in (
        (fastft.S2FT(target_modules=["q_proj"]), "no slice is asked for"),
        (fastft.S2FT(select="activation"), "calibration"),
        (fastft.S2FT(down_ratio=1e-4), "ratio"),
    ):
        with pytest.raises(ValueError, match=message):
            fastft.attach(model, method)
    assert_same(before, snapshot(model))
    with pytest.raises(ValueError):
        fastft.attach(torch.nn.Sequential(torch.nn.Linear(4, 4)), fastft.S2FT())
    down = model.model.layers[1].mlp.down_proj
    down.weight.data = down.weight.data.t().contiguous().t()
    with pytest.raises(ValueError, match="make it contiguous"):
        fastft.attach(model, fastft.S2FT(down_ratio=1.0))
    assert type(down) is torch.nn.Linear
    down.weight.data = down.weight.data.contiguous()
    model.model.layers[0].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    with pytest.raises(ValueError, match="shared"):
        fastft.attach(model, fastft.S2FT(down_ratio=0.5))


def test_dora_and_slices_do_not_mix():
    model = llama()
    attached(model, "a")
    with pytest.raises(ValueError, match="don't mix"):
        fastft.attach(model, fastft.LoRA(target_modules=["down_proj"], use_dora=True), "dora")
    model = llama()
    fastft.attach(model, fastft.LoRA(target_modules=["down_proj"], use_dora=True), "dora")
    with pytest.raises(ValueError, match="don't mix"):
        attached(model, "a")


def test_our_ops_ran():
    model = llama()
    handle = attached(model, **ALL)
    optimizer = handle.optimizer(lr=1e-3)
    ran = _ops(lambda: train(model, handle, steps=1, optimizer=optimizer))
    assert {"gather_columns", "slice_adamw_"} <= ran
    handle.unmerge()
    many = tokens(rows=4)
    with torch.no_grad():
        assert {"gather_columns", "scatter_add_columns_"} <= _ops(lambda: model(many))
