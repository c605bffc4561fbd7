"""What training is for: the held-out loss at equal size of what trains, and how long a given loss takes.

    fastft bench quality [--rounds SEEDS] [--steps N] [--quick] [--peers peft,full]

The demonstration's task (demo/): its small Llama, pretrained on English, learns code. Every method trains equally many
numbers, as many as a LoRA of rank 8 on all linears has (within 1 %), for the same steps on the same batches in the same
order, with AdamW under the same schedule, each at its own learning rate: the best of `RATES` at another seed (`--rates`
tries them again). A round is one seed of batches and initial values, in which every method runs once, in random order;
ratios are to PEFT's LoRA in the same rounds.

    held_out_loss      after the last step, a mean over the tokens of rows that nothing trains on
    seconds_to_loss    of steps (evaluations are not counted) until the held-out loss has fallen by `SHARE` of what it falls
                       by in PEFT's run of that round, between two evaluations by the straight line

The gate: a method trains what it should, its loss falls, and fastft's LoRA, which starts from PEFT's very values, has PEFT's
training losses, every one of them within `CLOSE`.
"""

import argparse
import random

import torch

from . import peers, results, stats
from .quality_runs import EVALUATIONS, PARAMETERS, TRAINED, Run, Task, make_task, missing, train

FAMILY, TASK = "quality", "functions"
STEPS, QUICK_STEPS, SEEDS = 60, 12, 5
SHARE, CLOSE = 0.9, 1e-3
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
YARDSTICK = "peft"
# implementation -> learning rate
ARMS = {
    "fastft:LoRA": 8e-3,
    "fastft:DoRA": 1.6e-2,
    "fastft:S2FT": 1.6e-2,
    "fastft:SpIEL": 8e-3,
    "fastft:LIFT": 1.6e-2,
    "peft": 8e-3,
    "full": 2e-3,
}
PEERS = {"peft": peers.peft_missing, "full": lambda: None}


def gate(name: str, runs: list[Run], others: dict[str, list[Run]]) -> str | None:
    """Why a method gets no number, or None."""
    if name != "full" and abs(runs[0].trained / TRAINED - 1) > 0.01:
        return f"it trains {runs[0].trained:,} numbers, not {TRAINED:,}"
    if not all(run.after < run.before for run in runs):
        return "its held-out loss does not fall"
    if name == "fastft:LoRA" and YARDSTICK in others and ARMS[name] == ARMS[YARDSTICK]:
        pairs = zip(runs, others[YARDSTICK], strict=True)
        apart = max(abs(a - b) for ours, peft in pairs for a, b in zip(ours.training, peft.training, strict=True))
        if not apart <= CLOSE:
            return f"its training losses are up to {apart:.1e} from PEFT's"
    return None


def rows(found: dict[str, list[Run]], steps: int, status: str, env: dict, skipped: dict[str, str]) -> list[dict]:
    """A row for each implementation and metric."""
    same = env | {"family": FAMILY, "case": f"{TASK} {steps} steps", "shape": "demo", "dtype": "fp32", "status": status}
    same |= {"rounds": len(next(iter(found.values()))), "size": f"{TRAINED:,} of {PARAMETERS:,} numbers"}
    made = []
    for name, runs in found.items():
        own = same | {"implementation": name}
        if reason := gate(name, runs, found):
            made += [own | {"metric": m, "status": "wrong", "note": reason} for m in ("held_out_loss", "seconds_to_loss")]
            continue
        note = f"lr {ARMS[name]:g}, {runs[0].trained:,} numbers, {_median([r.before for r in runs]):.4f} before"
        made.append(own | {"metric": "held_out_loss", "unit": "nats", "note": note} | _compared(*_losses(runs, found)))
        given, reached, theirs = _times(runs, found)
        note = f"{SHARE:.0%} of what PEFT's LoRA loses" if given else "no PEFT to be compared with"
        if any(seconds is None for seconds in reached):
            note += f": not reached in {sum(s is None for s in reached)} of {len(reached)} rounds"
            reached = theirs = None
        made.append(own | {"metric": "seconds_to_loss", "unit": "s", "note": note} | _compared(reached, theirs))
        steps_only = [r.seconds / steps for r in runs], [r.seconds / steps for r in found.get(YARDSTICK, ())]
        made.append(own | {"metric": "seconds_a_step", "unit": "s"} | _compared(*steps_only))
    return made + [same | {"implementation": n, "status": "skipped", "note": why} for n, why in skipped.items()]


def _losses(runs, found):
    return [r.after for r in runs], [r.after for r in found.get(YARDSTICK, ())]


def _times(runs, found):
    """(the losses to be reached, a round each, when these runs did, when PEFT's did)."""
    yardstick = found.get(YARDSTICK, ())
    given = [r.before - SHARE * (r.before - r.after) for r in yardstick]
    return (
        given,
        [run.seconds_to(loss) for run, loss in zip(runs, given)],
        [r.seconds_to(g) for r, g in zip(yardstick, given)],
    )


def _compared(values, theirs) -> dict:
    """The fields of a median, and of its ratio to the yardstick's where there are two rounds at least."""
    if not values:
        return {}
    found = {"value": f"{_median(values):.6g}"}
    if theirs and len(values) > 1:
        ratio = stats.paired_ratio(values, theirs)
        found |= {"ratio": f"{ratio.median:.5f}", "lo": f"{ratio.lo:.5f}", "hi": f"{ratio.hi:.5f}"}
    return found


def _median(values) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(0.5).item()


def table(made: list[dict]) -> list[tuple[str, ...]]:
    """Header and lines for the terminal: one per implementation."""
    metrics = ("held_out_loss", "seconds_to_loss", "seconds_a_step")
    lines = [("implementation", *(m.replace("_", " ") for m in metrics), "status")]
    for name in dict.fromkeys(row["implementation"] for row in made):
        own = {row.get("metric"): row for row in made if row["implementation"] == name}
        first = next(iter(own.values()))
        notes = dict.fromkeys(
            row.get("note", "") for m, row in own.items() if m != "seconds_to_loss" or not row.get("value")
        )
        lines.append((name, *(_cell(own.get(m, {})) for m in metrics), ": ".join(filter(None, (first["status"], *notes)))))
    return lines


def _cell(row) -> str:
    if not row.get("value"):
        return "-"
    value = f"{float(row['value']):.4g}"
    return (
        f"{value} ({float(row['ratio']):.3f} [{float(row['lo']):.3f}, {float(row['hi']):.3f}])"
        if row.get("ratio")
        else value
    )


def losses(made: list[dict]) -> list[str]:
    """Sentences on where fastft's LoRA is behind PEFT's, as `results.losses`."""
    said = [f"WRONG  quality: {r['implementation']}: {r['note']}" for r in made if r["status"] == "wrong"]
    for row in made:
        if row["implementation"] == "fastft:LoRA" and row.get("lo") and float(row["lo"]) > 1:
            said.append(f"LOST   quality {row['metric']}: fastft:LoRA {_cell(row)}, over PEFT's")
    return list(dict.fromkeys(said))


def measure(task: Task, rounds: int, steps: int, wanted, seed: int = 0, rates=None, say=print):
    """(implementation -> its runs, why others were skipped); with `rates`, (name, rate) -> runs.

    Args:
        wanted: peers. rates: learning rates that each implementation tries, instead of its own.
    """
    skipped = {name: why for name in wanted if (why := PEERS[name]())}
    names = [name for name in ARMS if name.startswith("fastft") or (name in wanted and name not in skipped)]
    arms = [(name, rate) for name in names for rate in (rates or [ARMS[name]])]
    found: dict = {(arm if rates else arm[0]): [] for arm in arms}
    shuffle = random.Random(seed).shuffle
    for i in range(rounds):
        shuffle(arms)
        for name, rate in arms:
            run = train(name, task, rate, steps, seed + i)
            found[(name, rate) if rates else name].append(run)
            say(f"round {i + 1} of {rounds}: {name} lr {rate:g}: {run.before:.4f} -> {run.after:.4f} in {run.seconds:.1f} s")
    return found, skipped


def main(argv=None) -> int:
    """``fastft bench quality``; returns the exit status of ``fastft bench``."""
    parser = argparse.ArgumentParser(prog="fastft bench quality", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, help=f"seeds ({SEEDS}); fewer are marked quick")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training ({STEPS})")
    parser.add_argument("--quick", action="store_true", help=f"one seed, {QUICK_STEPS} steps: to see that it works")
    parser.add_argument("--peers", help=f"comma-separated, of {', '.join(PEERS)}, or none; default: all")
    parser.add_argument("--rates", type=float, nargs="*", help="try learning rates, and keep no rows")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice); recorded in each row")
    parser.add_argument("--out", metavar="DIR", help="folder of the CSV (default: bench/results of a checkout)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    wanted = PEERS if args.peers is None else [p for p in args.peers.split(",") if p not in ("", "none")]
    if unknown := [p for p in wanted if p not in PEERS]:
        parser.error(f"unknown peer {unknown[0]!r}; known: {', '.join(PEERS)}")
    if reason := missing():
        parser.error(reason)
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1, not {args.threads}")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rounds = args.rounds if args.rounds is not None else 1 if args.quick else SEEDS
    steps = QUICK_STEPS if args.quick else args.steps
    if rounds < 1 or steps < EVALUATIONS:
        parser.error(f"at least one round and {EVALUATIONS} steps")
    env, task = results.environment(device), make_task(device)
    quick = args.quick or rounds < SEEDS or steps < STEPS
    if args.rates is not None:
        found, _ = measure(task, rounds, steps, wanted, args.seed + 1000, args.rates or RATES)
        lines = [
            (name, f"{rate:g}", f"{_median([r.after for r in runs]):.4f}") for (name, rate), runs in sorted(found.items())
        ]
        results.show("learning rates", [("implementation", "lr", "held-out loss"), *lines])
        return 0
    path = None if quick and not args.out else results.csv_path(env["device"], args.out)
    found, skipped = measure(task, rounds, steps, wanted, args.seed)
    made = rows(found, steps, "quick" if quick else "ok", env, skipped)
    if path:
        results.append(path, made)
    results.show(f"quality: {TASK}, {rounds} seeds of {steps} steps; in brackets over PEFT's", table(made))
    said = losses(made)
    print("\n".join(["", *said]) if said else "\nfastft's LoRA is not behind PEFT's.")
    return 1 if any(line.startswith("WRONG") for line in said) else 3 if said and not quick else 0
