"""Result rows: where a run was made, the append-only CSV, and the table on the terminal."""

import csv
import fcntl
import importlib.metadata
import io
import math
import os
import re
import subprocess
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

import torch

from fastft import _native

from . import runner, standings
from .runner import Case, Measurement

# fmt: off
FIELDS = [
    "date", "commit", "device", "capability", "threads", "torch", "triton", "peft", "family", "case",
    "shape", "size", "dtype", "implementation", "backend", "metric", "ratio", "lo", "hi", "floor_lo",
    "floor_hi", "value", "unit", "rounds", "status", "void", "target", "met", "flops", "moved", "note",
    "roofline",
]
# fmt: on
SOURCES = ("csrc", "kernels", "fastft", "bench/*.py", "bench/ops", "bench/e2e")
ROOT = Path(__file__).resolve().parent.parent  # of the checkout: resolve() follows fastft/bench -> ../bench


def environment(device) -> dict[str, str]:
    """What every row says about the machine, the libraries and the source."""
    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    else:
        name, capability = _cpu_name(), torch.backends.cpu.get_cpu_capability()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": name,
        "capability": capability,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peft": _version("peft"),
    }


def in_checkout() -> bool:
    return (ROOT / ".git").exists()


def csv_path(device_name: str, out=None) -> Path | None:
    """Where rows go: `out`, or bench/results of a checkout; None for an installed package without `out`."""
    folder = Path(out) if out else ROOT / "bench" / "results" if in_checkout() else None
    return folder / f"{slug(device_name)}.csv" if folder else None


def slug(text: str) -> str:
    """For a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def rows(case: Case, measurements: list[Measurement], env: dict[str, str]) -> list[dict[str, str]]:
    """One row per implementation and metric: time, saved_bytes, peak_bytes, launches, and what an arm's facts are."""
    out = []
    for m in measurements:
        is_floor = m.implementation.startswith("floor")
        same = env | {
            "family": case.family,
            "case": case.name,
            "shape": case.shape,
            "size": case.size,
            "dtype": case.dtype,
            "implementation": m.implementation,
            "backend": m.backend,
            "status": m.status,
            "note": m.note,
        }
        time = same | {"metric": "time", "rounds": m.rounds, "void": int(m.status == "void")}
        if m.ratio:
            time |= {"ratio": f"{m.ratio.median:.5f}", "lo": f"{m.ratio.lo:.5f}", "hi": f"{m.ratio.hi:.5f}"}
            time |= {"floor_lo": f"{m.floor.lo:.5f}", "floor_hi": f"{m.floor.hi:.5f}"}
            time |= {"value": f"{m.seconds:.6g}", "unit": "s"}
            time["flops"] = case.floor_flops if is_floor else case.flops
            time["moved"] = case.floor_moved if is_floor else case.moved
            time["roofline"] = "" if m.roofline is None else f"{m.roofline:.4f}"
        if m.target is not None:
            time |= {"target": m.target, "met": "" if m.met is None else int(m.met)}
        out.append(time)
        launched = "launches" if env["capability"].startswith("sm_") else "ops"
        for metric, unit in (("saved_bytes", "B"), ("peak_bytes", "B"), ("launches", launched)):
            if (value := getattr(m, metric)) is not None:
                # Counting is not disturbed by other load, so only a quick run makes these not count.
                status = "ok" if m.status == "void" else m.status
                out.append(same | {"metric": metric, "value": value, "unit": unit, "status": status})
        for fact in m.facts:
            row = same | {"metric": fact.metric, "value": f"{fact.value:.6g}", "unit": fact.unit}
            if fact.ratio:
                row |= {"ratio": f"{fact.ratio.median:.5f}", "lo": f"{fact.ratio.lo:.5f}", "hi": f"{fact.ratio.hi:.5f}"}
                row |= {"rounds": m.rounds, "void": int(m.status == "void")}
            elif m.status == "void" and not fact.timed:
                row["status"] = "ok"  # as with other counts
            if fact.target is not None:
                row |= {"target": fact.target, "met": "" if fact.met is None else int(fact.met)}
            out.append(row)
    return out


def append(path: Path, new: list[dict]) -> None:
    """Append rows in one write, with a header if the file is new; one process at a time, since two may measure at once.

    A file of an older version first gets the columns that have come since, at their end; its rows don't change otherwise.

    Raises:
        ValueError: the file has other columns; nothing is written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.parent):
        header = None
        if path.exists():
            with open(path, newline="") as file:
                header = next(csv.reader(file), None)
        if header is not None and header != FIELDS[: len(header)]:
            raise ValueError(f"{path} has other columns than this version writes; give --out another folder")
        if header is not None and len(header) < len(FIELDS):
            _widen(path)
        text = io.StringIO(newline="")
        if header is None:
            csv.DictWriter(text, FIELDS, lineterminator="\n").writeheader()
        elif not path.read_bytes().endswith(b"\n"):
            text.write("\n")  # whoever wrote the last row was stopped within it
        csv.DictWriter(text, FIELDS, lineterminator="\n").writerows(new)
        with open(path, "ab", buffering=0) as file:
            file.write(text.getvalue().encode())


@contextmanager
def _alone(folder: Path):
    """Nobody else appends to the folder's files meanwhile. A lock of the folder: a file that is widened is exchanged."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):  # not by closing alone: a process that was forked meanwhile has the same handle
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _widen(path: Path) -> None:
    """Give a file all columns; it is replaced as a whole."""
    old = read([path])
    new = path.with_name(f"{path.name}.new")
    with open(new, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(old)
    os.replace(new, path)


def read(paths, check: bool = False) -> list[dict[str, str]]:
    """All rows of these CSV files, oldest first within a file; "" in columns that an older file lacks.

    Raises:
        ValueError: with `check`, a row that counts lacks a number that tables and figures need.
    """
    found, blank = [], dict.fromkeys(FIELDS, "")
    for path in paths:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                found.append(blank | row)
                if check and row["status"] == "ok":
                    _check_numbers(found[-1], f"{path}, line {reader.line_num}")
    return found


def _check_numbers(row, where: str) -> None:
    for field in ("threads", *(("ratio", "lo", "hi", "value") if row["metric"] == standings.TIMED else ())):
        try:
            good = math.isfinite(int(row[field]) if field == "threads" else float(row[field]))
        except (TypeError, ValueError):
            good = False
        if not good:
            raise ValueError(
                f"{where}: a row whose status is ok needs a number as {field}, not {row[field]!r}; remove the row"
            )


def table(measurements: list[Measurement]) -> list[tuple[str, ...]]:
    """Header and lines for the terminal, one per implementation."""
    head = (
        "implementation",
        "time / floor",
        "95 % interval",
        "ms",
        "roofline",
        "saved",
        "peak",
        "launches",
        "backend",
        "status",
    )
    lines = [head]
    for m in measurements:
        lines.append(
            (
                m.implementation,
                f"{m.ratio.median:.3f}" if m.ratio else "-",
                f"{m.ratio.lo:.3f} - {m.ratio.hi:.3f}" if m.ratio else "-",
                f"{m.seconds * 1e3:.3f}" if m.seconds else "-",
                f"{100 * m.roofline:.3g} %" if m.roofline else "-",
                size(m.saved_bytes),
                size(m.peak_bytes),
                "-" if m.launches is None else str(m.launches),
                m.backend or "-",
                m.status + (f": {m.note}" if m.note else ""),
            )
        )
    return lines


BEHIND = ("MISSED", "LOST", "SLOWER")  # how sentences of `losses` begin that say so for certain


def losses(case: Case, measurements: list[Measurement]) -> list[str]:
    """Sentences on every place where ours is wrong, misses its target or is behind a peer, and on what has changed.

    As in the tables only `fastft` is judged, not ``fastft:triton`` and such, and beside what `standings.is_rival` alone.
    """
    said = []
    found = {m.implementation: m for m in measurements}
    timed = {name: m for name, m in found.items() if m.ratio and m.status != "void"}
    for m in measurements:
        if m.status == "wrong":
            said.append(f"WRONG  {case}: {m.implementation} gives wrong results, so it has no number: {m.note}")
        if "reference" in m.backend and runner.is_ours(m.implementation):
            said.append(f"SLOW   {case}: {m.implementation} ran on the PyTorch reference, not on a kernel (fastft info)")
        if m.met is False:
            word = "MISSED" if m.implementation == "fastft" else "LOOK  "
            said.append(f"{word} {case}: {m.implementation} {m.ratio}, target {m.target:.3f}")
        for fact in m.facts:
            if fact.metric == runner.OVER_BASE:
                said.append(_change(case, m, fact, found[fact.unit.removeprefix("x ")]))
            elif fact.target is not None:
                said.append(_verdict(case, m, fact))
    ours = timed.get("fastft")
    for name, peer in timed.items():
        if ours is None or not standings.is_rival(name) or ours.ratio.median <= peer.ratio.median:
            continue
        clear = ours.ratio.lo > peer.ratio.hi
        said.append(
            f"{'LOST  ' if clear else 'CLOSE '} {case}: fastft {ours.ratio}, {name} {peer.ratio}"
            f"{'' if clear else ', within the intervals'}"
        )
    return said


def _verdict(case: Case, m: Measurement, fact: runner.Fact) -> str:
    word = {True: "MET   ", False: "MISSED", None: "LOOK  "}[fact.met if m.implementation == "fastft" else None]
    number = f"{fact.metric} {fact.value:.4g} {fact.unit}"
    if fact.ratio is None:
        return f"{word} {case}: {m.implementation} {number}, target {fact.target:.4g}"
    possible, whose = fact.value / fact.ratio.median, "a copy's" if fact.metric == "bandwidth" else "the floor's"
    return f"{word} {case}: {m.implementation} {number}, {fact.ratio} of {whose} {possible:.3f}, target {fact.target:.3f}"


def _change(case: Case, m: Measurement, fact: runner.Fact, base: Measurement) -> str:
    """Faster or slower than at another revision by more than two processes differ."""
    apart = fact.target - 1
    word = {True: "FASTER" if fact.ratio.hi < 1 - apart else "SAME  ", False: "SLOWER", None: "LOOK  "}[fact.met]
    why = f"their floors differ by up to {100 * apart:.1f} %"
    if runner.runs_bare(base, m):
        word, why = "LOOK  ", "no verdict: that ran on the PyTorch reference, not on a kernel"
    return f"{word} {case}: {m.implementation} takes {fact.ratio} of {base.implementation}'s time; {why}"


def size(value: int | None) -> str:
    if value is None:
        return "-"
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} GB"


def show(title: str, lines: list[tuple[str, ...]]) -> None:
    """Print a table, with rich where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        print(f"\n{title}")
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    grid = Table(*lines[0], title=title, title_justify="left")
    for line in lines[1:]:
        grid.add_row(*line)
    # Without a terminal rich assumes 80 columns and would break the numbers.
    Console(width=None if os.isatty(1) else 160, soft_wrap=False).print(grid)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    """With "AMX" where there is: CPUs of one model name have it or not (virtual machines), and products in bfloat16 differ
    tenfold."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else os.uname().machine
    return f"{name}, AMX" if "amx_bf16" in _native.cpu_flags() else name


def _commit() -> str:
    """Short hash, with ``+dirty`` if files differ that are imported, compiled or looked up; the version outside a checkout.

    New files count where they lie beside those: a tuned configuration or a source that no commit has is found there all the
    same; so does native code that is older than its sources. FASTFT_COMMIT overrides it, for a tree that was copied without
    its .git.
    """
    if given := os.environ.get("FASTFT_COMMIT"):
        return given
    if not in_checkout():
        return _release()

    def git(*args):
        done = subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        changed += git("status", "--porcelain", "--untracked-files=all", "--", *SOURCES)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+dirty" if changed or _native_is_old() else "")


def _release() -> str:
    return f"v{_version('fastft')}"


def tells(commit: str) -> bool:
    """Whether it says what was measured: neither a changed tree nor the version, which every tree of it has."""
    return not commit.endswith("+dirty") and commit not in ("unknown", _release())


def _native_is_old() -> bool:
    """By time stamps, as ninja judges it: make setup builds what changed, and nothing else."""
    built = [path.stat().st_mtime for path in _native.LIB.glob("*.so")]
    sources = [path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file() and path.suffix != ".json"]
    return bool(built and sources) and max(sources) > max(built)
