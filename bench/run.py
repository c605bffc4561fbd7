"""``fastft bench``: measures a family's cases beside the floor and its peers, and says where we lose."""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from . import graphs, results, runner, shapes, stats

QUICK_ROUNDS = 5


def families() -> dict[str, str]:
    """Family -> its module: the ops' (bench/ops) and whole training steps (bench/e2e)."""
    here = Path(__file__).parent
    found = {
        path.stem: f"{__package__}.{folder}.{path.stem}"
        for folder in ("ops", "e2e")
        for path in (here / folder).glob("*.py")
    }
    return dict(sorted(found.items()))


def _parser():
    parser = argparse.ArgumentParser(
        prog="fastft bench",
        description="Times every implementation of a case in the same rounds as the floor (the frozen layer alone) and "
        "prints the median ratio with its 95 % bootstrap interval. Exit status: 0; 1 if an implementation of ours gave "
        "wrong results; 2 for bad arguments.",
    )
    parser.add_argument("family", nargs="?", default="lora", choices=families(), help="kernel family (default: lora)")
    parser.add_argument("--shape", action="append", help="named shape or model, repeatable; --list shows them")
    parser.add_argument("--dtype", action="append", help="fp32, bf16, bf16+fp32 (fp32 adapters), …; repeatable")
    parser.add_argument("--dropout", action="append", type=float, help="dropout probability, repeatable (0 and 0.05)")
    parser.add_argument("--rank", type=int, default=shapes.RANK, help=f"rank of the adapters ({shapes.RANK})")
    parser.add_argument("--peers", help="comma-separated peers, or none; default: the family's own choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument(
        "--timing",
        choices=graphs.TIMINGS,
        help="on a GPU: replays of CUDA graphs (default; of whole steps eager), or eager calls, launch gaps and all",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice); recorded in each row")
    parser.add_argument("--rounds", type=int, help=f"default {stats.MIN_ROUNDS}; fewer are marked quick")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds: to see that it works, no result")
    parser.add_argument("--out", metavar="DIR", help="folder of the CSV (default: bench/results of a checkout)")
    parser.add_argument("--resume", action="store_true", help="skip cases with rows of this commit in the CSV")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="list the shapes and stop")
    return parser


def main(argv=None) -> int:
    """Run ``fastft bench`` with these arguments (default: the command line's); returns the exit status."""
    import importlib

    parser = _parser()
    args = parser.parse_args(argv)
    if args.list:
        for name, linear in shapes.LINEARS.items():
            print(f"{name:24} T x K x N = {linear}")
        return 0
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else stats.MIN_ROUNDS)
    if rounds < 2:
        parser.error("--rounds must be at least 2")
    if args.threads:
        torch.set_num_threads(args.threads)
    peers = None if args.peers is None else [p for p in args.peers.split(",") if p not in ("", "none")]
    family = importlib.import_module(families()[args.family])
    try:
        cases = list(family.cases(device, args.shape, args.dtype, args.dropout, args.rank, peers))
    except ValueError as error:
        parser.error(str(error))

    usual = "eager" if ".e2e." in families()[args.family] else "graph"
    timing = args.timing or usual
    if device == "cuda" and timing != usual:  # rows of a name are compared with each other
        cases = [dataclasses.replace(case, name=f"{case.name} {timing}") for case in cases]
    env = results.environment(device)
    quick = args.quick or rounds < stats.MIN_ROUNDS
    path = None if quick and not args.out else results.csv_path(env["device"], args.out)
    done = _done(path, env) if args.resume else set()
    print(_where(env, rounds, quick, path))
    said, wrong = [], False
    for case in cases:
        if _key(vars(case) | {"case": case.name}) in done:
            print(f"{case}: already measured at {env['commit']}")
            continue
        found = runner.measure(case, device, rounds, quick, args.seed, timing)
        if path:
            results.append(path, results.rows(case, found, env))
        results.show(f"{case} ({case.size})", results.table(found))
        said += results.losses(case, found)
        wrong |= any(m.status == "wrong" and m.implementation.startswith("fastft") for m in found)
        if any(m.status == "void" for m in found):
            said.append(f"VOID   {case}: the floor differs from itself by more than 1.5 %; the machine is not quiet")
    print("\n".join(["", *said]) if said else "\nfastft is behind nothing measured here.")
    return int(wrong)


def _where(env, rounds, quick, path) -> str:
    kind = "quick look, not a result" if quick else f"{rounds} rounds"
    return (
        f"{env['device']} ({env['capability']}), {env['threads']} threads, torch {env['torch']}, commit {env['commit']}: "
        f"{kind}; rows {'are not kept' if path is None else f'go to {path}'}"
    )


def _key(row) -> tuple:
    return row["family"], row["case"], row["shape"], row["dtype"]


def _done(path, env) -> set[tuple]:
    if path is None or not path.exists():
        return set()
    same = ("commit", "device", "threads")
    counted = [r for r in results.read([path]) if r["metric"] == "time" and r["status"] == "ok"]
    return {_key(r) for r in counted if all(r[f] == env[f] for f in same)}


if __name__ == "__main__":
    sys.exit(main())
