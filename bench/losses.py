"""Where fastft is behind or misses its target, as a table: what bench/README.md shows of the rows."""

import itertools

from . import standings, tables

NONE = "No row that counts is behind a peer or misses its target."


def markdown(rows) -> str:
    """Per device and kind of case, the targets that are missed and the best peers that ours is clearly behind."""
    lines = []
    for here in standings.by_device(standings.counted(rows)).values():
        device = standings.place(next(iter(here.values()))["fastft"])
        for kind, group in itertools.groupby(sorted(here, key=tables.kind_of), key=tables.kind_of):
            cases = {key: here[key] for key in group}
            missed, behind = _missed(cases), _behind(cases)
            if missed or behind:
                lines.append(f"| {device} | {kind.what()} | {kind.dtype} | {missed or '-'} | {behind or '-'} |")
    if not lines:
        return NONE
    return "\n".join(["| device | what | dtype | targets missed | behind |", "|---|---|---|---|---|", *lines])


def _missed(cases) -> str:
    judged = [(key, arms["fastft"]) for key, arms in cases.items() if arms["fastft"]["target"]]
    missed = [(key, row) for key, row in judged if row["met"] != "1"]
    if not missed:
        return ""
    key, row = max(missed, key=lambda item: float(item[1]["ratio"]) / float(item[1]["target"]))
    return f"{len(missed)} of {len(judged)}; furthest: {_case(key)}: {_cost(key, row)}, target {_cost(key, row, 'target')}"


def _behind(cases) -> str:
    lost = {key: arms for key, arms in cases.items() if standings.standing(arms) == "behind"}
    if not lost:
        return ""
    compared = sum(standings.standing(arms) != "" for arms in cases.values())
    best = {key: standings.best_peer(arms) for key, arms in lost.items()}
    key = max(lost, key=lambda k: float(lost[k]["fastft"]["ratio"]) / float(best[k][1]["ratio"]))
    (name, row), ours = best[key], lost[key]["fastft"]
    peer = standings.LABELS.get(name, name)
    return f"{len(lost)} of {compared}; furthest: {_case(key)}: {_cost(key, ours)}, {peer} {_cost(key, row)}"


def _case(key) -> str:
    return ", ".join(filter(None, [key.shape, standings.short(key)]))


def _cost(key, row, field="ratio") -> str:
    return f"{float(row[field]):.3f}×" if standings.over(key.case)[1] else standings.percent(row, field)
