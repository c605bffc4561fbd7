"""Measures a case: every arm beside the floor, in the same rounds, in random order.

An arm is built on inputs and then called; the call runs the whole operation (forward and backward) and returns named
tensors. A case whose arms do not agree gets no number.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastft import testing

from . import graphs, stats
from .counting import launches, peak_bytes, saved_bytes
from .rounds import Run, interleaved

Build = Callable[[Any], Run]

MAX_SETS = 16
OVER_BASE = "time_over_base"  # metric: ours over another revision's fastft


class WrongResult(RuntimeError):
    """An arm does not compute what the case defines."""


@dataclass(frozen=True)
class Case:
    """One thing to measure: an operation on a named shape in one dtype, with its implementations.

    Attributes:
        name: what varies besides shape and dtype, e.g. ``layer r=16 p=0``; where the floor is no frozen layer or model, also
            what it is instead: ``switch down 3 % vs PEFT merge``.
        inputs: (device, seed) -> inputs; equal seeds give equal inputs.
        tensors: inputs -> the tensors every arm gets for free (parameters, the input itself): not counted as saved. Nor is
            what a run that works on copies of them yields by a function `parameters()`.
        floor: builds the arm that every other is divided by.
        arms: implementation name -> builder; names of ours begin with ``fastft``.
        checker: inputs -> function of a builder that raises `WrongResult`.
        skipped: implementation name -> why it can't run here.
        flops, moved: floating-point operations and the fewest bytes through memory (every tensor once) of one call, and the
            floor's.
        uncounted: why there are no operations to count, where there are none.
        target: the ratio to the floor that ours must reach, where one was set.
        rival, share: an arm that takes longer than the floor by what the method saves, and how much of that ours must get
            (`stats.kept_gain`).
        copies, reach: builds what copies as many bytes as `moved`, and how much of its speed ours must reach.
    """

    family: str
    name: str
    shape: str
    size: str
    dtype: str
    inputs: Callable[[torch.device, int], Any]
    tensors: Callable[[Any], list[torch.Tensor]]
    floor: Build
    arms: dict[str, Build]
    checker: Callable[[Any], Callable[[Build], None]]
    skipped: dict[str, str] = field(default_factory=dict)
    flops: int = 0
    moved: int = 0
    floor_flops: int = 0
    floor_moved: int = 0
    uncounted: str = ""
    target: float | None = None
    rival: str | None = None
    share: float = 1.0
    copies: Build | None = None
    reach: float = 1.0

    def __str__(self):
        return " ".join(self.key())

    def key(self) -> tuple[str, str, str, str]:
        return self.family, self.name, self.shape, self.dtype


@dataclass(frozen=True)
class Fact:
    """Something besides time and saved bytes that was found out about an arm: a number, or a ratio with its interval.

    A run may tell numbers by a function `facts() -> list[Fact]`, asked after it was called; with a target they are met up
    to it. One of many training steps may have a function `step()` that makes one of them: its memory is the run's.
    `timed`: the number is a time, which other load disturbs as it does the case's.
    """

    metric: str
    value: float
    unit: str
    ratio: stats.Interval | None = None
    target: float | None = None
    met: bool | None = None
    timed: bool = False


@dataclass
class Measurement:
    """What was found out about one arm of a case; `ratio` is None where it got no number."""

    implementation: str
    status: str = "ok"  # ok | void | quick | skipped | wrong
    note: str = ""
    backend: str = ""
    ratio: stats.Interval | None = None
    floor: stats.Interval | None = None
    seconds: float | None = None
    rounds: int = 0
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    launches: int | None = None
    roofline: float | None = None
    target: float | None = None
    met: bool | None = None
    facts: list[Fact] = field(default_factory=list)


def is_ours(implementation: str) -> bool:
    """Whether it is of this tree's fastft: not a peer's, nor another revision's (``fastft@REV``)."""
    return implementation.startswith("fastft") and "@" not in implementation


def measure(
    case: Case, device, rounds: int = stats.MIN_ROUNDS, quick: bool = False, seed: int = 0, timing: str = "graph", base=None
):
    """Check and time every arm of `case`.

    Args:
        rounds: below `stats.MIN_ROUNDS` the measurements are marked ``quick``, as with `quick`.
        timing: on a GPU, "graph": replays of CUDA graphs, or "eager" calls; each measurement's note says which.
        base: a `revision.Base`, whose fastft and floor are timed in the same rounds.

    Returns:
        A list of `Measurement`: the floor against itself (``floor2``) first, then every arm, skipped ones too.
    """
    device = torch.device(device)
    quick = quick or rounds < stats.MIN_ROUNDS
    data, runs, found = prepare(case, device, seed)
    runs["floor2"] = [case.floor(d) for d in data]
    if case.copies is not None:
        runs["copies"] = [case.copies(d) for d in data]
    if base is not None:
        found |= base.offer(case)

    _forget_compiled()  # of the gate's calls; timing's first calls compile for what is timed
    for group in graphs.groups(runs, timing if device.type == "cuda" else None):
        elsewhere = base.samplers(group, found) if base is not None else {}
        _time(case, group, found, device, rounds, quick, seed, elsewhere)
    if device.type == "cuda":  # last: a profiler that was on may go on costing
        for name in runs.keys() & found.keys():
            found[name].launches = launches(runs[name][0], device)
    names = ("floor2", *case.arms, *case.skipped)
    return [found[name] for name in (*names, *(name for name in found if name not in names))]


def prepare(case: Case, device, seed: int, arms=None):
    """Make inputs, and build, check and profile arms on them.

    Args:
        arms: names (default: all).

    Returns:
        (sets of inputs, name -> runs on each of them, name -> `Measurement` without times). There are runs of the floor and
        of the arms that passed the gate.
    """
    _forget_compiled()
    data = _input_sets(case, device, seed)
    free = case.tensors(data[0])
    found = {name: Measurement(name, "skipped", why) for name, why in case.skipped.items()}
    runs = {"floor": [case.floor(d) for d in data]}
    found["floor2"] = _profile(runs["floor"][0], free, Measurement("floor2"), device)
    check = case.checker(data[0])
    for name, build in case.arms.items():
        if arms is not None and name not in arms:
            continue
        found[name] = Measurement(name)
        try:
            check(build)
        except WrongResult as error:
            found[name].status, found[name].note = "wrong", str(error)
            continue
        except Exception as error:  # whatever a peer raises; of ours only what a forced backend lacks
            if is_ours(name) and not (":" in name and isinstance(error, testing.BackendError)):
                raise
            found[name].status, found[name].note = "skipped", f"{type(error).__name__}: {error}"[:300]
            continue
        runs[name] = [build(d) for d in data]
        _profile(runs[name][0], free, found[name], device)
    return data, runs, found


def _forget_compiled() -> None:
    """What torch.compile made of other calls: it makes dynamic what differs from theirs, and after some variants of the same
    code compiles no more and runs it eagerly, without a word."""
    if "torch._dynamo" in sys.modules:  # else nothing was compiled, and importing it takes seconds
        torch.compiler.reset()


def _time(
    case: Case, group: graphs.Group, found: dict[str, Measurement], device, rounds: int, quick: bool, seed: int, elsewhere
):
    """Time the arms of a group; what is found out goes into `found`."""
    times = interleaved(group.runs, device, rounds, seed, elsewhere)
    floor = stats.paired_ratio(times["floor2"], times["floor"])
    void = stats.is_void(floor)
    for name in times:
        m = found.get(name)
        if m is None or m.rounds:  # the floor, and floor2 in a second group
            continue
        m.note = group.notes.get(name, m.note)
        m.status = "quick" if quick else "void" if void else "ok"
        if m.status != "ok":
            m.facts = [replace(fact, met=None) if fact.timed else fact for fact in m.facts]
        m.ratio, m.floor, m.rounds = stats.paired_ratio(times[name], times["floor"]), floor, rounds
        m.seconds = torch.tensor(times[name], dtype=torch.float64).quantile(0.5).item()
        if is_ours(name) and case.target is not None:
            m.target = case.target
            m.met = stats.meets(case.target, m.ratio, floor) if m.status == "ok" else None
    if "fastft" in times:
        found["fastft"].facts += _compared(case, times, found, floor, quick or void)


def runs_bare(base: Measurement, ours: Measurement) -> bool:
    """Whether another revision ran without the kernels that ours has, which says nothing of either's code."""
    return base.backend == "reference" != ours.backend


def _compared(case: Case, times, found: dict[str, Measurement], floor: stats.Interval, unsure: bool) -> list[Fact]:
    """What ours is besides a ratio to the floor; whether it is met is left open where a run is `unsure`."""
    facts, ours, seconds = [], times["fastft"], found["fastft"].seconds
    if case.rival in times:
        kept = stats.kept_gain(times[case.rival], ours, times["floor"])
        gain = stats.paired_ratio(times[case.rival], ours).median
        met = None if unsure else kept.lo >= case.share - floor.half_width
        facts.append(Fact("speedup", gain, f"x over {case.rival}", kept, case.share, met))
    if "copies" in times:
        reached = stats.paired_ratio(times["copies"], ours)
        met = None if unsure else reached.lo >= case.reach - floor.half_width
        facts.append(Fact("bandwidth", case.moved / seconds / 1e9, "GB/s", reached, case.reach, met))
    for name in times:
        if name.startswith("fastft@"):
            # That process's floor tells by how much two processes differ where nothing changed.
            there = stats.paired_ratio(times[name.replace("fastft", "floor")], times["floor"])
            most = 1 + max(abs(there.lo - 1), abs(there.hi - 1))
            change = stats.paired_ratio(ours, times[name])
            met = None if unsure or runs_bare(found[name], found["fastft"]) else change.lo <= most
            facts.append(Fact(OVER_BASE, change.median, f"x {name}", change, most, met))
    return facts


def _input_sets(case, device, seed):
    """One set of inputs on a CPU; on a GPU as many as together exceed its L2 three times, by what a call moves of each."""
    first = case.inputs(device, seed)
    if device.type == "cpu":
        return [first]
    one = sum(t.untyped_storage().nbytes() for t in case.tensors(first))
    one = min(one, case.moved or one)  # an update touches a part of the weight alone, and no x
    needed = math.ceil(3 * torch.cuda.get_device_properties(device).L2_cache_size / max(one, 1)) + 1
    return [first, *(case.inputs(device, seed + i) for i in range(1, min(needed, MAX_SETS)))]


def _profile(run: Run, free, found: Measurement, device) -> Measurement:
    """What one call saves for backward, its peak memory, its launches, and which backends of ours it ran on."""
    run()  # outside the count: what a first call allocates stays
    if facts := getattr(run, "facts", None):
        found.facts = facts()
    step = getattr(run, "step", run)
    found.saved_bytes = saved_bytes(step, [*free, *getattr(run, "parameters", list)()])
    with testing.record() as calls:
        run()
    found.backend = "+".join(sorted({c.config if isinstance(c.config, str) else c.backend for c in calls}))
    found.peak_bytes = peak_bytes(step, device)
    if device.type == "cpu":
        found.launches = launches(run, device)
    return found


def check_close(outputs, golden, yardstick, factor: float) -> None:
    """Compare an arm's outputs with the float64 result, by the error that a plain composition makes.

    The relative Frobenius error of each output may be `factor` times the yardstick's, or half a unit in the last place
    of its dtype where that is larger.

    Raises:
        WrongResult: an output is missing, has another shape, or is too far off (NaN is).
    """
    for name, want in golden.items():
        got = outputs.get(name)
        if got is None or got.shape != want.shape:
            raise WrongResult(f"{name} is {'missing' if got is None else list(got.shape)}, expected {list(want.shape)}")
        limit = max(factor * relative_error(yardstick[name], want), torch.finfo(got.dtype).eps / 2)
        error = relative_error(got, want)
        if not error <= limit:
            raise WrongResult(f"{name}: relative error {error:.2e}, allowed {limit:.2e}")


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want|| in float64."""
    want = want.double()
    return ((got.double() - want).norm() / want.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()
