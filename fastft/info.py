"""`fastft info`: what is installed, what can run here, and how each op x backend was proven."""

import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import sys
import textwrap
from pathlib import Path

import torch

from . import __version__, _native
from .ops import registry

PROOF = Path(__file__).parent / "proof.json"
KERNEL_BACKENDS = ("cpu", "triton", "cuda")


def versions() -> dict[str, str]:
    """Versions of fastft and of what it works with; "-" where absent."""
    found = {"fastft": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers", "peft", "accelerate", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "-"
    return found


def machine() -> dict[str, str]:
    """CPU capability, threads and GPUs, in words."""
    namespace, reason = _native.cpu_library()
    gpus = [
        "{} (sm_{}{})".format(torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i))
        for i in range(torch.cuda.device_count())
    ]
    return {
        "CPU": f"{', '.join(_native.supported_isas())}; PyTorch uses {torch.backends.cpu.get_cpu_capability()}",
        "CPU library": namespace or f"none: {reason}",
        **({"forced backend": registry.unknown_backend() or forced} if (forced := registry.forced_backend()) else {}),
        "threads": str(torch.get_num_threads()),
        "GPU": ", ".join(gpus) or "none",
        "serving runtime": _native.runtime()[1] or "fastft._runtime",
        "CUDA library": _native.cuda_library()[0] or _library_state(),
    }


def _library_state():
    reason, library = _native.cuda_library()[1], _native.LIB / _native.CUDA
    if library.exists():
        return f"built, not used: {reason}"
    return "; ".join(dict.fromkeys((_native.absent(library), reason)))


def table() -> list[dict[str, str]]:
    """One row per op; per kernel backend whether it runs or is built here, or why not, and how it was proven."""
    proof = json.loads(PROOF.read_text()) if PROOF.exists() else {}
    rows = []
    for op in registry.OPS.values():
        row = {"op": op.name}
        for backend in KERNEL_BACKENDS:
            if op.cpu_alone and backend != "cpu":
                row[backend] = "None: it is other ops in one call, which pays on CPUs alone"
                continue
            ways = proof.get(op.name, {}).get(backend, [])
            unverified = backend != "cpu" and not any("on NVIDIA" in way for way in ways)
            row[backend] = (
                f"{_state(op, backend)}. Proven by: {'; '.join(ways) or 'nothing'}"
                f"{'. Unverified on a GPU.' if unverified else ''}"
            )
        rows.append(row)
    return rows


def _state(op, backend):
    reason = op.missing(backend, "cpu" if backend == "cpu" else "cuda")
    if reason is None:
        return "Runs here"
    if backend == "cuda" and (_native.LIB / _native.CUDA).exists():
        return f"Built ({reason})"
    if backend == "triton" and reason == "no CUDA device" and _has_launcher(op):
        return f"Compiled at run time ({reason})"
    return f"No: {reason}"


def _has_launcher(op):
    try:
        return hasattr(registry.BACKENDS["triton"].module(op), op.name)
    except ImportError:
        return False


def lines(width: int = 120) -> list[str]:
    """The report as plain text of `width` columns (at least 60)."""
    packages = "  ".join(f"{k}\xa0{v}" for k, v in versions().items())  # no line ends between a name and its version
    out = [line.replace("\xa0", " ") for line in textwrap.wrap(packages, width, break_on_hyphens=False)] + [""]
    for name, words in machine().items():
        out += textwrap.wrap(words, width, initial_indent=f"{name + ':':17}", subsequent_indent=17 * " ")
    rows = table()
    first = max(len(row["op"]) for row in rows) + 2
    column = max((width - first) // len(KERNEL_BACKENDS), 12)
    out += ["", "op".ljust(first) + "".join(name.ljust(column) for name in KERNEL_BACKENDS).rstrip()]
    # Ops whose cells are alike share them.
    for cells, alike in itertools.groupby(rows, lambda row: [row[name] for name in KERNEL_BACKENDS]):
        names = [row["op"] for row in alike]
        columns = [names, *(textwrap.wrap(cell, column - 2) for cell in cells)]
        for line in itertools.zip_longest(*columns, fillvalue=""):
            out.append((line[0].ljust(first) + "".join(part.ljust(column) for part in line[1:])).rstrip())
        out.append("")
    if any("Unverified on a GPU" in row[name] for row in rows for name in KERNEL_BACKENDS):
        out += textwrap.wrap("bench/gpu.sh OUT verifies on a GPU what is marked unverified there.", width)
    return out


def main() -> None:
    try:
        print("\n".join(lines(max(shutil.get_terminal_size().columns, 60))), flush=True)
    except BrokenPipeError:  # `fastft info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would flush the rest there at its end


if __name__ == "__main__":
    main()
