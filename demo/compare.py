"""LoRA, S²FT, SpIEL and LIFT with equally many trained parameters on the demo's model and data.

    python -m demo.compare [--out demo/out/compare] [--steps 60] [--write]

Each is one `fastft train` run, all with the same data, order, schedule and learning rate, which is not the best for each
(`--rates` tries several). `--write` keeps the table's rows in bench/results/methods and puts it into README.md. About two
minutes.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path

from fastft.bench.quality_runs import EVERY, PARAMETERS, RANK, TRAINED

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "demo" / "model"
CSV = ROOT / "bench" / "results" / "methods" / "demo.csv"
BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"
METHODS = {
    "LoRA": ("--method", "lora", "--r", RANK, "--alpha", 2 * RANK),
    "S²FT": ("--method", "s2ft", "--down-ratio", 720 / 2560),
    "SpIEL": ("--method", "spiel", "--density", (TRAINED + 0.5) / PARAMETERS, "--reselection-steps", EVERY),
    "LIFT": ("--method", "lift", "--rank-budget", RANK, "--filter-rank", 32, "--update-interval", EVERY),
}
RATE = 4e-3


def train(name: str, data: Path, out: Path, steps: int, rate: float) -> dict[str, str]:
    options = ["--model", MODEL, "--data", data, "--out", out, "--max-steps", steps, "--lr", rate, *METHODS[name]]
    options += ["--max-length", 128, "--eval-fraction", 0.05, "--device", "cpu", "--overwrite"]
    command = [sys.executable, "-m", "fastft.cli.main", "train", *map(str, options)]
    print("$ " + shlex.join(command), flush=True)
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ran.returncode:
        raise SystemExit(f"{ran.stdout}{name}: fastft train ended with {ran.returncode}")
    summary = json.loads((out / "summary.json").read_text())
    if (
        abs(summary["trainable_parameters"] / TRAINED - 1) > 1e-3
    ):  # SpIEL divides its entries among the modules, rounding down
        raise SystemExit(f"{name} trains {summary['trainable_parameters']:,} parameters, not {TRAINED:,}")
    return {
        "method": name,
        "lr": f"{rate:g}",
        "steps": str(steps),
        "trained": str(summary["trainable_parameters"]),
        "loss_before": f"{summary['held_out_loss']['before']:.4f}",
        "loss_after": f"{summary['held_out_loss']['after']:.4f}",
        "seconds": f"{summary['seconds']:.1f}",
        "training_bytes": str(sum(summary["adapter_memory_bytes"].values())),
        "file_bytes": str((out / "adapter" / "adapter_model.safetensors").stat().st_size),
        "device": summary["device"],
    }


def markdown(rows: list[dict[str, str]]) -> str:
    first = rows[0]
    lines = [
        f"About {int(first['trained']):,} trained parameters of {PARAMETERS:,} each, "
        f"{first['steps']} steps, {first['device']}; held-out loss before: {first['loss_before']}.",
        "",
        "| method | held-out loss | seconds | memory beside the model, a trained number | adapter file | learning rate |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        each = int(row["training_bytes"]) / int(row["trained"])
        lines.append(
            f"| {row['method']} | {row['loss_after']} | {row['seconds']} | {each:.0f} bytes | "
            f"{int(row['file_bytes']) / 2**20:.2f} MiB | {row['lr']} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "demo" / "out" / "compare")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rates", type=float, nargs="+", default=[RATE], help="learning rates, each for every method")
    parser.add_argument("--write", action="store_true", help="keep the rows and rewrite README's table")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = options.out / "functions.jsonl"
    subprocess.run([sys.executable, "-m", "demo.data", str(data), "1000"], check=True, cwd=ROOT)
    rows = []
    for name in METHODS:
        for rate in options.rates:
            rows.append(train(name, data, options.out / "run", options.steps, rate))
    print(markdown(rows))
    if options.write:
        from fastft.bench.plot import with_table

        CSV.parent.mkdir(parents=True, exist_ok=True)
        with open(CSV, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        readme = ROOT / "README.md"
        readme.write_text(with_table(readme.read_text(), markdown(rows), BEGIN, END))
        print(f"wrote {CSV} and {readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
