"""The CUDA C++ kernels of the sparse, partial and selection families on the CPU under AddressSanitizer (no GPU needed), and
the bytes that all families' kernels move there.
"""

from tests.cuda import host


def test_kernels_under_address_sanitizer(request):
    """The families' test matrices and what only the host build can show, in one process: starting it takes 15 s."""
    files = "cases_sparse.py", "cases_partial.py", "cases_selection.py", "cases_traffic.py"
    assert host.run_cases(request, *files) >= 50 + 35 + 20 + 7
