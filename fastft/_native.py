"""Loads the csrc libraries for this CPU and GPU. Importing never fails: what could not be loaded has a reason.

The libraries lie in ``fastft/lib``: one CPU library per instruction set, built from the same sources, and one CUDA
library. That of AMX holds only what AMX makes faster; the other ops come from the library that it `EXTENDS`. The best that
is there and that this CPU runs is chosen.
``FASTFT_CPU_ISA=default|avx2|avx512|avx512_bf16|amx`` overrides the choice (for tests and bug reports), ``FASTFT_LIB`` the
folder.
"""

import ctypes
import functools
import importlib
import os
import platform
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "default")
EXTENDS = {"amx": "avx512_bf16"}
LIB = Path(os.environ.get("FASTFT_LIB") or Path(__file__).parent / "lib").expanduser()
CUDA = "libfastft_cuda.so"
CUDA_CAPABILITY = (8, 0)  # the least that csrc/cuda is compiled for


def cpu_flags() -> frozenset[str]:
    """What Linux says that this CPU has."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def _may_use_tiles() -> bool:
    """Ask Linux to let this process use AMX's registers, which it keeps back until somebody asks."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return platform.machine() == "x86_64" and ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


@functools.cache
def supported_isas() -> tuple[str, ...]:
    """Instruction sets that this CPU runs, best first.

    PyTorch's capability says what it was allowed to use (ATEN_CPU_CAPABILITY lowers it). Its "AVX512" does not imply
    avx512_bf16, which Intel's server CPUs before Sapphire Rapids lack.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    flags = cpu_flags()
    isas = ["default"]
    if capability in ("AVX2", "AVX512") and {"avx2", "fma", "f16c"} <= flags:
        isas.insert(0, "avx2")
        if capability == "AVX512" and {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
            isas.insert(0, "avx512")
            if "avx512_bf16" in flags:
                isas.insert(0, "avx512_bf16")
                # Compilers older than GCC 11 and Clang 11 can't build it.
                if {"amx_tile", "amx_bf16"} <= flags and _path("amx").exists() and _may_use_tiles():
                    isas.insert(0, "amx")
    return tuple(isas)


def _path(isa: str) -> Path:
    return LIB / f"libfastft_cpu_{isa}.so"


def absent(path: Path) -> str:
    """Why there is no library at `path`."""
    if os.environ.get("FASTFT_LIB"):
        return f"no {path.name} in {path.parent}, which FASTFT_LIB names"
    if path.name == CUDA:
        return f"{path.name} is not built (nvcc was not found, or FASTFT_CUDA=0; FASTFT_CUDA=1 insists)"
    return f"{path.name} is not built (pip install with a C++ compiler, cmake and ninja; FASTFT_NATIVE=1 insists)"


@functools.cache
def _load(path: Path) -> str | None:
    """Load one library; the reason why not, or None."""
    if not path.exists():
        return absent(path)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


@functools.cache
def _cpu_library(isa: str) -> tuple[str | None, str | None]:
    if isa not in ISAS:
        return None, f"unknown instruction set {isa!r}; known: {', '.join(ISAS)}"
    if isa not in supported_isas():
        return None, f"this CPU does not run {isa} (it runs {', '.join(supported_isas())})"
    reason = _load(_path(isa))
    return (None, reason) if reason else (f"fastft_cpu_{isa}", None)


def cpu_library() -> tuple[str | None, str | None]:
    """(dispatcher namespace, None) of the loaded CPU library, or (None, reason)."""
    return _cpu_library(chosen_isa)


def with_extended(isa: str) -> tuple[str, ...]:
    """That instruction set and those whose libraries its own extends, in the order in which an op is looked for."""
    return (isa, *with_extended(EXTENDS[isa])) if isa in EXTENDS else (isa,)


def _best_isa() -> str:
    """The best that this CPU runs of those that are built; where none is, of all: what it lacks is then told."""
    built = [isa for isa in supported_isas() if all(_path(name).exists() for name in with_extended(isa))]
    return (built or supported_isas())[0]


chosen_isa = os.environ.get("FASTFT_CPU_ISA") or _best_isa()


@functools.cache
def _cpu_libraries(isa: str) -> tuple[tuple[str, ...], str | None]:
    found = [_cpu_library(name) for name in with_extended(isa)]
    reason = next((reason for _, reason in found if reason is not None), None)
    return ((), reason) if reason else (tuple(namespace for namespace, _ in found), None)


def cpu_libraries() -> tuple[tuple[str, ...], str | None]:
    """(dispatcher namespaces of the loaded CPU library and of what it extends, None), or ((), reason)."""
    return _cpu_libraries(chosen_isa)


@functools.cache
def cuda_library() -> tuple[str | None, str | None]:
    """(dispatcher namespace, None) of the loaded CUDA library, or (None, reason)."""
    if torch.version.cuda is None:
        return None, "this torch has no CUDA"
    if not torch.cuda.is_available():
        return None, "no CUDA device"
    reason = _load(LIB / CUDA) or _unfit_for_cuda(LIB / CUDA)
    return (None, reason) if reason else ("fastft_cuda", None)


def _unfit_for_cuda(library: Path) -> str | None:
    """Why the kernels of the loaded CUDA library can't run on this machine, or None: it loads on any."""
    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        if capability < CUDA_CAPABILITY:
            return (
                f"{library.name} needs compute capability {'{}.{}'.format(*CUDA_CAPABILITY)}, GPU {i} "
                f"({torch.cuda.get_device_name(i)}) has {'{}.{}'.format(*capability)}; CUDA_VISIBLE_DEVICES can hide it"
            )
    ask = ctypes.CDLL(str(library)).fastft_cuda_obstacle
    ask.restype = ctypes.c_char_p
    obstacle = ask()
    return obstacle and (
        f"{library.name} does not run here: {obstacle.decode()} (update the driver, or build with a CUDA toolkit that is no "
        "newer than it: CUDA_HOME)"
    )


@functools.cache
def runtime():
    """(the module fastft._runtime, None), or (None, reason). Serving many adapters needs it, nothing else does."""
    try:
        module = importlib.import_module("fastft._runtime")
        if Path(module.__file__).parent != Path(__file__).parent:  # an editable install of another copy offers its own
            raise ModuleNotFoundError
        return module, None
    except ModuleNotFoundError:
        wanted = "a C++ compiler, cmake, ninja, pybind11 and Python's headers"
        version = "{}.{}".format(*sys.version_info[:2])
        return None, (
            f"fastft._runtime is not built for Python {version} (pip install --no-build-isolation with {wanted}; "
            "FASTFT_NATIVE=1 insists and says what is absent)"
        )
    except ImportError as error:
        return None, f"fastft._runtime does not load: {error}"


@contextmanager
def forced_isa(isa: str):
    """Use the CPU library of `isa` inside, whatever is best on this CPU."""
    global chosen_isa
    namespace, reason = _cpu_library(isa)
    if namespace is None:
        raise RuntimeError(reason)
    before, chosen_isa = chosen_isa, isa
    try:
        yield
    finally:
        chosen_isa = before
