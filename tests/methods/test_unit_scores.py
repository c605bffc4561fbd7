"""Scores of units: each selector does what its formula says, finds a planted answer, and leaves the model as it was."""

import pytest
import torch
from torch import nn

import fastft
from fastft.methods import selection
from fastft.methods.selection import ROLES, SELECTORS, choose, unit_scores
from fastft.methods.units import Coupled, coupled_units

from .models import assert_same, gpt2, llama, snapshot, tokens, transformers

BY_CALIBRATION = ("activation", "product", "gradient")


def batches(labels=True):
    made = []
    for seed in (1, 2):
        ids = tokens(seed=seed)
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        made.append(
            {"input_ids": ids, "attention_mask": mask, **({"labels": ids.masked_fill(mask == 0, -100)} if labels else {})}
        )
    return made


def score(model, ratios, select, calibration=None):
    structures = coupled_units(model, by_group=True)
    return structures, unit_scores(model, structures, ratios, select, batches() if calibration is None else calibration)


ALL = dict.fromkeys(ROLES, 0.1)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_scores_are_what_their_formulas_say(build):
    model = build()
    ratios = {role: ratio for role, ratio in ALL.items() if role != "gate"}
    weights, inputs, grads = {}, {}, {}
    structures = coupled_units(model, by_group=True)
    for s in structures:
        for role in s.slices:
            module = model.get_submodule(s.slices[role].module)
            weights[s.key, role] = module
    reads = {s.key: weights[s.key, "down" if s.family == "ffn" else "o"] for s in structures}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, key=key: inputs.setdefault(key, []).append(args[0].detach()))
        for key, module in reads.items()
    ]
    model.eval()
    for batch in batches():
        model.zero_grad()
        model(**batch).loss.backward()
        for place, module in weights.items():
            grads.setdefault(place, []).append(module.weight.grad.clone())
    model.zero_grad()
    for hook in hooks:
        hook.remove()

    def part(tensor, slice, unit):
        tensor = tensor.t() if build is gpt2 else tensor
        at = slice.features(torch.tensor([unit]))
        return (tensor[at] if slice.kind == "rows" else tensor[:, at]).double().square().sum()

    tokens_kept = [batch["attention_mask"].bool() for batch in batches()]
    measured = {select: unit_scores(model, structures, ratios, select, batches()) for select in SELECTORS}
    assert measured.pop("random") is None
    for s in structures:
        asked = {role: slice for role, slice in s.slices.items() if role in ratios}
        read = s.read_out
        x = torch.cat([x[kept] for x, kept in zip(inputs[s.key], tokens_kept)]).double()
        for unit in {0, s.count // 2, s.count - 1}:
            weight = sum(part(weights[s.key, role].weight, slice, unit) for role, slice in asked.items()).sqrt()
            gradient = sum(part(g, slice, unit) for role, slice in asked.items() for g in grads[s.key, role]).sqrt()
            activation = x[:, read.features(torch.tensor([unit]))].square().sum(1).mean().sqrt()
            want = {"weight": weight, "activation": activation, "product": weight * activation, "gradient": gradient}
            for select, value in want.items():
                assert measured[select][s.key].dtype == torch.float32
                torch.testing.assert_close(measured[select][s.key][unit].double(), value, rtol=1e-4, atol=0, msg=select)


def test_each_selector_finds_what_was_planted():
    model = llama(hidden_act="relu")
    first, second = (layer.mlp for layer in model.model.layers)
    with torch.no_grad():
        first.down_proj.weight[:, 5] *= 50  # a large weight that reads nothing
        first.gate_proj.bias[5] = -1e4
        second.gate_proj.bias[7], second.up_proj.bias[7] = 30.0, 30.0  # a large activation that nothing reads
        second.down_proj.weight[:, 7] = 0
        first.gate_proj.bias[9], first.up_proj.bias[9] = 4.0, 4.0  # the largest product
        first.down_proj.weight[:, 9] *= 20
    for select, module, unit in (
        ("weight", "model.layers.0.mlp.down_proj", 5),
        ("activation", "model.layers.1.mlp.down_proj", 7),
        ("product", "model.layers.0.mlp.down_proj", 9),
        ("gradient", "model.layers.1.mlp.down_proj", 7),
    ):
        structures, scores = score(model, {"down": 0.02}, select)
        options = {"multiple": 1, "seed": 0}
        best = choose(structures, {"down": 0.02}, scores, largest=True, **options)
        assert best.keys() == {module} and best[module].tolist() == [unit], select
        worst = choose(structures, {"down": 0.98}, scores, largest=False, **options)
        assert unit not in worst[module] and sum(map(len, worst.values())) == 47


def test_a_gradient_flows_through_one_unit():
    model = gpt2()
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        model.transformer.h[0].mlp.c_proj.weight[11] = torch.randn(16)  # of Conv1D a row is a column
        model.transformer.h[1].attn.c_proj.weight[8:] = torch.randn(8, 16)
    _, scores = score(model, {"up": 0.1, "v": 0.1}, "gradient")
    assert {key: value.nonzero().flatten().tolist() for key, value in scores.items()} == {
        "transformer.h.0.mlp:ffn": [11],
        "transformer.h.1.mlp:ffn": [],
        "transformer.h.0.attn:attention": [],
        "transformer.h.1.attn:attention": [1],
    }


def test_only_the_families_asked_for_are_scored():
    _, scores = score(llama(), {"o": 0.5, "down": 0.0}, "activation")
    assert [(key.rsplit(":")[1], value.shape) for key, value in scores.items()] == [("attention", (1,))] * 2


def test_read_outs_of_narrowed_structures():
    model = llama()
    whole, scores = score(model, {"up": 0.5}, "activation")
    narrowed = [Coupled(s.name, s.family, s.count, {"up": s.slices["up"]}, s.read_out) for s in whole if s.family == "ffn"]
    again = unit_scores(model, narrowed, {"up": 0.5}, "activation", batches())
    assert all(torch.equal(again[key], value) for key, value in scores.items()) and len(scores) == 2


def test_padding_does_not_count():
    model = llama()
    whole = [{"input_ids": tokens()[:, :5]}]
    padded = [{"input_ids": tokens(), "attention_mask": (torch.arange(7) < 5).long().expand(2, 7)}]
    _, want = score(model, ALL, "activation", whole)
    for calibration in (padded, [(tokens()[:, :5],)], [tokens()[:, :5]], iter(whole)):
        _, scores = score(model, ALL, "activation", calibration)
        for key, value in want.items():
            torch.testing.assert_close(scores[key], value)


def test_an_encoder_decoders_masks():
    config = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**config))
    mask = (torch.arange(7) < 5).long().expand(2, 7)
    plain = {"input_ids": tokens()[:, :5], "decoder_input_ids": tokens(seed=1)[:, :5]}
    masks = {"attention_mask": mask, "decoder_attention_mask": mask}
    both = {"input_ids": tokens(), "decoder_input_ids": tokens(seed=1), **masks}
    _, want = score(model, ALL, "activation", [plain])
    _, scores = score(model, ALL, "activation", [both])
    for key, value in want.items():
        torch.testing.assert_close(scores[key], value)


def assert_untouched(model, call):
    parameters = list(model.parameters())
    for i, parameter in enumerate(parameters):
        parameter.requires_grad_(i % 3 > 0)
        parameter.grad = torch.full_like(parameter, i) if i % 2 and parameter.requires_grad else None
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: pytest.fail("a hook of the user's parameter ran"))
    model.train()
    model.model.layers[0].eval()
    grads = [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in parameters]
    before, modes = snapshot(model), [m.training for m in model.modules()]
    hooks = [list(p._post_accumulate_grad_hooks or ()) for p in parameters]
    call()
    assert_same(before, snapshot(model))
    assert modes == [m.training for m in model.modules()] and torch.is_grad_enabled()
    assert hooks == [list(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    for parameter, grad in zip(parameters, grads):
        assert (parameter.grad is None) == (grad is None)
        if grad is not None:
            assert id(parameter.grad) == grad[0] and torch.equal(parameter.grad, grad[1])


@pytest.mark.parametrize("select", SELECTORS)
def test_the_model_is_left_as_it_was(select):
    model = llama(attention_dropout=0.5)
    assert_untouched(model, lambda: score(model, ALL, select))


@pytest.mark.parametrize("select", BY_CALIBRATION)
def test_the_model_is_left_as_it_was_after_an_error(select):
    model = llama()

    def fail(calibration, error):
        with pytest.raises(error):
            score(model, ALL, select, calibration)

    wrong = {"input_ids": tokens(), "labels": tokens()[:, :3]} if select == "gradient" else {"input_ids": None}
    assert_untouched(model, lambda: fail([*batches(), wrong], ValueError))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.bias[3] = torch.inf  # found in the first batch
    assert_untouched(model, lambda: fail(batches(), ValueError))


def test_one_dense_gradient_at_a_time(monkeypatch):
    model, seen, plain = llama(), [], selection._norms

    def norms(module, tensor, slice, count):
        seen.append(slice.module)
        assert all(p.grad is None for p in model.parameters())
        assert [n for n, p in model.named_parameters() if p.requires_grad] == asked
        return plain(module, tensor, slice, count)

    monkeypatch.setattr(selection, "_norms", norms)
    asked = [f"model.layers.{i}.mlp.{name}_proj.weight" for i in range(2) for name in ("up", "down")]
    score(model, {"down": 0.1, "up": 0.1}, "gradient")
    assert sorted(seen) == sorted(2 * [name.removesuffix(".weight") for name in asked])


def test_scores_under_an_adapter():
    model = llama()
    _, want = score(model, ALL, "gradient")
    handle = fastft.attach(model, fastft.LoRA(r=2, target_modules="all-linear"))  # whose B is zero
    _, scores = score(model, ALL, "gradient")
    for key, value in want.items():
        torch.testing.assert_close(scores[key], value)
    assert all(p.grad is None for p in handle.parameters())


class Scalar(nn.Module):
    """Positional arguments, and a scalar in place of an output with a loss."""

    def __init__(self, depends=True):
        super().__init__()
        self.up_proj, self.down_proj, self.depends = nn.Linear(4, 6), nn.Linear(6, 4), depends

    def forward(self, x, y):
        return (self.down_proj(self.up_proj(x).relu()) - y).square().mean() if self.depends else (x - y).square().sum()


@pytest.mark.parametrize("select", ["activation", "gradient"])
def test_positional_batches(select):
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    _, scores = score(Scalar(), {"down": 0.5}, select, [(x, y), [x, y]])
    assert scores[":ffn"].shape == (6,) and scores[":ffn"].count_nonzero()


@pytest.mark.parametrize("select", BY_CALIBRATION)
def test_refused_calibrations(select):
    model, pair = Scalar(), (torch.randn(3, 4), torch.randn(3, 4))
    structures = coupled_units(model, by_group=True)

    def refuse(error, message, calibration, ratios={"down": 0.5}, model=model):  # noqa: B006
        with pytest.raises(error, match=message):
            unit_scores(model, structures, ratios, select, calibration)

    refuse(ValueError, f"select='{select}' needs calibration", None)
    refuse(ValueError, "calibration has no batches", [])
    refuse(TypeError, "calibration is a dict; put the one batch into a list", {"x": pair[0], "y": pair[1]})
    refuse(TypeError, "a calibration batch is a str", ["xy"])
    refuse(ValueError, "'down_proj' are not finite", [(torch.full((3, 4), torch.inf), pair[1])])
    other = "depends on none of the layers" if select == "gradient" else "no token of the calibration reaches 'down_proj'"
    refuse(ValueError, other, [pair], model=Scalar(depends=False))


def test_refused_scores():
    model = llama()
    with pytest.raises(ValueError, match="select='size' is not supported; supported: random, weight"):
        score(model, ALL, "size")
    with pytest.raises(ValueError, match="no scalar loss for a calibration batch; do the batches have labels"):
        score(model, ALL, "gradient", batches(labels=False))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.inf
    with pytest.raises(ValueError, match="'model.layers.1.mlp.up_proj' are not finite"):
        score(model, ALL, "weight")
    mask = torch.ones(2, 1, 7, 7)
    mask[..., 3:] = 0
    with pytest.raises(ValueError, match=r"'.*' reads .* doesn't tell the padding; calibrate with batches that have none"):
        score(model, ALL, "activation", [{"input_ids": tokens(), "attention_mask": mask}])
