"""CUDA graphs of the arms of a case: what a call costs the GPU, without the gaps that launching it leaves.

Both are real: torch.compile and captured training loops replay graphs, most loops launch from Python. The bench times
graphs by default, because eager times of small layers are the host's, and says in each row which it was.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

TIMINGS = ("graph", "eager")
WARM_UP = 2  # calls on the side stream before capture: compilers, allocators and lazily built tables settle
BESIDE = ("floor", "floor2")  # what every group of arms is timed beside


@dataclass(frozen=True)
class Group:
    """Arms that are timed in the same way in the same rounds, with the floor among them; a note for each arm's row."""

    runs: dict[str, list[Callable]]
    notes: dict[str, str]


def groups(runs: dict[str, list[Callable]], timing: str | None) -> list[Group]:
    """How to time arms, each a list of calls: one group, or two if some can't be captured while the floor can.

    Args:
        timing: "graph" or "eager" on a GPU, None elsewhere.
    """
    if timing != "graph":
        return [Group(runs, dict.fromkeys(runs, "eager" if timing else ""))]
    pool, captured, refused = new_pool(), {}, {}
    for name, arm in runs.items():
        try:
            captured[name] = [capture(run, pool) for run in arm]
        except Exception as error:  # whatever a library raises in a capture that it can't be in
            reason = (str(error).strip().splitlines() or [""])[0]
            refused[name] = f"eager: not captured, {type(error).__name__}: {reason}"[:200]
            if name in BESIDE:
                break  # then all are eager
    if refused.keys() & set(BESIDE) or captured.keys() <= set(BESIDE):
        return [Group(runs, {name: refused.get(name) or "eager, as the others" for name in runs})]
    found = [Group(captured, dict.fromkeys(captured, "CUDA graph"))]
    if refused:
        found.append(Group({name: runs[name] for name in (*BESIDE, *refused)}, dict.fromkeys(BESIDE, "eager") | refused))
    return found


def new_pool():
    """Memory that all graphs share: their results are never read, and one replay follows the other."""
    torch.cuda.synchronize()
    return torch.cuda.graph_pool_handle()


def capture(run: Callable, pool) -> Callable[[], None]:
    """A function that replays `run()`, captured on the current device after warm-up calls on the capturing stream.

    Autograd's backward runs on the streams of its forward, so that one stream has it all.
    """
    # Not torch.cuda.graph, which empties the allocator's cache for each of some hundred graphs.
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
        torch.cuda.synchronize()
        graph.capture_begin(pool=pool)
        try:
            run()
        except BaseException:
            _abandon(graph)
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


def _abandon(graph) -> None:
    """End a capture whose call failed; that it was invalidated says less than what the call raised."""
    try:
        graph.capture_end()
    except RuntimeError:
        torch.cuda.synchronize()
