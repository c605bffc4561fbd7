"""Memory: what one call saves for backward, the most it allocates, and what training keeps between steps."""

import functools

from . import figures, standings
from .standings import is_floor, is_ours

METRICS = {
    "saved_bytes": "saved for\nbackward",
    "peak_bytes": "peak of\none call",
    "state_bytes": "kept between\nsteps, a trained\nnumber",
}
LINE, BETWEEN, RIGHT = 0.34, 0.22, 0.25
ABOVE, TITLE = 0.12, 0.16
APART = 1.5  # values that are less are one dot on these axes, and there are many cases of such values alone


def drawings(rows, cases):
    by_metric = {metric: standings.counted(rows, metric) for metric in METRICS}
    for device, threads in standings.by_device({k: a for found in by_metric.values() for k, a in found.items()}):
        here = {
            metric: {k: a for k, a in found.items() if k[:2] == (device, threads) and _says_something(k, a)}
            for metric, found in by_metric.items()
        }
        here = {metric: found for metric, found in here.items() if found}
        if here:
            yield figures.Drawing(device, threads, "memory", "Memory", functools.partial(_figure, here))


def _says_something(key, arms) -> bool:
    """Forwards save nothing, a decoded token allocates what the floor does, and times over another yardstick have no frozen
    floor."""
    values = [float(row["value"]) for name, row in arms.items() if _is_shown(name)]
    return bool(values) and max(values) > APART * min(values) and not standings.over(key.case)[1]


def _is_shown(name: str) -> bool:
    return name in ("fastft", "floor2") or not (is_ours(name) or is_floor(name))


def _figure(metrics):
    from matplotlib.lines import Line2D

    keys = sorted({key for found in metrics.values() for key in found}, key=standings.order)
    arms_of = {(metric, key): arms for metric, found in metrics.items() for key, arms in found.items()}
    names = [n for n in standings.implementations(arms_of) if _is_shown(n) and not is_floor(n)]
    colours, markers = figures.colours(names), dict(zip(names, figures.MARKERS))
    handles = {figures.label(n): Line2D([], [], color=colours[n], marker=markers[n], lw=0, ms=6) for n in names}
    handles["the floor"] = Line2D([], [], color=figures.INK, marker="|", lw=0, ms=9, mew=1.8)
    row = next(iter(next(iter(arms_of.values())).values()))
    subtitle = (
        f"{standings.place(row)} · weights and input not counted · further left is better · left out: cases whose "
        f"largest value is less than {APART} times the smallest"
    )
    above = ABOVE + TITLE * max(METRICS[metric].count("\n") + 1 for metric in metrics)
    height = LINE * len(keys) + above
    figure, axes = figures.canvas("Memory", subtitle, height, handles, below=0.4)
    labels = [f"{key.shape} · {key.dtype}\n{_short(key)}" for key in keys]
    left = 0.2 + max(figures.wide(line, 8.5) for text in labels for line in text.split("\n"))
    wide = (figures.WIDTH - left - RIGHT - BETWEEN * (len(metrics) - 1)) / len(metrics)
    for i, (metric, found) in enumerate(metrics.items()):
        panel = axes(left + i * (wide + BETWEEN), 0, wide, height - above)
        _fill(panel, metric, found, keys, names, colours, markers)
        if i:
            panel.tick_params(axis="y", labelleft=False)
        else:
            panel.set_yticks(range(len(keys)), labels, fontsize=8.5, linespacing=1.2)
    return figure


def _short(key) -> str:
    return standings.short(key) if key.family != "dora" else f"DoRA {standings.short(key)}"


def _fill(panel, metric, found, keys, names, colours, markers):
    from matplotlib.ticker import NullLocator

    positive = [float(row["value"]) for arms in found.values() for row in arms.values() if float(row["value"]) > 0]
    least, most = min(positive), max(positive)
    zero = least / 30
    for at, key in enumerate(keys):
        arms = found.get(key, {})
        shown = {name: row for name, row in arms.items() if _is_shown(name)}
        values = {name: max(float(row["value"]), zero) for name, row in shown.items()}
        if values:
            panel.plot([min(values.values()), max(values.values())], [at, at], color=figures.GRID, lw=1, alpha=0.5, zorder=1)
        if "floor2" in values:
            panel.plot(values["floor2"], at, color=figures.INK, marker="|", ms=10, mew=1.8, zorder=2)
        for name in reversed(names):
            if name in values:
                size = 7 if name == "fastft" else 5.5
                panel.plot(values[name], at, color=colours[name], marker=markers[name], ms=size, lw=0, zorder=3)
    panel.set_xscale("log")
    has_zero = any(float(row["value"]) == 0 for arms in found.values() for row in arms.values())
    panel.set_xlim(zero / 1.5 if has_zero else least / 1.6, most * 1.9)
    ticks = _ticks(least, most)
    marks = ([(zero, "0")] if has_zero else []) + [(tick, _bytes(tick)) for tick in ticks]
    panel.set_xticks([at for at, _ in marks], [text for _, text in marks], fontsize=8.5)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_yticks(range(len(keys)))
    panel.set_ylim(len(keys) - 0.4, -0.6)
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    panel.grid(axis="both")
    panel.set_title(METRICS[metric], fontsize=9.5, loc="left")


def _ticks(least: float, most: float) -> list[float]:
    """At most two round numbers in the range: more do not fit beside the 0."""
    for steps in ((1,), (1, 3), (1, 2, 5)):
        found = [step * 10.0**n for n in range(16) for step in steps if least * 0.8 <= step * 10.0**n <= most * 1.25]
        if len(found) > 1:
            return found[:: len(found) - 1]
    return [most]


def _bytes(value: float) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g} B"
