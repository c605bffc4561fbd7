"""Which of the libraries that are there is used, and why one is not."""

import os
import subprocess
import sys

import pytest
import torch

from fastft import _native
from fastft.ops import registry


def python(code, **env):
    environment = {name: value for name, value in os.environ.items() if name != "FASTFT_CPU_ISA"} | env
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(len(_native.supported_isas()) < 2, reason="a CPU that runs one instruction set alone")
@pytest.mark.skipif(_native.cpu_library()[0] is None, reason=str(_native.cpu_library()[1]))
def test_the_best_library_that_is_there_is_chosen(tmp_path):
    code = "from fastft import _native; print(_native.chosen_isa, _native.cpu_library())"
    worst_first = _native.supported_isas()[::-1]
    for isa in worst_first[:2]:
        (tmp_path / _native._path(isa).name).symlink_to(_native._path(isa))
        assert python(code, FASTFT_LIB=str(tmp_path)) == f"{isa} ('fastft_cpu_{isa}', None)"


def test_a_library_without_what_it_extends_is_not_chosen(monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "LIB", tmp_path)
    monkeypatch.setattr(_native, "supported_isas", lambda: _native.ISAS)
    assert _native._best_isa() == "amx", "what is told where none is built"
    for isa in ("amx", "avx2"):
        _native._path(isa).touch()
    assert _native._best_isa() == "avx2"
    _native._path("avx512_bf16").touch()
    assert _native._best_isa() == "amx"


def test_a_wrong_folder_is_told_as_such(tmp_path):
    code = "from fastft import _native; print(_native.cpu_library()[1])"
    told = python(code, FASTFT_LIB="~/nowhere", HOME=str(tmp_path))
    assert told.endswith(f".so in {tmp_path}/nowhere, which FASTFT_LIB names") and told.startswith("no libfastft_cpu_")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU as far as torch tells, and a CUDA library of which `obstacle` says why it does not run."""

    def make(capability, obstacle):
        source = tmp_path / "library.cpp"
        source.write_text(f'extern "C" const char* fastft_cuda_obstacle() {{ return {obstacle}; }}')
        compiler = os.environ.get("CXX", "c++")
        subprocess.run([compiler, "-shared", "-fPIC", source, "-o", tmp_path / _native.CUDA], check=True)
        monkeypatch.setattr(_native, "LIB", tmp_path)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0) if i == 0 else capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"Some {i}")
        _native.cuda_library.cache_clear()

    yield make
    _native.cuda_library.cache_clear()


def test_the_cuda_library_is_used_where_its_kernels_run(gpu):
    gpu((8, 0), "nullptr")
    assert _native.cuda_library() == ("fastft_cuda", None)


@pytest.mark.parametrize(
    "capability, obstacle, told",
    [
        ((7, 5), "nullptr", "needs compute capability 8.0, GPU 1 (Some 1) has 7.5; CUDA_VISIBLE_DEVICES can hide it"),
        ((9, 0), '"The driver is insufficient"', "does not run here: The driver is insufficient (update the driver"),
    ],
)
def test_what_the_cuda_library_cannot_run_on_is_a_reason(gpu, capability, obstacle, told):
    gpu(capability, obstacle)
    namespace, reason = _native.cuda_library()
    assert namespace is None and told in reason, reason
    backend = registry.BACKENDS["cuda"]
    assert backend.missing(registry.OPS["lora_shrink"], "cuda") == reason, "so that Triton or the reference is next"
