"""The demonstration's last part: the base and three adapters of three kinds answer in one batch, each in its own way."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "demo" / "model"
PROMPT = "The following"
TOKENS = 40
CLOSE = 1e-3  # a token is the model's own if its logit is at most so much below the largest
# adapter -> (what it learns, fastft train's options); the LoRA is the one that the demonstration trained before
TRAINED = {
    "s2ft": ("capitals", ("--method", "s2ft", "--down-ratio", "0.3", "--o-ratio", "0.3")),
    "spiel": ("imports", ("--method", "spiel", "--density", "0.06", "--reselection-steps", "40")),
}
console = Console()


def train(name: str, out: Path, steps: int) -> Path:
    kind, options = TRAINED[name]
    data, run = out / f"{kind}.jsonl", out / f"run-{name}"
    subprocess.run([sys.executable, "-m", "demo.data", str(data), "2000", kind], check=True, cwd=ROOT)
    command = ["train", "--model", str(MODEL), "--data", str(data), *options, "--out", str(run), "--max-length", "128"]
    command += ["--lr", "4e-3", "--max-steps", str(steps), "--overwrite"]
    console.print(f"{name} learns {kind}, {steps} steps:", highlight=False)
    console.print("$ fastft " + shlex.join(command), soft_wrap=True, markup=False, highlight=False)
    subprocess.run([sys.executable, "-m", "fastft.cli.main", *command], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return run / "adapter"


def collect(adapters: dict[str, Path], out: Path) -> Path:
    """One folder with all of them, as the server wants it."""
    folder = out / "adapters"
    for name, path in adapters.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(path, folder / name)
    return folder


def answers(folder: Path, names: list[str | None]):
    """(tokenizer, prompt's tokens, each one's tokens) of the prompt, all in one batch."""
    import torch

    from fastft.cli.loading import load
    from fastft.serving import Engine

    tokenizer = load("AutoTokenizer", str(MODEL))
    model = load("AutoModelForCausalLM", str(MODEL), dtype=torch.float32).eval()
    prompt = tokenizer(PROMPT)["input_ids"]
    with Engine(model, tokenizer, folder, num_blocks=64, page_size=16, max_batch_tokens=128) as engine:
        done = engine.generate([prompt] * len(names), adapters=names, max_tokens=TOKENS)
    return tokenizer, prompt, [completion.tokens for completion in done]


def wrong_tokens(folder: Path, name: str | None, prompt: list[int], tokens: list[int]) -> int:
    """How many of the tokens the model with this adapter alone would not have chosen."""
    import torch

    import fastft
    from fastft.cli.loading import load

    model = load("AutoModelForCausalLM", str(MODEL), dtype=torch.float32).eval()
    if name is not None:
        fastft.load(model, folder / name)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return int((chosen < logits.max(1).values - CLOSE).sum())


def main(lora: Path, out: Path, steps: int = 120) -> list[str]:
    """Train two more adapters, serve all, show what they say; what went wrong."""
    console.rule("[bold]4. Serve: the base and three adapters in one batch")
    folder = collect({"lora": lora, **{name: train(name, out, steps) for name in TRAINED}}, out)
    names = [None, "lora", "s2ft", "spiel"]
    tokenizer, prompt, found = answers(folder, names)
    table = Table("model=", f"{PROMPT} …", show_lines=True)
    for name, tokens in zip(names, found):
        table.add_row(name or "(base)", escape(tokenizer.decode(tokens, skip_special_tokens=True)))
    console.print(table)
    failures = []
    for name, tokens in zip(names, found):
        if wrong := wrong_tokens(folder, name, prompt, tokens):
            failures.append(f"{wrong} of {name or 'the base'}'s {len(tokens)} tokens are not its own")
    if len(set(map(tuple, found))) < len(names):
        failures.append("two of them said the same")
    console.print(
        f"every token is the one that its adapter alone gives\nserve them over HTTP: fastft serve --model {MODEL} "
        f"--adapters {folder}"
        if not failures
        else "",
        soft_wrap=True,
        highlight=False,
    )
    return failures
