"""``fastft tune``: searches launch configurations of the Triton kernels on a GPU and writes them as data.

From the configuration in use the search goes to the fastest of those that differ from it in one number of
``kernels/configs/candidates/<family>.json``, and on from there until none is faster. What does not compile, spills registers
or gives wrong results is left out before it is timed. A configuration is faster only where the interval of its times over
those of the one in use lies wholly below the interval of that one over itself, in rounds of their own after those that
picked it. What looks faster without that is said to be within noise, and nothing changes.

The search asks functions for times and for reasons to leave something out (`bench/op_runs.py` on a GPU), so that its choices
can be tested without one.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .bench import stats
from .kernels import _config

ROUNDS, SCREENING_ROUNDS, FINALISTS, STEPS = stats.MIN_ROUNDS, 6, 3, 6
Config = dict
Timer = Callable[[list[Config], int], list[list[float]]]


@dataclass
class Choice:
    """What a search found: `config`, how its times stand to those of the configuration that it began with, and why.

    verdict: "faster"; "best" (no candidate looked faster); "noise" (some did, but not surely); "void" (the configuration in
    use differs from itself by more than 1.5 %, so that nothing can be said). left_out: (candidate, why) of each.
    """

    config: Config
    verdict: str
    ratio: stats.Interval | None = None
    floor: stats.Interval | None = None
    tried: int = 0
    left_out: list[tuple[Config, str]] = field(default_factory=list)

    def __str__(self):
        said = {
            "faster": f"{self.ratio} of the time in use",
            "best": "the configuration in use is the fastest",
            "noise": f"within noise: the fastest other one takes {self.ratio}, the one in use against itself {self.floor}",
            "void": f"nothing chosen: the one in use against itself {self.floor}, the GPU is not quiet",
        }[self.verdict]
        left = f", {len(self.left_out)} left out" if self.left_out else ""
        return f"{said} ({self.tried} candidates timed{left})"


def neighbours(config: Config, declared: dict[str, list]) -> list[Config]:
    """The configurations that differ from this one in one of the declared numbers, by one place in its list or, where the
    list lacks the present number, by any.
    """
    found = []
    for key, values in declared.items():
        if key in config:
            at = values.index(config[key]) if config[key] in values else None
            near = values if at is None else [values[i] for i in (at - 1, at + 1) if 0 <= i < len(values)]
            found += [config | {key: value} for value in near]
    return found


def search(
    start: Config,
    near: Callable[[Config], list[Config]],
    why_not: Callable[[Config], str | None],
    timer: Timer,
    rounds: int = ROUNDS,
    steps: int = STEPS,
) -> Choice:
    """The configuration to use instead of `start`, or `start`.

    Args:
        near: the candidates next to a configuration. why_not: why one is left out, or None.
        timer: (configurations, rounds) -> seconds of each in each round, paired by round.
    """
    best, seen, left_out, tried, runner_up = start, [start], [], 0, None
    for _ in range(steps):
        options = []
        for candidate in near(best):
            if candidate not in seen:
                seen.append(candidate)
                reason = why_not(candidate)
                if reason is None:
                    options.append(candidate)
                else:
                    left_out.append((candidate, reason))
        if not options:
            break
        tried += len(options)
        screened = _compared(best, options, timer, min(rounds, SCREENING_ROUNDS))[1]
        promising = sorted((i for i in range(len(options)) if screened[i].median < 1), key=lambda i: screened[i].median)
        finalists = [options[i] for i in promising[:FINALISTS]]
        if not finalists:
            break
        floor, ratios = _compared(best, finalists, timer, rounds)
        if stats.is_void(floor):
            return Choice(start, "void", floor=floor, tried=tried, left_out=left_out)
        fastest = min(range(len(finalists)), key=lambda i: ratios[i].median)
        if not ratios[fastest].hi < floor.lo:
            runner_up = (ratios[fastest], floor) if ratios[fastest].median < 1 else None
            break
        best = finalists[fastest]
    if best == start:
        if runner_up is None:
            return Choice(start, "best", tried=tried, left_out=left_out)
        return Choice(start, "noise", *runner_up, tried=tried, left_out=left_out)
    # Of several steps each was picked among several: what they come to is measured once more, alone.
    floor, (ratio,) = _compared(start, [best], timer, rounds)
    verdict = "void" if stats.is_void(floor) else "faster" if ratio.hi < floor.lo else "noise"
    return Choice(best if verdict == "faster" else start, verdict, ratio, floor, tried, left_out)


def _compared(current: Config, others: list[Config], timer: Timer, rounds: int):
    """(the current one over itself, each of the others over it) in the same rounds."""
    base, again, *times = timer([current, current, *others], rounds)
    return stats.paired_ratio(again, base), [stats.paired_ratio(each, base) for each in times]


def agreement(written: Config, found: Config, timer: Timer, rounds: int = ROUNDS) -> tuple[bool, str]:
    """Whether a second search agrees with what an earlier one wrote, and how to say so."""
    if found == written:
        return True, "reproduced"
    floor, (ratio,) = _compared(written, [found], timer, rounds)
    if stats.is_void(floor):
        return False, f"void: what is written takes {floor} of its own time, the GPU is not quiet"
    if ratio.hi < floor.lo:
        return False, f"differs: {found} takes {ratio} of what is written"
    return True, f"noise: this time {found} was chosen, which takes {ratio} of what is written ({floor} against itself)"


def write(device: str, family: str, chosen: dict[str, list[dict]], root: Path | None = None) -> Path:
    """Put ops' entries into root/<device>/<family>.json, as a whole or not at all; other ops of the file stay.

    Args:
        chosen: op -> all of its entries ({"when", "config"}), which replace those of the default table on this device.
    """
    path = (root or _config.CONFIGS) / device / f"{family}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text()) if path.exists() else {}
    ops = [
        f"  {json.dumps(op)}: [\n" + ",\n".join(f"    {json.dumps(entry)}" for entry in entries) + "\n  ]"
        for op, entries in (kept | chosen).items()
    ]
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, suffix=".new", delete=False) as file:
        file.write("{\n" + ",\n".join(ops) + "\n}\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    _config.table.cache_clear()
    _config._nearest.cache_clear()
    return path


def declared(family: str) -> dict[str, dict[str, list]]:
    """Op -> the numbers of its configurations that are searched, and their values."""
    return json.loads((_config.CONFIGS / "candidates" / f"{family}.json").read_text())


def families() -> list[str]:
    return sorted(path.stem for path in (_config.CONFIGS / "candidates").glob("*.json"))


def tune(
    family: str,
    device: str,
    bench: Callable,
    *,
    quick: bool = False,
    check: bool = False,
    root: Path | None = None,
    say: Callable[[str], None] = print,
) -> bool:
    """Search every entry of a family's table for one device; write what is faster, or with `check` compare it.

    Args:
        device: folder of ``configs``. bench: (op, when, the configuration in use) -> an object with `why_not` and `times`.
        quick: one step of the search, of the first 16-bit entry of each op.

    Returns:
        Whether `check` found nothing that disagrees; True without it.
    """
    agreed, root, wrote = True, root or _config.CONFIGS, None
    default = _config.table("default", family)
    for op, numbers in declared(family).items():
        entries = [dict(entry) for entry in table(device, family, root)[op]]
        changed = False
        for i in _quick(entries) if quick else range(len(entries)):
            when, used = entries[i]["when"], entries[i]["config"]
            # A second search begins where the first one did.
            start = next((e["config"] for e in default[op] if e["when"] == when), used) if check else used
            runs = bench(op, when, start)

            def near(config, numbers=numbers):
                return neighbours(config, numbers)

            choice = search(start, near, runs.why_not, runs.times, steps=1 if quick else STEPS)
            say(f"{' '.join([op, *(f'{key}={value}' for key, value in when.items())])}: {choice}")
            for config, why in choice.left_out:
                say(f"    left out {_changes(start, config)}: {why}")
            if check:
                same, how = (False, str(choice)) if choice.verdict == "void" else agreement(used, choice.config, runs.times)
                say(f"    {how}")
                agreed &= same
            elif choice.verdict == "faster":
                say(f"    {_changes(start, choice.config)}")
                entries[i], changed = {"when": when, "config": choice.config}, True
        if changed:
            wrote = write(device, family, {op: entries}, root)
    if wrote:
        say(f"wrote {wrote}; in a checkout its kernels go into the table: python tests/aot/aot.py --all --write")
    elif not check:
        say(f"{family}: nothing is surely faster than what is in use on {device}; nothing written")
    return agreed


def table(device: str, family: str, root: Path) -> dict:
    """A family's entries by op: a device's own in `root`, and the defaults of the package."""
    own = root / device / f"{family}.json"
    return _config.table("default", family) | (json.loads(own.read_text()) if own.exists() else {})


def _quick(entries) -> list[int]:
    """The first entry of 16-bit numbers, or of any."""
    narrow = [i for i, e in enumerate(entries) if e["when"].get("dtypes", e["when"].get("dtype", "16")).startswith("16")]
    return (narrow or [0])[:1]


def _changes(old: Config, new: Config) -> str:
    return ", ".join(f"{key} {old.get(key)} -> {value}" for key, value in new.items() if old.get(key) != value)


def _no_gpu() -> str | None:
    """Why nothing can be tuned here."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed, and configurations are those of Triton kernels"
    import torch

    if not torch.cuda.is_available():
        return "torch sees no GPU; kernels use kernels/configs/<device>, where there is one, or kernels/configs/default"
    return None


def main(argv=None) -> int:
    """Run ``fastft tune`` with these arguments; returns the exit status: 0, 1 if --check disagrees, 2 where it can't run."""
    parser = argparse.ArgumentParser(
        prog="fastft tune",
        description="Searches launch configurations of the Triton kernels on a GPU: those of kernels/configs/candidates, "
        "checked against the reference, timed in CUDA graphs beside the configuration in use. What is surely faster is "
        "written to kernels/configs/<device>/<family>.json, which kernels look up from then on.",
    )
    parser.add_argument("family", nargs="*", help=f"of {', '.join(families())}; default: all")
    parser.add_argument("--device", default="cuda", help="which GPU, as torch names it (cuda:1)")
    parser.add_argument("--quick", action="store_true", help="one step, of the first 16-bit entry of each op")
    parser.add_argument("--check", action="store_true", help="search again from the default and compare; writes nothing")
    parser.add_argument("--out", type=Path, help="folder instead of the package's kernels/configs")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.family if name not in families()]:
        parser.error(f"unknown family {unknown[0]!r}; known: {', '.join(families())}")
    if why := _no_gpu():
        print(f"fastft tune: {why}", file=sys.stderr)
        return 2
    import importlib

    import torch

    from .bench import op_problems, op_runs
    from .kernels import _launch

    device = torch.device(args.device, torch.cuda.current_device()) if args.device == "cuda" else torch.device(args.device)
    name, agreed = _launch.device_name(device), True
    with torch.cuda.device(device):
        print(f"{torch.cuda.get_device_name(device)} ({name}), torch {torch.__version__}")
        for family in args.family or families():
            problems = {(p.op, json.dumps(p.when)): p for p in op_problems.problems(family)}
            module = importlib.import_module(f"fastft.kernels.{family}")

            def bench(op, when, used, problems=problems, module=module):
                return op_runs.Bench(problems[op, json.dumps(when)], getattr(module, op), used, device)

            agreed &= tune(family, name, bench, quick=args.quick, check=args.check, root=args.out)
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
