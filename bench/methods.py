"""What whole training runs found (`fastft bench quality`), as tables and figures: loss at equal size, time to a loss."""

import functools

from . import figures, standings

METRICS = {
    "held_out_loss": "held-out loss",
    "seconds_to_loss": "seconds to a given loss",
    "seconds_a_step": "seconds a step",
}
DRAWN = ("held_out_loss", "seconds_to_loss")
LINE, RIGHT, BETWEEN, ABOVE = 0.3, 0.75, 0.55, 0.28

Runs = dict[str, dict[str, dict]]  # implementation -> metric -> row


def latest(rows) -> dict[tuple[str, str, str], Runs]:
    """(device, threads, case) -> what its latest run that counts found."""
    runs: dict[tuple[str, str, str], dict[str, Runs]] = {}
    for row in rows:
        if row["family"] == "quality" and row["status"] == "ok" and row["metric"] in METRICS:
            dates = runs.setdefault((*standings.where(row), row["case"]), {})
            dates.setdefault(row["date"], {}).setdefault(row["implementation"], {})[row["metric"]] = row
    return {key: dates[max(dates)] for key, dates in runs.items()}


def label(name: str) -> str:
    """fastft:S2FT is a method of ours, not a backend."""
    return name.replace("fastft:", "fastft's ").replace("S2FT", "S²FT") if standings.is_ours(name) else _peer(name)


def _peer(name: str) -> str:
    return "PEFT's LoRA" if name == "peft" else standings.LABELS.get(name, name)


def tables(rows) -> dict[tuple[str, str], list[str]]:
    """(device, threads) -> tables in markdown, with the ratio to PEFT's LoRA of the same rounds."""
    found: dict[tuple[str, str], list[str]] = {}
    for (device, threads, case), runs in latest(rows).items():
        row = next(iter(next(iter(runs.values())).values()))
        lines = [
            f"Training at equal size: {case}, {row['size']} train, {row['rounds']} seeds, commit {row['commit']}. "
            "Medians; in brackets over PEFT's LoRA in the same rounds, with the 95 % interval. The given loss lies at 90 % "
            "of PEFT's way.",
            "",
            f"| method | {' | '.join(METRICS.values())} |",
            "|---" * (1 + len(METRICS)) + "|",
        ]
        for name, measured in runs.items():
            lines.append(f"| {label(name)} | {' | '.join(_cell(measured.get(metric)) for metric in METRICS)} |")
        found.setdefault((device, threads), []).append("\n".join(lines))
    return found


def sentences(rows) -> list[tuple[tuple[str, str], str]]:
    """((device, threads), what a method's runs found)."""
    said = []
    for (device, threads, case), runs in latest(rows).items():
        for name, measured in runs.items():
            found = [f"{METRICS[m]} {_cell(measured[m])}" for m in METRICS if m in measured]
            said.append(((device, threads), f"Training at equal size, {case}: {label(name)}: {', '.join(found)}."))
    return said


def _cell(row) -> str:
    if row is None or not row["value"]:
        return row["note"].split(": ")[-1] if row and row["note"] else "-"
    text = f"{float(row['value']):.4g}"
    return text + (f" ({row['ratio'][:5]}×, {row['lo'][:5]} … {row['hi'][:5]})" if row["ratio"] else "")


def drawings(rows, cases):
    for (device, threads, case), runs in latest(rows).items():
        judged = {name: found for name, found in runs.items() if any(found.get(m, {}).get("ratio") for m in DRAWN)}
        if len(judged) > 1:
            title = "Training at equal size"
            name = f"quality-{figures.results.slug(case)}"
            yield figures.Drawing(device, threads, name, title, functools.partial(_figure, title, case, judged))


def _figure(title, case, runs):
    row = next(iter(next(iter(runs.values())).values()))
    subtitle = (
        f"{standings.place(row)} · {case}, {row['rounds']} seeds · over PEFT's LoRA · whiskers: 95 % · shorter is better"
    )
    height = LINE * len(runs) + ABOVE
    figure, axes = figures.canvas(title, subtitle, height, {}, below=0.35)
    left = 0.2 + max(figures.wide(label(name), 9.5) for name in runs)
    width = (figures.WIDTH - left - RIGHT - BETWEEN * (len(DRAWN) - 1)) / len(DRAWN)
    for i, metric in enumerate(DRAWN):
        panel = axes(left + i * (width + BETWEEN), 0, width, height - ABOVE)
        for at, (name, found) in enumerate(runs.items()):
            measured = found.get(metric, {})
            if not measured.get("ratio"):
                panel.text(0.02, at, "not reached", va="center", fontsize=8.5, color=figures.MUTED)
                continue
            ratio, low, high = (float(measured[field]) for field in ("ratio", "lo", "hi"))
            colour = figures.OURS["fastft"] if standings.is_ours(name) else figures.PEERS.get(name, figures.MUTED)
            panel.barh(at, ratio, 0.62, color=colour)
            panel.errorbar(ratio, at, xerr=[[ratio - low], [high - ratio]], color=figures.INK, lw=1, capsize=1.8)
            panel.annotate(
                f"{ratio:.3f}×", (max(ratio, high), at), (4, 0), textcoords="offset points", va="center", fontsize=8.5
            )
        panel.axvline(1, color=figures.MUTED, lw=1.2)
        panel.set_title(METRICS[metric], fontsize=9.5, loc="left")
        panel.set_ylim(len(runs) - 0.5, -0.5)
        panel.set_yticks(range(len(runs)), [label(name) for name in runs] if not i else [""] * len(runs))
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
        panel.grid(axis="x")
    return figure
