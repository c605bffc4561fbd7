"""Shared options, for one process or for xdist's: what passed tests prove, and one line for each failure."""

import gc
import importlib.util
import json
import os
from pathlib import Path

# cuBLAS refuses to run under deterministic algorithms, with which `golden.poisoned` finds what nobody writes, without this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Triton's kernels run on CPU in its interpreter; the variable must be there before triton is imported.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from tests import golden

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from tests import interpreter

    interpreter.hasten()

_proven: dict[str, dict[str, list[str]]] = {}


def pytest_addoption(parser):
    parser.addoption("--write-proof", metavar="FILE", help="add what the passed tests prove to this JSON file")
    parser.addoption("--failures", metavar="FILE", help="write a line for each failure, as soon as it is known")


# Files with tests that take long. They go first, so that no worker is left waiting for the last of them (with xdist's
# --no-loadscope-reorder; by default it puts files of few tests last).
LONG = (
    *("cuda/test_host_low_rank.py", "integrations/test_processes.py", "cuda/test_host_entries.py", "ops/test_grouped.py"),
    *("cuda/test_cuda_build.py", "test_build.py", "cli/test_launch.py", "cli/test_demo.py"),
    *("ops/test_partial.py", "ops/test_selection.py", "integrations/test_s2ft_ddp.py", "integrations/test_sparse_ddp.py"),
)


def pytest_collection_modifyitems(items):
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


_files = set()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """What is there before a file's first test stays: a tenth of all time went into looking through it for garbage."""
    if item.path not in _files:
        _files.add(item.path)
        gc.collect()
        gc.freeze()


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Collector(_of_this_process(config, "--failures")))


def _of_this_process(config, option):
    """The file of an option; None in xdist's workers, whose reports come to the process that started them."""
    path = config.getoption(option)
    return Path(path) if path and not hasattr(config, "workerinput") else None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.when == "setup":
        golden.PENDING.clear()
    if report.when == "teardown" and getattr(item, "_passed", False) and report.passed:
        report.user_properties += [("proven", list(proof)) for proof in dict.fromkeys(golden.PENDING)]
    if report.when == "call":
        item._passed = report.passed


class _Collector:
    """Takes from the reports of every test, wherever it ran, what it proves and how it failed."""

    def __init__(self, failures: Path | None):
        self.failures = failures
        if failures:
            failures.write_text("")

    def pytest_runtest_logreport(self, report):
        for name, proof in report.user_properties if report.when == "teardown" else ():
            if name == "proven":
                op, backend, how = proof
                ways = _proven.setdefault(op, {}).setdefault(backend, [])
                ways += [how] if how not in ways else []
        if report.failed and self.failures:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = " ".join((crash.message if crash else str(report.longrepr)).split())
            with self.failures.open("a") as file:
                file.write(f"{report.nodeid} ({report.when}): {reason[:300]}\n")


def pytest_sessionfinish(session):
    gc.unfreeze()
    path = _of_this_process(session.config, "--write-proof")
    if path:
        table = json.loads(path.read_text()) if path.exists() else {}
        for op, backends in _proven.items():
            for backend, ways in backends.items():
                known = table.setdefault(op, {}).setdefault(backend, [])
                known += [how for how in ways if how not in known]
        path.write_text(json.dumps(table, indent=1) + "\n")
