"""Builds the native libraries with CMake and ninja; metadata is in pyproject.toml.

Environment:
    FASTFT_NATIVE  0: pure-Python install; 1: fail without a compiler; default: build where cmake, ninja and a compiler are.
    FASTFT_CUDA    0 or 1: without or with the CUDA library; default: with it where nvcc is found.
    FASTFT_HOSTCUDA  1: also the test-only host build of the CUDA sources (make setup sets it).
    FASTFT_ISAS    instruction sets to build CPU libraries for, separated by semicolons (default: all; amx needs avx512_bf16
                   beside it). Each takes a minute of a core, so that fastft bench --base builds this machine's alone.
    FASTFT_JOBS    parallel compile jobs (default: the number of processors).
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent


def find_nvcc():
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def why_not_native():
    """The reason why native code can't be built here, or None."""
    if os.environ.get("FASTFT_NATIVE") == "0":
        return "FASTFT_NATIVE=0"
    if sys.platform != "linux":
        return f"native code is built on Linux only, this is {sys.platform}"
    if importlib.util.find_spec("torch") is None:
        return "torch is not importable in the build environment (pip install torch, then pip install --no-build-isolation)"
    absent = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        absent.append("a C++ compiler")
    return f"not found: {', '.join(absent)}" if absent else None


def pybind11():
    """Its folder of headers, or nothing."""
    found = importlib.util.find_spec("pybind11") if why_no_runtime() is None else None
    return Path(found.submodule_search_locations[0]) / "include" if found else ""


def why_no_runtime():
    """The reason why fastft._runtime, the one part that needs Python's headers, can't be built here, or None."""
    if why_not_native() is not None:
        return why_not_native()
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    headers = Path(sysconfig.get_paths()["include"])
    return None if (headers / "Python.h").exists() else f"no Python.h in {headers} (on Debian: apt install python3-dev)"


class Build(build):
    # setuptools leaves build_ext out where ext_modules is empty, which makes a wheel a pure one; but it also refuses, tells
    # why the install is pure Python and removes older libraries.
    sub_commands = [(name, None if name == "build_ext" else applies) for name, applies in build.sub_commands]  # noqa: RUF012


class CMakeBuild(build_ext):
    def run(self):
        reason = why_not_native()
        absent = why_no_runtime()
        if reason is None and absent is not None and os.environ.get("FASTFT_NATIVE") == "1":
            raise SystemExit(f"fastft: FASTFT_NATIVE=1 but fastft._runtime can't be built: {absent}")
        if reason is None:
            self.cmake()
            if absent is not None:
                print(f"fastft: built without fastft._runtime, adapters can't be served: {absent}", file=sys.stderr)
        elif os.environ.get("FASTFT_NATIVE") == "1":
            raise SystemExit(f"fastft: FASTFT_NATIVE=1 but the native libraries can't be built: {reason}")
        else:
            self.remove_old()
            print(f"fastft: pure-Python install, ops run on the PyTorch reference and on Triton: {reason}", file=sys.stderr)

    def destination(self):
        root = HERE if self.editable_mode or self.inplace else Path(self.build_lib).absolute()
        return root / "fastft" / "lib"

    def runtimes(self):
        return self.destination().parent.glob("_runtime.*.so")

    def remove_old(self):
        shutil.rmtree(self.destination(), ignore_errors=True)
        for module in self.runtimes():
            module.unlink()

    def cmake(self):
        # Found without importing torch: the build needs its headers and libtorch_cpu.so only.
        torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
        # Builds in this tree are kept, so that a changed source compiles alone.
        kept = self.editable_mode or self.inplace
        build = HERE / "build" / "cmake" if kept else Path(self.build_temp).absolute() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        nvcc = find_nvcc()
        cuda = os.environ.get("FASTFT_CUDA", "1" if nvcc else "0")
        if cuda == "1" and nvcc is None:
            raise SystemExit("fastft: FASTFT_CUDA=1 but nvcc was not found (set CUDA_HOME or PATH)")
        configure = [
            *("cmake", "-G", "Ninja", "-S", str(HERE), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"),
            f"-DFASTFT_TORCH={torch}",
            f"-DFASTFT_NVCC={nvcc if cuda == '1' else ''}",
            f"-DFASTFT_HOSTCUDA={os.environ.get('FASTFT_HOSTCUDA', '0')}",
            f"-DFASTFT_ISAS={os.environ.get('FASTFT_ISAS', '')}",
            f"-DFASTFT_PYBIND11={pybind11()}",
            f"-DFASTFT_PYTHON_INCLUDE={sysconfig.get_paths()['include']}",
            f"-DFASTFT_EXT_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
            f"-DCMAKE_INSTALL_PREFIX={self.destination()}",
        ]
        jobs = os.environ.get("FASTFT_JOBS", str(os.cpu_count() or 1))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True)
        # A rebuild must not leave libraries of older sources behind, nor a failed one take away what worked.
        self.remove_old()
        subprocess.run(["cmake", "--install", str(build)], check=True)

    def get_outputs(self):
        return [str(path) for path in (*self.destination().glob("*.so"), *self.runtimes())] if not self.editable_mode else []

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return [str(p.relative_to(HERE)) for p in (HERE / "csrc").rglob("*") if p.is_file()]


setup(
    # Without the folder of the libraries, which building may take away.
    packages=find_namespace_packages(include=["fastft", "fastft.*"], exclude=["fastft.lib"]),
    package_data={"": ["*.json", "*.csv", "*.html"]},
    # One extension stands for all libraries, so that wheels are platform wheels. fastft._runtime makes them wheels of one
    # Python: pybind11 has no stable ABI. Without it any Python >= 3.10 loads them.
    ext_modules=[Extension("fastft._native_libraries", [])] if why_not_native() is None else [],
    cmdclass={"build": Build, "build_ext": CMakeBuild},
    options={
        # A path in site-packages instead of a finder: from the clone's parent folder Python would take the clone itself for
        # an empty namespace package fastft.
        "editable_wheel": {"mode": "compat"},
        **({"bdist_wheel": {"py_limited_api": "cp310"}} if why_not_native() is None and why_no_runtime() else {}),
    },
)
