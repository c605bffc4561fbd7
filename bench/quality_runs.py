"""One training run of the demonstration's task: its data, the methods of equal size, and what is seen of a run."""

import copy
import importlib.util
import itertools
import math
import random
import tempfile
import time
from dataclasses import dataclass, field

import torch

from . import results

ROOT = results.ROOT
MODEL = ROOT / "demo" / "model"
# TRAINED: a LoRA of rank 8 on all linear layers; 720 of 2,560 columns of down; LIFT's budget.
RANK, TRAINED, PARAMETERS = 8, 138_240, 2_422_848
TARGETS = "all-linear"
EVALUATIONS = 6
BATCH, LENGTH, TEXTS, HELD_OUT, WARMUP = 8, 128, 1000, 48, 5
EVERY = 20  # steps between two choices of entries


@dataclass
class Task:
    """The pretrained model, rows to learn from and held-out batches, both {"input_ids", "labels"} int64."""

    model: torch.nn.Module
    rows: list[dict]
    held_out: list[dict]
    pad: int
    device: torch.device


@dataclass
class Run:
    """What one method did in one round."""

    trained: int
    training: list[float] = field(default_factory=list)  # losses of steps
    held_out: list[tuple[float, float]] = field(default_factory=list)  # (seconds of steps so far, loss)

    @property
    def before(self) -> float:
        return self.held_out[0][1]

    @property
    def after(self) -> float:
        return self.held_out[-1][1]

    @property
    def seconds(self) -> float:
        return self.held_out[-1][0]

    def seconds_to(self, loss: float) -> float | None:
        """When the held-out loss reached that; None if it did not."""
        for (begin, high), (end, low) in itertools.pairwise(self.held_out):
            if low <= loss:
                return begin + (end - begin) * max(0.0, (high - loss) / max(high - low, 1e-12))
        return None


def missing() -> str | None:
    """Why this can't run here, or None."""
    from .e2e.step import transformers_missing

    if not (MODEL / "model.safetensors").is_file():
        return f"quality needs the demonstration's model, which is in a git checkout alone ({MODEL})"
    return transformers_missing()


def _functions(count: int) -> list[str]:
    """The demonstration's texts, wherever this is called from."""
    spec = importlib.util.spec_from_file_location("demo.data", ROOT / "demo" / "data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.functions(count)


def make_task(device, texts: int = TEXTS, held_out: int = HELD_OUT) -> Task:
    """The first `held_out` of so many functions of the standard library are what no method trains on."""
    from fastft.cli.data import Record, tokenize
    from fastft.cli.loading import load
    from fastft.integrations.transformers import collate

    tokenizer = load("AutoTokenizer", str(MODEL))
    records = [Record(f"text {i}", "text", {"text": text}) for i, text in enumerate(_functions(texts))]
    rows = tokenize(records, tokenizer, LENGTH).rows
    model = load("AutoModelForCausalLM", str(MODEL), dtype=torch.float32).to(device)
    pad = tokenizer.pad_token_id
    kept = [collate(rows[i : i + BATCH], pad) for i in range(0, held_out, BATCH)]
    return Task(model, rows[held_out:], kept, pad, torch.device(device))


# ---- methods: (model, handle or None, parameters, optimizer) of a copy of the model


def methods():
    import fastft

    return {
        "LoRA": lambda: fastft.LoRA(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS),
        # Magnitudes are numbers, too: rank 7 but for two of seven linears.
        "DoRA": lambda: fastft.LoRA(
            r=7, lora_alpha=14, rank_pattern={"gate_proj": 8, "up_proj": 8}, use_dora=True, target_modules=TARGETS
        ),
        "S2FT": lambda: fastft.S2FT(down_ratio=720 / 2560),
        "SpIEL": lambda: fastft.SpIEL(density=(TRAINED + 0.5) / PARAMETERS, reselection_steps=EVERY),
        "LIFT": lambda: fastft.LIFT(rank_budget=RANK, filter_rank=32, update_interval=EVERY),
    }


def prepared(name: str, task: Task, rate: float, steps: int, seed: int):
    """(model, what is called after each step, the parameters that train, optimizer)."""
    import fastft

    torch.manual_seed(seed)
    model, options = copy.deepcopy(task.model).train(), {"lr": rate, "weight_decay": 0.0}
    if name == "full":
        parameters = list(model.requires_grad_(True).parameters())
        return model, lambda: None, parameters, torch.optim.AdamW(parameters, fused=True, **options)
    if name == "peft":
        return _through_peft(model, task, options, seed)
    handle = fastft.attach(model, methods()[name.partition(":")[2]]())
    handle.total_steps = steps
    return model, handle.step, list(handle.parameters()), handle.optimizer(**options)


def _through_peft(model, task, options, seed):
    """PEFT's LoRA, from the very values that ours begins with."""
    from peft import PeftModel

    import fastft

    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        fastft.attach(copy.deepcopy(task.model), methods()["LoRA"]()).save(folder)
        model = PeftModel.from_pretrained(model, folder, is_trainable=True).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    return model, lambda: None, parameters, torch.optim.AdamW(parameters, fused=True, **options)


# ---- a run


def batches(task: Task, steps: int, seed: int) -> list[dict]:
    from fastft.integrations.transformers import collate

    order = random.Random(seed)
    picked: list[dict] = []
    while len(picked) < steps * BATCH:
        picked += order.sample(task.rows, len(task.rows))
    return [collate(picked[i * BATCH : (i + 1) * BATCH], task.pad) for i in range(steps)]


@torch.no_grad()
def held_out_loss(model, task: Task) -> float:
    """Over tokens."""
    total = count = 0
    model.eval()
    for batch in task.held_out:
        batch = {name: t.to(task.device) for name, t in batch.items()}
        labels = int((batch["labels"][:, 1:] != -100).sum())
        total += model(**batch, use_cache=False).loss.item() * labels
        count += labels
    model.train()
    return total / count


def train(name: str, task: Task, rate: float, steps: int, seed: int) -> Run:
    model, after_step, parameters, optimizer = prepared(name, task, rate, steps, seed)
    run = Run(sum(p.numel() for p in parameters))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * i / steps)))
    )
    run.held_out.append((0.0, held_out_loss(model, task)))
    seconds, stops = 0.0, {round(steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
    synchronize = torch.cuda.synchronize if task.device.type == "cuda" else lambda: None
    for step, batch in enumerate(batches(task, steps, seed), 1):
        batch = {key: t.to(task.device) for key, t in batch.items()}
        synchronize()
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        after_step()
        synchronize()
        seconds += time.perf_counter() - start
        run.training.append(loss.item())
        if step in stops:
            run.held_out.append((seconds, held_out_loss(model, task)))
    return run
