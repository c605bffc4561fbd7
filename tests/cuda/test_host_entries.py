"""The CUDA C++ kernels of the sparse, partial and selection families on the CPU under AddressSanitizer (no GPU needed)."""

from tests.cuda import host


def test_kernels_under_address_sanitizer(request):
    """The families' test matrices and what only the host build can show, in one process: starting it takes 15 s."""
    assert host.run_cases(request, "cases_sparse.py", "cases_partial.py", "cases_selection.py") >= 50 + 35 + 20
