"""What GPUs took beside what `layer_model` says: the table in bench/results/modelled/README.md.

``python -m fastft.bench.layer_model --write`` rewrites it, from the CSVs of bench/results.
"""

import statistics
from dataclasses import dataclass

from . import layer_model, model, results

PATH = model.FOLDER / "README.md"
FAR = 1.5  # times as much, or as little: the model does not explain what was measured
BACKENDS = {"fastft_cuda": "cuda", "triton": "triton"}


@dataclass(frozen=True)
class Pair:
    """A measured row of ours and its model; seconds. `adds` is what ours takes beyond the floor, or in all if less."""

    gpu: str
    row: dict[str, str]
    backend: str
    floor: tuple[float, float]  # measured, modelled
    ours: tuple[float, float]

    @property
    def adds(self) -> tuple[float, float]:
        return tuple(o - f for o, f in zip(self.ours, self.floor)) if min(self.ratios) > 1 else self.ours

    @property
    def ratios(self) -> tuple[float, float]:
        return tuple(o / f for o, f in zip(self.ours, self.floor))

    @property
    def off(self) -> float:
        """How many times the modelled time the measured one is, of what ours adds."""
        measured, modelled = self.adds
        return measured / modelled

    @property
    def far(self) -> bool:
        return not 1 / FAR <= self.off <= FAR


def pairs(rows: list[dict[str, str]]) -> list[Pair]:
    """Measured rows of GPUs that count, the latest of each case and backend, with their models."""
    cases = {(c.family, c.name, c.shape, c.dtype): c for family in layer_model.FAMILIES for c in layer_model.cases(family)}
    latest = {}
    for row in rows:
        key = row["family"], row["case"], row["shape"], row["dtype"]
        gpu = next((name for name in model.GPUS if name in row["device"].split()), None)
        counts = row["metric"] == "time" and row["status"] == "ok" and row["backend"] in BACKENDS
        if gpu and counts and key in cases and row["implementation"].startswith("fastft"):
            key = gpu, key, BACKENDS[row["backend"]]
            # Of one run the arm that was not forced onto its backend: forced, it is the same again.
            forced = row["implementation"] != "fastft"
            if not (forced and key in latest and latest[key]["date"] == row["date"]):
                latest[key] = row
    found = []
    for (gpu, key, backend), row in latest.items():
        if modelled := layer_model.launches(cases[key]):
            floor, ours = modelled.seconds(model.GPUS[gpu], backend)
            seconds, ratio = float(row["value"]), float(row["ratio"])
            found.append(Pair(gpu, row, backend, (seconds / ratio, floor), (seconds, ours)))
    order = list(layer_model.FAMILIES)
    return sorted(found, key=lambda pair: (order.index(pair.row["family"]), pair.gpu))


def markdown(found: list[Pair]) -> str:
    """The summary of each family, then a line a measured row."""
    lines = ["| family | GPU | rows | adds, times its model: median | range | far apart |", "|---|---|---|---|---|---|"]
    for family, gpu in dict.fromkeys((pair.row["family"], pair.gpu) for pair in found):
        off = sorted(pair.off for pair in found if (pair.row["family"], pair.gpu) == (family, gpu))
        far = sum(pair.far for pair in found if (pair.row["family"], pair.gpu) == (family, gpu))
        middle = statistics.median(off)
        lines.append(f"| {family} | {gpu} | {len(off)} | {middle:.2f} | {off[0]:.2f} to {off[-1]:.2f} | {far} |")
    head = ("case", "shape", "dtype", "GPU", "backend", "floor, µs: model", "measured", "adds, µs: model", "measured")
    head += ("ratio: model", "measured (95 %)", "adds: measured / model")
    lines += ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for pair in found:
        row, (measured, modelled) = pair.row, pair.adds
        cells = [f"{row['family']}: {row['case']}", row["shape"], row["dtype"], pair.gpu, pair.backend]
        cells += [_us(pair.floor[1]), _us(pair.floor[0]), _us(modelled), _us(measured), f"{pair.ratios[1]:.3f}"]
        cells += [f"{float(row['ratio']):.3f} ({float(row['lo']):.3f} to {float(row['hi']):.3f})"]
        cells += [f"**{pair.off:.2f}**" if pair.far else f"{pair.off:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.3g}" if seconds < 1e-3 else f"{seconds * 1e6:.0f}"


HEAD = f"""# Modelled times of GPUs

The CSVs here are models (`status` is `modelled`), never measurements: `llama3-8b.csv` of a decoder layer's LoRAs
(`bench/model.py`), `llama3-8b-sparse.csv` of entries (`bench/sparse_model.py`), and `<family>.csv` of every launch of
every case that a GPU is measured with (`bench/layer_model.py`, which says what is counted). Whole steps and forwards
(`step`, `s2ft`, `spiel`, `peft`, `serve`), an exact SVD and the choice of the largest entries have no model. Where a
GPU was measured since, below is what was found.

A launch takes as long as the resource that it needs most: memory, L2, or arithmetic. What launches cost beside, how
well a few programs fill a GPU, and gaps between launches are left out, so a model is nearer to the least time that
there could be than to what a kernel takes. **Bold** is what is more than {FAR:g} times (or less than 1/{FAR:g} of)
its model: not explained by it. "adds" is what ours takes beyond the floor; where it takes less than the floor, all of
it.

What the rows say:

* Floors of training layers and of prefill are within 20 % of their models, and so is what entries (`sparse`, `layer`)
  add where a GEMM forms their gradient.
* LoRA layers add twice to three times what their bytes would take: the kernels reach a third to a half of the
  bandwidth.
* Slices (`partial`) add three to four times their model, which takes a vendor's GEMM that is 430 columns wide to run
  at the rate of a square one, and the sectors of chosen columns to arrive at the full bandwidth. The rows
  are from before the slice's operands were aligned for tensor cores.
* A histogram takes six times as long as reading the weight does: it is the time of its counters.
* Decoding with adapters (`grouped`, `decode`) is not explained at all. With one adapter the model says 1.014 and an
  H200 took 1.553: the eight launches of a layer read few megabytes, 2 to 11 µs by the model, and take 56 to 76 µs, 7
  to 10 µs each, whatever D is. That is what a launch and its chain of dependent reads take, which the model has no
  word for.
* The same is so of few tokens beside entries (`beside`, T = 1 and 16). What the model says of few tokens is a bound,
  no forecast.
"""


def page(found: list[Pair]) -> str:
    return (
        f"{HEAD}\n{markdown(found)}\n\nWritten by `python -m fastft.bench.layer_model --write` from `bench/results/*.csv`.\n"
    )


def measured() -> list[Pair]:
    return pairs(results.read(sorted((results.ROOT / "bench" / "results").glob("*.csv"))))


def write() -> None:
    PATH.write_text(page(measured()))
    print(f"wrote {PATH}")
