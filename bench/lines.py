"""Lines: how the cost changes with one parameter of a case (density, rank, tokens, adapters), the others held."""

import functools

from . import figures, standings
from .standings import FAMILIES, PARAMETERS, is_ours

FEWEST = 3  # two points are no curve: the bars show them
AXES = {
    "density": "entries that train, %",
    "rank": "rank",
    "tokens": "tokens in the batch",
    "adapters": "distinct adapters in the batch",
}
TALL, BELOW, ABOVE = 1.75, 0.52, 0.42
GAP = 0.42  # between two rows of panels
LEFT, BETWEEN, RIGHT = 0.8, 0.8, 0.2


def drawings(rows, cases):
    for (device, threads), here in standings.by_device(cases).items():
        for parameter in PARAMETERS:
            if panels := series(here, parameter):
                title = f"Cost against {parameter}"
                make = functools.partial(_figure, title, parameter, panels)
                yield figures.Drawing(device, threads, f"by-{parameter}", title, make)


def series(cases, parameter: str) -> dict[standings.Key, dict[float, dict]]:
    """Cases that differ in this parameter alone: their common key -> its value -> implementations."""
    found: dict[standings.Key, dict[float, dict]] = {}
    for key, arms in cases.items():
        value = standings.parameters(key.case).get(parameter)
        if value is not None:
            common = key._replace(case=standings.without(key.case, parameter))
            found.setdefault(common, {})[value] = arms
    return {key: dict(sorted(points.items())) for key, points in found.items() if len(points) >= FEWEST}


def drawn(cases) -> set[standings.Key]:
    """The cases that are points of a line."""
    found = set()
    for parameter in PARAMETERS:
        common = series(cases, parameter)
        for key in cases:
            named = parameter in standings.parameters(key.case)
            if named and key._replace(case=standings.without(key.case, parameter)) in common:
                found.add(key)
    return found


def _figure(title, parameter, panels):
    from matplotlib.lines import Line2D

    names = [n for n in standings.implementations(_all_arms(panels)) if not (is_ours(n) and n != "fastft")]
    colours = figures.colours(names)
    markers = dict(zip(names, figures.MARKERS))
    handles = {
        figures.label(name): Line2D([], [], color=colours[name], marker=markers[name], lw=2.2 if name == "fastft" else 1.4)
        for name in names
    }
    row = next(iter(next(iter(panels.values())).values()))["fastft"]
    subtitle = f"{standings.place(row)} · bands: 95 % intervals · dashes: target · lower is better"
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    height = down * (TALL + ABOVE) + (down - 1) * GAP
    figure, axes = figures.canvas(title, subtitle, height, handles, below=BELOW)
    wide = (figures.WIDTH - LEFT - RIGHT - (across - 1) * BETWEEN) / across
    for i, (key, points) in enumerate(panels.items()):
        column, line = i % across, i // across
        bottom = height - (line + 1) * (TALL + ABOVE) - line * GAP
        panel = axes(LEFT + column * (wide + BETWEEN), bottom, wide, TALL)
        _fill(panel, key, points, names, colours, markers)
        if line == down - 1 or i + across >= len(panels):
            panel.set_xlabel(AXES[parameter])
    return figure


def _all_arms(panels):
    return {(key, value): arms for key, points in panels.items() for value, arms in points.items()}


def _fill(panel, key, points, names, colours, markers):
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    top = 1.0
    for name in reversed(names):  # ours above the others
        at = [value for value, arms in points.items() if name in arms]
        if not at:
            continue
        ratio, low, high = ([float(points[v][name][f]) for v in at] for f in ("ratio", "lo", "hi"))
        width = 2.2 if name == "fastft" else 1.4
        panel.fill_between(at, low, high, color=colours[name], alpha=0.25, lw=0)
        panel.plot(at, ratio, color=colours[name], marker=markers[name], ms=5, lw=width)
        top = max(top, *high)
    aimed = {v: float(arms["fastft"]["target"]) for v, arms in points.items() if arms["fastft"]["target"]}
    for value, target in aimed.items():
        panel.plot([value / 1.25, value * 1.25], [target] * 2, color=figures.INK, lw=1.6, dashes=(2.2, 1.0), zorder=4)
    yardstick = standings.over(key.case)[1]
    panel.axhline(1, color=figures.MUTED, lw=1.2, zorder=1.5)
    family = FAMILIES.get(key.family, key.family)
    held = ", ".join(filter(None, [key.shape, standings.short(key)]))
    panel.set_title(f"{family}, {key.dtype}\n{held}", fontsize=9, loc="left", linespacing=1.3)
    panel.set_ylabel(f"time / {yardstick}" if yardstick else "time / frozen model", fontsize=9.5)
    panel.set_xscale("log")
    panel.set_xticks(list(points), [f"{value:g}" for value in points])
    panel.xaxis.set_minor_locator(NullLocator())
    if top > 5:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_minor_formatter(NullFormatter())
    else:
        panel.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    panel.grid(axis="y")
