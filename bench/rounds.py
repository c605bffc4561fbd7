"""Times arms in rounds: one sample of each a round, in random order."""

import gc
import math
import random
import time
from collections.abc import Callable
from contextlib import contextmanager

import torch

Run = Callable[[], dict[str, torch.Tensor]]

MIN_SAMPLE = {"cpu": 0.01, "cuda": 0.003}  # seconds: shorter calls are repeated within a sample
PAUSE = 0.01  # seconds


def interleaved(
    runs: dict[str, list[Run]], device, rounds: int, seed: int = 0, elsewhere: dict[str, Callable] | None = None
) -> dict[str, list[float]]:
    """Seconds per call of every arm, one sample per arm and round, arms in random order within a round.

    Each arm has one run per input set; successive calls, also of different arms, take successive sets, so that no call
    finds its inputs in a GPU's L2 because the call before left them there.

    Args:
        elsewhere: arms of another process: a number of calls -> the seconds they take there. With any, every sample begins
            with a pause, in which the other process's threads stop spinning for work, and a call that is not timed.

    On a GPU every sample begins when the GPU is idle, with a call that is not timed: what the host is ahead by after an arm
    that keeps the GPU busy would hide the gaps that launching the next one leaves.
    """
    device, elsewhere = torch.device(device), elsewhere or {}
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

    begin, end, seconds = clock(device)
    start = begin()
    sample(runs["floor"], sets)
    once = seconds(start, end()) / sets
    calls = max(1, math.ceil(MIN_SAMPLE[device.type] / once))
    order, shuffle = [*runs, *elsewhere], random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in order}
    with without_garbage_collection():
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                if elsewhere and device.type == "cpu":
                    time.sleep(PAUSE)  # OpenMP's threads spin for a few milliseconds after their work
                if name in elsewhere:
                    times[name].append(elsewhere[name](calls) / calls)
                    continue
                if elsewhere or device.type == "cuda":
                    sample(runs[name], 1)
                start = begin()
                sample(runs[name], calls)
                times[name].append(seconds(start, end()) / calls)
    return times


def clock(device):
    """(begin, end, seconds between): the host's clock on a CPU, events in the stream on a GPU, whose end is waited for."""
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
def without_garbage_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
