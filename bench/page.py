"""``fastft bench --html``: all results as one page that needs no network: figures, and a table to sort and filter.

Its text and look are page.html. Modelled times of GPUs (results/modelled) are rows beside the measured ones, marked as such.
"""

import csv
import importlib.util
import re
from pathlib import Path

from . import figures, methods, results, standings, tables
from .standings import FAMILIES, LABELS, is_ours

FOLDER = Path(__file__).parent / "results"
DEFAULT = "fastft-bench.html"
MODEL, MEASURED = "model", "measured"
# field, heading, style: `number` columns are sorted by value, `wide` ones are left out on a phone, whose cards say the
# heading of `said` ones.
COLUMNS = [
    ("device", "Device", "", False),
    ("family", "Family", "", False),
    ("case", "Case", "wraps", False),
    ("shape", "Shape", "", False),
    ("dtype", "dtype", "", False),
    ("implementation", "Implementation", "implementation wraps", False),
    ("ratio", "Ratio", "number ratio", False),
    ("interval", "95 % interval", "number", True),
    ("target", "Target", "number", True),
    ("met", "Met", "", False),
    ("roofline", "Of roofline", "number", True),
    ("seconds", "Time", "number", True),
    ("saved_bytes", "Saved for backward", "number wide", False),
    ("peak_bytes", "Peak", "number wide", False),
    ("launches", "Launches", "number wide", False),
    ("kind", "Kind", "", False),
    ("size", "Size", "wide", False),
    ("commit", "Commit", "wide", False),
]
COUNTS = ("saved_bytes", "peak_bytes", "launches")  # metrics that are columns, from rows of their own
FILTERS = [
    ("device", "Device"),
    ("family", "Family"),
    ("shape", "Shape"),
    ("dtype", "dtype"),
    ("implementation", "Implementation"),
    ("met", "Target"),
    ("kind", "Kind"),
]


def write(out: str | None = None, folder: Path = FOLDER) -> Path:
    """Write the page of the results in `folder` to `out` (default: fastft-bench.html here).

    Args:
        out: a file; or a folder, which is made: what ends with a slash or has no suffix is one.
    """
    path = Path(out or DEFAULT)
    if path.is_dir() or not path.suffix or (out or "").endswith("/"):
        path = path / DEFAULT
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = results.read(sorted(folder.glob("*.csv")), check=True)
    path.write_text(render(rows, modelled(folder / "modelled")), encoding="utf-8")
    return path


def render(rows, models=()) -> str:
    """The page of these rows and of the modelled ones."""
    import jinja2  # comes with torch

    cases = standings.counted(rows)
    counts = _counts(rows)
    listed = [_measured(key, name, row, counts) for key, arms in cases.items() for name, row in arms.items()]
    listed = _beside(listed, [_modelled(row, cases) for row in models])
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    )
    return template.render(
        rows=listed,
        newest=max((row["date"][:10] for arms in cases.values() for row in arms.values()), default="no day"),
        devices=[_device(here) for here in standings.by_device(cases).values()],
        columns=[dict(zip(("field", "label", "style", "said"), column)) for column in COLUMNS],
        filters=[{"field": f, "label": label, "choices": sorted({r[f] for r in listed} - {""})} for f, label in FILTERS],
        findings=_findings(rows, cases),
        figures=_figures(rows, cases),
    )


def modelled(folder: Path) -> list[dict[str, str]]:
    """Rows of modelled cases: those with a ratio, in files that name family and case."""
    found = []
    for path in sorted(folder.glob("*.csv")):
        with open(path, newline="") as file:
            found += [row for row in csv.DictReader(file) if row.get("ratio") and row.get("family") and row.get("case")]
    return found


def _counts(rows) -> dict[tuple, str]:
    """(metric, case, date, implementation) -> value of what was counted in the runs."""
    return {
        (row["metric"], standings.key_of(row), row["date"], row["implementation"]): row["value"]
        for row in rows
        if row["metric"] in COUNTS and row["status"] == "ok"
    }


def _measured(key, name, row, counts) -> dict:
    roofline, target = row.get("roofline") or "", row["target"]
    sort = {"ratio": row["ratio"], "interval": row["lo"], "seconds": row["value"]}
    counted = {metric: counts.get((metric, key, row["date"], name), "") for metric in COUNTS}
    return _cells(key, LABELS.get(name, name), row["ratio"], target) | {
        "names": f"{key.family} {name}",  # what the command line calls them, to be found by
        "ours": is_ours(name),
        "device": standings.place(row),
        "size": row["size"].replace("x", "×"),
        "interval": f"{float(row['lo']):.3f} … {float(row['hi']):.3f}",
        "seconds": duration(float(row["value"])),
        "roofline": f"{100 * float(roofline):.0f} %" if roofline else "",
        "met": {"1": "met", "0": "missed"}.get(row["met"], "") if target else "",
        "styles": {"met": {"1": " good", "0": " bad"}.get(row["met"], "") if target else ""},
        "sort": sort | {"roofline": roofline, "target": target} | counted,
        "saved_bytes": size(counted["saved_bytes"]),
        "peak_bytes": size(counted["peak_bytes"]),
        "launches": counted["launches"],
        "kind": MEASURED,
        "commit": row["commit"],
    }


def _modelled(row, cases) -> dict:
    """A modelled row's cells; its device is the measured one of that name, so that both stand together."""
    places = [standings.place(arms["fastft"]) for arms in cases.values()]
    device = next((place for place in places if row["gpu"] in place.split()), row["gpu"])
    key = standings.Key(device, "", row["family"], row["case"], row["shape"], row["dtype"])
    backend = row.get("backend", "")
    name = f"fastft:{backend}" if backend not in ("", "any") else "fastft"
    seconds = float(row["us"]) / 1e6 if row.get("us") else None
    return _cells(key, name, row["ratio"], "") | {
        "names": key.family,
        "ours": True,
        "device": device,
        "size": "",
        "interval": "",
        "seconds": duration(seconds) if seconds else "",
        "roofline": "",
        "met": "",
        "styles": {"kind": " model"},
        "sort": dict.fromkeys(("interval", "roofline", "target", *COUNTS), "")
        | {"ratio": row["ratio"], "seconds": seconds or ""},
        **dict.fromkeys(COUNTS, ""),
        "kind": MODEL,
        "commit": "",
    }


def _cells(key, implementation, ratio, target) -> dict:
    return {
        "family": FAMILIES.get(key.family, key.family),
        "case": key.case,
        "shape": key.shape,
        "dtype": key.dtype,
        "implementation": implementation,
        "ratio": f"{float(ratio):.3f}×",
        "target": f"≤ {float(target):.3f}×" if target else "",
    }


def _beside(measured: list[dict], models: list[dict]) -> list[dict]:
    """Each model after the measured rows of its case; those of what nobody measured at the end."""
    what = ("device", "family", "case", "shape", "dtype")
    waiting: dict[tuple, list[dict]] = {}
    for model in models:
        waiting.setdefault(tuple(model[f] for f in what), []).append(model)
    found = []
    for row, after in zip(measured, [*measured[1:], None]):
        found.append(row)
        here = tuple(row[f] for f in what)
        if after is None or tuple(after[f] for f in what) != here:
            found += waiting.pop(here, [])
    return found + [model for left in waiting.values() for model in left]


def _device(cases) -> dict:
    stands = [standings.standing(arms) for arms in cases.values()]
    judged = [arms["fastft"]["met"] for arms in cases.values() if arms["fastft"]["target"]]
    counts = {word: stands.count(word) for word in ("ahead", "level", "behind")}
    name = standings.place(next(iter(cases.values()))["fastft"])
    return counts | {"name": name, "cases": len(cases), "judged": len(judged), "met": judged.count("1")}


def _findings(rows, cases) -> list[tuple[str, str]]:
    """(device, what was found besides times) as sentences."""
    found = []
    for where, here in standings.by_device(cases).items():
        found += [(where, said) for said in tables.facts(rows, here)]
    found += [(where, said) for where, sentences in tables.traces(rows).items() for said in sentences]
    found += methods.sentences(rows)
    places = _places(cases)
    return [(places.get(where) or standings.named(*where), said.removeprefix("- ")) for where, said in found]


def _places(cases) -> dict[tuple[str, str], str]:
    """(device, threads) -> what the device is called on the page."""
    return {
        where: standings.place(next(iter(here.values()))["fastft"]) for where, here in standings.by_device(cases).items()
    }


def _figures(rows, cases) -> list[tuple[str, list[dict]]]:
    """(device, its figures), or nothing where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    places = {
        where: standings.place(next(iter(here.values()))["fastft"]) for where, here in standings.by_device(cases).items()
    }
    found: dict[str, list[dict]] = {}
    for i, drawing in enumerate(figures.drawings(rows)):
        place = places.get((drawing.device, drawing.threads), drawing.device)
        found.setdefault(place, []).append({"svg": inline(drawing, f"f{i}-", place)})
    return list(found.items())


def inline(drawing, prefix: str, place: str) -> str:
    """A figure as an element of the page: its ink is the page's, its ids its own."""
    svg = drawing.svg(transparent=True)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|xlink:href="#|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = svg.replace(figures.INK, "currentColor")
    title = f"{drawing.title}, {place}".replace("&", "&amp;").replace('"', "&quot;")
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', rf'\1 role="img" aria-label="{title}"', svg, count=1)


def size(value: str) -> str:
    return results.size(float(value)) if value else ""


def duration(seconds: float) -> str:
    for factor, unit in ((1, "s"), (1e-3, "ms")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
