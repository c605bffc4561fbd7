"""Shared options: `--write-proof FILE` records how each op x backend was proven, for `fastft info`."""

import json
import os
from pathlib import Path

# Triton's kernels run on CPU in its interpreter; the variable must be there before triton is imported.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from tests import golden

_proven: dict[str, dict[str, list[str]]] = {}


def pytest_addoption(parser):
    parser.addoption("--write-proof", metavar="FILE", help="add what the passed tests prove to this JSON file")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.when == "setup":
        golden.PENDING.clear()
    if report.when == "teardown" and getattr(item, "_passed", False) and report.passed:
        for op, backend, how in golden.PENDING:
            ways = _proven.setdefault(op, {}).setdefault(backend, [])
            if how not in ways:
                ways.append(how)
    if report.when == "call":
        item._passed = report.passed


def pytest_sessionfinish(session):
    path = session.config.getoption("--write-proof")
    if path:
        path = Path(path)
        table = json.loads(path.read_text()) if path.exists() else {}
        for op, backends in _proven.items():
            for backend, ways in backends.items():
                known = table.setdefault(op, {}).setdefault(backend, [])
                known += [how for how in ways if how not in known]
        path.write_text(json.dumps(table, indent=1) + "\n")
