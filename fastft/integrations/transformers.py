"""Fine-tuning an attached model on transformers' Trainer: checkpoints hold the adapter, not the base.

trainer = make_trainer(model, handle, arguments, train_rows, eval_rows, pad_token_id=tokenizer.pad_token_id)
trainer.train(resume_from_checkpoint=None)
trainer.evaluate()                      # {"eval_loss": mean over every held-out token}
trainer.backends                        # Counter of (op, backend): what ran, launch by launch
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import testing
from ..optim.sparse import SparseSM3

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def peak_memory(device: torch.device) -> int:
    """Peak bytes: what the CUDA allocator held, or on CPU this process's resident set (code and libraries included)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss not inherited from the parent of a fork
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def collate(rows: list[dict[str, list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right: input_ids, attention_mask, labels, each int64 [rows, longest]; padding has label -100."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", pad_token_id), "attention_mask": mask, "labels": padded("labels", -100)}


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint-N in `folder`. Without trainer_state.json, written last, a save was interrupted."""
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name[11:].isdigit() and _complete(p)]
    return max(found, key=lambda p: int(p.name[11:]), default=None)


def _complete(checkpoint: Path) -> bool:
    from transformers import TrainerState

    try:
        TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    except (OSError, ValueError, TypeError):
        return False
    # Without these Trainer would go on with a fresh optimizer, schedule or generator and say nothing.
    files = ["optimizer.pt", "scheduler.pt", *(f"adapter/{name}" for name in ADAPTER_FILES)]
    return all((checkpoint / name).is_file() for name in files) and any(checkpoint.glob("rng_state*.pth"))


def finish(trainer, checkpoint: Path) -> None:
    """Bring `trainer` to the end of a run whose last step `checkpoint` holds. Trainer itself would train one step more."""
    from transformers import TrainerState

    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def check_finite(handle, step: int) -> None:
    """Raise FloatingPointError if anything that trains is not finite: such an adapter is not to replace an earlier one."""
    for name, value in handle.named_parameters():
        if not torch.isfinite(value).all():
            raise FloatingPointError(diverged(f"{name} of the adapter has values that are not finite at step {step}"))


def diverged(what: str) -> str:
    return f"{what}; try a lower --lr, a longer --warmup or --dtype float32"


@contextmanager
def adapters_acknowledged(model):
    """Make a Trainer of an attached quantised model inside: Trainer refuses to train one on which it sees no adapters, and
    it knows PEFT's only. (Outside, the model has to be saved as what it is, a base without PEFT's adapters.)"""
    unseen = getattr(model, "is_quantized", False) and not getattr(model, "_hf_peft_config_loaded", False)
    if unseen:
        model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        if unseen:
            del model._hf_peft_config_loaded


def make_trainer(model, handle, arguments, train_rows, eval_rows=(), *, pad_token_id: int = 0, callbacks=()) -> Any:
    """A transformers Trainer over the attached `model`.

    Args:
        model: a transformers model with `handle` attached.
        arguments: transformers.TrainingArguments.
        train_rows, eval_rows: [{"input_ids": list[int], "labels": list[int]}].

    It differs from Trainer in five ways: a checkpoint holds the adapter (checkpoint-N/adapter) and no base weights; of an
    adapter that is not finite none is written (FloatingPointError); the evaluation loss is the mean over tokens, not over
    batches; launches are counted in `backends`; where slices or entries of the weights train, AdamW is the handle's own,
    which decays all that trains (see `own_optimizer`).
    """
    from transformers import Trainer

    class AdapterTrainer(Trainer):
        backends: Counter
        seconds_evaluating = 0.0

        def create_optimizer(self, model=None):
            adamw = self.args.optim in ("adamw_torch", "adamw_torch_fused")
            if self.optimizer is None and adamw and handle.method.trains_merged:
                self.optimizer = own_optimizer(handle, self.args)
                self._count_launches(self.optimizer)
            return super().create_optimizer(model)

        def _count_launches(self, optimizer):
            step = ExitStack()

            def begin(*_):
                calls = step.enter_context(testing.record())
                step.callback(lambda: self.backends.update((call.op, call.backend) for call in calls))

            optimizer.register_step_pre_hook(begin)
            optimizer.register_step_post_hook(lambda *_: step.close())

        def training_step(self, *args, **kwargs):
            with testing.record() as calls:
                loss = super().training_step(*args, **kwargs)
            self.backends.update((call.op, call.backend) for call in calls)
            return loss

        def _save_checkpoint(self, *args, **kwargs):
            check_finite(handle, self.state.global_step)  # in every process: they would wait for one that raises alone
            super()._save_checkpoint(*args, **kwargs)

        def _save(self, output_dir=None, state_dict=None):
            # The handle's callback saves the adapter too, but after older checkpoints are deleted:
            # killed in between, the run would have no checkpoint.
            if self.args.should_save:
                handle.save(Path(output_dir or self.args.output_dir) / "adapter")

        def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
            handle.restore(Path(resume_from_checkpoint) / "adapter")

        def _load_best_model(self):
            self._load_from_checkpoint(self.state.best_model_checkpoint)

        @torch.no_grad()
        def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
            started = time.monotonic()
            self.model.eval()
            total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
            rows = self.eval_dataset if eval_dataset is None else eval_dataset
            # Each process takes its own, and one may have fewer: accelerate would let some rows count twice.
            rows = rows[self.args.process_index :: self.args.world_size]
            for at in range(0, len(rows), self.args.eval_batch_size):
                inputs = self._prepare_inputs(self.data_collator(rows[at : at + self.args.eval_batch_size]))
                count = (inputs["labels"][:, 1:] != -100).sum()
                loss = self.model(**inputs).loss.double()
                # A batch without a token to predict has no mean: transformers gives NaN.
                total += torch.stack([torch.where(count > 0, loss * count, 0), count.double()])
            if self.args.world_size > 1:
                torch.distributed.all_reduce(total)
            if not total[1]:
                raise ValueError("the held-out rows have no token to predict: their labels, but for the first, are all -100")
            metrics = {f"{metric_key_prefix}_loss": (total[0] / total[1]).item()}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            self.seconds_evaluating += time.monotonic() - started
            return metrics

    if arguments.data_seed is None:
        # Else the order of the data follows torch's global seed of the moment, and a resumed run may see another order.
        arguments.data_seed = arguments.seed
    with adapters_acknowledged(model):
        trainer = AdapterTrainer(
            model=model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=list(eval_rows) or None,
            data_collator=lambda rows: collate(rows, pad_token_id),
            callbacks=[handle.callback(), *callbacks],
        )
    trainer.backends = Counter()
    trainer.handle = handle
    return trainer


def own_optimizer(handle, arguments) -> torch.optim.Optimizer:
    """The handle's optimizer with what transformers.TrainingArguments say of AdamW. Betas and eps are the method's own where
    the arguments leave theirs at transformers' defaults: a paper's are others (LIFT's betas, SpIEL's eps).

    Raises:
        ValueError: betas are given, and the optimizer (SM3 of SpIEL) has none.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(type(arguments))}
    given = {name for name in ("adam_beta1", "adam_beta2", "adam_epsilon") if getattr(arguments, name) != defaults[name]}
    optimizer = handle.optimizer(lr=arguments.learning_rate, weight_decay=arguments.weight_decay)
    if isinstance(optimizer, SparseSM3) and given:
        raise ValueError(f"{', '.join(sorted(given))}: SM3, which trains this adapter, is no AdamW")
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        group["betas"] = (
            arguments.adam_beta1 if "adam_beta1" in given else beta1,
            arguments.adam_beta2 if "adam_beta2" in given else beta2,
        )
        if "adam_epsilon" in given:
            group["eps"] = arguments.adam_epsilon
    return optimizer


def choice(made: dict[str, int]) -> str:
    """One of a method's `history`, in words."""
    entries = max(made["entries"], 1)
    changed, first = (f"{100 * made[key] / entries:.1f} %" for key in ("changed", "overlap_with_first"))
    return f"{made['changed']:,} of {entries:,} entries replaced ({changed}); {first} of them trained first"


def progress(trainer) -> Any:
    """Replace `trainer`'s progress bar by one with loss, tokens/s, peak memory (plain lines when stderr is no terminal).
    Where a method chooses anew what trains, each choice is a line.

    The returned callback has `tokens_per_second` and `seconds` (of training, without evaluations) of this process.

    Raises (from `trainer.train`):
        FloatingPointError: the training loss or the held-out loss is not finite.
    """
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    class Progress(TrainerCallback):
        def __init__(self):
            self.bar = None
            self.said = -math.inf
            self.started: float | None = None
            self.seconds = self.tokens_per_second = 0.0

        def on_train_begin(self, args, state, control, **kwargs):
            # A resumed state brings the earlier run's steps between logs, evaluations and checkpoints: this one's count.
            state.compute_steps(args, state.max_steps)
            if sys.stderr.isatty() and state.is_world_process_zero:
                from tqdm.auto import tqdm

                self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

        def on_step_begin(self, args, state, control, **kwargs):
            if self.started is None:
                self.first_tokens = state.num_input_tokens_seen
                self.started = time.monotonic() - trainer.seconds_evaluating

        def on_step_end(self, args, state, control, **kwargs):
            if self.bar is not None:
                self.bar.update(state.global_step - self.bar.n)
            history = getattr(trainer.handle.method, "history", None)
            if history and history[-1]["update"] == state.global_step:
                self._say(f"step {state.global_step}: {choice(history[-1])}")

        def on_log(self, args, state, control, logs, **kwargs):
            if "eval_loss" in logs:
                self._say(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}")
            for key, what in (("eval_loss", "held-out loss"), ("loss", "loss")):
                if key in logs and not math.isfinite(logs[key]):
                    raise FloatingPointError(diverged(f"the {what} is {logs[key]} at step {state.global_step}"))
            if "loss" not in logs:
                return
            self.seconds = time.monotonic() - trainer.seconds_evaluating - self.started
            self.tokens_per_second = (state.num_input_tokens_seen - self.first_tokens) / self.seconds
            values = {
                "loss": f"{logs['loss']:.4f}",
                "tokens/s": f"{self.tokens_per_second:,.0f}",
                "memory": f"{peak_memory(args.device) / 2**30:.2f} GiB",
            }
            if self.bar is not None:
                self.bar.set_postfix(values)
            elif time.monotonic() - self.said > 5 or state.global_step == state.max_steps:  # a log need not hold every step
                self.said = time.monotonic()
                self._say(f"step {state.global_step}/{state.max_steps}: " + ", ".join(f"{k} {v}" for k, v in values.items()))

        def on_train_end(self, args, state, control, **kwargs):
            if self.bar is not None:
                self.bar.close()
                self.bar = None

        def _say(self, line: str) -> None:
            if self.bar is not None:
                self.bar.write(line, file=sys.stderr)
            elif trainer.is_world_process_zero():
                print(line, file=sys.stderr, flush=True)

    callback = Progress()
    for default in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(default)
    trainer.add_callback(callback)
    return callback
