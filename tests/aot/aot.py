"""Compiles Triton kernels for GPUs that this machine does not have, and records what they need.

    python tests/aot/aot.py --quick            one launch per op and target, checked
    python tests/aot/aot.py --all              every launch and its instructions, checked against kernels/configs/aot.json
                                               (minutes; Triton caches compiled kernels)
    python tests/aot/aot.py --all --write      the same, but then rewrite kernels/configs/aot.json
    python tests/aot/aot.py --table            check that kernels/configs/aot.json is of the present sources (seconds)

`tests/aot/<family>.py` lists launches as op arguments on the meta device. The family's launcher is called with them
while `JITFunction.run` is replaced by a recorder, so what is compiled is what the launcher would have launched, with
each configuration that `kernels/configs` ships for the target. Must run without TRITON_INTERPRET.
"""

import argparse
import ast
import functools
import hashlib
import importlib
import json
import re
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from fastft.kernels import _config

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for tests.aot.<family>: this file runs as a script

from tests import machine_code  # noqa: E402
from tests.aot.meant import MEANT  # noqa: E402

CONFIGS = ROOT / "kernels" / "configs"
TABLE = CONFIGS / "aot.json"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one block can use: CUDA C++ Programming Guide, "Technical specifications per compute
# capability"; AMD CDNA3 ISA guide, "Local data share".
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


@dataclass(frozen=True)
class Launch:
    """One compilation: everything that Triton's compiled code depends on.

    Constants and alignment are by path: (position of the argument,), or (position, index) of an element of a tuple.
    """

    kernel: JITFunction
    signature: tuple
    constants: tuple
    aligned: tuple
    options: tuple

    @classmethod
    def of(cls, kernel, *args, grid, warmup, **kwargs):
        """What Triton's own launcher would derive from the arguments of one call."""
        given = dict(zip(kernel.arg_names, args)) | kwargs
        signature, constants, aligned = {}, {}, []

        def kind(path, value, parameter):
            if isinstance(value, tuple):
                return tuple(kind((*path, i), inner, parameter) for i, inner in enumerate(value))
            specialised = type(value) is int and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (specialised and value == 1):
                constants[path] = value
                return "constexpr"
            if isinstance(value, torch.Tensor) or (specialised and value % 16 == 0):
                aligned.append(path)
            return _type_name(value)

        for i, parameter in enumerate(kernel.params):
            signature[parameter.name] = kind((i,), given.pop(parameter.name), parameter)
        return cls(kernel, tuple(signature.items()), tuple(constants.items()), tuple(aligned), tuple(given.items()))

    @property
    def label(self) -> str:
        named = {self.kernel.arg_names[path[0]]: value for path, value in self.constants if len(path) == 1}
        pointers = [f"{name.removeprefix('p_')}={kind[1:]}" for name, kind in self.signature if kind[0] == "*"]
        groups = [f"{name}x{len(kind)}" for name, kind in self.signature if isinstance(kind, tuple) and len(kind) > 1]
        settings = [f"{name}={value}" for name, value in (*named.items(), *self.options) if value is not None]
        return " ".join([self.kernel.__name__, *pointers, *groups, *settings])

    def source_hash(self) -> str:
        """Changes with the kernel's code (comments and docstrings aside), argument types, constants and options."""
        parts = (*_code(self.kernel), self.signature, self.constants, self.aligned, self.options)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def compile(self, target: str, instructions: bool) -> dict:
        """{"registers", "spills", "shared"} of the kernel compiled for `target`; spills and shared in bytes.

        With `instructions`, for whose sake NVIDIA's code is disassembled (0.4 s), also what `machine_code.seen` tells.
        """
        aligned = {path: [["tt.divisibility", 16]] for path in self.aligned}
        source = ASTSource(self.kernel, dict(self.signature), dict(self.constants), aligned)
        compiled = triton.compile(source, target=TARGETS[target], options=dict(self.options))
        if target.startswith("gfx"):
            usage, code = _amd_usage(compiled), compiled.asm["amdgcn"]
        else:
            usage, code = _nvidia_usage(compiled, instructions)
        usage["shared"] = compiled.metadata.shared
        return usage | machine_code.seen(code) if instructions else usage


def _nvidia_usage(compiled, disassembled: bool) -> tuple[dict, str]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [tool, "--dump-resource-usage", *["-sass"] * disassembled, cubin.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": usage["REG"], "spills": usage["STACK"] + usage["LOCAL"]}, text


def _amd_usage(compiled) -> dict:
    usage = {key: int(value) for key, value in re.findall(r"^\s*\.(\w+):\s+(\d+)$", compiled.asm["amdgcn"], re.M)}
    return {
        "registers": usage["vgpr_count"],
        "spills": 4 * (usage["vgpr_spill_count"] + usage["sgpr_spill_count"]) + usage["private_segment_fixed_size"],
    }


@functools.cache
def _code(kernel: JITFunction) -> tuple[str, ...]:
    """Normalised source of a kernel and of the device functions it calls."""
    tree = ast.parse(textwrap.dedent(kernel.src))
    function = tree.body[0]
    if ast.get_docstring(function):
        del function.body[0]
    called = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    scope = kernel.fn.__globals__
    functions = [scope[name] for name in sorted(called) if isinstance(scope.get(name), JITFunction)]
    return (ast.unparse(function), *(text for inner in functions if inner is not kernel for text in _code(inner)))


def _type_name(value) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"


_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int16: "i16",
    torch.uint8: "u8",
}


def launches(target: str, quick: bool = False) -> dict[str, Launch]:
    """Every launch that a shipped configuration means on `target`, by label; with `quick` the first of each kernel."""
    found: dict[str, Launch] = {}
    for path in sorted((CONFIGS / "default").glob("*.json")):
        family = path.stem
        module = importlib.import_module(f"fastft.kernels.{family}")
        cases = importlib.import_module(f"tests.aot.{family}")
        for op, entries in _config.table(target, family).items():
            for entry in entries:
                for args in cases.arguments(op, entry["when"]):
                    for launch in intercept(getattr(module, op), args, entry["config"]):
                        found.setdefault(launch.label, launch)
    return {launch.label: launch for launch in _first_of_each_kernel(found.values())} if quick else found


def _first_of_each_kernel(launches):
    return {launch.kernel: launch for launch in reversed(list(launches))}.values()


def intercept(launcher, args, config) -> list[Launch]:
    """What `launcher` would launch for tensors on the meta device."""
    calls = []
    with mock.patch.object(JITFunction, "run", lambda *values, **options: calls.append(Launch.of(*values, **options))):
        launcher(*args, config=config)
    return calls


def compile_all(quick: bool) -> dict:
    """{label: {"source": hash, target: usage}} of every launch on every target, compiled on all cores."""
    table: dict[str, dict] = {}
    jobs = [(target, label, not quick) for target in TARGETS for label in launches(target, quick)]
    with ProcessPoolExecutor() as pool:
        for (target, label, _), (source, usage) in zip(jobs, pool.map(_compile_one, jobs, chunksize=4)):
            table.setdefault(label, {"source": source})[target] = usage
    return table


def _compile_one(job):
    target, label, instructions = job
    launch = _cached_launches(target)[label]
    return launch.source_hash(), launch.compile(target, instructions)


_cached_launches = functools.cache(launches)


def broken(table: dict) -> list[str]:
    """What would be slow or impossible on the device: registers spilled to memory, too much shared memory, or other
    instructions than are meant.
    """
    found = []
    for label, target, usage in rows(table):
        if usage["spills"]:
            found.append(f"{label} on {target} spills {usage['spills']} bytes")
        if usage["shared"] > SHARED_LIMIT[target]:
            found.append(f"{label} on {target} needs {usage['shared']} of {SHARED_LIMIT[target]} bytes shared memory")
        if "tensor_cores" in usage:
            found += machine_code.unmet(MEANT, label, target, usage)
    return found


def worse(table: dict, committed: dict) -> list[str]:
    """What became worse than in the committed table."""
    kept = {(label, target): usage for label, target, usage in rows(committed)}
    return [
        problem
        for label, target, usage in rows(table)
        if (label, target) in kept
        for problem in machine_code.worse(label, target, kept[label, target], usage)
    ]


def rows(table: dict):
    """(label, target, what it needs) of every compiled launch."""
    for label, row in table.items():
        for target, usage in row.items():
            if target != "source":
                yield label, target, usage


def stale(table: dict) -> list[str]:
    """Where the table differs from what the present sources and configurations would compile."""
    present, recorded = {}, {}
    for target in TARGETS:
        for label, launch in launches(target).items():
            present.setdefault(label, {"source": launch.source_hash()})[target] = None
    for label, row in table.items():
        recorded[label] = {**dict.fromkeys(row), "source": row["source"]}
    return sorted(label for label in present.keys() | recorded.keys() if present.get(label) != recorded.get(label))


def write(table: dict) -> None:
    """One line per launch, so that a diff shows which kernels changed."""
    rows = ",\n".join(f"  {json.dumps(label)}: {json.dumps(table[label])}" for label in sorted(table))
    TABLE.write_text("{\n" + rows + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--quick", action="store_true", help="compile one launch per kernel and target")
    what.add_argument("--all", action="store_true", help="compile every launch")
    what.add_argument("--table", action="store_true", help="check the committed table without compiling")
    parser.add_argument("--write", action="store_true", help="with --all: rewrite the table")
    options = parser.parse_args()
    committed = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    name = TABLE.relative_to(ROOT)
    rewrite = f"on purpose, or with another Triton? Rewrite {name}: python tests/aot/aot.py --all --write"
    if options.table:
        problems = [f"{name} is stale at {label}" for label in stale(committed)] + broken(committed)
        problems += [
            f"no label is like {p}: tests/aot/meant.py" for p, *_ in MEANT if not any(re.search(p, k) for k in committed)
        ]
    else:
        table = compile_all(options.quick)
        print(f"compiled {sum(1 for _ in rows(table))} kernels with triton {triton.__version__}")
        problems = broken(table)
        if options.write and options.all and not problems:
            write(table)
        elif not problems:
            problems = worse(table, committed)
        else:
            rewrite = "choose other blocks in kernels/configs, or change what tests/aot/meant.py means"
    print("\n".join([*problems, rewrite]) if problems else "ok")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
