"""Which path a call takes, and what is said about it: fallbacks, `report`, `strict` and `check`."""

import copy
import json
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import fastft
from fastft.integrations.peft_check import NOISY_RUNS, CheckError
from fastft.integrations.peft_layers import FallbackError, FastLinear
from tests.integrations.peft_models import (
    K,
    N,
    R,
    accelerated,
    assert_same_step,
    layer,
    one,
    peft,
    peft_llama,
    randomize,
    step,
)
from tests.methods.models import assert_same, llama, snapshot, tokens

X = torch.randn(5, K, generator=torch.Generator().manual_seed(0))


def compare(model, fast, x=X):
    """Outputs and gradients of one call; returns (path, reason) that the report gives."""
    results = []
    for m in (model, fast):
        m.zero_grad(set_to_none=True)
        y = one(m)(x)
        if y.requires_grad:
            y.square().sum().backward()
        results.append((y.detach(), {n: p.grad for n, p in m.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    (row,) = fastft.report(fast)
    return row


class Twice(nn.Linear):
    """A base layer that only it knows how to compute."""

    def forward(self, x):
        return 2 * super().forward(x)


def hooked(lin):
    lin.base_layer.register_forward_hook(lambda module, args, y: 3 * y)


def replaced(lin):
    forward = lin.base_layer.forward
    lin.base_layer.forward = lambda x: forward(x) + 1


def parametrised(lin):
    parametrize.register_parametrization(lin.base_layer, "weight", nn.Softplus())


@pytest.mark.parametrize("change", [hooked, replaced, parametrised], ids=lambda f: f.__name__)
@pytest.mark.parametrize("config", [{}, {"lora_bias": True}, {"adapters": ("default", "b")}, {"use_dora": True}], ids=str)
def test_base_layers_that_compute_themselves(change, config):
    model = layer(**config)
    change(one(model))
    fast = fastft.accelerate(layer(**config))
    change(one(fast))
    row = compare(model, fast)
    if config.get("use_dora") and change is parametrised:
        assert row.path == "peft" and "DoRA on a base layer that computes itself" in row.reason and row.calls["peft"] == 1
    else:
        assert row.path == "low-rank part" and "the base layer is" in row.reason and row.calls["low-rank part"] == 1


def test_other_base_layers():
    model = layer()
    twice = Twice(K, N)
    for m in (model, fast := accelerated(model)):
        one(m).base_layer = twice
    row = compare(model, fast)
    assert (row.path, row.reason) == ("low-rank part", "the base layer is a Twice")
    for kind in (torch.float64, torch.bfloat16):  # outputs of another dtype than the input's

        class Cast(nn.Linear):
            def forward(self, x, kind=kind):
                return super().forward(x).to(kind)

        for m in (model, fast):
            one(m).base_layer = Cast(K, N) if m is model else one(model).base_layer
        with torch.no_grad():
            ours, theirs = one(fast)(X), one(model)(X)
        assert ours.dtype == theirs.dtype == kind
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def hook_factor(lin):
    lin.lora_A["default"].register_forward_hook(lambda module, args, y: 2 * y)


def parametrise_factor(lin):
    parametrize.register_parametrization(lin.lora_B["default"], "weight", nn.Tanh())


def other_dropout(lin):
    lin.lora_dropout["default"] = nn.Sequential(nn.Tanh())


def disable(lin):
    lin.enable_adapters(False)


def nobody(lin):
    lin._active_adapter = []


def test_a_forward_that_was_replaced_on_the_layer():
    """As X-LoRA does: ours is never reached, which the report says, and `strict`; and a mixed batch is PEFT's."""
    model = layer(adapters=("default", "b")).eval()
    forward = one(model).forward
    one(model).forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)
    names = ["default", "b", "__base__", "b", "b"]
    want, mixed = model(X), model(X, adapter_names=names)
    with pytest.raises(FallbackError, match="lin: its forward was replaced on the instance"):
        fastft.accelerate(model, strict=True)
    fastft.accelerate(model)
    assert torch.equal(model(X), want)
    torch.testing.assert_close(model(X, adapter_names=names), mixed)
    (row,) = fastft.report(model)
    assert row.path == "peft" and "its forward was replaced on the instance" in row.reason


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_hooks_of_accelerate(before):
    """They keep the forward that they found. (`dispatch_model` hangs them on every layer.)"""
    hooks = pytest.importorskip("accelerate.hooks")
    model = layer(adapters=("default", "b")).eval()
    names, act = ["default", "b", "__base__", "b", "b"], [fastft.accelerate, fastft.restore]
    want, mixed = model(X), model(X, adapter_names=names)
    act.insert(not before, lambda model: hooks.add_hook_to_module(one(model), hooks.ModelHook()))
    for change in (*act, fastft.accelerate, hooks.remove_hook_from_submodules):
        change(model)
        torch.testing.assert_close(model(X), want)
        torch.testing.assert_close(model(X, adapter_names=names), mixed)
    (row,) = fastft.report(model)
    assert row.path == "fused" and row.calls == {"fused": 2, "low-rank part": 2, "peft": 0}


def test_hooks_of_accelerate_that_are_gone_from_the_base_layer():
    hooks = pytest.importorskip("accelerate.hooks")
    model = layer()
    hooks.add_hook_to_module(one(model).base_layer, hooks.ModelHook())
    hooks.remove_hook_from_submodules(model)  # leaves the forward on the instance
    assert "forward" in one(model).base_layer.__dict__ and compare(model, accelerated(model)).path == "fused"


FALLBACKS = {
    "lora_A or lora_B is hooked": hook_factor,
    "lora_A or lora_B is hooked or no plain Linear": parametrise_factor,
    "dropout is a Sequential": other_dropout,
    "adapters are disabled": disable,
    "no active adapter": nobody,
    "merged into the base weight": lambda lin: lin.merge(),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_fallbacks(reason):
    model = layer()
    FALLBACKS[reason](one(model))
    row = compare(model, accelerated(model))
    assert row.path == "peft" and reason in row.reason and row.calls == {"fused": 0, "low-rank part": 0, "peft": 1}


def test_fallbacks_of_inputs():
    for make, reason in (
        (lambda m, x: (m.double(), x.double()), "the input is float64"),
        (lambda m, x: (m, x.as_subclass(type("Own", (torch.Tensor,), {}))), "the input is a Own"),
        (lambda m, x: (m.to("meta"), x.to("meta")), "the input is on meta"),
    ):
        model, x = make(layer(), X)
        fast = accelerated(model)
        assert one(fast)(x).shape == (5, N)
        (row,) = fastft.report(fast)
        assert reason in row.reason and row.calls["peft"] == 1, row
    fast = fastft.accelerate(layer())
    torch.func.jvp(one(fast), (X,), (X,))
    torch.func.vmap(one(fast))(X)
    torch.jit.trace(one(fast), X, check_trace=False)
    assert fastft.report(fast).calls["fused"] == 0
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module)))
    try:
        one(fast)(X)
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 3
    with pytest.raises(RuntimeError):  # PEFT's own words
        one(fast)(torch.randn(5, K + 1))
    exported = torch.export.export(one(fastft.accelerate(layer())), (X,))
    assert not [node for node in exported.graph.nodes if "fastft" in str(node.target)]


def test_casts_switched_off():
    model = layer(dtype=torch.bfloat16)
    for m in (model, fast := accelerated(model)):
        with peft.helpers.disable_input_dtype_casting(m), pytest.raises(RuntimeError):
            one(m)(X.bfloat16())
    assert fastft.report(fast).calls["peft"] == 1
    assert compare(model, fast, X.bfloat16()).calls["fused"] == 1


def test_variants():
    for config, name in (
        (
            {"velora_config": peft.VeloraConfig(num_groups=4)} if hasattr(peft, "VeloraConfig") else None,
            "VeloraLinearVariant",
        ),
        ({"alora_invocation_tokens": [1]}, "ALoraLinearVariant"),
    ):
        if config is None:
            continue
        model = layer(**config)
        row = compare(model, accelerated(model))
        assert row.path == "peft" and row.reason == f"variant {name}"
    model = layer(init_lora_weights="mica", r=4)
    assert compare(model, accelerated(model)).path == "fused"


def test_dora_with_dropout():
    model = layer(use_dora=True, lora_dropout=0.5).train()
    fast = accelerated(model)
    torch.manual_seed(0)
    want = one(model)(X)
    torch.manual_seed(0)
    assert torch.equal(one(fast)(X), want)
    assert "DoRA with dropout" in fastft.report(fast).rows[0].reason
    assert compare(model.eval(), fast.eval()).path == "fused"


@pytest.mark.parametrize("site", ["second", "first", "alone", "hooked"])
def test_dora_with_a_dropout_module_that_drops_nothing(site):
    """PEFT then leaves what other adapters and hooks add out of its correction, in training alone."""
    adapters = {"second": ("b", "default"), "first": ("default", "b")}.get(site, ("default",))
    model = layer(adapters=adapters, configs={"default": {"use_dora": True, "lora_dropout": 0.5}})
    one(model).lora_dropout["default"].p = 0.0  # as TRL does
    if site == "hooked":
        hooked(one(model))
    fast = accelerated(model)
    left = site in ("second", "hooked")
    assert (compare(model.train(), fast.train()).path == "peft") == left
    assert not left or "DoRA with a dropout module in training" in fastft.report(fast).rows[0].reason
    assert compare(model.eval(), fast.eval()).path != "peft"


def test_dora_after_an_adapter_with_a_bias():
    mixed = {"adapters": ("default", "b"), "configs": {"default": {"lora_bias": True}, "b": {"use_dora": True}}}
    model = layer(**mixed)
    assert "DoRA after an adapter with lora_bias" in compare(model, accelerated(model)).reason


# ---- report


def test_report_of_all_kinds_of_layers():
    class Everything(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.conv, self.lin = nn.Embedding(9, 8), nn.Conv2d(1, 4, 3), nn.Linear(8, 8)
            self.mha, self.config = nn.MultiheadAttention(8, 2), {"model_type": "test"}

    model = peft.get_peft_model(Everything(), peft.LoraConfig(r=2, target_modules=["emb", "conv", "lin", "mha"]))
    before = fastft.report(model)
    assert {row.path for row in before} == {"peft"}
    assert before["base_model.model.lin"].reason == "not accelerated: call fastft.accelerate"
    report = fastft.report(fastft.accelerate(model))
    rows = {row.kind: row for row in report}
    assert report["base_model.model.lin"].path == "fused"
    for kind in ("Embedding", "Conv2d", "MultiheadAttention"):
        assert rows[f"lora.{kind}"].path == "peft" and "left to PEFT" in rows[f"lora.{kind}"].reason
    inner = report["base_model.model.mha.base_layer.out_proj"]
    assert inner.path == "peft" and inner.reason == "lora.MultiheadAttention merges it for each forward"
    with pytest.raises(KeyError, match="is no adapted layer of this model"):
        fastft.report(model)["mha.in_proj"]


def test_report_is_a_table_of_like_layers():
    model = fastft.accelerate(peft_llama())
    step(model)
    report = fastft.report(model)
    assert len(report) == len(list(report)) == 14 and report.calls == {"fused": 14, "low-rank part": 0, "peft": 0}
    lines = str(report).splitlines()
    assert len(lines) == 8 and lines[0].split() == ["layer", "n", "kind", "path", "calls", "reason"]
    assert lines[1].split() == [
        "base_model.model.model.layers.*.self_attn.q_proj",
        "2",
        "lora.Linear",
        "fused",
        "2",
        "fused",
    ]
    hooked(model.base_model.model.model.layers[1].mlp.up_proj)
    line = next(line for line in str(fastft.report(model)).splitlines() if "layers.1.mlp.up_proj" in line)
    assert line.split()[1:5] == ["1", "lora.Linear", "low-rank", "part"] and "the base layer is hooked" in line
    assert len(fastft.report(llama())) == 0


def test_report_of_attached_models():
    model = llama()
    handle = fastft.attach(
        model, fastft.LoRA(r=2, target_modules=["q_proj", "k_proj", "up_proj"], modules_to_save=["lm_head"])
    )
    report = fastft.report(model)
    assert report["model.layers.0.self_attn.q_proj"].path == "fused"
    assert report["model.layers.0.self_attn.q_proj"].reason == "shares its input with model.layers.0.self_attn.k_proj"
    assert report["lm_head"].path == "plain" and len(report) == 7
    with handle.disabled():
        assert {(row.path, row.reason) for row in fastft.report(model)} == {
            ("plain", "adapters are disabled"),
            ("plain", "trained copies of its own tensors"),
        }
    other = fastft.attach(model, fastft.LoRA(r=2, target_modules=["q_proj"]), "other")
    handle.merge()
    report = fastft.report(model)
    for name, path in (("q_proj", "fused"), ("k_proj", "plain")):
        row = report[f"model.layers.0.self_attn.{name}"]
        assert (row.path, row.reason) == (path, "merged: default")
    other.detach()
    handle.detach()
    assert len(fastft.report(model)) == 0


# ---- strict


def test_strict():
    model = fastft.accelerate(peft_llama(lora_dropout=0.1), strict=True).train()
    step(model)
    with model.disable_adapter():  # nothing that we could compute
        model(input_ids=tokens())
    hook = model.base_model.model.model.layers[1].mlp.up_proj.lora_A["default"].register_forward_hook(lambda *a: None)
    with pytest.raises(
        FallbackError, match=r"model.layers.1.mlp.up_proj: lora_A or lora_B is hooked .* strict=True forbids"
    ):
        step(model)
    step(fastft.accelerate(model))
    fastft.accelerate(model, strict=True)
    hook.remove()
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["lm_head"], use_dora=True, lora_dropout=0.1))
    model.set_adapter("b")
    with pytest.raises(FallbackError, match="lm_head: DoRA with dropout"):  # also what came later
        step(model.train())


# ---- check


def test_check_passes_and_leaves_no_trace(capsys):
    for config, batch in (
        ({"lora_dropout": 0.1}, {"input_ids": tokens(), "labels": tokens()}),
        ({"use_dora": True}, lambda model: model(input_ids=tokens(), labels=tokens()).loss * 3),
    ):
        model = peft_llama(**config).train()
        step(model)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        before, state = snapshot(fastft.accelerate(copy.deepcopy(model))), torch.get_rng_state()
        assert fastft.accelerate(model, check=batch) is model
        assert model.training and torch.equal(state, torch.get_rng_state())
        assert all(p.grad is gradients[name] for name, p in model.named_parameters())
        assert snapshot(model)[1] == before[1]
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 12 and ("of 29" in lines[0] or "of 43" in lines[0]), lines[0]
    fastft.accelerate(model, check=batch)  # again, on an accelerated one


def test_check_at_bfloat16_and_under_autocast():
    def loss(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=tokens(), labels=tokens()).loss

    fastft.accelerate(peft_llama(dtype=torch.bfloat16), check={"input_ids": tokens(), "labels": tokens()})
    fastft.accelerate(peft_llama(), check=loss)
    fastft.accelerate(peft.get_peft_model(llama(), peft.LoraConfig(target_modules="all-linear")), check=loss)  # B is zero


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_check_allows_what_peft_rounds_in_adapters_narrower_than_the_base(dtype):
    model = peft_llama()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype if "lora_" in name else parameter.dtype)
    fastft.accelerate(model, check={"input_ids": tokens(), "labels": tokens()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_check_finds_errors(dtype, monkeypatch, capsys):
    model = peft_llama(dtype=dtype)
    before, plain = snapshot(model), FastLinear._commonest

    def wrong(self, x):
        *base, one = plain(self, x)
        return *base, one._replace(scale=one.scale * 1.5) if self._fastft.name.endswith("layers.1.mlp.up_proj") else one

    monkeypatch.setattr(FastLinear, "_commonest", wrong)
    batch = {"input_ids": tokens(), "labels": tokens()}
    with pytest.raises(CheckError, match=r"of 29 differ from PEFT's: .*layers.1.mlp.up_proj.lora_[AB].default.weight by 0"):
        fastft.accelerate(model, check=batch)
    assert "layers.1.mlp.up_proj.lora_" in capsys.readouterr().out.splitlines()[2]
    assert_same(before, snapshot(model))  # restored
    with pytest.raises(ValueError, match="returned no loss"):
        fastft.accelerate(model, check={"input_ids": tokens()})
    assert_same(before, snapshot(model))


class Experts(nn.Module):
    """One linear layer per expert, as models with routed experts have them; `routes`: each row's expert."""

    def __init__(self):
        super().__init__()
        self.experts, self.config = nn.ModuleList(nn.Linear(K, K) for _ in range(3)), {"model_type": "test"}

    def forward(self, x, routes):
        return torch.stack([self.experts[i](row) for i, row in zip(routes, x)]).square().mean()


@pytest.mark.parametrize(
    ("peft_s", "noisy", "ours", "agree"),
    [
        ([0, 1, 1], [0, 0, 1], [0, 1, 1], True),
        ([0, 1, 1], [0, 0, 0], [0, 1, 1], True),  # one gets none in the noise
        ([0, 1, 1], [0, 0, 0], [0, 0, 0], True),
        ([0, 0, 0], [0, 1, 0], [0, 1, 0], True),
        ([0, 1, 1], [0, 1, 1], [0, 0, 0], False),
        ([0, 0, 0], [0, 0, 0], [0, 1, 0], False),
        ([0, 1, 2], [0, 0, 2], [1, 1, 2], False),
    ],
)
def test_check_allows_tokens_that_rounding_sends_to_other_experts(peft_s, noisy, ours, agree, capsys):
    config = peft.LoraConfig(r=R, target_modules=["0", "1", "2"])
    torch.manual_seed(0)
    model = randomize(peft.get_peft_model(Experts(), config))
    routes = iter([peft_s, peft_s, noisy, *[peft_s] * (NOISY_RUNS - 2), ours])
    x = X[[0, 1, 1]]
    with nullcontext() if agree else pytest.raises(CheckError, match=r"in some of the runs only.* sends tokens .*float\(\)"):
        fastft.accelerate(model, check=lambda m: m(x, next(routes)))
    assert next(routes, None) is None


def test_check_needs_what_is_finite():
    model = peft_llama()
    nothing = {"input_ids": tokens(), "labels": torch.full_like(tokens(), -100)}
    with pytest.raises(ValueError, match="PEFT's own loss is nan on this batch, so there is nothing .* another batch"):
        fastft.accelerate(model, check=nothing)
    with pytest.raises(ValueError, match=r"PEFT's own gradients are not finite \(.*lora_A.* and 25 more\) on this batch"):
        fastft.accelerate(model, check=lambda m: (m(input_ids=tokens()).logits * 0).sum().sqrt())


def test_a_batch_that_is_no_good_leaves_an_accelerated_model_so():
    model = fastft.accelerate(peft_llama(), strict=True)
    modules = {module: (type(module), module.__dict__.get("_fastft")) for module in model.modules()}
    with pytest.raises(ValueError, match="returned no loss"):
        fastft.accelerate(model, check={"input_ids": tokens()})
    assert all((type(module), module.__dict__.get("_fastft")) == before for module, before in modules.items())
    step(model)
    assert fastft.report(model).calls["fused"] == 14


def test_usage_of_trainers():
    """The config of an accelerated model is PEFT's (Trainer writes it beside its checkpoints)."""
    model = fastft.accelerate(randomize(peft_llama()))
    json.dumps({name: str(config.to_dict()) for name, config in model.peft_config.items()})
    assert model.get_nb_trainable_parameters() == peft_llama().get_nb_trainable_parameters()
    assert [s.module_type for s in model.get_layer_status()] == ["lora.Linear"] * 14


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_selective_checkpointing(config):
    """It keeps products by reference: nothing may be added to them in place."""
    plain = peft_llama(**config)
    fast = accelerated(plain)
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    options = {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, kept)}
    wanted = step(plain)
    for m in (plain, fast):
        m.train().gradient_checkpointing_enable(options)
        m.enable_input_require_grads()
        assert_same_step(step(m), wanted)
    assert all(row.path == "fused" for row in fastft.report(fast))


def test_a_gradient_penalty_and_a_jacobian():
    plain = layer()
    fast = accelerated(plain)
    found = []
    for m in (plain, fast):
        x = X.clone().requires_grad_()
        (g,) = torch.autograd.grad(m(x).tanh().sum(), x, create_graph=True)
        factors = [p for name, p in m.named_parameters() if "lora_" in name]
        jacobian = torch.autograd.functional.jacobian(m, X, vectorize=True)
        found.append((*torch.autograd.grad(g.square().sum(), factors), jacobian))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    (row,) = fastft.report(fast)
    assert row.path == "fused"


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_dora_follows_a_base_weight_that_an_initialisation_changed(init):
    """PEFT takes what it gives to the adapter from the base, through ``.data``, which no version counts."""
    plain = layer(use_dora=True)
    fast = accelerated(plain)
    for m in (plain, fast):
        m.eval()(X)
        torch.manual_seed(0)
        m.add_adapter("other", peft.LoraConfig(r=R, target_modules=["lin"], init_lora_weights=init))
        m.base_model.set_adapter("default")
    compare(plain, fast)


@pytest.mark.parametrize("swap", ["before the first forward", "after it"])
def test_dora_moves_where_modules_swap_their_parameters(swap):
    plain = layer(use_dora=True)
    fast = accelerated(plain)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap != "after it")
    try:
        for m in (plain, fast):
            m(X)
        torch.__future__.set_swap_module_params_on_conversion(True)
        for m in (plain, fast):
            m.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    torch.testing.assert_close(fast(X.bfloat16()), plain(X.bfloat16()), rtol=2e-2, atol=2e-2)
