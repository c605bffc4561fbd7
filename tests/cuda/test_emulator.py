"""The host build itself: it runs right kernels right, and it catches broken ones."""

import pytest

from tests.cuda import host

GLOBAL, NEXT_ARRAY, LOCAL = 5, 6, 7


def test_right_and_wrong_kernels():
    host.need_library()
    process = host.under_sanitizer("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/cuda/cases_emulator.py")
    assert host.passed(process) >= 21


@pytest.mark.parametrize(
    "kind, report", [(GLOBAL, "heap-buffer-overflow"), (NEXT_ARRAY, "use-after-poison"), (LOCAL, "stack-buffer-overflow")]
)
def test_sanitizer_is_on(kind, report):
    """One element past global memory, past a shared array, past a thread's own array (in a fiber): each ends the process."""
    host.need_library()
    code = (
        "import torch; from tests.cuda import host; host.register(); "
        f"torch.ops.fastft_hostcuda.misuse(torch.zeros(7), {kind}); print('survived')"
    )
    process = host.under_sanitizer("-c", code)
    assert process.returncode != 0 and "survived" not in process.stdout
    assert f"AddressSanitizer: {report}" in process.stderr and "misuse_kernel" in process.stderr, process.stderr[-3000:]
