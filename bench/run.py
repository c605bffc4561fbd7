"""``fastft bench``: measures a family's cases beside the floor and its peers, and says where we lose."""

import argparse
import dataclasses
import importlib
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch

from ..cli.quiet import quiet_imports
from . import calibration, graphs, page, quality, results, revision, runner, shapes, stats

QUICK_ROUNDS = 5
CALIBRATION = "calibration"  # a family without cases
WHOLE_RUNS = {"quality": quality.main}  # families of whole training runs, which have options of their own
WRONG, BAD_ARGUMENTS, BEHIND = 1, 2, 3  # exit statuses


def families() -> dict[str, str]:
    """Family -> its module: the ops' (bench/ops), whole training steps and what is called without a graph (bench/e2e)."""
    here = Path(__file__).parent
    found = {
        path.stem: f"{__package__}.{folder}.{path.stem}"
        for folder in ("ops", "e2e")
        for path in (here / folder).glob("*.py")
    }
    return dict(sorted(found.items()))


def listed(family: str, device: str, names, dtypes, dropouts, rank: int, peers, timing: str) -> list[runner.Case]:
    """The cases of a family; what is None takes its own choice.

    Raises:
        ValueError: an unknown shape, dtype or peer, or what the family needs is not installed.
    """
    module = importlib.import_module(families()[family])
    cases = list(module.cases(device, names, dtypes, dropouts, rank, peers))
    if device == "cuda" and timing != usual_timing(family):  # rows of a name are compared with each other
        cases = [dataclasses.replace(case, name=f"{case.name} {timing}") for case in cases]
    return cases


def usual_timing(family: str) -> str:
    return "eager" if ".e2e." in families()[family] else "graph"


def _parser():
    parser = argparse.ArgumentParser(
        prog="fastft bench",
        description="Times every implementation of a case in the same rounds as the floor (the frozen layer alone) and "
        "prints the median ratio with its 95 % bootstrap interval.",
        epilog=f"Exit status: 0; {WRONG} if an implementation of ours gave wrong results; {BAD_ARGUMENTS} for bad "
        f"arguments; {BEHIND} if all are right but fastft missed a target, is behind a peer by more than both intervals, or "
        "has become slower than at --base (quick runs, which are no results, don't tell, nor do fastft:… and full).",
    )
    parser.add_argument(
        "family",
        nargs="?",
        default="lora",
        choices=[*families(), CALIBRATION, *WHOLE_RUNS],
        help=f"kernel family (default: lora); {CALIBRATION}: what the machine can do at most, and nothing else; "
        f"{', '.join(WHOLE_RUNS)}: whole training runs, with options of their own ({' '.join(WHOLE_RUNS)} --help)",
    )
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
    parser.add_argument(
        "--calibrate",
        action=argparse.BooleanOptionalAction,
        help="measure the machine's rates first, so that rows tell their part of the roofline (default: unless --quick)",
    )
    parser.add_argument(
        "--base",
        metavar="REV",
        help="in a git checkout: also time the fastft of this revision, in the same rounds, and say what has changed",
    )
    parser.add_argument(
        "--html",
        action="store_true",
        help=f"measure nothing: write all results as one page (--out FILE or DIR; {page.DEFAULT})",
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the CSV (default: bench/results of a checkout)")
    parser.add_argument("--resume", action="store_true", help="skip cases with rows of this clean commit in the CSV")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="list the models and shapes and stop")
    return parser


def main(argv=None) -> int:
    """Run ``fastft bench`` with these arguments (default: the command line's); returns the exit status."""
    quiet_imports()
    given = sys.argv[1:] if argv is None else list(argv)
    if given and given[0] in WHOLE_RUNS:
        return WHOLE_RUNS[given[0]](given[1:])
    parser = _parser()
    args = parser.parse_args(given)
    if args.list:
        for name, model in shapes.MODELS.items():
            print(f"{name:24} model of {model.layers} layers, T = {model.batch * model.length}")
        for name, linear in shapes.LINEARS.items():
            print(f"{name:24} T x K x N = {linear}")
        return 0
    if args.html:
        try:
            print(f"wrote {page.write(args.out)}")
        except OSError as error:
            parser.error(f"--out {args.out}: cannot be written: {error.strerror}; give another file or folder")
        except ValueError as error:
            parser.error(str(error))
        return 0
    _check(parser, args)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    rounds = (QUICK_ROUNDS if args.quick else stats.MIN_ROUNDS) if args.rounds is None else args.rounds
    if args.threads:
        torch.set_num_threads(args.threads)
    env = results.environment(device)
    quick = args.quick or rounds < stats.MIN_ROUNDS
    path = None if quick and not args.out else results.csv_path(env["device"], args.out)
    if path:
        _check_folder(parser, path.parent)
    if args.family == CALIBRATION:
        print(_where(env, "calibration", path))
        _calibrated(device, env, path, "quick" if quick else "ok")
        return 0
    timing = args.timing or usual_timing(args.family)
    peers = None if args.peers is None else [p for p in args.peers.split(",") if p not in ("", "none")]
    settings = {"family": args.family, "device": device, "names": args.shape, "dtypes": args.dtype}
    settings |= {"dropouts": args.dropout, "rank": args.rank, "peers": peers, "timing": timing}
    try:
        cases = listed(**settings)
    except ValueError as error:
        parser.error(str(error))
    if not cases:  # nothing measured is nothing found, which would read as if all was well
        parser.error(f"{args.family} has no case of this shape and dtype")
    try:
        theirs = settings | {"peers": []}
        base = revision.Base(args.base, theirs, args.seed, torch.get_num_threads()) if args.base else None
    except revision.RevisionError as error:
        parser.error(str(error))

    done = _done(path, env) if args.resume else set()
    print(_where(env, "quick look, not a result" if quick else f"{rounds} rounds", path))
    for case in (case for case in cases if case.key() in done):
        print(f"{case}: already measured at {env['commit']}")
    cases = [case for case in cases if case.key() not in done]
    rates = None
    if cases and (args.calibrate or (args.calibrate is None and not quick)):
        rates = _calibrated(device, env, path, "quick" if quick else "ok")
    said, wrong = [], False
    with base or nullcontext():
        for case in cases:
            found = runner.measure(case, device, rounds, quick, args.seed, timing, base)
            if rates:
                calibration.place(case, found, rates)
            if path:
                results.append(path, results.rows(case, found, env))
            results.show(f"{case} ({case.size})", results.table(found))
            said += results.losses(case, found)
            wrong |= any(m.status == "wrong" and runner.is_ours(m.implementation) for m in found)
            if any(m.status == "void" for m in found):
                said.append(f"VOID   {case}: the floor differs from itself by more than 1.5 %; the machine is not quiet")
    print("\n".join(["", *said]) if said else "\nfastft is behind nothing measured here.")
    behind = not quick and any(line.startswith(results.BEHIND) for line in said)
    return WRONG if wrong else BEHIND if behind else 0


def _check(parser, args) -> None:
    """Numbers that no case can be measured with are bad arguments; as errors of a case they would be wrong results."""
    for option, value, least in (("rank", args.rank, 1), ("threads", args.threads, 1), ("rounds", args.rounds, 2)):
        if value is not None and value < least:
            parser.error(f"--{option} must be at least {least}, not {value}")
    for dropout in args.dropout or ():
        if not 0 <= dropout < 1:
            parser.error(f"--dropout must be in [0, 1), not {dropout}")


def _check_folder(parser, folder: Path) -> None:
    """Before anything is measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        parser.error(f"--out {folder}: cannot be written: {error.strerror}; give another folder")


def _calibrated(device, env, path, status: str) -> calibration.Rates:
    """The machine's rates, shown and kept."""
    rates = calibration.measure(device)
    calibration.show(rates)
    if path:
        results.append(path, calibration.rows(rates, env, status))
    return rates


def _where(env, kind: str, path) -> str:
    return (
        f"{env['device']} ({env['capability']}), {env['threads']} threads, torch {env['torch']}, commit {env['commit']}: "
        f"{kind}; rows {'are not kept' if path is None else f'go to {path}'}"
    )


def _done(path, env) -> set[tuple]:
    """The keys of cases of which ours has a number that counts, of this commit, device and number of threads.

    Not where an arm of ours was wrong, which then would be said no more; and none of a commit that doesn't tell what was
    measured.
    """
    if path is None or not path.exists() or not results.tells(env["commit"]):
        return set()
    done, wrong = set(), set()
    for row in results.read([path]):
        if row["metric"] == "time" and all(row[f] == env[f] for f in ("commit", "device", "threads")):
            key = row["family"], row["case"], row["shape"], row["dtype"]
            if row["status"] == "ok" and row["implementation"] == "fastft":
                done.add(key)
            elif row["status"] == "wrong" and runner.is_ours(row["implementation"]):
                wrong.add(key)
    return done - wrong


if __name__ == "__main__":
    sys.exit(main())
