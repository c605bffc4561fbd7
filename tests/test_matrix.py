"""No empty cell in op x {CPU C++, Triton, CUDA C++}; every family has its tests and its benchmark."""

import importlib
import json
import re
from pathlib import Path

import pytest

from fastft import _native, info
from fastft.ops import registry

ROOT = Path(__file__).parent.parent
BACKENDS = ("cpu", "triton", "cuda")

# (op, backend) -> the measurement that makes the kernel not worth its lines.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("grouped_add_", backend): "one call instead of two: 36 instead of 47 us for 512 -> 512 at 32 rows on a CPU; S must be "
    "whole before y is begun, so on a GPU it would be the same two launches, which a CUDA graph replays without a call"
    for backend in ("triton", "cuda")
} | {
    ("lora_add_", backend): "one call instead of two: of 4 tokens of 2048 features 56 instead of 89 us after a GEMM that "
    "emptied a CPU's caches; on a GPU it would be the same two launches, which a CUDA graph replays without a call"
    for backend in ("triton", "cuda")
}


def has_kernel(op, backend):
    if backend == "cpu":
        return op.missing("cpu", "cpu") is None
    if backend == "triton":
        return hasattr(importlib.import_module(f"fastft.kernels.{op.family}"), op.name)
    # The CUDA library loads only where torch has CUDA; its sources say what it registers.
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    return re.search(rf'm\.impl\("{op.name}"', sources) is not None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(registry.OPS))
def test_every_cell_is_filled(name, backend):
    filled = has_kernel(registry.OPS[name], backend)
    assert registry.OPS[name].cpu_alone == ((name, "cuda") in EXCEPTIONS)
    if (name, backend) in EXCEPTIONS:
        assert not filled, f"{name} has a {backend} kernel now: remove its exception"
        assert re.search(r"\d", EXCEPTIONS[name, backend]), "an exception needs its measurement"
    else:
        assert filled, f"{name} has no {backend} kernel"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(registry.OPS))
def test_every_kernel_is_proven(name, backend):
    """`fastft info` shows fastft/proof.json; rewrite it with `make proof`."""
    if (name, backend) not in EXCEPTIONS:
        assert json.loads(info.PROOF.read_text()).get(name, {}).get(backend), (
            f"{name} on {backend} is not proven in {info.PROOF}"
        )


@pytest.mark.parametrize("family", sorted({op.family for op in registry.OPS.values()}))
def test_every_family_has_its_files(family):
    for place in (f"fastft/ops/{family}.py", f"tests/ops/test_{family}.py", f"bench/ops/{family}.py"):
        assert (ROOT / place).exists(), place


def test_all_cpu_libraries_are_built():
    assert all((_native.LIB / f"libfastft_cpu_{isa}.so").exists() for isa in _native.ISAS)
