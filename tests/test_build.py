"""Wheels, with and without native code: what they hold, and that what they hold works."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from fastft import _native

ROOT = Path(__file__).parent.parent
TRY = """
import pathlib, sys, warnings
import torch, fastft
assert pathlib.Path(fastft.__file__).is_relative_to(sys.argv[1]), fastft.__file__
warnings.simplefilter("ignore")
layer = fastft.LoRALinear(16, 16, lora_dropout=0.1)
with fastft.testing.record() as calls:
    layer(torch.randn(4, 16, requires_grad=True)).sum().backward()
from fastft import info
info.main()
from fastft import _native
print("RUNTIME", _native.runtime()[1])
print("BACKENDS", sorted({c.backend for c in calls}), len(calls))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what a clone holds, so that building leaves this checkout alone and no stale file can ship."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    copy = tmp_path_factory.mktemp("clone")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if name.startswith(("demo/", "tests/")) or not path.exists():
            continue
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            (copy / name).symlink_to(os.readlink(path))
        else:
            shutil.copy2(path, copy / name)
    return copy


def build(source, out, **env):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        str(out),
        ".",
    ]
    done = subprocess.run(
        command, cwd=source, capture_output=True, text=True, env={**os.environ, "FASTFT_HOSTCUDA": "0", **env}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = Path(out).glob("*.whl")
    return wheel


def run_from(wheel, folder, **environment):
    """Run from the unpacked wheel alone, with the torch of this environment."""
    with zipfile.ZipFile(wheel) as z:
        z.extractall(folder)
    # -P and a neutral folder: not this checkout; its editable install comes after PYTHONPATH.
    env = {**os.environ, "PYTHONPATH": str(folder), **environment}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", TRY, str(folder)], cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def names(wheel):
    with zipfile.ZipFile(wheel) as z:
        return z.namelist()


def check_python_part(files):
    tops = {name.split("/")[0] for name in files}
    assert tops == {"fastft", "fastft-0.1.0.dist-info"}, f"a wheel installs nothing beside fastft: {tops}"
    for wanted in ("fastft/kernels/lora.py", "fastft/ops/lora.py", "fastft/bench/run.py", "fastft/proof.json"):
        assert wanted in files, wanted
    assert any(name.startswith("fastft/kernels/configs/") and name.endswith(".json") for name in files)
    assert not [n for n in files if n.startswith("fastft/kernels/") and n.endswith("__init__.py")]


KNOWN_OBJECTS = """#!/bin/sh
for word in "$@"; do
    [ "$before" = -o ] && object=$word
    before=$word
done
case $object in
CMakeFiles/fastft_cpu_*.o | csrc/runtime/*.o) [ -f "{build}/$object" ] && exec cp "{build}/$object" "$object" ;;
esac
exec "$@" -O0
"""


def test_native_wheel(source, tmp_path):
    # One instruction set, which every CPU runs, of the objects that this checkout's own build left, where it is one; else by
    # a compiler told last not to optimise, which takes most of a minute. The next test sees all of them.
    isa, compiler = "default", tmp_path / "compiler"
    compiler.write_text(KNOWN_OBJECTS.format(build=ROOT / "build" / "cmake"))
    compiler.chmod(0o755)
    native = {"FASTFT_NATIVE": "1", "FASTFT_CUDA": "0", "FASTFT_ISAS": isa, "CMAKE_CXX_COMPILER_LAUNCHER": str(compiler)}
    wheel = build(source, tmp_path / "dist", **native)
    # Of one Python, for fastft._runtime's sake: pybind11 has no stable ABI.
    tag = "cp{}{}".format(*sys.version_info[:2])
    assert wheel.name.startswith(f"fastft-0.1.0-{tag}-{tag}-linux_"), wheel.name
    files = names(wheel)
    check_python_part(files)
    libraries = sorted(n for n in files if n.endswith(".so"))
    assert libraries == ["fastft/_runtime" + sysconfig.get_config_var("EXT_SUFFIX"), f"fastft/lib/libfastft_cpu_{isa}.so"]
    output = run_from(wheel, tmp_path / "site", FASTFT_CPU_ISA=isa)
    assert "BACKENDS ['cpu'] 5" in output and "RUNTIME None" in output, output


def test_every_instruction_set_is_built():
    """In this checkout's own build, which asks for none by name."""
    built = {path.name for path in (ROOT / "fastft" / "lib").glob("libfastft_cpu_*.so")}
    if not built:
        pytest.skip("a pure-Python install")
    assert built == {f"libfastft_cpu_{isa}.so" for isa in _native.ISAS}


def test_pure_python_wheel(source, tmp_path):
    wheel = build(source, tmp_path / "dist", FASTFT_NATIVE="0")
    assert wheel.name == "fastft-0.1.0-py3-none-any.whl"
    files = names(wheel)
    check_python_part(files)
    assert not [n for n in files if n.endswith(".so")]
    output = run_from(wheel, tmp_path / "site")
    assert "BACKENDS ['reference'] 5" in output and "is not built" in output
    assert "RUNTIME fastft._runtime is not built" in output, output


def run_setup(source, *command, **env):
    done = subprocess.run([sys.executable, "setup.py", "-q", *command], cwd=source, capture_output=True, text=True, env=env)
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", [("build_ext", "--inplace"), ("bdist_wheel",), ("editable_wheel",)])
def test_asking_for_native_code_without_tools_fails_clearly(source, tmp_path, command):
    code, told = run_setup(source, *command, PATH=str(tmp_path), FASTFT_NATIVE="1", HOME=str(tmp_path))
    assert code != 0 and "not found: cmake, ninja, a C++ compiler" in told, told


@pytest.mark.parametrize("env", [{"FASTFT_NATIVE": "0"}, {"PATH": ""}], ids=["asked for", "without tools"])
def test_a_pure_python_install_says_so_and_leaves_no_older_libraries(source, tmp_path, env):
    old = [source / "fastft" / "lib" / "libfastft_cpu_default.so", source / "fastft" / "_runtime.cpython-311.so"]
    for path in old:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    code, told = run_setup(source, "editable_wheel", "-d", str(tmp_path), **{**os.environ, **env})
    assert code == 0 and "pure-Python install" in told, told
    assert not [path for path in old if path.exists()]
    assert [path.name for path in tmp_path.glob("*.whl")] == ["fastft-0.1.0-0.editable-py3-none-any.whl"]


@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("ninja") is None, reason="no cmake or ninja")
def test_instruction_sets_to_build_are_checked(tmp_path):
    for isas, problem in (
        ("default;AVX512", "unknown here is AVX512; known, to be separated by semicolons: default"),
        ("default,avx2", "unknown here is default,avx2;"),
        ("amx", "amx needs avx512_bf16 beside it" if platform.machine() == "x86_64" else "unknown here is amx"),
    ):
        options = (f"-DFASTFT_TORCH={Path(torch.__file__).parent}", f"-DFASTFT_ISAS={isas}")
        command = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path, *options]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode != 0 and problem in " ".join(done.stderr.split()), done.stderr


def test_libraries_use_the_process_s_standard_library():
    """A second, static copy of libstdc++ crashes in the locales of the first (seen with a toolchain that links one)."""
    for library in (ROOT / "fastft" / "lib").glob("libfastft_c*.so"):
        defined = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
        assert "_ZNSt6locale7classicEv" not in defined, library.name


def test_libraries_use_the_stable_abi_only():
    """No C++ symbol of libtorch is needed, so one binary serves every torch >= 2.11."""
    for library in (ROOT / "fastft" / "lib").glob("libfastft_cpu_*.so"):
        symbols = subprocess.run(
            ["nm", "-D", "--undefined-only", "-C", str(library)], capture_output=True, text=True, check=True
        )
        foreign = [line for line in symbols.stdout.splitlines() if " at::" in line or " c10::" in line]
        assert not foreign, foreign
