"""Every family's cases under pytest-benchmark: one group per case, with the floor, ours and the peers side by side.

For looking, saving and comparing while one works on a kernel. These times are taken one implementation after the other, so
they drift apart by more than the differences that matter; ``fastft bench`` makes the numbers that count.
"""

import importlib

import pytest
import torch

from fastft.bench import run
from fastft.testing import BackendError

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_latest = {}


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    arms, refusals = [], []
    for module in run.families().values():
        try:
            cases = list(importlib.import_module(module).cases(DEVICE, option("bench_shape"), option("bench_dtype")))
        except ValueError as error:  # a shape or dtype of other families
            refusals.append(str(error))
            continue
        for case in cases:
            for arm in ("floor", *case.arms, *case.skipped):
                arms.append(pytest.param(case, arm, id=f"{case}-{arm}".replace(" ", "-")))
    if not arms:
        raise pytest.UsageError("; ".join(refusals))
    metafunc.parametrize(("case", "arm"), arms)


def inputs_and_check(case):
    """The case's inputs and gate, made once for all its arms."""
    if str(case) not in _latest:
        _latest.clear()
        data = case.inputs(torch.device(DEVICE), 0)
        _latest[str(case)] = data, case.checker(data)
    return _latest[str(case)]


def test_case(benchmark, case, arm, pytestconfig):
    if arm in case.skipped:
        pytest.skip(case.skipped[arm])
    data, check = inputs_and_check(case)
    build = case.floor if arm == "floor" else case.arms[arm]
    if arm != "floor":
        try:
            check(build)
        except BackendError as error:  # of a forced backend
            pytest.skip(str(error)[:300])
    call = build(data)

    def finished():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = str(case)
    flops, moved = (case.floor_flops, case.floor_moved) if arm == "floor" else (case.flops, case.moved)
    benchmark.extra_info |= {"flops": flops, "moved": moved}
    benchmark.pedantic(finished, rounds=pytestconfig.getoption("bench_rounds"), warmup_rounds=2)
