"""Training on transformers' Trainer: exact continuation, adapter-only checkpoints, evaluation per token, launches."""

import random

import pytest
import torch
from safetensors.torch import load_file

import fastft
from fastft.integrations.transformers import collate, last_checkpoint, make_trainer, progress
from tests.methods.models import llama

transformers = pytest.importorskip("transformers")

ROWS = [{"input_ids": ids, "labels": ids} for i in range(10) for ids in [random.Random(i).choices(range(50), k=4 + i)]]


def make_model(**lora):
    model = llama(pad_token_id=0)
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2, "target_modules": "all-linear", **lora}
    return model, fastft.attach(model, fastft.LoRA(**options))


class StopAt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def make(out, eval_rows=(), callbacks=(), lora=None, **options):
    model, handle = make_model(**(lora or {}))
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(out),
            "use_cpu": True,
            "max_steps": 6,
            "save_steps": 1,
            "per_device_train_batch_size": 4,
            "report_to": "none",
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "disable_tqdm": True,
            "logging_steps": 1,
            "remove_unused_columns": False,
            "include_num_input_tokens_seen": "non_padding",
            **options,
        }
    )
    return handle, make_trainer(model, handle, arguments, ROWS, eval_rows, callbacks=callbacks)


# 10 rows in batches of 4: an epoch is 3 steps
@pytest.mark.parametrize(("stop", "lora"), [(2, {}), (3, {}), (4, {}), (2, {"use_dora": True}), (2, {"lora_bias": True})])
def test_resume_is_bit_for_bit(tmp_path, stop, lora):
    handle, trainer = make(tmp_path / "straight", lora=lora)
    trainer.train()
    handle.save(tmp_path / "expected")
    _, trainer = make(tmp_path / "stopped", callbacks=[StopAt(stop)], lora=lora)
    trainer.train()
    assert trainer.state.global_step == stop
    handle, trainer = make(tmp_path / "stopped", lora=lora)
    random.seed(5), torch.manual_seed(5)  # a new process has other generators
    trainer.train(resume_from_checkpoint=str(last_checkpoint(tmp_path / "stopped")))
    assert trainer.state.global_step == 6
    handle.save(tmp_path / "resumed")
    expected, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("expected", "resumed"))
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)
    assert any(value.abs().max() > 0 for key, value in expected.items() if "lora_B" in key)


def test_checkpoints_hold_the_adapter_only(tmp_path):
    _, trainer = make(tmp_path, max_steps=1)
    trainer.train()
    files = {str(p.relative_to(tmp_path / "checkpoint-1")) for p in (tmp_path / "checkpoint-1").rglob("*") if p.is_file()}
    assert {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "optimizer.pt",
        "trainer_state.json",
    } <= files
    assert not {"model.safetensors", "pytorch_model.bin", "training_args.bin"} & files


def test_interrupted_checkpoints_are_not_resumed(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    _, trainer = make(tmp_path, max_steps=3)
    trainer.train()
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    state = tmp_path / "checkpoint-3" / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    (tmp_path / "checkpoint-2" / "adapter" / "adapter_model.safetensors").unlink()
    assert last_checkpoint(tmp_path).name == "checkpoint-1"


def test_the_best_adapter_is_kept_at_the_end(tmp_path):
    worst = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}  # not the last one
    handle, trainer = make(tmp_path, ROWS, eval_strategy="steps", eval_steps=1, warmup_steps=0, max_steps=4, **worst)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best != str(tmp_path / "checkpoint-4") and trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    handle.save(tmp_path / "kept")
    kept, expected = (load_file(f"{at}/adapter_model.safetensors") for at in (tmp_path / "kept", f"{best}/adapter"))
    assert all(torch.equal(kept[key], expected[key]) for key in expected)


def test_evaluation_is_the_mean_over_tokens(tmp_path):
    _, trainer = make(tmp_path, ROWS, per_device_eval_batch_size=3)
    found = trainer.evaluate()["eval_loss"]
    losses = []
    with torch.no_grad():
        for row in ROWS:
            ids = torch.tensor([row["input_ids"]])
            logits = trainer.model(input_ids=ids).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    assert found == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert trainer.state.log_history[-1]["eval_loss"] == found


def test_a_batch_without_tokens_to_predict_counts_nothing(tmp_path):
    masked = {"input_ids": [1, 2, 3], "labels": [-100] * 3}
    _, trainer = make(tmp_path, [*ROWS[:2], masked], per_device_eval_batch_size=1)
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate(ROWS[:2])["eval_loss"]
    with pytest.raises(ValueError, match="no token to predict"):
        trainer.evaluate([masked])


def test_every_launch_is_counted(tmp_path):
    _, trainer = make(tmp_path, max_steps=2)
    trainer.train()
    linears, inputs = 2 * 7, 2 * 4  # layers x linears in each (q, k, v share an input, gate and up another)
    ops = {op for op, _ in trainer.backends}
    assert {"lora_shrink", "lora_expand_", "lora_grad_sb", "lora_grad_a"} <= ops
    for op, launches in (("lora_shrink", 2 * inputs), ("lora_grad_sb", 2 * linears)):  # a step is a forward and a backward
        assert sum(n for (name, _), n in trainer.backends.items() if name == op) == launches


def test_gradient_checkpointing_gives_the_same_adapter(tmp_path):
    saved = []
    for checkpointing in (False, True):
        handle, trainer = make(tmp_path / str(checkpointing), max_steps=3)
        if checkpointing:
            enable = (
                getattr(trainer.model, "activation_checkpointing_enable", None)
                or trainer.model.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})
        trainer.train()
        saved.append(dict(handle.named_parameters()))
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    handle, trainer = make(tmp_path, logging_nan_inf_filter=False)
    progress(trainer)
    with torch.no_grad():
        next(iter(handle.parameters())).fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        trainer.train()


def test_restore_refuses_another_adapter(tmp_path):
    model, handle = make_model()
    handle.save(tmp_path / "r4")
    handle.detach()
    handle = fastft.attach(model, fastft.LoRA(r=2, target_modules="all-linear"))
    before = {name: value.detach().clone() for name, value in handle.named_parameters()}
    with pytest.raises(ValueError, match="the scale of"):
        handle.restore(tmp_path / "r4")
    after = dict(handle.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert len(fastft.methods.base.handles(model)) == 1


def test_collate_pads_on_the_right():
    batch = collate([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
