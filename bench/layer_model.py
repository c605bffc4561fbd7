"""Times of every op's benchmark case on GPUs, from counted bytes and operations: a model, never a measurement.

    time of a launch = max(bytes through memory / bandwidth, bytes through L2 / its bandwidth, operations / rate)

A case is its floor's launches and what ours adds to them. Rates, and the counts of the LoRA and DoRA kernels, are those of
`model`, the costs of entries those of `sparse_model`; other kernels move every tensor once. What the model leaves out it
takes for free: that launches begin and end, that a few programs don't fill a GPU, and gaps between launches.

``python -m fastft.bench.layer_model`` prints the cases; ``--write`` keeps every launch, in bench/results/modelled/
<family>.csv, and the table beside what was measured, in README.md there (`measured_beside`).
"""

import argparse
import importlib
import re
import sys
from dataclasses import dataclass, replace

from . import entries, model, results, run, runner, shapes, slices, sparse_model
from .ops import lora, selection

# As bench/gpu.sh measures; whole steps and forwards (bench/e2e) have no model.
FAMILIES = {
    "lora": ("bf16", "bf16+fp32"),
    "dora": ("bf16", "bf16+fp32"),
    "partial": ("bf16", "bf16+fp32"),
    "sparse": ("bf16+fp32",),
    "selection": ("bf16",),
    "grouped": ("bf16",),
}
NOT_MODELLED = ("LIFT mask", "5 % largest")  # an exact SVD; a choice that waits for the host between its passes
FEW_TOKENS = 64  # up to here grouped kernels multiply without tensor cores
SECTOR = 32  # bytes that one access of memory moves at least


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, or a vendor's GEMM: bytes through memory and L2, operations, and what executes them.

    unit: "gemm", "tensor" (products with few columns on tensor cores) or "fma" (float32). products: tensor-core products
    for one, of operands that are split.
    """

    name: str
    memory: float
    operations: float = 0.0
    unit: str = "fma"
    l2: float = 0.0
    products: int = 1

    def bounds(self, gpu: model.Gpu) -> dict[str, float]:
        """Seconds that each resource needs."""
        rate = {"gemm": gpu.gemm, "tensor": model.SKINNY * gpu.gemm, "fma": gpu.fma}[self.unit]
        work = self.products * self.operations / rate
        return {"memory": self.memory / gpu.memory, "L2": self.l2 / gpu.l2, self.unit: work}

    def seconds(self, gpu: model.Gpu) -> float:
        return max(self.bounds(gpu).values())


@dataclass(frozen=True)
class Launches:
    """Of a case: the floor's, and by backend what ours adds to them, or all of ours where it doesn't begin with them."""

    floor: list[Launch]
    ours: dict[str, list[Launch]]
    alone: bool = False

    def seconds(self, gpu: model.Gpu, backend: str) -> tuple[float, float]:
        """(the floor's, ours)."""
        floor = sum(launch.seconds(gpu) for launch in self.floor)
        own = sum(launch.seconds(gpu) for launch in self.of(backend))
        return floor, own if self.alone else floor + own

    def of(self, backend: str) -> list[Launch]:
        return self.ours["any"] if "any" in self.ours else self.ours[backend]


def gemm(name: str, t: int, k: int, n: int, size: int, out: int | None = None) -> Launch:
    """[t, k] x [k, n] of elements of `size` bytes, the result's of `out`."""
    return Launch(name, size * (t * k + k * n) + (out or size) * t * n, 2 * t * k * n, "gemm")


def frozen(linear: shapes.Linear, size: int, backward: bool = True) -> list[Launch]:
    t, k, n = linear.tokens, linear.k, linear.n
    return [gemm("forward", t, k, n, size), *([gemm("dX", t, n, k, size)] if backward else [])]


def counted(op: str, backend: str, dtype: str, t: int, features: int, rank: int, p: float = 0.0) -> Launch:
    """A launch of the LoRA or DoRA family, as often as its tiles read."""
    act, adapter = (8 * kind.itemsize for kind in lora.DTYPES[dtype])
    dtypes = str(act) if backend == "triton" and op == "dora_grad_y" else f"{act}/{adapter}"
    moved = model.BACKENDS[backend](op, T=t, features=features, ranks=[rank], p=p, dtypes=dtypes, bias=False)
    if op == "dora_grad_y":
        return Launch(op, moved.once(), 3 * t * features, l2=moved.total())
    like = "lora_expand_" if op == "dora_expand_" else op
    products = model.tensor_products(backend, dtype, like)
    work = 2 * t * features * rank * (2 if op == "lora_grad_sb" else 1)
    return Launch(op, moved.once(), work, "tensor" if products else "fma", moved.total(), max(products, 1))


def _lora(case, linear, size):
    rank, p = int(_in(r"r=(\d+)", case)), float(_in(r"p=([\d.]+)", case))
    return Launches(frozen(linear, size), {b: _adapter(b, case.dtype, linear, rank, p) for b in model.BACKENDS})


def _adapter(backend, dtype, linear, rank, p, expand="lora_expand_"):
    t, k, n = linear.tokens, linear.k, linear.n
    ops = (("lora_shrink", k), (expand, n), ("lora_grad_sb", n), ("lora_grad_a", k), ("lora_grad_x_", k))
    return [counted(op, backend, dtype, t, features, rank, p) for op, features in ops]


def _dora(case, linear, size):
    """LoRA's, W Aᵀ of the row norms by the same shrink, and dY scaled."""
    rank, (t, k, n) = int(_in(r"r=(\d+)", case)), (linear.tokens, linear.k, linear.n)
    adds = {}
    for backend in model.BACKENDS:
        norm = replace(counted("lora_shrink", backend, case.dtype, n, k, rank), name="lora_shrink of W")
        scaled = counted("dora_grad_y", backend, case.dtype, t, n, rank)
        adds[backend] = [norm, *_adapter(backend, case.dtype, linear, rank, 0.0, "dora_expand_"), scaled]
    return Launches(frozen(linear, size), adds)


def touched(rows: int, columns: int, chosen: int, size: int) -> float:
    """Bytes of the sectors that hold some of `chosen` random columns."""
    in_sector = SECTOR // size
    return rows * columns * size * (1 - (1 - chosen / columns) ** in_sector)


def _partial(case, linear, size):
    sort, kind = case.name.split()[:2]
    adapter = lora.DTYPES[case.dtype][1].itemsize
    t, k, n = linear.tokens, linear.k, linear.n
    if sort == "update":
        return Launches([Launch("AdamW, index_copy_", case.floor_moved)], _each(Launch("slice_adamw_", case.moved)), True)
    chosen, inner, outer = slices.slice_size(linear, kind), *((k, n) if kind == "columns" else (n, k))
    gather = Launch("gather_columns", touched(t, inner, chosen, size) + t * chosen * size)
    if sort == "layer":
        return Launches(frozen(linear, size), _each(gather, gemm("slice of dW", outer, t, chosen, size, adapter)))
    rank, forward = slices.equal_rank(linear, kind), frozen(linear, size, backward=False)
    # The floor of `unmerged` is a LoRA with as many numbers: what ours adds stands beside what that adds.
    low_rank = [counted(op, "cuda", case.dtype, t, w, rank) for op, w in (("lora_shrink", k), ("lora_expand_", n))]
    if kind == "columns":
        ours = [gather, replace(gemm("delta", t, chosen, n, size), memory=2 * size * t * n + adapter * chosen * n)]
    else:
        product = gemm("delta", t, k, chosen, size)
        ours = [product, Launch("scatter_add_columns_", 2 * touched(t, n, chosen, size) + size * t * chosen)]
    return Launches([*forward, *low_rank], _each(*forward, *ours), True)


def _sparse(case, linear, size):
    sort, density = case.name.split()[0], float(_in(r"([\d.]+) %", case)) / 100
    if sort == "update":
        return Launches([Launch("LIFT's algorithm", case.floor_moved)], _each(Launch("sparse_adamw_", case.moved)), True)
    t, k, n = linear.tokens, linear.k, linear.n
    count = entries.count_of(linear, density)
    if sort == "beside":
        moved = 2 * t * n * size + 8 * count + t * k * size
        product = Launch("add_sparse_product_", moved, 2 * t * count, l2=moved + 2 * t * count)
        return Launches(frozen(linear, size, backward=False), _each(product))
    if sparse_model.engine(linear, density) == "blocks":
        return Launches(
            frozen(linear, size), _each(gemm("blocks of dW", n, t, k, size, 4), Launch("entries of them", 0, l2=8 * k * n))
        )
    copies = Launch("copies of dY and X", 2 * size * t * (k + n))
    return Launches(frozen(linear, size), _each(copies, Launch("sampled_product_", 0, 2 * count * t, l2=size * count * t)))


def _selection(case, linear, size):
    """The histogram: |W| once."""
    return Launches([Launch("torch.bincount", case.floor_moved)], _each(Launch("count_bins_", case.moved)), True)


def _grouped(case, linear, size):
    layer, count, rank = shapes.MODELS[case.shape], int(_in(r"D=(\d+)", case)), int(_in(r"r=(\d+)", case))
    t = int(re.search(r"(\d+) tokens", case.size)[1])
    unit = "fma" if t <= FEW_TOKENS else "tensor"
    floor, adds = [], []
    for k, widths in layer.groups():
        n, ranks = sum(widths), rank * len(widths)
        floor.append(gemm("forward", t, k, n, size))
        s, held = 4 * t * ranks, size * count * rank
        adds.append(Launch("grouped_shrink", size * t * k + held * k * len(widths) + s, 2 * t * k * ranks, unit))
        adds.append(Launch("grouped_expand_", 2 * size * t * n + held * n + s, 2 * t * n * rank, unit))
    return Launches(floor, _each(*adds))


def _each(*launches):
    """Kernels whose counts are the same on every backend."""
    return {"any": list(launches)}


def _in(pattern, case) -> str:
    return re.search(pattern, case.name)[1]


_MODELS = {
    "lora": _lora,
    "dora": _dora,
    "partial": _partial,
    "sparse": _sparse,
    "selection": _selection,
    "grouped": _grouped,
}


def launches(case: runner.Case) -> Launches | None:
    """Of a case of a family here; None where there is no model of it."""
    if case.family not in _MODELS or case.name.startswith(NOT_MODELLED):
        return None
    sizes = [int(word) for word in re.findall(r"\d+", case.size)]
    linear = shapes.Linear(*sizes) if re.fullmatch(r"\d+x\d+x\d+", case.size) else None
    dtypes = selection.DTYPES[case.dtype] if case.family == "selection" else lora.DTYPES[case.dtype][0]
    return _MODELS[case.family](case, linear, dtypes.itemsize)


def cases(family: str):
    module = importlib.import_module(run.families()[family])
    return module.cases("cuda", None, list(FAMILIES[family]))


def rows(family: str) -> list[dict[str, str]]:
    """Of each GPU, case and backend: every launch, what bounds it, then "floor" and "ours" with the ratio."""
    found = []
    for case in cases(family):
        modelled = launches(case)
        for gpu_name, gpu in model.GPUS.items() if modelled else ():
            for backend in modelled.ours:
                floor, ours = modelled.seconds(gpu, backend)
                same = {
                    "status": "modelled",
                    "gpu": gpu_name,
                    "family": family,
                    "case": case.name,
                    "shape": case.shape,
                    "dtype": case.dtype,
                    "backend": backend,
                }
                for launch in modelled.of(backend):
                    bounds = launch.bounds(gpu)
                    found.append(_row(same, launch.name, launch.seconds(gpu), max(bounds, key=bounds.get)))
                found.append(_row(same, "floor", floor))
                found.append(_row(same, "ours", ours) | {"ratio": f"{ours / floor:.3f}"})
    return found


def _row(same, kernel, seconds, bound=""):
    return same | {"kernel": kernel, "us": f"{seconds * 1e6:.3g}", "bound": bound, "ratio": ""}


def main(argv=None) -> int:
    from . import measured_beside  # which imports this module

    parser = argparse.ArgumentParser(prog="python -m fastft.bench.layer_model", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="keep the rows, and the table beside what was measured")
    parser.add_argument("--gpu", choices=model.GPUS, default="H200")
    args = parser.parse_args(argv)
    everything = {family: rows(family) for family in FAMILIES}
    for family, found in everything.items():
        lines = [("case", "shape", "dtype", "backend", "floor, us", "ours, us", "ratio")]
        here = [row for row in found if row["gpu"] == args.gpu]
        for floor, ours in zip(*([r for r in here if r["kernel"] == name] for name in ("floor", "ours"))):
            lines.append((*(ours[f] for f in ("case", "shape", "dtype", "backend")), floor["us"], ours["us"], ours["ratio"]))
        results.show(f"{family} on {args.gpu}: modelled, not measured", lines)
        if args.write:
            model.write_rows(model.FOLDER / f"{family}.csv", found)
    if args.write:
        measured_beside.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
