"""The CUDA C++ kernels of the LoRA family, run on the CPU under AddressSanitizer (no GPU needed)."""

import os

from tests.cuda import host


def test_kernels_under_address_sanitizer(request):
    """`cases_lora.py`: the test matrix of the family and what only the host build can show."""
    host.need_library()
    proof = request.config.getoption("--write-proof")
    process = host.under_sanitizer(
        *("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/cuda/cases_lora.py"),
        *(("--write-proof", os.path.abspath(proof)) if proof else ()),
    )
    assert host.passed(process) >= 20
