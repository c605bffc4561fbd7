"""The host build of the CUDA sources (csrc/hostcuda): where it lies, and how a process runs under its sanitizer."""

import os

import pytest
import torch

import fastft
from fastft import _native
from fastft.ops import registry
from tests import golden, sanitizer

LIBRARY = _native.LIB / "libfastft_cuda_host.so"


def need_library():
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY.name} is not built (FASTFT_HOSTCUDA=1 pip install -e ., or make setup)")


def register():
    """Load the library and add the backend `cuda_host`; only in a process started by `under_sanitizer`."""
    torch.ops.load_library(str(LIBRARY))
    registry.BACKENDS["cuda_host"] = registry.NativeBackend(lambda: (("fastft_cuda_host",), None), "cpu", "CPU")


@pytest.fixture
def backend():
    """Tests of a family's matrix run on `cuda_host` where a file of cases imports this in place of their own fixture."""
    with fastft.testing.use("cuda_host"), fastft.testing.record() as calls:
        yield "cpu"
    assert all(call.backend == "cuda_host" for call in calls), calls
    for call in calls:
        golden.prove(call.op, "cuda", "tests of the host build under AddressSanitizer")


def run_cases(request, *files):
    """Run files of `tests/cuda` under the sanitizer, passing on --write-proof; the number of tests that passed."""
    need_library()
    proof = request.config.getoption("--write-proof")
    return passed(
        under_sanitizer(
            *("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(f"tests/cuda/{name}" for name in files)),
            *(("--write-proof", os.path.abspath(proof)) if proof else ()),
        )
    )


def under_sanitizer(*arguments, seed=0):
    """Run this Python under AddressSanitizer; blocks take turns in the order that `seed` shuffles."""
    return sanitizer.under_sanitizer(*arguments, OMP_NUM_THREADS="1", FASTFT_HOSTCUDA_SEED=str(seed))


def passed(process):
    """Number of tests that passed in a pytest process, which must have neither failed nor skipped any."""
    output = process.stdout + process.stderr
    assert process.returncode == 0, output[-6000:]
    summary = process.stdout.strip().splitlines()[-1]
    assert "skipped" not in summary and "deselected" not in summary, output[-3000:]
    return int(summary.split(" passed")[0].split()[-1])
