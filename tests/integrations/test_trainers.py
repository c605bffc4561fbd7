"""Trainers as they are: transformers' Trainer, TRL's SFTTrainer and DPOTrainer; attached and accelerated PEFT models."""

import random
from pathlib import Path

import pytest
import torch

import fastft
from tests.methods.models import llama

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

ROWS = [{"input_ids": ids, "labels": ids} for i in range(24) for ids in [random.Random(i).choices(range(5), k=8)]]
TOKENIZER = Path(__file__).parents[2] / "demo" / "model"
WORDS = ["the", "file", "is", "read", "once", "and", "its", "lines", "are", "kept", "in", "a", "list"]
TEXTS = [" ".join(random.Random(i).choices(WORDS, k=9)) for i in range(12)]
PAIRS = [{"prompt": t[:12], "chosen": t[12:], "rejected": " ".join(WORDS[:4])} for t in TEXTS]

KINDS = ("attached", "accelerated", "PEFT")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(kind, base=llama, **options):
    """(model, what trains in it, handle): the same numbers for every kind."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(base(), config)
    handle = None
    if kind == "attached":
        values = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if "lora_" in name}
        model = base()
        handle = fastft.attach(model, fastft.LoRA(r=4, lora_alpha=8, target_modules="all-linear", **options))
        with torch.no_grad():
            for name, parameter in handle.named_parameters():
                parameter.copy_(values[f"{name}.weight"])
    elif kind == "accelerated":
        fastft.accelerate(model)
    return model, handle


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def arguments(out, kind=transformers.TrainingArguments, **options):
    defaults = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "learning_rate": 5e-2}
    defaults |= {"per_device_train_batch_size": 4, "data_seed": 0, "save_strategy": "no"}
    return kind(output_dir=str(out), **{**defaults, **options})


def losses(trainer):
    return torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log])


def assert_ours(kind, model, calls):
    """Our ops did the layers' work, every time."""
    if kind == "PEFT":
        assert not calls
        return
    assert {call.backend for call in calls} == {"cpu"} and "lora_grad_sb" in {call.op for call in calls}
    if kind == "accelerated":
        found = fastft.report(model).calls
        assert found["fused"] and not found["peft"] and not found["low-rank part"], found


# ---- transformers' Trainer


class StopAt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("kind", ["attached", "accelerated"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_resume_is_bit_for_bit(tmp_path, kind, dropout):
    def run(out, callbacks=(), resume=None):
        model, handle = make(kind, lora_dropout=dropout)
        callbacks = [*callbacks, *([handle.callback()] if handle else [])]
        options = arguments(tmp_path / out, max_steps=6, save_strategy="steps", save_steps=3)
        trainer = transformers.Trainer(model=model, args=options, train_dataset=ROWS, callbacks=callbacks)
        with fastft.testing.record() as calls:
            trainer.train(resume_from_checkpoint=resume)
        assert_ours(kind, model, calls)
        return trainer, trained(model)

    trainer, straight = run("straight")
    assert trainer.state.global_step == 6
    trainer, _ = run("stopped", [StopAt(3)])
    assert trainer.state.global_step == 3
    random.seed(5), torch.manual_seed(5)  # a new process has other generators
    _, resumed = run("stopped", resume=str(tmp_path / "stopped" / "checkpoint-3"))
    assert straight.keys() == resumed.keys() and all(torch.equal(straight[name], resumed[name]) for name in straight)
    fresh = trained(make(kind)[0])
    assert not any(torch.equal(value, fresh[name]) for name, value in straight.items())


def test_all_kinds_train_alike(tmp_path):
    found = []
    for kind in KINDS:
        model, _ = make(kind)
        trainer = transformers.Trainer(model=model, args=arguments(tmp_path, max_steps=4), train_dataset=ROWS)
        trainer.train()
        found.append(losses(trainer))
    assert found[0][-1] < found[0][0] - 0.05
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


# ---- TRL


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(scope="module")
def base(tokenizer):
    """Makes a model of the tokenizer's vocabulary."""
    return lambda: llama(
        vocab_size=len(tokenizer), max_position_embeddings=64, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )


def test_sft_trainer(tmp_path, tokenizer, base):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    found = []
    for kind in KINDS:
        model, _ = make(kind, base)
        options = arguments(tmp_path, trl.SFTConfig, max_steps=4, max_length=32)
        trainer = trl.SFTTrainer(model, options, train_dataset=rows, processing_class=tokenizer)
        with fastft.testing.record() as calls:
            trainer.train()
        assert_ours(kind, model, calls)
        found.append(losses(trainer))
    assert found[0][-1] < found[0][0] - 0.05
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-3)


def preferences(tmp_path, tokenizer, model, ref_model=None, after=None, **options):
    """(losses, margins of the rewards, trainer) of DPO. `after`: what is done to the trainer before it trains."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(PAIRS)
    peft_config = options.pop("peft_config", None)
    options = arguments(tmp_path, trl.DPOConfig, max_steps=4, max_length=32, **options)
    more = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": peft_config}
    trainer = trl.DPOTrainer(model, ref_model, options, **more)
    if after:
        after(trainer)
    trainer.train()
    margins = [log["rewards/margins"] for log in trainer.state.log_history if "rewards/margins" in log]
    return losses(trainer), torch.tensor(margins), trainer


def assert_same_preferences(found, expected):
    for one, other in zip(found[:2], expected[:2]):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def peft_alone(tmp_path_factory, tokenizer, base):
    """DPO of PEFT's own model: the reference is its adapter's start, in which B is zero."""
    found = preferences(tmp_path_factory.mktemp("dpo"), tokenizer, make("PEFT", base)[0])
    assert found[0][0] == pytest.approx(0.6931, abs=1e-3) and found[0][-1] < 0.67
    return found


def test_dpo_of_an_accelerated_model(tmp_path, tokenizer, base, peft_alone):
    """TRL copies the adapter to one named "ref" and switches to it for the reference's forward."""
    model, _ = make("accelerated", base)
    with fastft.testing.record() as calls:
        found = preferences(tmp_path, tokenizer, model)
    assert set(model.peft_config) == {"default", "ref"}
    assert_ours("accelerated", model, calls)
    assert_same_preferences(found, peft_alone)


def test_dpo_of_a_model_that_trl_gives_its_adapter(tmp_path, tokenizer, base, peft_alone):
    """`peft_config=`: the model is accelerated after TRL made it; the reference runs with adapters disabled."""
    config = make("PEFT", base)[0].peft_config["default"]
    torch.manual_seed(1)
    with fastft.testing.record() as calls:
        found = preferences(
            tmp_path, tokenizer, base(), peft_config=config, after=lambda trainer: fastft.accelerate(trainer.model)
        )
    model = found[2].model
    assert set(model.peft_config) == {"default"} and "lora_grad_sb" in {call.op for call in calls}
    assert {row.reason for row in fastft.report(model)} == {"last call on PEFT's path: adapters are disabled"}
    assert found[0][0] == pytest.approx(0.6931, abs=1e-3) and found[0][-1] < 0.67


def test_dpo_of_an_attached_model(tmp_path, tokenizer, base, peft_alone):
    model, handle = make("attached", base)
    with fastft.testing.record() as calls:
        found = preferences(tmp_path, tokenizer, model, handle.reference())
    assert_ours("attached", model, calls)
    assert_same_preferences(found, peft_alone)
    plain = base().state_dict()  # and the base, which both models hold, is what it was
    handle.detach()
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())


def test_dpo_with_log_probabilities_of_before(tmp_path, tokenizer, base, peft_alone):
    """An adapter that starts at zero is its own reference before training."""
    model, _ = make("attached", base)
    found = preferences(tmp_path, tokenizer, model, precompute_ref_log_probs=True)
    assert found[2].ref_model is None
    assert_same_preferences(found, peft_alone)
