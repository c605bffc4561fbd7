"""S²FT on transformers' Trainer as it is, whose checkpoints hold the whole model, and on fastft's Trainer."""

import random

import pytest
import torch

import fastft
from fastft.integrations.transformers import last_checkpoint, make_trainer
from fastft.optim.slice_adamw import SliceAdamW
from tests.methods.models import llama

transformers = pytest.importorskip("transformers")

ROWS = [{"input_ids": ids, "labels": ids} for i in range(16) for ids in [random.Random(i).choices(range(50), k=9)]]
RATIOS = {"down_ratio": 0.2, "o_ratio": 0.5, "up_ratio": 0.1}
# transformers' Trainer with its own AdamW or with the handle's, and fastft's Trainer
KINDS = ("plain", "plain with the handle's", "fastft")


def make(out, kind="plain", stop=None, seed=0, layers=2, **options):
    model = llama(num_hidden_layers=layers)
    handle = fastft.attach(model, fastft.S2FT(**RATIOS, seed=seed))
    callbacks = [StopAt(stop)] if stop else []
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(out),
            "use_cpu": True,
            "max_steps": 6,
            "save_steps": 3,
            "per_device_train_batch_size": 4,
            "report_to": "none",
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "weight_decay": 0.1,
            "disable_tqdm": True,
            "logging_steps": 1,
            "remove_unused_columns": False,
            "data_seed": 0,
            **options,
        }
    )
    if kind == "fastft":
        return handle, make_trainer(model, handle, arguments, ROWS, callbacks=callbacks)
    callbacks.append(handle.callback())
    optimizer = handle.optimizer(lr=1e-2, weight_decay=0.1) if kind == "plain with the handle's" else None
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=ROWS, callbacks=callbacks, optimizers=(optimizer, None)
    )
    return handle, trainer


class StopAt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def weights(handle):
    """What trained: the deltas, and the weights they stand in."""
    deltas = {name: value.detach().clone() for name, value in handle.named_parameters()}
    return deltas, {name: module.weight.detach().clone() for name, module in handle.targets.items()}


def assert_equal(found, expected):
    for one, other in zip(found, expected):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def assert_moved(handle):
    fresh = llama()
    for name, module in handle.targets.items():
        moved = (module.weight != fresh.get_submodule(name).weight).any(dim=module.part_of(handle.name).dim() ^ 1)
        assert moved.nonzero().flatten().tolist() == module.part_of(handle.name).index.tolist(), name


def assert_pristine(model):
    fresh = llama().state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_for_bit(tmp_path, kind):
    straight, trainer = make(tmp_path / "straight", kind)
    trainer.train()
    assert_moved(straight)
    _, trainer = make(tmp_path / "stopped", kind, stop=3)
    trainer.train()
    resumed, trainer = make(tmp_path / "stopped", kind)
    random.seed(5), torch.manual_seed(5)  # a new process has other generators
    trainer.train(resume_from_checkpoint=str(last_checkpoint(tmp_path / "stopped")))
    assert trainer.state.global_step == 6
    assert_equal(weights(resumed), weights(straight))
    resumed.detach()
    assert_pristine(resumed.model)


def test_a_checkpoint_holds_the_pristine_base_and_the_adapter(tmp_path):
    handle, trainer = make(tmp_path, max_steps=3)
    trainer.train()
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert_pristine(base)
    loaded = fastft.load(base, tmp_path / "checkpoint-3" / "adapter")
    assert_equal(weights(loaded), weights(handle))


@pytest.mark.parametrize("kind", ["plain", "fastft"])
def test_the_units_of_a_checkpoint_count(tmp_path, kind):
    """A process that resumes may have chosen others: as many of them, and the checkpoint's replace them; else it is told."""
    straight, trainer = make(tmp_path / "straight", kind, layers=1)
    trainer.train()
    resumed, trainer = make(tmp_path / "straight", kind, layers=1, seed=1)
    name = "model.layers.0.mlp.down_proj"
    units = [handle.targets[name].slice_units["default"].tolist() for handle in (straight, resumed)]
    assert units[0] != units[1]
    trainer.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert resumed.targets[name].slice_units["default"].tolist() == units[0]
    assert_equal(weights(resumed), weights(straight))

    _, trainer = make(tmp_path / "two", kind, max_steps=3)
    trainer.train()
    _, trainer = make(tmp_path / "two", kind, seed=1)
    with pytest.raises((RuntimeError, ValueError), match="size mismatch|the slice of"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-3"))


def test_fastfts_trainer_uses_the_handles_optimizer(tmp_path):
    handle, trainer = make(tmp_path, "fastft", max_steps=2, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is SliceAdamW
    (group,) = optimizer.param_groups
    assert group["betas"] == (0.8, 0.95) and group["eps"] == 1e-6 and group["weight_decay"] == 0.1
    assert group["params"] == list(handle.parameters())
    assert sum(n for (op, _), n in trainer.backends.items() if op == "slice_adamw_") == 2 * len(handle.targets)
    assert [log["learning_rate"] for log in trainer.state.log_history if "loss" in log] == [0.0, 5e-3]


def test_the_trainers_agree(tmp_path):
    found = []
    for kind in KINDS:
        handle, trainer = make(tmp_path / kind, kind, save_strategy="no")
        trainer.train()
        found.append(weights(handle))
    assert_equal(found[1], found[2])
    for one, other in zip(*found[:2]):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "fastft"])
def test_accumulated_gradients_are_those_of_one_batch(tmp_path, kind):
    found = []
    for accumulation in (1, 2):
        handle, trainer = make(
            tmp_path / str(accumulation),
            kind,
            max_steps=3,
            save_strategy="no",
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        found.append(weights(handle))
    for one, other in zip(*found):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "fastft"])
def test_bf16_autocast(tmp_path, kind):
    handle, trainer = make(tmp_path, kind, bf16=True, max_steps=3, save_strategy="no")
    trainer.train()
    assert_moved(handle)
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 3 and all(torch.tensor(losses).isfinite())


def test_gradient_checkpointing_gives_the_same_bits(tmp_path):
    found = []
    for checkpointing in (False, True):
        handle, trainer = make(tmp_path, "fastft", max_steps=2, save_strategy="no")
        if checkpointing:
            model = trainer.model
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        trainer.train()
        found.append(weights(handle))
    assert_equal(*found)
