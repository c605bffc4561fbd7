"""The demonstration: fine-tune the embedded language model with LoRA on code, stand beside PEFT, serve three adapters.

    python -m demo.run [--out demo/out] [--steps 240]

Exits with 1 if the held-out loss did not drop, the losses differ from PEFT's by more than 1e-3 at any step, or a served
adapter says anything but what it says alone.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from demo import serving

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "demo" / "model"
PROMPTS = ("def read_file(self, path):", "If the name is", "class Connection")
BLOCK = 5  # steps an arm runs before it is the other's turn
MAX_LOSS_DIFFERENCE = 1e-3
console = Console()


def generate(adapter: Path | None) -> list[str]:
    """A continuation of every prompt, sampled with the same seed with and without the adapter."""
    import torch

    import fastft
    from fastft.cli.loading import load

    tokenizer = load("AutoTokenizer", str(MODEL))
    model = load("AutoModelForCausalLM", str(MODEL), dtype=torch.float32).eval()
    if adapter is not None:
        fastft.load(model, adapter)
    texts = []
    for prompt in PROMPTS:
        torch.manual_seed(1)
        tokens = model.generate(
            **tokenizer(prompt, return_tensors="pt", return_token_type_ids=False),
            max_new_tokens=70,
            do_sample=True,
            temperature=0.5,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
    return texts


def train(data: Path, out: Path, steps: int) -> dict:
    command = [
        "train",
        "--model",
        str(MODEL),
        "--data",
        str(data),
        "--method",
        "lora",
        "--out",
        str(out),
        "--max-length",
        "256",
        "--lr",
        "2e-3",
        "--r",
        "16",
        "--alpha",
        "32",
        "--max-steps",
        str(steps),
        "--eval-fraction",
        "0.05",
        "--overwrite",
    ]
    console.rule("[bold]1. Fine-tune")
    console.print("$ fastft " + shlex.join(command), soft_wrap=True, markup=False, highlight=False)
    subprocess.run([sys.executable, "-m", "fastft.cli.main", *command], check=True, cwd=ROOT)
    return json.loads((out / "summary.json").read_text())


class Arm:
    """A `demo.arm` process that runs a block of steps when told to."""

    def __init__(self, name: str, *arguments: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "demo.arm", name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.seconds: list[float] = []

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")
        return json.loads(line)

    def block(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.seconds.append(self.read()["seconds"])


def compare(data: Path, initial: Path, steps: int) -> tuple[dict, dict, list[float]]:
    """(fastft's results, PEFT's results, seconds of fastft / seconds of PEFT per pair of blocks), blocks in random order."""
    arms = {name: Arm(name, str(data), str(initial), str(steps), str(BLOCK)) for name in ("fastft", "peft")}
    for arm in arms.values():
        arm.read()  # loaded and ready
    order = random.Random(0)
    for i in range(steps // BLOCK):
        for name in order.sample(list(arms), 2):
            arms[name].block()
            result = arms[name].read()  # ready again, or the end
            if i == steps // BLOCK - 1:
                arms[name].result = result
                arms[name].process.wait()
    ratios = [a / b for a, b in zip(arms["fastft"].seconds, arms["peft"].seconds)][1:]  # the first block warms up
    for arm in arms.values():
        arm.result["tokens_per_second"] = arm.result["tokens"] / sum(arm.seconds)
    return arms["fastft"].result, arms["peft"].result, ratios


def interval(values: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[1949]


def make_initial(out: Path) -> Path:
    """An adapter that has not trained, for both arms to start from."""
    import torch

    import fastft
    from fastft.cli.loading import load

    torch.manual_seed(0)
    model = load("AutoModelForCausalLM", str(MODEL), dtype=torch.float32)
    fastft.attach(model, fastft.LoRA(r=16, lora_alpha=32)).save(out / "initial")
    return out / "initial"


def show_texts(before: list[str], after: list[str]) -> None:
    console.rule("[bold]2. What it writes")
    for prompt, old, new in zip(PROMPTS, before, after):
        for title, text in (("before", old), ("after", new)):
            body = f"[bold]{escape(prompt)}[/bold]{escape(text[len(prompt) :])}"
            console.print(Panel(body, title=title, title_align="left", border_style="dim" if title == "before" else "green"))


def show_comparison(ours: dict, peft: dict, ratios: list[float], difference: float) -> None:
    table = Table("", "fastft", "PEFT", "fastft / PEFT")
    low, high = interval(ratios)
    table.add_row(
        "tokens/s",
        f"{ours['tokens_per_second']:,.0f}",
        f"{peft['tokens_per_second']:,.0f}",
        f"{ours['tokens_per_second'] / peft['tokens_per_second']:.3f}",
    )
    table.add_row("time of a step", "", "", f"{statistics.median(ratios):.3f} (95 %: {low:.3f} to {high:.3f})")
    for key, name in (("peak_bytes", "peak memory (VmHWM), MiB"), ("rise_bytes", "of it by training, MiB")):
        table.add_row(name, f"{ours[key] / 2**20:,.0f}", f"{peft[key] / 2**20:,.0f}", f"{ours[key] / max(1, peft[key]):.3f}")
    table.add_row(
        "training loss, last step",
        f"{ours['losses'][-1]:.4f}",
        f"{peft['losses'][-1]:.4f}",
        f"at most {difference:.1e} apart in any step",
    )
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "demo" / "out")
    parser.add_argument("--steps", type=int, default=240)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    data = options.out / "functions.jsonl"
    subprocess.run([sys.executable, "-m", "demo.data", str(data), "2000"], check=True, cwd=ROOT)
    summary = train(data, options.out / "run", options.steps)
    adapter = options.out / "run" / "adapter"
    show_texts(generate(None), generate(adapter))

    console.rule("[bold]3. Beside PEFT: same model, data, order, initial adapter; float32")
    steps = options.steps // 2 // BLOCK * BLOCK
    console.print(f"{steps} steps of each, in turns of {BLOCK}; nothing is shown until both are done", highlight=False)
    ours, peft, ratios = compare(data, make_initial(options.out), steps)
    difference = max(abs(a - b) for a, b in zip(ours["losses"], peft["losses"], strict=True))
    show_comparison(ours, peft, ratios, difference)

    failures = serving.main(adapter, options.out, max(40, options.steps // 2))

    before, after = summary["held_out_loss"]["before"], summary["held_out_loss"]["after"]
    ran = ", ".join(f"{b['op']} on {b['backend']}" for b in summary["backends"])
    console.print(f"held-out loss {before:.4f} -> {after:.4f}", style="bold")
    console.print(
        f"ops: {ran}\nadapter: {adapter} (also loads in PEFT)\n{time.monotonic() - started:.0f} s in all", highlight=False
    )
    if not after < before:
        failures.append("the held-out loss did not drop")
    if not difference <= MAX_LOSS_DIFFERENCE:
        failures.append(f"the loss differs from PEFT's by {difference:.1e} > {MAX_LOSS_DIFFERENCE}")
    for failure in failures:
        console.print(f"FAILED: {failure}", style="bold red")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
