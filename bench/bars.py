"""Bars: what each implementation costs over the floor, a figure for each family; and times over other yardsticks."""

import functools

from . import figures, lines, standings
from .standings import FAMILIES, is_ours

UNIT, GAP = 0.165, 0.13  # inches: a bar, and what lies between two cases
LEAST = 0.3  # of a case, whose label has two lines
RIGHT = 0.75
BOTH_PASSES = ("lora", "dora", "partial", "sparse")


def drawings(rows, cases):
    for (device, threads), here in standings.by_device(cases).items():
        drawn = lines.drawn(here)
        for family, yardstick in dict.fromkeys((key.family, standings.over(key.case)[1]) for key in here):
            chosen = {k: a for k, a in here.items() if (k.family, standings.over(k.case)[1]) == (family, yardstick)}
            if len(chosen) == 1 and sum(map(len, chosen.values())) == 1:
                continue  # one number: a table says it better
            if yardstick and all(key in drawn for key in chosen):
                continue  # lines say it better
            title = FAMILIES.get(family, family)
            title += f": time over that of {yardstick}" if yardstick else ": cost over the frozen model"
            name = family + (f"-vs-{figures.results.slug(yardstick)}" if yardstick else "")
            make = functools.partial(_figure, title, family, yardstick, chosen)
            yield figures.Drawing(device, threads, name, title, make)


def _figure(title, family, yardstick, cases):
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = standings.implementations(cases)
    colours = figures.colours(names)
    handles = {figures.label(name): Patch(color=colours[name]) for name in names}
    if any(arms["fastft"]["target"] for arms in cases.values()):
        handles["target"] = Line2D([], [], color=figures.INK, lw=2)
    place = standings.place(next(iter(cases.values()))["fastft"])
    passes = "" if yardstick or family not in BOTH_PASSES else " · forward and backward"
    subtitle = f"{place}{passes} · whiskers: 95 % intervals · shorter is better"
    height = sum(max(len(arms) * UNIT, LEAST) + GAP for arms in cases.values())
    figure, axes = figures.canvas(title, subtitle, height, handles)
    left = 0.2 + max(figures.wide(line, 9) for key in cases for line in _label(key).split("\n"))
    panel = axes(left, 0, figures.WIDTH - left - RIGHT, height)
    _fill(panel, cases, colours, bool(yardstick))
    panel.set_ylim(height, 0)
    panel.set_xlabel(f"time over that of {yardstick}" if yardstick else "more time than the frozen model, %")
    return figure


def _label(key) -> str:
    return f"{key.shape}\n{standings.short(key)} · {key.dtype}"


def _fill(panel, cases, colours, over):
    scale = (lambda ratio: float(ratio)) if over else (lambda ratio: 100 * (float(ratio) - 1))
    write = (lambda value: f"{value:.2f}×") if over else (lambda value: f"{value:+.1f} %")
    limit = _limit(cases, scale)
    at, ticks = GAP / 2, []
    for key, arms in cases.items():
        taken = sum(name in arms for name in colours) * UNIT
        room = max(taken, LEAST)
        ticks.append((at + room / 2, _label(key)))
        end_of_case = at + room + GAP
        at += (room - taken) / 2
        for name in colours:
            if name not in arms:
                continue
            row, middle = arms[name], at + UNIT / 2
            value, low, high = (scale(row[field]) for field in ("ratio", "lo", "hi"))
            cut = value > limit
            panel.barh(middle, min(value, limit), 0.86 * UNIT, color=colours[name])
            if not cut:
                panel.errorbar(value, middle, xerr=[[value - low], [high - value]], color=figures.INK, lw=1, capsize=1.8)
            text = f"{write(value)} ▸" if cut else write(value)
            weight = "bold" if name == "fastft" else "normal"
            end = limit if cut else max(value, high, 0)
            if name == "fastft" and row["target"]:
                end = max(end, scale(row["target"]))
            panel.annotate(text, (end, middle), (4, 0), textcoords="offset points", va="center", fontsize=8.5, weight=weight)
            if name == "fastft" and row["target"]:
                panel.plot([scale(row["target"])] * 2, [at - 0.02, at + UNIT + 0.02], color=figures.INK, lw=2, zorder=4)
            at += UNIT
        at = end_of_case
    panel.set_yticks([place for place, _ in ticks], [text for _, text in ticks], fontsize=9, linespacing=1.25)
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    panel.axvline(1 if over else 0, color=figures.INK, lw=1)
    panel.set_xlim(right=1.02 * limit if limit < float("inf") else None)
    panel.grid(axis="x")


def _limit(cases, scale) -> float:
    """Where bars are cut that would dwarf ours and the best peers'; never one of ours itself, nor a best peer's."""
    kept, all_of_them = [], []
    for arms in cases.values():
        best = standings.best_peer(arms)
        for name, row in arms.items():
            all_of_them.append(scale(row["hi"]))
            if is_ours(name) or (best and name == best[0]):
                kept.append(scale(row["hi"]))
        kept += [scale(arms["fastft"]["target"])] if arms["fastft"]["target"] else []
    return 1.6 * max(kept) if max(all_of_them) > 2.5 * max(kept) > 0 else max(all_of_them)
