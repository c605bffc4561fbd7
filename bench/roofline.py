"""Roofline: the speed of each case over its operational intensity, under the roofs that calibration measured.

Operations and bytes are the formulas' (`flops`, `moved`: every tensor once), so an implementation that moves a tensor twice
lies below the roof, and one that keeps a tensor in a cache can lie above its slope.
"""

import functools
import math

from . import figures, standings
from .standings import FAMILIES

CALIBRATION = "calibration"
TALL, LEFT, RIGHT = 3.3, 0.75, 1.3
APART = 0.17  # inches between two lines of type
DASHES = {"fp32": "solid", "bf16": "dashed", "fp16": "dotted"}
ROUTES = ("fastft", "best peer", "floor")


def roofs(rows) -> dict[tuple[str, str], tuple[float, dict[str, float]]]:
    """(device, threads) -> bytes/s of a copy, and operations/s of a GEMM by dtype, from the latest calibration."""
    latest: dict[tuple[str, str], dict[tuple[str, str], dict]] = {}
    for row in rows:
        if row["family"] == CALIBRATION and row["status"] == "ok" and row["metric"] in ("bandwidth", "gemm_rate"):
            here = latest.setdefault(standings.where(row), {})
            what = row["metric"], row["dtype"] if row["metric"] == "gemm_rate" else ""
            if what not in here or here[what]["date"] <= row["date"]:
                here[what] = row
    found = {}
    for where, measured in latest.items():
        rates = {dtype: float(row["value"]) for (metric, dtype), row in measured.items() if metric == "gemm_rate"}
        if ("bandwidth", "") in measured and rates:
            found[where] = float(measured["bandwidth", ""]["value"]), rates
    return found


def drawings(rows, cases):
    known = roofs(rows)
    for where, here in standings.by_device(cases).items():
        if where not in known:
            continue
        (bandwidth, rates), points = known[where], _points(rows, here)
        used = {dtype.split("+")[0] for _, dtype, *_ in points}  # of bf16+fp32 nearly all products are the base's
        if roofs_used := {dtype: rate for dtype, rate in rates.items() if dtype in used}:
            place = standings.place(next(iter(here.values()))["fastft"])
            make = functools.partial(_figure, place, bandwidth, roofs_used, points)
            yield figures.Drawing(*where, "roofline", "Roofline", make)


def _points(rows, cases) -> list[tuple[str, str, str, float, float]]:
    """(family, dtype, route, operations a byte, operations/s) of ours, of the best peer and of the floor itself."""
    measured = standings.floors(rows, cases)
    found = []
    for key, arms in cases.items():
        best = standings.best_peer(arms)
        routes = {"fastft": arms["fastft"], "best peer": best and best[1], "floor": measured.get(key, {}).get("floor2")}
        for route, row in routes.items():
            if row and float(row["flops"] or 0) > 0 and float(row["moved"] or 0) > 0:
                flops = float(row["flops"])
                found.append((key.family, key.dtype, route, flops / float(row["moved"]), flops / float(row["value"])))
    return found


def _figure(place, bandwidth, rates, points):
    from matplotlib.lines import Line2D

    families = list(dict.fromkeys(family for family, *_ in points))
    hues = dict(zip(families, ("#0969da", "#e16f24", "#2da44e", "#bf3989", "#9a6700", "#8250df", "#cf222e", "#1b7c83")))
    handles = {FAMILIES.get(f, f): Line2D([], [], color=hues.get(f, figures.MUTED), marker="o", lw=0) for f in families}
    handles["fastft"] = Line2D([], [], color=figures.INK, marker="o", lw=0)
    handles["best peer"] = Line2D([], [], color=figures.INK, marker="x", lw=0, mew=1.6)
    handles["the floor"] = Line2D([], [], color=figures.INK, marker="o", mfc="none", lw=0, mew=1.4)
    subtitle = f"{place} · roofs: a copy and the vendor's GEMM, measured · higher is better"
    figure, axes = figures.canvas("Roofline", subtitle, TALL, handles)
    panel = axes(LEFT, 0, figures.WIDTH - LEFT - RIGHT, TALL)
    panel.set_xscale("log")
    panel.set_yscale("log")
    left = min(x for *_, x, _ in points) / 2
    right = max(max(x for *_, x, _ in points) * 2, 4 * max(rates.values()) / bandwidth)
    for dtype, rate in rates.items():
        knee = rate / bandwidth
        dashes = DASHES.get(dtype, "dashdot")
        panel.plot([left, knee, right], [left * bandwidth, rate, rate], color=figures.INK, lw=1.5, ls=dashes)
    for family, _, route, x, y in points:
        hue = hues.get(family, figures.MUTED)
        shape = {"fastft": {"marker": "o"}, "best peer": {"marker": "x", "mew": 1.6}}.get(
            route, {"marker": "o", "mfc": "none", "mew": 1.4}
        )
        panel.plot(x, y, color=hue, ms=5.5, lw=0, alpha=0.85, zorder=3 if route == "fastft" else 2.5, **shape)
    lowest, highest = min(y for *_, y in points) / 3, 3 * max(*rates.values(), *(y for *_, y in points))
    panel.set_xlim(left, right)
    panel.set_ylim(lowest, highest)
    up, along = TALL / math.log10(highest / lowest), (figures.WIDTH - LEFT - RIGHT) / math.log10(right / left)
    at = 0.0
    for dtype, rate in sorted(rates.items(), key=lambda item: item[1]):
        at = max(at, up * math.log10(rate / lowest))
        panel.annotate(
            f"{dtype} {_rate(rate)}FLOP/s", (1, at / TALL), (4, 0), xycoords="axes fraction", textcoords="offset points",
            fontsize=8.5, va="center", annotation_clip=False,
        )  # fmt: skip
        at += APART
    # Along the slope, whose angle is that of a decade up for a decade right.
    start = max(left, lowest / bandwidth) * 1.25
    panel.text(
        start, start * bandwidth * 1.15, f"copy {_rate(bandwidth)}B/s", fontsize=9, rotation_mode="anchor",
        rotation=math.degrees(math.atan2(up, along)),
    )  # fmt: skip
    panel.set_xlabel("operational intensity: FLOP a byte, every tensor moved once")
    panel.set_ylabel("FLOP/s")
    panel.grid(True)
    return figure


def _rate(value: float) -> str:
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "
