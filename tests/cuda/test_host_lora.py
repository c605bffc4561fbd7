"""The CUDA C++ kernels of the LoRA family, run on the CPU under AddressSanitizer (no GPU needed)."""

from tests.cuda import host


def test_kernels_under_address_sanitizer(request):
    """`cases_lora.py`: the test matrix of the family and what only the host build can show."""
    assert host.run_cases(request, "cases_lora.py") >= 19


def test_groups_under_address_sanitizer(request):
    """`cases_lora_groups.py`: adapters that share one x, rows that lie apart."""
    assert host.run_cases(request, "cases_lora_groups.py") >= 15
