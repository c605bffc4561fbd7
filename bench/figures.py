"""Bar plots of the results: the cost over the floor, or times over another yardstick, with intervals and targets."""

from pathlib import Path

from . import plot, results

OURS, PEERS = ("#1b6ca8", "#4fa3d8", "#9cc9e8"), ("#e07b39", "#8d99a6", "#b04a7a", "#c9a227")
MANY = 6  # groups of bars, above which a panel takes the whole width


def draw(rows, folder: Path) -> list[Path]:
    """One figure per device, family and yardstick, as PNG and SVG. Returns the files written."""
    import matplotlib

    matplotlib.use("Agg")
    written = []
    cases = plot.counted(rows)
    for device, threads, family, yardstick in dict.fromkeys((*key[:3], plot.over(key[3])[1]) for key in cases):
        here = {
            (plot.over(key[3])[0], *key[4:]): arms
            for key, arms in cases.items()
            if (*key[:3], plot.over(key[3])[1]) == (device, threads, family, yardstick)
        }
        figure = _figure(here, family, f"{device}" + ("" if _on_gpu(here) else f", {threads} threads"), yardstick)
        stem = results.csv_path(device, folder).with_suffix("").name
        name = family + (f"-vs-{results.slug(yardstick)}" if yardstick else "")
        for kind in ("png", "svg"):
            path = folder / f"{stem}-{threads}t-{name}.{kind}"
            # A fixed salt and no date: the same rows give the same file.
            with matplotlib.rc_context({"svg.hashsalt": "fastft"}):
                figure.savefig(path, dpi=150, metadata={"Date": None} if kind == "svg" else None)
            written.append(path)
    return written


def _on_gpu(cases) -> bool:
    return any(row["capability"].startswith("sm_") for arms in cases.values() for row in arms.values())


def _height(yardstick):
    """What is drawn of a ratio."""
    return (lambda ratio: float(ratio)) if yardstick else (lambda ratio: 100 * (float(ratio) - 1))


def _figure(cases, family, where, yardstick):
    """One panel per shape; bars grouped by dtype and case; whiskers are the 95 % intervals, a bar's line its target."""
    from matplotlib.figure import Figure

    names = plot.implementations(cases)
    panels = list(dict.fromkeys(shape for _, shape, _ in cases))
    widest = max(sum(key[1] == panel for key in cases) for panel in panels)
    across = min(1 if widest > MANY else 2, len(panels))
    down = -(-len(panels) // across)
    # Wide enough for the title and the legend of a single panel.
    figure = Figure(figsize=(max(6 * across + 1, 12), 3.4 * down + 1.2), layout="constrained")
    grid = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for spare in grid[len(panels) :]:
        spare.remove()
    height, limit = _height(yardstick), _limit(cases, _height(yardstick))
    for panel, axes in zip(panels, grid):
        groups = {key: arms for key, arms in cases.items() if key[1] == panel}
        _bars(axes, groups, names, height, limit)
        labels = [f"{dtype}\n{case.split(' ', 1)[-1]}".replace(" T=", "\nT=") for case, _, dtype in groups]
        axes.set_xticks(range(len(groups)), labels, fontsize=8 if len(groups) <= 2 * MANY else 6.5)
        sizes = {arms[next(iter(arms))]["size"] for arms in groups.values()}
        axes.set_title(panel + (f" ({sizes.pop().replace('x', '×')})" if len(sizes) == 1 else ""), fontsize=10)
        axes.axhline(1 if yardstick else 0, color="black", lw=0.8)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    if limit is not None:
        axes.set_ylim(top=limit)
    floor = "floor" if family in (*plot.SLICES, *plot.SERVED) else "frozen layer"
    figure.supylabel(f"time over that of {yardstick}" if yardstick else f"time over the {floor}, %", fontsize=10)
    # A panel need not have every implementation.
    entries = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    if any(row["target"] for arms in cases.values() for row in arms.values()):
        from matplotlib.lines import Line2D

        entries["target"] = Line2D([], [], color="black", lw=1.8)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=len(entries), frameon=False)
    if yardstick:
        title = f"{family} on {where}: time over that of {yardstick} (95 % intervals; lower is better)"
    else:
        note = "" if family in (*plot.SLICES, *plot.SERVED) else "; p: dropout"
        title = f"Cost of fine-tuning: {family} on {where} (forward + backward, 95 % intervals{note}; lower is better)"
    figure.suptitle(title, fontsize=11)
    return figure


def _bars(axes, groups, names, height, limit):
    width = 0.8 / len(names)
    ours = sum(name.startswith("fastft") for name in names)
    colours = [OURS[i % len(OURS)] if i < ours else PEERS[(i - ours) % len(PEERS)] for i in range(len(names))]
    for i, name in enumerate(names):
        bars = [(g, arms[name]) for g, arms in enumerate(groups.values()) if name in arms]
        at = [g + (i - (len(names) - 1) / 2) * width for g, _ in bars]
        ratio, low, high = ([height(row[f]) for _, row in bars] for f in ("ratio", "lo", "hi"))
        shown = [limit is None or value <= limit for value in ratio]
        whiskers = [[(r - lo) * on for r, lo, on in zip(ratio, low, shown)]]
        whiskers += [[(hi - r) * on for r, hi, on in zip(ratio, high, shown)]]
        axes.bar(at, ratio, width, yerr=whiskers, capsize=2, color=colours[i], label=plot.LABELS.get(name, name))
        for x, value, on in zip(at, ratio, shown):
            if not on:
                axes.text(x, 0.97 * limit, f"{value:.0f}", ha="center", va="top", fontsize=8, color="white", weight="bold")
        if name == "fastft":
            for x, (_, row) in zip(at, bars):
                if row["target"]:
                    axes.plot([x - width / 2, x + width / 2], [height(row["target"])] * 2, color="black", lw=1.8)


def _limit(cases, height):
    """Where to cut bars that would dwarf the others: those of training everything, which the method is to avoid."""
    rows = [(name, row) for arms in cases.values() for name, row in arms.items()]
    if all(name != "full" for name, _ in rows):
        return None
    others = [height(row[f]) for name, row in rows if name != "full" for f in ("hi", "target") if row[f]]
    return 1.5 * max(others)
