"""The C++ CPU kernels under AddressSanitizer and UBSan: `make test-asan`, which builds their libraries in build/sanitize."""

import re

import pytest

from fastft import _native
from tests.sanitizer import ROOT, under_sanitizer

pytestmark = [pytest.mark.asan, pytest.mark.timeout(1800)]
LIB = ROOT / "build" / "sanitize"
REPORT = re.compile(r"ERROR: AddressSanitizer|runtime error:")


def run(*arguments, timeout=1700, **environment):
    return under_sanitizer(*arguments, timeout=timeout, FASTFT_LIB=str(LIB), **environment)


@pytest.mark.parametrize(
    ("function", "argument", "report"),
    [
        ("fastft_reads_past_the_end", "ctypes.c_int64(8)", "ERROR: AddressSanitizer: heap-buffer-overflow"),
        ("fastft_overflows", "2**31 - 1", "runtime error: signed integer overflow"),
    ],
)
def test_the_sanitizers_are_on(function, argument, report):
    """What they must find, they find, and the process dies of it."""
    library = LIB / "libfastft_sanitize_selftest.so"
    process = run("-c", f"import ctypes; ctypes.CDLL('{library}').{function}({argument}); print('went on')")
    assert process.returncode != 0 and "went on" not in process.stdout
    assert report in process.stderr and function in process.stderr


def test_the_ops_run_on_the_sanitized_libraries():
    code = (
        "import pathlib, torch, fastft\nfrom fastft.ops.lora_linear import lora_linear\n"
        "one = torch.ones(3, 5)\n"
        f"for isa in {_native.supported_isas()}:\n"
        "    with fastft.testing.cpu_isa(isa), fastft.testing.use('cpu'):\n"
        "        lora_linear(one, one, None, one, one.t().contiguous()[:3])\n"
        "maps = pathlib.Path('/proc/self/maps').read_text().split()\n"
        "print(*sorted({m for m in maps if 'libfastft' in m}), sep='\\n')"
    )
    process = run("-c", code)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == sorted(str(LIB / f"libfastft_cpu_{isa}.so") for isa in _native.supported_isas())


def test_the_tests_of_the_ops_are_clean():
    """On every instruction set that this CPU runs; a report ends the process, and so the test that ran."""
    others = " and ".join(f"not {name}" for name in ("reference", "triton", "gradcheck", "inductor", "anomaly"))
    process = run("-m", "pytest", "tests/ops", "-q", "-n", "2", "-p", "no:cacheprovider", "-k", others)
    output = process.stdout + process.stderr
    assert process.returncode == 0 and not REPORT.search(output), output[-8000:]
    summary = process.stdout.strip().splitlines()[-1]
    print(summary)
    assert int(re.search(r"(\d+) passed", summary)[1]) > 300
