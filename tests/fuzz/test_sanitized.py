"""The drawn tests of the ops under AddressSanitizer and UBSan: `make test-fuzz`, which builds the libraries."""

import pytest

from tests.lengths import SECONDS
from tests.test_asan import REPORT, run

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(3600)]
DRAWN = 40  # about as many tests


def test_drawn_ops_are_clean():
    """On every instruction set that this CPU runs; a report ends the process, and so the test that ran."""
    seconds = SECONDS or 1.0
    process = run(
        *("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/fuzz/test_ops.py", "tests/ops/test_hypothesis.py"),
        timeout=600 + 4 * DRAWN * seconds,
        FUZZ_SECONDS=str(seconds),
    )
    output = process.stdout + process.stderr
    assert process.returncode == 0 and not REPORT.search(output), output[-8000:]
    assert " passed" in process.stdout
