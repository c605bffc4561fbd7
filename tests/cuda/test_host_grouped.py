"""The CUDA C++ kernels of the grouped family, run on the CPU under AddressSanitizer (no GPU needed)."""

from tests.cuda import host


def test_kernels_under_address_sanitizer(request):
    """`cases_grouped.py`: the test matrix of the family and what only the host build can show."""
    assert host.run_cases(request, "cases_grouped.py") >= 30
