"""Times of a linear whose chosen entries train, on GPUs and at sizes that nobody has measured yet: a model, no measurement.

    entries   token-contiguous copies of dY and X (read and written once), then for every entry a column of X^T from L2;
              time = copies / memory bandwidth + max(2 bytes an entry and token / L2 bandwidth, 2 operations / FMA rate)
    blocks    the vendor's GEMM of some rows of dYᵀ X at a time in float32, of which the entries are read; time = the GEMM's
              + 8 bytes an element of the weight, to L2 and back
    update    `sparse_adamw_`: 32 bytes an entry and the touched 32-byte sectors of the weight, read and written

`ops/sparse_linear.py`'s rule says which engine runs. The floor, the rates and their sources are those of `model`.
``python -m fastft.bench.sparse_model`` prints the table; ``--write`` keeps it in bench/results/modelled and in README.
"""

import argparse
import math
import sys

from fastft.ops import sparse_linear

from . import results, shapes
from .model import GPUS, MODEL, keep

BEGIN, END = "<!-- modelled sparse:begin -->", "<!-- modelled sparse:end -->"
DENSITIES = (0.001, 0.01, 0.05)
SIZE = 2  # bytes of an activation's and a weight's element: bfloat16
TARGETS = {0.001: 1.15, 0.01: 1.60, 0.05: 1.60}
NARROW_TARGET = 1.30  # of k_proj at the lowest density


def floor_seconds(linear: shapes.Linear, gpu) -> float:
    """Forward and dX."""
    t, k, n = linear.tokens, linear.k, linear.n
    return 2 * max(2 * t * k * n / gpu.gemm, SIZE * (t * (k + n) + k * n) / gpu.memory)


def engine(linear: shapes.Linear, density: float) -> str:
    count = round(density * linear.k * linear.n)
    kind = sparse_linear.engine("cuda", (linear.n, linear.k), count, linear.n, linear.k)
    return "entries" if kind == "sampled" else kind


def gradient_seconds(linear: shapes.Linear, gpu, density: float) -> float:
    t, k, n = linear.tokens, linear.k, linear.n
    entries = density * k * n
    if engine(linear, density) == "blocks":
        return 2 * t * k * n / gpu.gemm + 8 * k * n / gpu.l2
    copies = 2 * SIZE * t * (k + n) / gpu.memory
    return copies + max(entries * t * SIZE / gpu.l2, 2 * entries * t / gpu.fma)


def update_seconds(linear: shapes.Linear, gpu, density: float) -> float:
    size, in_sector = linear.k * linear.n, 32 // SIZE
    sectors = size / in_sector * -math.expm1(in_sector * math.log1p(-density))
    return (32 * density * size + 2 * 32 * sectors) / gpu.memory


def rows(name: str = MODEL) -> list[dict[str, str]]:
    found = []
    for gpu_name, gpu in GPUS.items():
        for projection, linear in shapes.MODELS[name].linears().items():
            for density in DENSITIES:
                floor, ours = floor_seconds(linear, gpu), gradient_seconds(linear, gpu, density)
                narrow = projection == "k_proj" and density == DENSITIES[0]
                found.append(
                    {
                        "status": "modelled",
                        "gpu": gpu_name,
                        "linear": f"{name}/{projection}",
                        "tokens": str(linear.tokens),
                        "density": f"{density:g}",
                        "engine": engine(linear, density),
                        "floor_us": f"{floor * 1e6:.0f}",
                        "gradient_us": f"{ours * 1e6:.0f}",
                        "ratio": f"{1 + ours / floor:.3f}",
                        "target": f"{NARROW_TARGET if narrow else TARGETS[density]:.2f}",
                        "update_us": f"{update_seconds(linear, gpu, density) * 1e6:.1f}",
                    }
                )
    return found


def markdown(found) -> str:
    """README's table: the linears of one GPU by density."""
    lines = ["| GPU | linear | 0.1 % | 1 % | 5 % |", "|---|---|---|---|---|"]
    for gpu, linear in dict.fromkeys((row["gpu"], row["linear"]) for row in found if row["gpu"] in ("H200", "A100")):
        here = [row for row in found if (row["gpu"], row["linear"]) == (gpu, linear)]
        cells = [f"{100 * (float(row['ratio']) - 1):+.0f} % ({row['engine']})" for row in here]
        lines.append(f"| {gpu} | {linear.split('/')[1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastft.bench.sparse_model", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="keep the rows and rewrite README's table")
    args = parser.parse_args(argv)
    found = rows()
    table = [tuple(found[0]), *(tuple(row.values()) for row in found)]
    results.show(f"{MODEL}, one linear whose entries train: modelled, not measured", table)
    if args.write:
        keep(found, f"{MODEL}-sparse", markdown(found), BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
