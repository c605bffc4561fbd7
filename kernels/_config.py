"""Launch configurations are data: ``configs/<device>/<family>.json``, read by a pure function.

A file maps each op to a list of ``{"when": {...}, "config": {...}}``. Strings in `when` must match exactly; numbers are
sizes, and the entry whose sizes are nearest (by ratio) wins, the first one on a tie. Nothing is tuned while a model
runs: ``configs/default`` holds conservative entries for every device, and a device's own file, where there is one,
replaces it op by op.
"""

import functools
import json
import math
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"


@functools.cache
def table(device: str, family: str) -> dict:
    """The default table of a family, with the ops that the device's own file lists replaced."""
    own = CONFIGS / device / f"{family}.json"
    default = json.loads((CONFIGS / "default" / f"{family}.json").read_text())
    return default | json.loads(own.read_text()) if own.exists() else default


@functools.lru_cache(maxsize=4096)
def _nearest(device: str, family: str, op: str, problem: tuple) -> dict:
    sizes = dict(problem)

    def distance(when):
        mismatch = sum(sizes[key] != want for key, want in when.items() if isinstance(want, str))
        ratio = sum(abs(math.log2(max(sizes[key], 1) / want)) for key, want in when.items() if not isinstance(want, str))
        return math.inf if mismatch else ratio

    entry = min(table(device, family)[op], key=lambda entry: distance(entry["when"]))
    if distance(entry["when"]) == math.inf:
        raise LookupError(f"no configuration of {op} for {sizes} in configs/{device} or configs/default")
    return entry["config"]


def lookup(device: str, family: str, op: str, **problem) -> dict:
    """The configuration of one launch.

    Args:
        device: a folder of ``configs`` such as "sm_90" or "gfx942"; an unknown one means "default".
        problem: what the entries' `when` may ask: strings, and sizes as integers.

    Raises:
        KeyError: unknown op. LookupError: no entry has the asked strings.
    """
    return dict(_nearest(device, family, op, tuple(problem.items())))
