"""The CUDA C++ kernels of the LoRA, DoRA and grouped families on the CPU under AddressSanitizer (no GPU needed)."""

from tests.cuda import host


def test_kernels_under_address_sanitizer(request):
    """The families' test matrices and what only the host build can show, in one process: starting it takes 15 s."""
    files = "cases_lora.py", "cases_lora_groups.py", "cases_dora.py", "cases_grouped.py"
    assert host.run_cases(request, *files) >= 19 + 15 + 15 + 30
