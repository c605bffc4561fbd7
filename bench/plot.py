"""Figures and README's numbers, from ``bench/results/*.csv`` and nothing else.

``python -m fastft.bench.plot`` draws each family's cost over the floor beside the CSV (PNG and SVG); ``--readme`` rewrites
the table between the numbers markers of README.md. Only rows that count are read: not quick, void, wrong or skipped ones.
"""

import argparse
import sys
from pathlib import Path

from . import results, shapes

BEGIN, END = "<!-- numbers:begin -->", "<!-- numbers:end -->"
LABELS = {"peft": "PEFT", "addmm": "plain PyTorch, one autograd node", "peft-compile": "PEFT, torch.compile"}
OURS, PEERS = ("#1b6ca8", "#4fa3d8", "#9cc9e8"), ("#e07b39", "#8d99a6", "#b04a7a", "#c9a227")


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


def _order(key):
    device, threads, family, case, shape, dtype = key
    known = list(shapes.LINEARS)
    return device, int(threads), family, known.index(shape) if shape in known else len(known), shape, dtype, case


def implementations(cases) -> list[str]:
    """Those that appear, ours first."""
    names = {name for arms in cases.values() for name in arms}
    peers = [*LABELS, *sorted(names - LABELS.keys())]
    ours = sorted(n for n in names if n.startswith("fastft"))
    return ours + [n for n in peers if n in names and n not in ours]


def percent(row) -> str:
    return f"{100 * (float(row['ratio']) - 1):+.1f} %"


def readme_table(rows) -> str:
    """README's numbers as markdown: time over the frozen layer, per device, with the interval of ours."""
    cases = counted(rows)
    if not cases:
        return "No results yet: `fastft bench` makes them."
    parts = []
    for device, threads in dict.fromkeys(key[:2] for key in cases):
        here = {key: arms for key, arms in cases.items() if key[:2] == (device, threads)}
        names = implementations(here)
        any_row = next(iter(next(iter(here.values())).values()))
        where = f"{threads} threads" if any_row["capability"][:3] != "sm_" else any_row["capability"]
        versions = sorted({f"torch {r['torch']}, PEFT {r['peft'] or '-'}" for a in here.values() for r in a.values()})
        commits = sorted({r["commit"] for a in here.values() for r in a.values()})
        lines = [
            f"**{device}**, {where}; {'; '.join(versions)}; commit {', '.join(commits)}. Time of forward and backward "
            "over the frozen layer alone (median of paired ratios, with the 95 % interval of ours; r: rank, p: dropout):",
            "",
            "| layer | T×K×N | dtype | " + " | ".join(LABELS.get(n, n) for n in names) + " | target |",
            "|---" * (4 + len(names)) + "|",
        ]
        for (_, _, _, case, shape, dtype), arms in here.items():
            ours = arms["fastft"]
            cells = [percent(arms[n]) if n in arms else "-" for n in names]
            low, high = (f"{100 * (float(ours[f]) - 1):.1f}" for f in ("lo", "hi"))
            cells[names.index("fastft")] = f"**{percent(ours)}** ({low} … {high})"
            target = "-"
            if ours["target"]:
                met = "met" if ours["met"] == "1" else "missed"
                target = f"≤ {100 * (float(ours['target']) - 1):.1f} %, {met}"
            size = ours["size"].replace("x", "×")
            lines.append(f"| {shape}, {case} | {size} | {dtype} | " + " | ".join(cells) + f" | {target} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def with_table(text: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """README's text with the part between the markers replaced.

    Raises:
        ValueError: a marker is missing, repeated or out of order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"README needs one {begin} followed by one {end}")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def draw(rows, folder: Path) -> list[Path]:
    """Bar plots of the cost over the floor, one figure per device and family. Returns the files written."""
    import matplotlib

    matplotlib.use("Agg")
    written = []
    cases = counted(rows)
    for device, threads, family in dict.fromkeys(key[:3] for key in cases):
        here = {key[3:]: arms for key, arms in cases.items() if key[:3] == (device, threads, family)}
        figure = _figure(here, f"{family} on {device}" + ("" if _on_gpu(here) else f", {threads} threads"))
        stem = results.csv_path(device, folder).with_suffix("").name
        for kind in ("png", "svg"):
            path = folder / f"{stem}-{threads}t-{family}.{kind}"
            # A fixed salt and no date: the same rows give the same file.
            with matplotlib.rc_context({"svg.hashsalt": "fastft"}):
                figure.savefig(path, dpi=150, metadata={"Date": None} if kind == "svg" else None)
            written.append(path)
    return written


def _on_gpu(cases) -> bool:
    return any(row["capability"].startswith("sm_") for arms in cases.values() for row in arms.values())


def _figure(cases, title):
    """One panel per shape; bars grouped by dtype and case; whiskers are the 95 % intervals, a bar's line its target."""
    from matplotlib.figure import Figure

    names = implementations(cases)
    panels = list(dict.fromkeys(shape for _, shape, _ in cases))
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    # Wide enough for the title and the legend of a single panel.
    figure = Figure(figsize=(max(6 * across + 1, 12), 3.4 * down + 1.2), layout="constrained")
    width = 0.8 / len(names)
    ours = sum(name.startswith("fastft") for name in names)
    colours = [OURS[i % len(OURS)] if i < ours else PEERS[(i - ours) % len(PEERS)] for i in range(len(names))]
    grid = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for spare in grid[len(panels) :]:
        spare.remove()
    for panel, axes in zip(panels, grid):
        groups = [key for key in cases if key[1] == panel]
        for i, name in enumerate(names):
            bars = [(g, cases[key][name]) for g, key in enumerate(groups) if name in cases[key]]
            at = [g + (i - (len(names) - 1) / 2) * width for g, _ in bars]
            ratio, low, high = ([100 * (float(row[f]) - 1) for _, row in bars] for f in ("ratio", "lo", "hi"))
            whiskers = [[r - lo for r, lo in zip(ratio, low)], [h - r for r, h in zip(ratio, high)]]
            axes.bar(at, ratio, width, yerr=whiskers, capsize=2, color=colours[i], label=LABELS.get(name, name))
            if name == "fastft":
                for x, (_, row) in zip(at, bars):
                    if row["target"]:
                        goal = 100 * (float(row["target"]) - 1)
                        axes.plot([x - width / 2, x + width / 2], [goal, goal], color="black", lw=1.8)
        axes.set_xticks(range(len(groups)), [f"{dtype}\n{case.split(' ', 1)[-1]}" for case, _, dtype in groups], fontsize=8)
        size = next(iter(cases[groups[0]].values()))["size"].replace("x", "×")
        axes.set_title(f"{panel} ({size})", fontsize=10)
        axes.axhline(0, color="black", lw=0.8)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.supylabel("time over the frozen layer, %", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if any(row["target"] for arms in cases.values() for row in arms.values()):
        from matplotlib.lines import Line2D

        handles, labels = [*handles, Line2D([], [], color="black", lw=1.8)], [*labels, "target"]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        f"Cost of fine-tuning: {title} (forward + backward, 95 % intervals; p: dropout; lower is better)", fontsize=11
    )
    return figure


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
        written = draw(rows, args.results)
        print("\n".join(map(str, written)) or "no rows that count: nothing to draw")
    return 0


if __name__ == "__main__":
    sys.exit(main())
