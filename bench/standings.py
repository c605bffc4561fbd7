"""Which rows of the results count, and what is read from them: the latest run of each case, its peers, its parameters."""

import re
from typing import NamedTuple

from . import shapes
from .runner import is_ours


class Key(NamedTuple):
    """What a case is known by: rows of equal keys are the same measurement, made again."""

    device: str
    threads: str
    family: str
    case: str
    shape: str
    dtype: str


Cases = dict[Key, dict[str, dict]]

FAMILIES = {
    "lora": "LoRA layer",
    "inference": "Generating, one layer",
    "dora": "DoRA layer",
    "step": "LoRA training step",
    "peft": "PEFT model",
    "qlora": "PEFT's QLoRA",
    "partial": "S²FT layer",
    "s2ft": "S²FT training step",
    "sparse": "SpIEL and LIFT layer",
    "spiel": "SpIEL and LIFT training step",
    "selection": "Choosing entries",
    "grouped": "Serving, one layer",
    "serve": "Serving, whole model",
    "serve_trace": "Serving, through the server",
}
LABELS = {
    "peft": "PEFT",
    "addmm": "plain PyTorch, one autograd node",
    "peft-compile": "PEFT, torch.compile",
    "compile": "plain PyTorch, torch.compile",
    "unsloth": "unsloth",
    "liger": "PEFT on Liger",
    "plain": "plain PyTorch",
    "permuted": "slice first (permuted)",
    "full": "full fine-tuning",
    "lora-exchange": "LoRA: unmerge, merge",
    "published": "as published, plain PyTorch",
    "shira": "PEFT SHiRA",
    "csr": "torch.sparse CSR",
    "bmm": "two batched products",
    "loop": "loop over adapters",
    "padded": "padded to rank 64",
    "vllm": "vLLM's kernels",
}
# Training everything is what a method is to avoid: it is shown, but to be ahead of it says nothing.
NO_RIVALS = ("full",)
# What a case's name says in numbers; a figure can have each of them as its axis.
PARAMETERS = {
    "density": re.compile(r"\b([\d.]+) %"),
    "rank": re.compile(r"\br=(\d+)"),
    "tokens": re.compile(r"\bT=(\d+)"),
    "adapters": re.compile(r"\bD=(\d+)"),
}
TOKENS = re.compile(r" T=(\d+)")
TIMED = "time"


def counted(rows, metric: str = TIMED) -> Cases:
    """Case -> implementation -> its row, of the latest run that counts; floors only appear for other metrics than time.

    Implementations of one case are taken from one run, since only those were measured in the same rounds. A case whose
    gate ours has failed since has no number: the older one is of code that is no more.
    """
    runs: dict[Key, dict[str, dict[str, dict]]] = {}
    wrong: dict[Key, str] = {}
    for row in rows:
        if (row["metric"], row["implementation"], row["status"]) == (TIMED, "fastft", "wrong"):
            wrong[key_of(row)] = max(wrong.get(key_of(row), ""), row["date"])
        if row["metric"] != metric or row["status"] != "ok" or "@" in row["implementation"]:  # @: of another revision
            continue
        if metric == TIMED and is_floor(row["implementation"]):
            continue
        runs.setdefault(key_of(row), {}).setdefault(row["date"], {})[row["implementation"]] = row
    found = {}
    for key, by_date in runs.items():
        ours = [date for date, arms in by_date.items() if "fastft" in arms]
        if ours and max(ours) > wrong.get(key, ""):
            found[key] = by_date[max(ours)]
    return dict(sorted(found.items(), key=lambda item: order(item[0])))


def key_of(row) -> Key:
    return Key(*where(row), *(row[field] for field in Key._fields[2:]))


def floors(rows, cases: Cases) -> Cases:
    """The floor's own time rows (`floor2`) in the runs that `cases` are from, where they count."""
    wanted = {(key, arms["fastft"]["date"]): key for key, arms in cases.items()}
    found = {}
    for row in rows:
        if row["metric"] == TIMED and row["implementation"] == "floor2" and row["status"] == "ok":
            key = wanted.get((key_of(row), row["date"]))
            if key is not None:
                found[key] = {"floor2": row}
    return found


def is_floor(implementation: str) -> bool:
    return implementation.startswith("floor")


def is_rival(implementation: str) -> bool:
    """Whether to be behind it is to lose: no floor, none of ours, of whatever revision, and not full training."""
    return not (implementation.startswith("fastft") or is_floor(implementation) or implementation in NO_RIVALS)


def over(case: str) -> tuple[str, str]:
    """A case's name without what its ratios are over, and that, or "" if it is the frozen layer or model."""
    name, _, yardstick = case.partition(" vs ")
    return name, yardstick


def parameters(case: str) -> dict[str, float]:
    """The numbers in a case's name: density in %, rank, tokens, adapters. What it names twice is none of them."""
    found = {name: pattern.findall(case) for name, pattern in PARAMETERS.items()}
    return {name: float(values[0]) for name, values in found.items() if len(values) == 1}


def without(case: str, parameter: str) -> str:
    """A case's name without one of its parameters, so that cases that differ in it alone have the same."""
    return " ".join(PARAMETERS[parameter].sub("", case).split())


def best_peer(arms) -> tuple[str, dict] | None:
    """The fastest implementation that is not ours."""
    rivals = {name: row for name, row in arms.items() if is_rival(name)}
    return min(rivals.items(), key=lambda item: float(item[1]["ratio"])) if rivals else None


def standing(arms) -> str:
    """How `fastft` stands to the best peer: ahead, level (the intervals overlap), behind, or "" without one."""
    best, ours = best_peer(arms), arms["fastft"]
    if best is None:
        return ""
    if float(ours["hi"]) < float(best[1]["lo"]):
        return "ahead"
    return "behind" if float(ours["lo"]) > float(best[1]["hi"]) else "level"


def implementations(cases) -> list[str]:
    """Those that appear, ours first."""
    names = {name for arms in cases.values() for name in arms}
    peers = [*LABELS, *sorted(names - LABELS.keys())]
    ours = sorted(n for n in names if is_ours(n))
    return ours + [n for n in peers if n in names and n not in ours]


def on_gpu(row) -> bool:
    return row["capability"].startswith("sm_")


def where(row) -> tuple[str, str]:
    """(device, threads): what is one place to measure at. The host's threads are no part of a GPU's, so those are ""."""
    return row["device"], "" if on_gpu(row) else row["threads"]


def named(device: str, threads: str) -> str:
    return f"{device}, {threads} threads" if threads else device


def place(row) -> str:
    """A device as a heading has it: without the signs of trademarks, a CPU with its threads."""
    device, threads = where(row)
    return named(re.sub(r" ?\((R|TM)\)", "", device), threads)


def by_device(cases: Cases) -> dict[tuple[str, str], Cases]:
    """(device, threads), as `where` has them -> its cases."""
    found: dict[tuple[str, str], Cases] = {}
    for key, arms in cases.items():
        found.setdefault((key.device, key.threads), {})[key] = arms
    return found


def short(key: Key) -> str:
    """A case's name without what its family's label and its yardstick say already."""
    words = over(key.case)[0].removeprefix("DoRA " * (key.family == "dora")).split()
    return " ".join(words[1:] if words[0] in ("layer", "step") else words)


def percent(row, field="ratio") -> str:
    return f"{100 * (float(row[field]) - 1):+.1f} %"


def times(row, field="ratio") -> str:
    return f"{float(row[field]):.2f}×"


def order(key: Key):
    known, families = list(shapes.LINEARS), list(FAMILIES)
    # Numbers in names are ordered as numbers.
    case = re.sub(r"\d+(\.\d+)?", lambda found: f"{float(found[0]):013.3f}", key.case)
    return (
        key.device,
        int(key.threads or 0),
        families.index(key.family) if key.family in families else len(families),
        key.family,
        known.index(key.shape) if key.shape in known else len(known),
        key.shape,
        key.dtype,
        case,
    )
