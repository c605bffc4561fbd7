"""Figures and README's numbers, from ``bench/results/*.csv`` and nothing else.

``python -m fastft.bench.plot`` draws each family's cost over the floor beside the CSV (PNG and SVG); ``--readme`` rewrites
the table between the numbers markers of README.md. Only rows that count are read: not quick, void, wrong or skipped ones.
"""

import argparse
import itertools
import re
import sys
from pathlib import Path

from . import results, shapes

BEGIN, END = "<!-- numbers:begin -->", "<!-- numbers:end -->"
LABELS = {
    "peft": "PEFT",
    "addmm": "plain PyTorch, one autograd node",
    "peft-compile": "PEFT, torch.compile",
    "plain": "plain PyTorch",
    "permuted": "slice first (permuted)",
    "full": "full fine-tuning",
    "lora-exchange": "LoRA: unmerge, merge",
    "shira": "PEFT SHiRA",
    "csr": "torch.sparse CSR",
    "bmm": "two batched products",
    "loop": "loop over adapters",
    "padded": "padded to rank 64",
}
# What rows are ratios to: the frozen layer for families that aren't named here; `over` is for cases that say it themselves.
ABOUT = "Time of forward and backward over the frozen layer alone ({median}; r: rank, p: dropout):"
ABOUT_SLICES = (
    "S²FT: time over the same layer or step that computes no gradient of the slice and updates nothing ({median}; columns, "
    "rows: what trains; full fine-tuning trains all of the layer or model):"
)
ABOUT_ENTRIES = (
    "SpIEL, LIFT: time over the same layer, step or steps that compute no gradient of the entries and update nothing "
    "({median}):"
)
ABOUT_SERVED = (
    "Serving: time of a forward whose rows name their own adapters, over the same layer or model without any ({median}; D: "
    "distinct adapters):"
)
ABOUT_OVER = "Time over what each line says ({median}; below 1: faster):"
SLICES = ("partial", "s2ft", "sparse", "spiel")
ENTRIES = ("sparse", "spiel")
SERVED = ("grouped", "serve")
TOKENS = re.compile(r" T=(\d+)")
FACTS = {
    "speedup": "full fine-tuning takes {value:.2f} times as long as fastft; of the floor's speed over it fastft keeps "
    "{kept}",
    "state_bytes": "{value:.4g} bytes a trained number between steps",
    "entry_bytes": "{value:.4g} bytes an entry between steps, its index included",
    "bandwidth": "{value:.3g} GB/s of the bytes that it has to move, {kept} of a copy's speed",
}


def counted(rows) -> dict[tuple, dict[str, dict]]:
    """(device, threads, family, case, shape, dtype) -> implementation -> its time row, of the latest run that counts.

    Implementations of one case are taken from one run, since only those were measured in the same rounds.
    """
    runs: dict[tuple, dict[str, dict[str, dict]]] = {}
    for row in rows:
        if row["metric"] == "time" and row["status"] == "ok" and not row["implementation"].startswith("floor"):
            key = tuple(row[f] for f in ("device", "threads", "family", "case", "shape", "dtype"))
            runs.setdefault(key, {}).setdefault(row["date"], {})[row["implementation"]] = row
    found = {}
    for key, by_date in runs.items():
        ours = [date for date, arms in by_date.items() if "fastft" in arms]
        if ours:
            found[key] = by_date[max(ours)]
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def over(case: str) -> tuple[str, str]:
    """A case's name without what its ratios are over, and that, or "" if it is the frozen layer or model."""
    name, _, yardstick = case.partition(" vs ")
    return name, yardstick


def facts(rows, cases) -> list[str]:
    """What ours was found to be besides its times, in the runs that `cases` are from, as sentences."""
    said = []
    for (device, threads, family, case, shape, dtype), arms in cases.items():
        here = (arms["fastft"]["date"], device, threads, family, case, shape, dtype)
        for row in rows:
            where = tuple(row[f] for f in ("date", "device", "threads", "family", "case", "shape", "dtype"))
            if where != here or row["implementation"] != "fastft" or row["metric"] not in FACTS or row["status"] != "ok":
                continue
            kept = row["ratio"] and f"{100 * float(row['ratio']):.1f} %"
            text = FACTS[row["metric"]].format(value=float(row["value"]), kept=kept)
            if row["target"]:
                sign, goal = ("≥", f"{100 * float(row['target']):.0f} %") if kept else ("≤", row["target"])
                text += f" (target {sign} {goal}, {'met' if row['met'] == '1' else 'missed'})"
            said.append(f"- {shape}, {case}, {dtype}: {text}.")
    return said


def traces(rows) -> dict[tuple[str, str], list[str]]:
    """(device, threads) -> what the latest runs of `serve_trace` that count found, as sentences."""
    latest: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["family"] == "serve_trace" and row["status"] == "ok" and row["implementation"] == "fastft":
            runs = latest.setdefault(tuple(row[f] for f in ("device", "threads", "shape", "case")), {})
            runs.setdefault(row["date"], {})[row["metric"]] = row
    said: dict[tuple[str, str], list[str]] = {}
    for (device, threads, shape, case), runs in sorted(latest.items()):
        found = runs[max(runs)]
        counts = {metric: f"{float(row['value']):,.0f}" for metric, row in found.items()}
        gap = found["inter_token_p99"]
        said.setdefault((device, threads), []).append(
            f"- Through the server: {shape} ({gap['size']}), {case}, {gap['dtype']}, commit {gap['commit']}: "
            f"{counts['requests']} answers, {counts['loads']} loads, {counts['wrong_tokens']} wrong tokens, "
            f"{counts['errors']} errors. 99 % of tokens come within {1e3 * float(gap['value']):.1f} ms of the one before: "
            f"{times(gap)} ({times(gap, 'lo')[:-1]} … {times(gap, 'hi')[:-1]}) of the same trace without loads "
            f"(target ≤ {times(gap, 'target')}, {'met' if gap['met'] == '1' else 'missed'})."
        )
    return said


def _order(key):
    device, threads, family, case, shape, dtype = key
    known = list(shapes.LINEARS)
    case = TOKENS.sub(lambda found: f" T={int(found[1]):09}", case)
    return device, int(threads), family, known.index(shape) if shape in known else len(known), shape, dtype, case


def implementations(cases) -> list[str]:
    """Those that appear, ours first."""
    names = {name for arms in cases.values() for name in arms}
    peers = [*LABELS, *sorted(names - LABELS.keys())]
    ours = sorted(n for n in names if n.startswith("fastft"))
    return ours + [n for n in peers if n in names and n not in ours]


def percent(row, field="ratio") -> str:
    return f"{100 * (float(row[field]) - 1):+.1f} %"


def times(row, field="ratio") -> str:
    return f"{float(row[field]):.2f}×"


def _about(key) -> str:
    _, _, family, case, _, _ = key
    if over(case)[1]:
        return ABOUT_OVER
    if family in SERVED:
        return ABOUT_SERVED
    return ABOUT_ENTRIES if family in ENTRIES else ABOUT_SLICES if family in SLICES else ABOUT


def readme_table(rows) -> str:
    """README's numbers as markdown: time over the frozen layer, per device, with the interval of ours."""
    cases, served = counted(rows), traces(rows)
    if not (cases or served):
        return "No results yet: `fastft bench` makes them."
    parts = []
    for device, threads, about in dict.fromkeys((*key[:2], _about(key)) for key in cases):
        here = {key: arms for key, arms in cases.items() if (*key[:2], _about(key)) == (device, threads, about)}
        names = implementations(here)
        any_row = next(iter(next(iter(here.values())).values()))
        where = f"{threads} threads" if any_row["capability"][:3] != "sm_" else any_row["capability"]
        versions = sorted({f"torch {r['torch']}, PEFT {r['peft'] or '-'}" for a in here.values() for r in a.values()})
        commits = sorted({r["commit"] for a in here.values() for r in a.values()})
        said = about.format(median="median of paired ratios, with the 95 % interval of ours")
        first = "layer | T×K×N" if about != ABOUT_OVER else "what | size"
        lines = [
            f"**{device}**, {where}; {'; '.join(versions)}; commit {', '.join(commits)}. {said}",
            "",
            f"| {first} | dtype | " + " | ".join(LABELS.get(n, n) for n in names) + " | target |",
            "|---" * (4 + len(names)) + "|",
        ]
        show = times if about == ABOUT_OVER else percent
        for (shape, case, dtype), group in itertools.groupby(here, lambda key: (key[4], TOKENS.sub("", key[3]), key[5])):
            lines.append(_line(shape, case, dtype, {key: here[key] for key in group}, names, show))
        if said := facts(rows, here):
            lines += ["", *said]
        parts.append("\n".join(lines))
    for (device, threads), said in served.items():
        parts.append("\n".join([f"**{device}**, {threads} threads:", "", *said]))
    return "\n\n".join(parts)


def _line(shape, case, dtype, cases, names, show) -> str:
    """A line of the table; cases that differ in their tokens alone share it."""
    tokens = [found[1] for key in cases if (found := TOKENS.search(key[3]))]
    ours = [arms["fastft"] for arms in cases.values()]
    cells = []
    for name in names:
        found = [show(arms[name]) if name in arms else "-" for arms in cases.values()]
        cells.append(" / ".join(found) if set(found) != {"-"} else "-")
    own, target = names.index("fastft"), "-"
    cells[own] = f"**{cells[own]}**"
    size = ours[0]["size"].replace("x", "×")
    if len(ours) == 1:
        unit = show(ours[0]).lstrip("+-0123456789.")
        low, high = (show(ours[0], field).removesuffix(unit).lstrip("+") for field in ("lo", "hi"))
        cells[own] += f" ({low} … {high})"
    if tokens:
        case, size = f"{case}, T = {' / '.join(tokens)}", f"T×{size.partition('×')[2]}"
    if ours[0]["target"]:
        met = " / ".join("met" if row["met"] == "1" else "missed" for row in ours)
        target = f"≤ {show(ours[0], 'target').lstrip('+')}, {met}"
    return f"| {shape}, {case} | {size} | {dtype} | " + " | ".join(cells) + f" | {target} |"


def with_table(text: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """README's text with the part between the markers replaced.

    Raises:
        ValueError: a marker is missing, repeated or out of order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"README needs one {begin} followed by one {end}")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastft.bench.plot", description=__doc__.split("\n")[0])
    folder = results.ROOT / "bench" / "results"
    parser.add_argument("--results", type=Path, default=folder, metavar="DIR", help=f"folder of the CSVs ({folder})")
    parser.add_argument("--readme", action="store_true", help="rewrite README.md's table instead of drawing")
    args = parser.parse_args(argv)
    rows = results.read(sorted(args.results.glob("*.csv")))
    if args.readme:
        path = results.ROOT / "README.md"
        path.write_text(with_table(path.read_text(), readme_table(rows)))
        print(f"wrote {path}")
    else:
        from .figures import draw

        written = draw(rows, args.results)
        print("\n".join(map(str, written)) or "no rows that count: nothing to draw")
    return 0


if __name__ == "__main__":
    sys.exit(main())
