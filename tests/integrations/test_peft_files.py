"""Adapters travel between fastft and PEFT in both directions, and give the same logits on both sides."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastft
from tests.methods.models import gpt2, llama, randomize, tokens, transformers

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore::FutureWarning")

OPTIONS = [  # in Llama's names
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": "all-linear", "r": 3, "lora_alpha": 5, "use_rslora": True},
    {"target_modules": None},
    {"target_modules": r".*(q_proj|down_proj)", "lora_dropout": 0.2},
    {"target_modules": "all-linear", "bias": "lora_only"},
    {"target_modules": "all-linear", "bias": "all"},
    {
        "target_modules": "all-linear",
        "exclude_modules": ["up_proj"],
        "rank_pattern": {"down_proj": 2, "0.*q_proj": 5},
        "alpha_pattern": {"q_proj": 7},
    },
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "init_lora_weights": "gaussian"},
    {"target_modules": ["q_proj"], "modules_to_save": ["norm", "mlp"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["norm", "layernorm"], "bias": "all"},
    {"target_modules": "all-linear", "use_dora": True, "r": 3, "lora_alpha": 5},
    {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "use_rslora": True, "bias": "lora_only"},
    {"target_modules": "all-linear", "lora_bias": True},
    {"target_modules": ["v_proj", "up_proj"], "lora_bias": True, "bias": "lora_only"},
]
GPT2 = {"q_proj": "c_attn", "v_proj": "attn.c_proj", "down_proj": "mlp.c_proj", "up_proj": "c_fc", "norm": "ln_f"}
GPT2["layernorm"] = "ln_1"


def translated(value):
    """Options in GPT-2's names."""
    if isinstance(value, str):
        return re.sub("|".join(sorted(GPT2, key=len, reverse=True)), lambda found: GPT2[found[0]], value)
    if isinstance(value, dict):
        return {translated(key): translated(item) for key, item in value.items()}
    return [translated(item) for item in value] if isinstance(value, list) else value


CASES = [
    pytest.param(make, translated(options) if make is gpt2 else options, id=f"{name}-{number}")
    for name, make in (("llama", llama), ("gpt2", gpt2), ("bfloat16", lambda: llama().bfloat16()))
    for number, options in enumerate(OPTIONS)
]


def logits(model):
    with torch.no_grad():
        return model.eval()(tokens()).logits


def randomized_peft(model, **options):
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.5)
    return model


def check(one, two, plain):
    """Equal within rounding: float32's far below what the adapter changes, bfloat16's a few units in the last place."""
    error = (one - two).float().norm()
    assert torch.isfinite(one).all()
    if one.dtype == torch.float32:
        assert error <= 1e-3 * (two - plain).norm()
    else:
        assert error <= 2**-5 * two.float().norm()  # (PEFT's own error beside float32 reaches 2**-5.3, with a bias on B)


@pytest.mark.parametrize(("make", "options"), CASES)
def test_what_peft_saves_loads_here(make, options, tmp_path):
    theirs = randomized_peft(make(), **options)
    theirs.save_pretrained(tmp_path)
    ours = make()
    plain = logits(ours)
    handle = fastft.load(ours, tmp_path)
    check(logits(ours), logits(theirs), plain)
    with handle.disabled():
        assert torch.equal(logits(ours), plain)
    merged = logits(theirs.merge_and_unload())
    check(logits(handle.merge_and_unload()), merged, plain)


@pytest.mark.parametrize(("make", "options"), CASES)
def test_what_we_save_loads_in_peft(make, options, tmp_path, recwarn):
    ours = make()
    plain = logits(ours)
    handle = fastft.attach(ours, fastft.LoRA(**options))
    randomize(handle, std=0.5)
    handle.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    assert not [str(w.message) for w in recwarn if "missing" in str(w.message) or "Unexpected" in str(w.message)]
    check(logits(ours), logits(theirs), plain)
    # and back: PEFT writes the tensors that we wrote (it adds copies of biases that it does not read again)
    theirs.save_pretrained(tmp_path / "theirs")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert {key for key in two if "original_module" not in key and "modules_to_save" not in key} == set(one)
    for key, value in one.items():
        assert torch.equal(value, two[key]), key
    again = make()
    fastft.load(again, tmp_path / "theirs")
    assert torch.equal(logits(again), logits(ours))


def test_the_config_has_pefts_keys_only(tmp_path):
    fastft.attach(llama(), fastft.LoRA(target_modules=["q_proj"])).save(tmp_path / "ours")
    peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    assert set(ours) <= set(theirs)
    different = {key: (value, theirs[key]) for key, value in ours.items() if value != theirs[key]}
    assert not different


def task_model(task):
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
        pad_token_id=0,
    )

    kinds = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification", "QUESTION_ANS": "QuestionAnswering"}
    torch.manual_seed(0)
    return getattr(transformers, f"LlamaFor{kinds[task]}")(config).eval()


def test_saved_from_a_task_model(tmp_path):
    theirs = randomized_peft(task_model("SEQ_CLS"), task_type="SEQ_CLS", target_modules="all-linear")
    theirs.save_pretrained(tmp_path)
    ours = task_model("SEQ_CLS")
    handle = fastft.load(ours, tmp_path)
    assert "score.modules_to_save.default.weight" in dict(handle.named_parameters())
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("task", "head"), [("SEQ_CLS", "score"), ("TOKEN_CLS", "score"), ("QUESTION_ANS", "qa_outputs")])
def test_heads_of_tasks_train_as_pefts_do(tmp_path, task, head):
    ours, loaded = task_model(task), task_model(task)
    handle = fastft.attach(ours, fastft.LoRA(target_modules=["q_proj"], task_type=task))
    whole = peft.get_peft_model(task_model(task), peft.LoraConfig(target_modules=["q_proj"], task_type=task))
    assert len(list(handle.parameters())) == sum(p.requires_grad for p in whole.parameters())
    assert head in {name.split(".modules_to_save")[0] for name, _ in handle.named_parameters()}
    randomize(handle)
    handle.save(tmp_path)
    fastft.load(loaded, tmp_path)
    with torch.no_grad():
        models = ours, loaded, peft.PeftModel.from_pretrained(task_model(task), tmp_path)
        want, *others = (dict(model(input_ids=tokens(), use_cache=False)) for model in models)
    for one in others:
        torch.testing.assert_close(one, want, rtol=1e-5, atol=1e-5)


def test_a_model_with_pefts_adapters_is_refused():
    whole = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    for targets in ("all-linear", ["v_proj"]):
        with pytest.raises(
            ValueError, match=r"holds adapters of PEFT's \(at 'base_model.model.model.layers.0.self_attn.q_proj'"
        ):
            fastft.attach(whole, fastft.LoRA(target_modules=targets))
    fastft.attach(whole.unload(), fastft.LoRA(target_modules="all-linear"))


def test_tied_heads_that_peft_trained_come_apart_on_loading(tmp_path):
    def make():
        return llama(tie_word_embeddings=True)

    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    with pytest.warns(UserWarning):
        theirs = randomized_peft(make(), **options)
    theirs.save_pretrained(tmp_path)
    ours = make()
    handle = fastft.load(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="shared with"):
        handle.merge_and_unload()
    handle.merge()  # of q_proj alone, which shares nothing
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


def test_what_peft_adds_for_resized_embeddings_is_refused(tmp_path):
    """PEFT writes whole embeddings beside the adapter then, which replace the base's."""
    randomized_peft(llama(), target_modules=["q_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "base_model.model.model.embed_tokens.weight": torch.ones(60, 16)}, path)
    with pytest.raises(fastft.methods.AdapterFileError, match=r"not expected .*embed_tokens"):
        fastft.load(llama(), tmp_path)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
)
def test_options_of_peft_that_are_refused_by_name(options, name, tmp_path):
    peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["v_proj"], **options)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=name):
        fastft.load(llama(), tmp_path)
