"""`fastft train`: from a TrainConfig to OUT/{adapter, checkpoint-N, config.yaml, summary.json, loss.png}."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from . import launch
from .config import TrainConfig
from .data import Record, Tokenized, check_fit, read_jsonl, split, tokenize
from .errors import UserError
from .folder import (
    DIGESTS,
    ROWS,
    UNREADABLE,
    after_stop,
    check_data,
    check_out,
    check_sources,
    checkpoint_step,
    clear,
    damaged,
    finished,
    owned,
    rotate,
    write,
    writing,
)
from .loading import check_adapter, check_bitsandbytes, load, load_adapter, load_base


def run(
    config: TrainConfig, *, resume: bool = False, overwrite: bool = False, dry_run: bool = False
) -> dict[str, Any] | None:
    """Train and report. Returns the summary (None for a dry run, and in other ranks than 0).

    Raises:
        UserError: anything the user can put right; nothing was trained then.
    """
    # Quick checks before slow imports and downloads.
    launch.check()
    out = Path(config.out).expanduser()
    try:
        check_out(out, resume, overwrite)
        if overwrite:
            check_sources(config, out)
    except UserError as error:
        if not dry_run:
            raise
        print(f"note: the run itself will be refused: {error}")
    if dry_run and config.adapter is not None:
        raise UserError("--dry-run counts an adapter that begins anew; leave --adapter out")
    if not dry_run:
        check_bitsandbytes(config.bits())
        if config.adapter is not None and not resume:
            check_adapter(config.adapter)
    records, held_out, digests = _records(config)
    if resume:
        check_data(digests, out)
    tokenizer = load("AutoTokenizer", config.model)
    train_rows = tokenize(records, tokenizer, config.max_length, config.packing)
    for note in train_rows.notes:
        print(f"data: {note}")
    eval_rows = Tokenized([], [])
    if held_out:
        eval_rows = tokenize(held_out, tokenizer, config.max_length, what="held out: ")
        for note in eval_rows.notes:
            print(f"held out: {note}")
    del records, held_out  # else they are in memory as long as it trains
    rows = [f"# {one.digest()}  {name}" for name, one in zip(ROWS, (train_rows, eval_rows))]
    if resume:
        check_data(rows, out)
    print(
        f"data: {len(train_rows.rows)} rows with {train_rows.tokens:,} tokens; held out: {len(eval_rows.rows)} rows "
        f"with {eval_rows.tokens:,} tokens"
    )
    if dry_run:
        from .dryrun import report

        if launch.rank() == 0:
            report(config, train_rows, eval_rows)
        return None
    steps = _steps(config, len(train_rows.rows))
    checkpoint = _continued(out, steps) if resume else None
    if checkpoint and checkpoint_step(checkpoint) == steps:
        print(f"{checkpoint} is the run's end; more --max-steps or --epochs would continue it")
        if (summary := finished(out, steps)) is not None:
            return summary
    _, dtype = choose_device_and_dtype(config)
    config = dataclasses.replace(config, dtype=str(dtype).removeprefix("torch."))  # where it is resumed, auto may be another
    trainer = _prepare(config, out, checkpoint, steps, tokenizer, train_rows, eval_rows)
    launch.wait()  # from here on the folder changes, which all have looked at
    with writing(out), owned(out, resume, overwrite):
        return _train(config, out, checkpoint, steps, trainer, train_rows, eval_rows, [*digests, *rows])


def _records(config: TrainConfig) -> tuple[list[Record], list[Record], list[str]]:
    """What trains, what is held out, and a line of each file for `DIGESTS`."""
    found, digests = [], []
    for path in (config.data, config.eval_data):
        if path is not None:
            digest = hashlib.sha256()
            found.append(read_jsonl(path, digest))
            digests.append(f"{digest.hexdigest()}  {path}")
    records, held_out = found if len(found) == 2 else split(*found, config.eval_fraction, config.seed)
    return records, held_out, digests


def choose_device_and_dtype(config: TrainConfig) -> tuple[Any, Any]:
    """(torch.device, torch.dtype of the base) that `config` asks for.

    Raises:
        UserError: a GPU is asked for and there is none, or FASTFT_BACKEND asks for what can't run there.
    """
    import torch

    from ..ops import registry

    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: torch sees no GPU here; use --device cpu (fastft info tells more)")
    device = torch.device("cpu")
    if config.device != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", launch.local_rank()) if launch.processes() > 1 else torch.device("cuda")
    try:
        registry.check_forced(device.type)
    except registry.BackendError as error:
        raise UserError(str(error)) from None
    if config.dtype == "auto":
        bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return device, torch.bfloat16 if bfloat16 else torch.float32
    return device, getattr(torch, config.dtype)


def make_method(config: TrainConfig, calibration: Any = None) -> Any:
    """The fastft method that `config` describes. `calibration`: batches, for those of its choices that look at data."""
    import fastft

    if config.method == "s2ft":
        same = ("select", "largest", "multiple", "seed")
        options = {**config.ratios(), **{name: getattr(config, name) for name in same}, "calibration": calibration}
        return fastft.S2FT(**options, target_modules=config.targets())
    if config.method == "spiel":
        same = (
            "selection",
            "reselection_steps",
            "selection_accumulation_steps",
            "initial_reselection_rate",
            "policy",
            "seed",
        )
        options = {name: getattr(config, name) for name in same}
        return fastft.SpIEL(**config.entries(), **options, target_modules=config.targets())
    if config.method == "lift":
        options = {"filter_rank": config.filter_rank, "update_interval": config.update_interval}
        return fastft.LIFT(**config.entries(), **options, target_modules=config.targets())
    return fastft.LoRA(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.use_dora,
        lora_bias=config.lora_bias,
        target_modules=config.targets(),
    )


def attach(config: TrainConfig, model: Any, rows: list[Any], pad: int, checkpoint: Path | None = None) -> Any:
    """Attach the adapter that `config` describes; its start depends on config.seed, and where it is measured on `rows`.

    Raises:
        UserError: no module matches, or an option the method refuses.
    """
    import torch

    import fastft

    from ..integrations.transformers import collate

    torch.manual_seed(config.seed)
    if checkpoint is not None and (config.method != "lora" or config.adapter is not None):
        # What trains is the run's: measured anew, on other hardware say, others might be chosen.
        try:
            return fastft.load(model, checkpoint / "adapter")
        except UNREADABLE as error:
            raise damaged(checkpoint, error) from error
    if config.adapter is not None:
        handle = load_adapter(model, config.adapter)
        if handle.method.peft_type.lower() != config.method:
            raise UserError(
                f"adapter {config.adapter} is {type(handle.method).__name__}'s, which --method {config.method} can't train"
            )
        return handle
    try:
        measured = rows[: config.calibration_rows]
        starts = range(0, len(measured), config.batch_size)
        return fastft.attach(
            model, make_method(config, [collate(measured[at : at + config.batch_size], pad) for at in starts])
        )
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def _steps(config: TrainConfig, rows: int) -> int:
    """Optimizer steps of the whole run, counted as Trainer counts them."""
    batches = math.ceil(math.ceil(rows / config.batch_size) / launch.processes())
    an_epoch = math.ceil(batches / config.gradient_accumulation)
    return config.max_steps or math.ceil(an_epoch * config.epochs)


def _warmup(config: TrainConfig, steps: int) -> int:
    """Steps of warm-up. A part of a step is none: the first has a learning rate of 0, and a short run may have no other."""
    warmup = int(config.warmup) if config.warmup >= 1 else math.ceil(config.warmup * steps)
    if config.warmup * steps < 1:
        return 0
    if warmup >= steps:
        print(f"note: the warm-up of {warmup} steps is not shorter than the run of {steps}, which does not reach --lr")
    return warmup


def _arguments(config: TrainConfig, out: Path, device: Any, steps: int, evaluate: bool, start: bool) -> Any:
    """transformers' TrainingArguments for `config`. `start`: the run begins here, so its held-out loss before is taken."""
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(out),
        use_cpu=device.type == "cpu",
        seed=config.seed,
        report_to="none",
        disable_tqdm=True,
        max_steps=config.max_steps or -1,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.lr,
        lr_scheduler_type=config.schedule if config.schedule != "constant" else "constant_with_warmup",
        warmup_steps=_warmup(config, steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",
        remove_unused_columns=False,
        include_num_input_tokens_seen="non_padding",
        # The default filter replaces a NaN loss by the previous value: a run that diverged must be seen.
        logging_steps=config.log_steps or max(1, steps // 200),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluate and config.eval_steps else "no",
        eval_steps=config.eval_steps,
        eval_on_start=evaluate and start,
        save_strategy="steps" if config.save_steps else "epoch",
        save_steps=config.save_steps or 500,
        dataloader_pin_memory=device.type == "cuda",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else Trainer wraps the model in DataParallel, which replicates parameters at every forward
    return arguments


def _recompute(model: Any) -> None:
    """Gradient checkpointing without reentrant backward; transformers 5.23 warns about the old name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _continued(out: Path, steps: int) -> Path:
    """The checkpoint that a resumed run of `steps` goes on from. Raises UserError if it can't."""
    from ..integrations.transformers import last_checkpoint

    checkpoint = last_checkpoint(out)
    launch.check_resume(checkpoint)
    if checkpoint_step(checkpoint) > steps:
        raise UserError(f"--resume: {checkpoint} is beyond the run's {steps} steps; give more --max-steps or --epochs")
    return checkpoint


def _prepare(
    config: TrainConfig,
    out: Path,
    checkpoint: Path | None,
    steps: int,
    tokenizer: Any,
    train_rows: Tokenized,
    eval_rows: Tokenized,
) -> Any:
    """A trainer of the attached model. Nothing is written: anything of the user's input can still be wrong.

    Raises:
        UserError: it is.
    """
    from ..integrations.transformers import make_trainer

    device, dtype = choose_device_and_dtype(config)
    model = load_base(config.model, device, dtype, config.bits())
    check_fit(model, train_rows, eval_rows)
    if config.gradient_checkpointing:
        _recompute(model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    if pad >= model.get_input_embeddings().num_embeddings:  # a token that was added to the tokenizer alone
        pad = 0  # nothing sees it
    # First, as processes know each other from here on, and methods agree on what trains while they are attached.
    arguments = _arguments(config, out, device, steps, bool(eval_rows.rows), start=checkpoint is None)
    handle = attach(config, model, train_rows.rows, pad, checkpoint)
    rows, callbacks = (train_rows.rows, eval_rows.rows), [_rotation(config, out)]
    return make_trainer(model, handle, arguments, *rows, pad_token_id=pad, callbacks=callbacks)


def _rotation(config: TrainConfig, out: Path) -> Any:
    from transformers import TrainerCallback

    class Rotation(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                rotate(out, state.global_step, config.keep_checkpoints)

    return Rotation()


def _go_on(trainer: Any, speed: Any, checkpoint: Path | None, steps: int) -> None:
    """Train to the end. Raises UserError where `checkpoint` can't be read, and what Trainer raises."""
    from ..integrations.transformers import finish

    try:
        if checkpoint and checkpoint_step(checkpoint) == steps:
            finish(trainer, checkpoint)  # killed between the last step and the summary
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except UNREADABLE as error:
        # From the first step on the checkpoint is read; and no lack of memory is to cost one.
        if checkpoint is None or speed.started is not None or "out of memory" in str(error):
            raise
        raise damaged(checkpoint, error) from error


def _train(
    config: TrainConfig,
    out: Path,
    checkpoint: Path | None,
    steps: int,
    trainer: Any,
    train_rows: Tokenized,
    eval_rows: Tokenized,
    digests: list[str],
) -> dict[str, Any] | None:
    from ..integrations.transformers import check_finite, progress
    from .report import plot, plot_selection, print_summary, summarize

    handle = trainer.handle
    if launch.rank() == 0:
        if checkpoint is None:
            clear(out)
        write(out / "config.yaml", config.yaml())
        if not (out / DIGESTS).is_file():  # else they were compared
            write(out / DIGESTS, "".join(f"{line}\n" for line in digests))
    launch.wait()

    speed = progress(trainer)
    trainable = sum(p.numel() for p in handle.parameters())
    device, dtype = choose_device_and_dtype(config)
    base = f"{dtype}, base of {config.bits()} bits" if config.bits() else dtype
    where = f"{launch.processes()} processes, {device.type}" if launch.processes() > 1 else device
    print(f"training {trainable:,} parameters on {where} ({base}); output in {out}")
    try:
        _go_on(trainer, speed, checkpoint, steps)
        step = trainer.state.global_step
        check_finite(handle, step)  # the last step need not have had a loss logged, nor a checkpoint
        if eval_rows.rows and not any("eval_loss" in h and h["step"] == step for h in trainer.state.log_history):
            trainer.evaluate()
    except FloatingPointError as error:
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(after_stop(out)) from None
    launch.wait()
    if launch.rank() != 0:
        return None
    handle.save(out / "adapter")
    summary = summarize(config, trainer, speed, handle, trainer.model, train_rows, eval_rows)
    write(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    plot(summary, out / "loss.png")
    if summary["selection"]:
        plot_selection(summary, out / "selection.png")
    print_summary(summary, out)
    return summary
