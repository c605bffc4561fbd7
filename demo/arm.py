"""One side of the comparison in a process of its own: same Trainer, model, data, order, initial adapter; fastft or PEFT.

    python -m demo.arm fastft|peft DATA.jsonl INITIAL_ADAPTER STEPS BLOCK

Before every BLOCK steps it prints {"ready": true} and waits for a line on stdin, so that its parent can alternate two arms;
after them it prints {"seconds": ...}; at the end {"losses": [...], "peak_bytes": ..., "rise_bytes": ..., "tokens": ...}.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

from fastft.cli.loading import load  # first: it keeps torchao quiet, which transformers imports

# isort: split
import psutil
import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from fastft.cli.data import read_jsonl, tokenize
from fastft.integrations.transformers import collate, peak_memory

MODEL = Path(__file__).parent / "model"


def say(**values) -> None:
    print(json.dumps(values), flush=True)


class Turns(TrainerCallback):
    """Wait for the parent before each block of steps and report the block's seconds."""

    def __init__(self, block: int):
        self.block = block
        self.before: int | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % self.block == 0:
            say(ready=True)
            sys.stdin.readline()
            self.before = psutil.Process().memory_info().rss if self.before is None else self.before
            self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.block == 0:
            say(seconds=time.perf_counter() - self.started)


def main(arm: str, data: str, initial: str, steps: str, block: str) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what transformers renamed
    tokenizer = load("AutoTokenizer", str(MODEL))
    rows = tokenize(read_jsonl(data), tokenizer, 256).rows
    model = load("AutoModelForCausalLM", str(MODEL), dtype=torch.float32)
    if arm == "fastft":
        import fastft

        fastft.load(model, initial)
    else:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, initial, is_trainable=True)
    turns = Turns(int(block))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            seed=0,
            report_to="none",
            disable_tqdm=True,
            max_steps=int(steps),
            per_device_train_batch_size=8,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            optim="adamw_torch_fused",
            logging_steps=1,
            save_strategy="no",
            remove_unused_columns=False,
            include_num_input_tokens_seen="non_padding",
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            callbacks=[turns],
            data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    peak = peak_memory(torch.device("cpu"))
    say(
        losses=[h["loss"] for h in trainer.state.log_history if "loss" in h],
        peak_bytes=peak,
        rise_bytes=peak - turns.before,
        tokens=trainer.state.num_input_tokens_seen,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
