"""The results as markdown: README's summary of each device, and the full tables of bench/results/README.md."""

import itertools
from typing import NamedTuple

from . import methods, shapes, standings
from .standings import FAMILIES, LABELS, TOKENS, over, percent, times

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
ABOUT_INFERENCE = (
    "Generating: time of a layer's forward without gradients over the frozen layer's ({median}; r: rank, T: tokens a call):"
)
ABOUT_OVER = "Time over what each line says ({median}; below 1: faster):"
SLICES = ("partial", "s2ft", "sparse", "spiel")
ENTRIES = ("sparse", "spiel")
SERVED = ("grouped", "serve")
FACTS = {
    "speedup": "full fine-tuning takes {value:.2f} times as long as fastft; of the floor's speed over it fastft keeps "
    "{kept}",
    "state_bytes": "{value:.4g} bytes a trained number between steps",
    "entry_bytes": "{value:.4g} bytes an entry between steps, its index included",
    "bandwidth": "{value:.3g} GB/s of the bytes that it has to move, {kept} of a copy's speed",
}
SORTS = {
    "unmerged": "delta beside the weight",
    "beside": "delta beside the weight",
    "update": "optimizer's update",
    "switch": "exchange of adapters",
}
NOTHING = "No results yet: `fastft bench` makes them."


def summary(rows, full: str) -> str:
    """README's numbers: per device one line for each family, kind and dtype of case, by the case that stands worst.

    Args:
        full: path of the file that has the tables of every case.
    """
    cases, served = standings.counted(rows), traces(rows)
    parts = []
    for (device, threads), here in standings.by_device(cases).items():
        row = next(iter(here.values()))["fastft"]
        heading, versions = standings.place(row), ", ".join([row["capability"], *_versions(here)])
        usual = {k: a for k, a in here.items() if standings.parameters(k.case).get("rank", shapes.RANK) == shapes.RANK}
        lines = [
            f"**[{heading}]({full}#{_anchor(heading)})** ({versions}): {_counts(here)}"
            + _unlisted({k: a for k, a in here.items() if k not in usual}),
            "",
            "| what | worst case | dtype | fastft | best peer | target | all of the kind |",
            "|---|---|---|---|---|---|---|",
        ]
        for kind, group in itertools.groupby(sorted(usual, key=kind_of), key=kind_of):
            lines.append(_worst_line({k: usual[k] for k in group}, kind))
        if said := served.pop((device, threads), None):
            lines += ["", *said]
        parts.append("\n".join(lines))
    parts += ["\n".join([f"**{standings.named(*where)}**:", "", *said]) for where, said in served.items()]
    return "\n\n".join(parts) or NOTHING


def _versions(cases) -> list[str]:
    found = {f"torch {row['torch'].split('+')[0]}" for arms in cases.values() for row in arms.values()}
    found |= {f"PEFT {row['peft']}" for arms in cases.values() for row in arms.values() if row["peft"]}
    return sorted(found, key=lambda text: (text.split()[0] != "torch", text))


def _counts(cases) -> str:
    judged = [arms["fastft"]["met"] for arms in cases.values() if arms["fastft"]["target"]]
    stands = [found for arms in cases.values() if (found := standings.standing(arms))]
    ahead, level, behind = (stands.count(word) for word in ("ahead", "level", "behind"))
    return (
        f"{len(cases)} cases, {judged.count('1')} of {len(judged)} targets met; beside the best peer ahead in {ahead}, "
        f"level in {level}, **behind in {behind}** of {len(stands)}."
    )


def _unlisted(cases) -> str:
    """What the heading counts and no line shows."""
    if not cases:
        return ""
    said = "; ".join(_met_and_stands(cases))
    return f" ({len(cases)} of them, of other ranks than {shapes.RANK}, are in no line below{': ' if said else ''}{said}.)"


class Kind(NamedTuple):
    """Cases that one line of the summary stands for."""

    place: int
    family: str
    sort: str
    yardstick: str
    dtype: str

    def what(self) -> str:
        family = FAMILIES.get(self.family, self.family)
        sort = SORTS.get(self.sort, self.sort)
        return family + (f": {sort}" if sort else "") + (f", over {self.yardstick}" if self.yardstick else "")


def kind_of(key) -> Kind:
    name, yardstick = over(key.case)
    sort = name.split()[0]
    known = ("layer", "step", "DoRA") if key.family == "dora" else ("layer", "step")
    if sort in known or not sort.isalpha():  # what the family's label says already, or a number
        sort = ""
    sort = f"{sort}{' via PEFT' * name.endswith(' via PEFT')}".strip()
    place = list(FAMILIES).index(key.family) if key.family in FAMILIES else len(FAMILIES)
    return Kind(place, key.family, sort, yardstick, key.dtype)


def _badness(arms) -> float:
    """How badly ours stands in a case: time over the target's or the best peer's, whichever is worse."""
    ours, best = arms["fastft"], standings.best_peer(arms)
    ratio = float(ours["ratio"])
    marks = [float(ours["target"])] if ours["target"] else []
    marks += [float(best[1]["ratio"])] if best else []
    return max(ratio / mark for mark in marks) if marks else ratio


def _worst_line(cases, kind: Kind) -> str:
    key = max(cases, key=lambda k: _badness(cases[k]))
    arms = cases[key]
    ours, best, stands = arms["fastft"], standings.best_peer(arms), standings.standing(arms)
    show = times if kind.yardstick else percent
    peer = "-"
    if best:
        label = LABELS.get(best[0], best[0])
        peer = f"{show(best[1])} {label}" + {"ahead": "", "level": ": level", "behind": ": **lost**"}[stands]
    target = "-"
    if ours["target"]:
        target = f"≤ {show(ours, 'target').lstrip('+')}: {'met' if ours['met'] == '1' else '**missed**'}"
    sort, _, entrance = kind.sort.partition(" via ")
    case = standings.short(key).removesuffix(f" via {entrance}").removeprefix(sort).strip()
    where = f"{key.shape}, {case}" if case else key.shape
    return (
        f"| {kind.what()} | {where} | {key.dtype} | **{show(ours)}** ({_interval(ours, show)}) | "
        f"{peer} | {target} | {_all(cases, show)} |"
    )


def _interval(row, show) -> str:
    unit = show(row).lstrip("+-0123456789.")
    low, high = (show(row, field).removesuffix(unit).lstrip("+") for field in ("lo", "hi"))
    return f"{low} … {high}"


def _all(cases, show) -> str:
    """The range over all cases of a kind, and how many met their targets and stand ahead of, level with, behind peers."""
    if len(cases) == 1:
        return "1 case"
    ours = sorted((arms["fastft"] for arms in cases.values()), key=lambda row: float(row["ratio"]))
    return "; ".join([f"{len(cases)} cases, {show(ours[0])} … {show(ours[-1])}", *_met_and_stands(cases)])


def _met_and_stands(cases) -> list[str]:
    judged = [arms["fastft"]["met"] for arms in cases.values() if arms["fastft"]["target"]]
    stands = [found for arms in cases.values() if (found := standings.standing(arms))]
    said = [f"{judged.count('1')} of {len(judged)} targets met"] if judged else []
    if stands:
        said.append(", ".join(f"{word} in {stands.count(word)}" for word in ("ahead", "level", "behind") if word in stands))
    return said


def full(rows, figures=None) -> str:
    """Tables of every case of every device, with what else was found out in their runs.

    Args:
        figures: (device, threads) -> what is to be shown under the heading of this device.
    """
    cases, served, trained = standings.counted(rows), traces(rows), methods.tables(rows)
    parts = []
    for (device, threads), of_device in standings.by_device(cases).items():
        parts.append(f"## {standings.place(next(iter(of_device.values()))['fastft'])}")
        parts += ["\n".join(shown)] if (shown := (figures or {}).get((device, threads))) else []
        for about in dict.fromkeys(_about(key) for key in of_device):
            here = {key: arms for key, arms in of_device.items() if _about(key) == about}
            parts.append(_table(here, about))
            parts += ["\n".join(said)] if (said := facts(rows, here)) else []
        parts += trained.pop((device, threads), [])
        parts += ["\n".join(said)] if (said := served.pop((device, threads), None)) else []
    for device, threads in dict.fromkeys([*trained, *served]):
        parts += [f"## {standings.named(device, threads)}", *trained.get((device, threads), [])]
        parts += ["\n".join(served[device, threads])] if (device, threads) in served else []
    return "\n\n".join(parts) or NOTHING


def _anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return "".join(c if c.isalnum() or c in "-_" else "-" if c == " " else "" for c in heading.lower())


def _about(key) -> str:
    if over(key.case)[1]:
        return ABOUT_OVER
    if key.family in SERVED:
        return ABOUT_SERVED
    if key.family == "inference":
        return ABOUT_INFERENCE
    return ABOUT_ENTRIES if key.family in ENTRIES else ABOUT_SLICES if key.family in SLICES else ABOUT


def _table(cases, about: str) -> str:
    names = standings.implementations(cases)
    commits = sorted({row["commit"] for arms in cases.values() for row in arms.values()})
    median = "median of paired ratios, with the 95 % interval of ours"
    first = "layer | T×K×N" if about != ABOUT_OVER else "what | size"
    lines = [
        f"{about.format(median=median)[:-1]}. {', '.join(_versions(cases))}; commit {', '.join(commits)}.",
        "",
        f"| {first} | dtype | " + " | ".join(LABELS.get(n, n) for n in names) + " | target |",
        "|---" * (4 + len(names)) + "|",
    ]
    show = times if about == ABOUT_OVER else percent
    for line, group in itertools.groupby(cases, lambda key: (key.shape, TOKENS.sub("", key.case), key.dtype)):
        lines.append(_line(*line, {key: cases[key] for key in group}, names, show))
    return "\n".join(lines)


def _line(shape, case, dtype, cases, names, show) -> str:
    """A line of the table; cases that differ in their tokens alone share it."""
    tokens = [found[1] for key in cases if (found := TOKENS.search(key.case))]
    ours = [arms["fastft"] for arms in cases.values()]
    cells = []
    for name in names:
        found = [show(arms[name]) if name in arms else "-" for arms in cases.values()]
        cells.append(" / ".join(found) if set(found) != {"-"} else "-")
    own, target = names.index("fastft"), "-"
    cells[own] = f"**{cells[own]}**"
    size = ours[0]["size"].replace("x", "×")
    if len(ours) == 1:
        cells[own] += f" ({_interval(ours[0], show)})"
    if tokens:
        case, size = f"{case}, T = {' / '.join(tokens)}", f"T×{size.partition('×')[2]}"
    if ours[0]["target"]:
        met = " / ".join("met" if row["met"] == "1" else "missed" for row in ours)
        target = f"≤ {show(ours[0], 'target').lstrip('+')}, {met}"
    return f"| {shape}, {case} | {size} | {dtype} | " + " | ".join(cells) + f" | {target} |"


def facts(rows, cases) -> list[str]:
    """What ours was found to be besides its times, in the runs that `cases` are from, as sentences."""
    said = []
    for key, arms in cases.items():
        for row in rows:
            if (row["date"], standings.key_of(row)) != (arms["fastft"]["date"], key):
                continue
            if row["implementation"] != "fastft" or row["metric"] not in FACTS or row["status"] != "ok":
                continue
            kept = row["ratio"] and f"{100 * float(row['ratio']):.1f} %"
            text = FACTS[row["metric"]].format(value=float(row["value"]), kept=kept)
            if row["target"]:
                sign, goal = ("≥", f"{100 * float(row['target']):.0f} %") if kept else ("≤", row["target"])
                text += f" (target {sign} {goal}, {'met' if row['met'] == '1' else 'missed'})"
            said.append(f"- {key.shape}, {key.case}, {key.dtype}: {text}.")
    return said


def traces(rows) -> dict[tuple[str, str], list[str]]:
    """(device, threads) -> what the latest runs of `serve_trace` that count found, as sentences."""
    latest: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["family"] == "serve_trace" and row["status"] in ("ok", "wrong") and row["implementation"] == "fastft":
            runs = latest.setdefault((*standings.where(row), row["shape"], row["case"]), {})
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
