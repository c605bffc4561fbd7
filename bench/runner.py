"""Measures a case: every arm beside the floor, in the same rounds, in random order.

An arm is built on inputs and then called; the call runs the whole operation (forward and backward) and returns named
tensors. A case whose arms do not agree gets no number.
"""

import gc
import math
import random
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fastft import testing

from . import graphs, stats

Run = Callable[[], dict[str, torch.Tensor]]
Build = Callable[[Any], Run]

MIN_SAMPLE = {"cpu": 0.01, "cuda": 0.003}  # seconds: shorter calls are repeated within a sample
MAX_SETS = 16


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
        flops, moved: floating-point operations and the fewest bytes through memory of one call, and the floor's.
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
    target: float | None = None
    rival: str | None = None
    share: float = 1.0
    copies: Build | None = None
    reach: float = 1.0

    def __str__(self):
        return f"{self.family} {self.name} {self.shape} {self.dtype}"


@dataclass(frozen=True)
class Fact:
    """Something besides time and saved bytes that was found out about an arm: a number, or a ratio with its interval.

    A run may tell numbers by a function `facts() -> list[Fact]`, asked after it was called; with a target they are met up
    to it. One of many training steps may have a function `step()` that makes one of them: its memory is the run's.
    """

    metric: str
    value: float
    unit: str
    ratio: stats.Interval | None = None
    target: float | None = None
    met: bool | None = None


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
    target: float | None = None
    met: bool | None = None
    facts: list[Fact] = field(default_factory=list)


def measure(case: Case, device, rounds: int = stats.MIN_ROUNDS, quick: bool = False, seed: int = 0, timing: str = "graph"):
    """Check and time every arm of `case`.

    Args:
        rounds: below `stats.MIN_ROUNDS` the measurements are marked ``quick``, as with `quick`.
        timing: on a GPU, "graph": replays of CUDA graphs, or "eager" calls; each measurement's note says which.

    Returns:
        A list of `Measurement`: the floor against itself (``floor2``) first, then every arm, skipped ones too.
    """
    device = torch.device(device)
    quick = quick or rounds < stats.MIN_ROUNDS
    data = _input_sets(case, device, seed)
    free = case.tensors(data[0])
    found = {name: Measurement(name, "skipped", why) for name, why in case.skipped.items()}
    runs = {"floor": [case.floor(d) for d in data], "floor2": [case.floor(d) for d in data]}
    found["floor2"] = _profile(runs["floor2"][0], free, Measurement("floor2"), device)

    check = case.checker(data[0])
    for name, build in case.arms.items():
        found[name] = Measurement(name)
        try:
            check(build)
        except WrongResult as error:
            found[name].status, found[name].note = "wrong", str(error)
            continue
        arm = [build(d) for d in data]
        _profile(arm[0], free, found[name], device)
        runs[name] = arm
    del check
    if case.copies is not None:
        runs["copies"] = [case.copies(d) for d in data]

    for group in graphs.groups(runs, timing if device.type == "cuda" else None):
        _time(case, group, found, device, rounds, quick, seed)
    return [found[name] for name in ("floor2", *case.arms, *case.skipped)]


def _time(case: Case, group: graphs.Group, found: dict[str, Measurement], device, rounds: int, quick: bool, seed: int):
    """Time the arms of a group; what is found out goes into `found`."""
    times = interleaved(group.runs, device, rounds, seed)
    floor = stats.paired_ratio(times["floor2"], times["floor"])
    void = stats.is_void(floor)
    for name in group.runs:
        m = found.get(name)
        if m is None or m.rounds:  # the floor, and floor2 in a second group
            continue
        m.note = group.notes[name]
        m.status = "quick" if quick else "void" if void else "ok"
        m.ratio, m.floor, m.rounds = stats.paired_ratio(times[name], times["floor"]), floor, rounds
        m.seconds = torch.tensor(times[name], dtype=torch.float64).quantile(0.5).item()
        if name.startswith("fastft") and case.target is not None:
            m.target = case.target
            m.met = stats.meets(case.target, m.ratio, floor) if m.status == "ok" else None
    if case.rival in times and "fastft" in times:
        kept = stats.kept_gain(times[case.rival], times["fastft"], times["floor"])
        gain = stats.paired_ratio(times[case.rival], times["fastft"]).median
        met = kept.lo >= case.share - floor.half_width if not (quick or void) else None
        found["fastft"].facts.append(Fact("speedup", gain, f"x over {case.rival}", kept, case.share, met))
    if "copies" in times and "fastft" in times:
        reached = stats.paired_ratio(times["copies"], times["fastft"])
        met = reached.lo >= case.reach - floor.half_width if not (quick or void) else None
        bandwidth = case.moved / found["fastft"].seconds / 1e9
        found["fastft"].facts.append(Fact("bandwidth", bandwidth, "GB/s", reached, case.reach, met))


def interleaved(runs: dict[str, list[Run]], device, rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """Seconds per call of every arm, one sample per arm and round, arms in random order within a round.

    Each arm has one run per input set; successive calls, also of different arms, take successive sets, so that no call
    finds its inputs in a GPU's L2 because the call before left them there.
    """
    device = torch.device(device)
    sets = len(next(iter(runs.values())))
    for arm in runs.values():
        for run in arm * 2:  # twice: compilers, allocators and lazily built tables settle
            run()
    position = 0

    def sample(arm: list[Run], calls: int):
        nonlocal position
        for _ in range(calls):
            arm[position % sets]()
            position += 1

    begin, end, seconds = _clock(device)
    start = begin()
    sample(runs["floor"], sets)
    once = seconds(start, end()) / sets
    calls = max(1, math.ceil(MIN_SAMPLE[device.type] / once))
    order, shuffle = list(runs), random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in runs}
    with _no_garbage_collection():
        for _ in range(rounds):
            shuffle(order)
            stamps = []
            for name in order:
                start = begin()
                sample(runs[name], calls)
                stamps.append((name, start, end()))
            for name, start, stop in stamps:
                times[name].append(seconds(start, stop) / calls)
    return times


def _clock(device):
    """(begin, end, seconds between): the host's clock on a CPU, events in the stream on a GPU."""
    if device.type == "cpu":
        return time.perf_counter, time.perf_counter, lambda start, stop: stop - start

    def stamp():
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(start, stop):
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    torch.cuda.synchronize(device)
    return stamp, stamp, seconds


@contextmanager
def _no_garbage_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _input_sets(case, device, seed):
    """One set of inputs on a CPU; on a GPU as many as together exceed its L2 three times."""
    first = case.inputs(device, seed)
    if device.type == "cpu":
        return [first]
    one = sum(t.untyped_storage().nbytes() for t in case.tensors(first))
    needed = math.ceil(3 * torch.cuda.get_device_properties(device).L2_cache_size / max(one, 1)) + 1
    return [first, *(case.inputs(device, seed + i) for i in range(1, min(needed, MAX_SETS)))]


def _profile(run: Run, free, found: Measurement, device) -> Measurement:
    """What one call saves for backward, its peak memory on a GPU, and which backends of ours it ran on."""
    run()  # outside the count: what a first call allocates stays
    if facts := getattr(run, "facts", None):
        found.facts = facts()
    step = getattr(run, "step", run)
    found.saved_bytes = saved_bytes(step, [*free, *getattr(run, "parameters", list)()])
    with testing.record() as calls:
        run()
    found.backend = "+".join(sorted({c.config if isinstance(c.config, str) else c.backend for c in calls}))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        found.peak_bytes = torch.cuda.max_memory_allocated(device) - before
    return found


def saved_bytes(run: Run, free) -> int:
    """Bytes of the distinct storages that one call saves for backward, without those of the tensors in `free`."""
    known = {t.untyped_storage().data_ptr() for t in free}
    saved: dict[int, torch.UntypedStorage] = {}  # holding the storages keeps their addresses distinct

    def pack(tensor):
        for dense in _dense(tensor):
            storage = dense.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in saved.values())


def _dense(tensor) -> list[torch.Tensor]:
    """The tensors that have storages: a sparse one's indices and values, or itself."""
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    return [tensor]


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
