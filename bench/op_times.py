"""What each op takes on a GPU, on every backend that has a kernel: microseconds, and the bytes it must move over that.

    python -m fastft.bench.op_times --out DIR    # the table also goes to DIR/op-times.csv
    python -m fastft.bench.op_times lora         # of one family: about 20 s on an H100

For work on kernels and for the order of backends: a layer's ratio says that it is slow, this says where. An op runs in a
CUDA graph over copies of its arguments that exceed the L2 three times; bytes count every tensor once (LoRA's by `_traffic`,
others' by `op_problems.moved`). LoRA's ops have the shapes of a model's layers, the others those of their configurations.
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path

import torch

from fastft import testing
from fastft.ops import lora, registry

from . import graphs, op_problems, op_runs, shapes
from .model import BACKENDS
from .ops.lora import DTYPES

SHAPES = ("llama3-8b/q_proj", "llama3-8b/k_proj", "llama3-8b/gate_proj", "llama3-8b/down_proj")
REPEATS = 8
FAMILIES = ("lora", "dora", "grouped", "partial", "selection", "sparse")
FIELDS = ("shape", "dtype", "p", "op", "backend", "us", "GB_s")


def arguments(linear: shapes.Linear, dtype: str, rank: int, p: float, device) -> dict[str, tuple]:
    """Op -> its arguments in the forward and backward of a layer."""
    act, adapter = DTYPES[dtype]

    def normal(*size, dtype):
        return torch.randn(size, device=device).to(dtype)

    t, k, n = linear.tokens, linear.k, linear.n
    x, y = normal(t, k, dtype=act), normal(t, n, dtype=act)
    a, b, s = normal(rank, k, dtype=adapter), normal(n, rank, dtype=adapter), normal(t, rank, dtype=torch.float32)
    seed = torch.randint(2**62, (1,), device=device) if p > 0 else None
    mask = lora.lora_shrink(x, a, [rank], p, seed)[1]
    return {
        "lora_shrink": (x, a, [rank], p, seed),
        "lora_expand_": (y, s, b, 1e-3),
        "lora_grad_sb": (y, s, b, 1e-3),
        "lora_grad_a": (s, x, a, [rank], mask, p),
        "lora_grad_x_": (x, s, 1e-3 * a, [rank], mask, p),
    }


def sets_beyond_l2(one: int, device) -> int:
    return max(2, min(16, -(-3 * torch.cuda.get_device_properties(device).L2_cache_size // one) + 1))


def seconds(replay, rounds: int = 15) -> float:
    """Median time of one replay."""
    times = []
    for _ in range(rounds + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times[2:])


def measure(shape: str, dtype: str, p: float, rank: int, device):
    """Yields a row for every op and backend."""
    linear, (act, adapter) = shapes.LINEARS[shape], DTYPES[dtype]
    one = linear.tokens * min(linear.k, linear.n) * act.itemsize
    sets = [arguments(linear, dtype, rank, p, device) for _ in range(sets_beyond_l2(one, device))]
    for name in sets[0]:
        op, features = getattr(lora, name), linear.n if name in ("lora_expand_", "lora_grad_sb") else linear.k
        for backend in (b for b in testing.available("cuda") if b in BACKENDS):
            with torch.no_grad(), testing.use(backend):
                # All copies and calls in one graph: a graph starts some microseconds after the one before has ended.
                calls = [d[name] for d in sets] * REPEATS
                took = seconds(graphs.capture(lambda op=op, calls=calls: [op(*c) for c in calls], graphs.new_pool()))
            took /= len(calls)
            dtypes = f"{8 * act.itemsize}/{8 * adapter.itemsize}"
            moved = BACKENDS[backend](name, T=linear.tokens, features=features, ranks=[rank], p=p, dtypes=dtypes)
            yield dict(
                zip(FIELDS, (shape, dtype, p, name, backend, f"{took * 1e6:.1f}", f"{moved.once() / took / 1e9:.0f}"))
            )


def measure_family(family: str, device, linear: shapes.Linear = op_problems.FULL):
    """Yields a row for every configured problem of a family and backend that runs it."""
    for problem in op_problems.problems(family, linear):
        op, args = registry.OPS[problem.op], problem.make(device, 0)
        one = sum(arg.nbytes for arg in args if isinstance(arg, torch.Tensor))
        sets = [op_runs.copies(args) for _ in range(sets_beyond_l2(one, device))] * REPEATS
        for backend in (b for b in testing.available("cuda") if b in BACKENDS):
            with torch.no_grad(), testing.use(backend):
                try:
                    outcome = op_runs.outcome(problem.op, op, args)
                except RuntimeError as error:  # what has no kernel there says so
                    print(f"{problem} on {backend}: {str(error).splitlines()[0]}", file=sys.stderr)
                    continue
                took = seconds(graphs.capture(lambda op=op, calls=sets: [op(*c) for c in calls], graphs.new_pool()))
            took /= len(sets)
            when = {key: str(value) for key, value in problem.when.items()}
            dtype = when.pop("dtypes", when.pop("dtype", ""))
            what = " ".join(f"{key}={value}" for key, value in when.items())
            speed = op_problems.moved(problem.op, args, outcome) / took / 1e9
            yield dict(zip(FIELDS, (what, dtype, "", problem.op, backend, f"{took * 1e6:.1f}", f"{speed:.0f}")))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("family", nargs="*", help=f"default: all, {', '.join(FAMILIES)}")
    parser.add_argument("--out", type=Path, help="folder for op-times.csv")
    parser.add_argument("--shape", action="append", choices=shapes.LINEARS, help="repeatable; default: llama3-8b's")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeatable; default: bf16 and bf16+fp32")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rank", type=int, default=shapes.RANK)
    args = parser.parse_args(argv)
    if unknown := [name for name in args.family if name not in FAMILIES]:
        parser.error(f"unknown family {unknown[0]!r}; known: {', '.join(FAMILIES)}")
    device, rows = torch.device("cuda"), []

    def tell(found):
        for row in found:
            print("  ".join(f"{row[name]!s:>12}" for name in FIELDS), flush=True)
            rows.append(row)
        torch.cuda.empty_cache()

    for family in args.family or FAMILIES:
        if family != "lora":
            tell(measure_family(family, device))
            continue
        for shape in args.shape or SHAPES:
            for dtype in args.dtype or ("bf16", "bf16+fp32"):
                tell(measure(shape, dtype, args.dropout, args.rank, device))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / "op-times.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
