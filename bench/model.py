"""Times of a decoder layer's linears on GPUs that nobody has measured yet: a model from counted bytes, never a measurement.

    time of a kernel = max(bytes through memory / bandwidth, bytes through L2 / its bandwidth, operations / rate)

Bytes are counted from each kernel's own loads and stores (`kernels/_traffic.py`, `traffic_cuda.py`): through memory every
tensor once, through L2 as often as the tiles read it. Vendor GEMMs are taken at their sustained rate; kernels don't overlap,
and gaps between launches are not counted. The floor is the frozen layer as PyTorch runs it: a GEMM forward and one for dX
per linear, and the sums that autograd forms of the dX of projections that share an input.

``python -m fastft.bench.model`` prints the table; ``--write`` keeps it in bench/results/modelled and in README.
"""

import argparse
import csv
import sys
from dataclasses import dataclass

from fastft.kernels import _traffic

from . import plot, results, shapes, traffic_cuda

BEGIN, END = "<!-- modelled:begin -->", "<!-- modelled:end -->"
FOLDER = results.ROOT / "bench" / "results" / "modelled"
MODEL, DTYPES, DROPOUTS = "llama3-8b", {"bf16": (2, 2), "bf16+fp32": (2, 4)}, (0.0, 0.05)
TARGETS = {0.0: 1.05, 0.05: 1.07}
BACKENDS = {"triton": _traffic.traffic, "cuda": traffic_cuda.traffic}


@dataclass(frozen=True)
class Gpu:
    """Sustained rates that are assumed: 16-bit GEMMs and float32 FMA (operations/s), memory and L2 (bytes/s)."""

    gemm: float
    fma: float
    memory: float
    l2: float


GPUS = {
    "H200": Gpu(650e12, 45e12, 4.0e12, 5.5e12),
    "H100": Gpu(650e12, 45e12, 2.8e12, 5.5e12),
    "A100": Gpu(240e12, 14e12, 1.7e12, 4.0e12),
    "L40S": Gpu(250e12, 60e12, 0.72e12, 4.0e12),
}
SKINNY = 0.5  # of the GEMM rate: products with 16 to 64 columns on tensor cores


def calls(model: shapes.Model, rank: int):
    """(op, features, ranks, operations) of every launch of one layer's forward and backward."""
    tokens = model.batch * model.length
    for k, outs in model.groups():
        ranks = [rank] * len(outs)
        for op in ("lora_shrink", "lora_grad_a", "lora_grad_x_"):
            yield op, k, ranks, 2 * tokens * k * sum(ranks)
        for n in outs:
            yield "lora_expand_", n, [rank], 2 * tokens * n * rank
            yield "lora_grad_sb", n, [rank], 4 * tokens * n * rank


def floor_seconds(model: shapes.Model, gpu: Gpu, size: int) -> float:
    tokens, total = model.batch * model.length, 0.0
    for k, outs in model.groups():
        for n in outs:
            total += 2 * max(2 * tokens * k * n / gpu.gemm, size * (tokens * (k + n) + k * n) / gpu.memory)
        total += 3 * size * tokens * k * (len(outs) - 1) / gpu.memory  # autograd's sums of dX
    return total


def adapter_seconds(model: shapes.Model, gpu: Gpu, backend: str, dtype: str, rank: int, p: float) -> float:
    """Our kernels' time, and what the accumulating GEMMs read of dX, less the sums that autograd no longer forms."""
    tokens, (size, adapter) = model.batch * model.length, DTYPES[dtype]
    total = 0.0
    for op, features, ranks, operations in calls(model, rank):
        dtypes = f"{8 * size}/{8 * adapter}"
        moved = BACKENDS[backend](op, T=tokens, features=features, ranks=ranks, p=p, dtypes=dtypes)
        products = tensor_products(backend, dtype, op)
        rate = SKINNY * gpu.gemm / products if products else gpu.fma
        total += max(moved.once() / gpu.memory, moved.total() / gpu.l2, operations / rate)
    for k, outs in model.groups():
        total -= 2 * size * tokens * k * (len(outs) - 1) / gpu.memory  # read and written by a sum, now read by the GEMM
    return total


def tensor_products(backend: str, dtype: str, op: str) -> int:
    """Tensor-core products that a kernel makes for one, of operands split into 16-bit parts; 0: float32 FMA.

    Operations are those of the rank itself; tiles pad it to 16, 32 or 64.
    """
    makes_activation = op in ("lora_expand_", "lora_grad_x_")
    if dtype == "bf16":  # Triton splits the float32 S, CUDA C++ rounds it as PEFT does
        return 3 if backend == "triton" and makes_activation else 1
    return 0 if backend == "triton" else 6 if makes_activation else 3


def rows(name: str = MODEL, rank: int = shapes.RANK) -> list[dict[str, str]]:
    model, out = shapes.MODELS[name], []
    for gpu_name, gpu in GPUS.items():
        for dtype, (size, _) in DTYPES.items():
            for p in DROPOUTS:
                floor = floor_seconds(model, gpu, size)
                for backend in BACKENDS:
                    ours = adapter_seconds(model, gpu, backend, dtype, rank, p)
                    out.append(
                        {
                            "status": "modelled",
                            "gpu": gpu_name,
                            "model": name,
                            "tokens": str(model.batch * model.length),
                            "rank": str(rank),
                            "dtype": dtype,
                            "dropout": f"{p:g}",
                            "backend": backend,
                            "floor_us": f"{floor * 1e6:.0f}",
                            "adapter_us": f"{ours * 1e6:.0f}",
                            "ratio": f"{1 + ours / floor:.3f}",
                            "target": f"{TARGETS[p]:.2f}",
                        }
                    )
    return out


def traffic_rows(name: str = MODEL, rank: int = shapes.RANK, dtype: str = "bf16", p: float = 0.0):
    """Per op and backend: megabytes of one layer's launches, every tensor once and as the tiles read it."""
    model, found = shapes.MODELS[name], {}
    for op, features, ranks, _ in calls(model, rank):
        for backend, count in BACKENDS.items():
            dtypes = "/".join(str(8 * size) for size in DTYPES[dtype])
            moved = count(op, T=model.batch * model.length, features=features, ranks=ranks, p=p, dtypes=dtypes)
            once, total, launches = found.get((op, backend), (0, 0, 0))
            found[op, backend] = once + moved.once(), total + moved.total(), launches + moved.kernels
    return found


def markdown(found: list[dict[str, str]]) -> str:
    """README's table: one line per GPU and dtype, the better backend of each."""
    lines = ["| GPU | dtype | p=0 | target | p=0.05 | target |", "|---|---|---|---|---|---|"]
    for gpu, dtype in dict.fromkeys((row["gpu"], row["dtype"]) for row in found):
        cells = []
        for p in DROPOUTS:
            here = [r for r in found if (r["gpu"], r["dtype"], r["dropout"]) == (gpu, dtype, f"{p:g}")]
            best = min(here, key=lambda r: float(r["ratio"]))
            cells += [f"{100 * (float(best['ratio']) - 1):+.1f} % ({best['backend']})", f"≤ {100 * (TARGETS[p] - 1):.0f} %"]
        lines.append(f"| {gpu} | {dtype} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastft.bench.model", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="keep the rows and rewrite README's table")
    args = parser.parse_args(argv)
    found = rows()
    table = [tuple(found[0]), *(tuple(row.values()) for row in found)]
    results.show(f"{MODEL}, one decoder layer's linears: modelled, not measured", table)
    lines = [("op", "backend", "MB, every tensor once", "MB, as the tiles read", "kernels")]
    for (op, backend), (once, total, kernels) in sorted(traffic_rows().items()):
        lines.append((op, backend, f"{once / 1e6:.0f}", f"{total / 1e6:.0f}", str(kernels)))
    results.show(f"Bytes of one layer's launches, bf16, r={shapes.RANK}, p=0", lines)
    if args.write:
        keep(found, MODEL, markdown(found), BEGIN, END)
    return 0


def keep(found: list[dict[str, str]], name: str, table: str, begin: str, end: str) -> None:
    """Write the rows to results/modelled/NAME.csv and the table between README's marks."""
    path = FOLDER / f"{name}.csv"
    write_rows(path, found)
    readme = results.ROOT / "README.md"
    readme.write_text(plot.with_table(readme.read_text(), table, begin, end))
    print(f"wrote {path} and {readme}")


def write_rows(path, found: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    sys.exit(main())
