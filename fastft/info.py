"""`fastft info`: what is installed, what can run here, and how each op x backend was proven."""

import importlib.metadata
import json
import platform
import shutil
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
        "CPU": f"{torch.backends.cpu.get_cpu_capability()}, runs {', '.join(_native.supported_isas())}",
        "CPU library": namespace or f"none: {reason}",
        "threads": str(torch.get_num_threads()),
        "GPU": ", ".join(gpus) or "none",
        "CUDA library": _native.cuda_library()[0] or _library_state(),
    }


def _library_state():
    reason = _native.cuda_library()[1]
    built = (_native.LIB / "libfastft_cuda.so").exists()
    return f"built, not loaded: {reason}" if built else f"not built (nvcc was not found, or FASTFT_CUDA=0); {reason}"


def table() -> list[dict[str, str]]:
    """One row per op; per kernel backend whether it runs or is built here, or why not, and how it was proven."""
    proof = json.loads(PROOF.read_text()) if PROOF.exists() else {}
    rows = []
    for op in registry.OPS.values():
        row = {"op": op.name}
        for backend in KERNEL_BACKENDS:
            proven = "; ".join(proof.get(op.name, {}).get(backend, [])) or "nothing"
            row[backend] = f"{_state(op, backend)}. Proven by: {proven}"
        rows.append(row)
    return rows


def _state(op, backend):
    reason = op.missing(backend, "cpu" if backend == "cpu" else "cuda")
    if reason is None:
        return "Runs here"
    if backend == "cuda" and (_native.LIB / "libfastft_cuda.so").exists():
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
    """The report as plain text of `width` columns."""
    out = ["  ".join(f"{k} {v}" for k, v in versions().items()), ""]
    out += [f"{k + ':':14}{v}" for k, v in machine().items()]
    rows = table()
    first = max(len(row["op"]) for row in rows) + 2
    column = max((width - first) // len(KERNEL_BACKENDS), 24)
    out += ["", "op".ljust(first) + "".join(name.ljust(column) for name in KERNEL_BACKENDS)]
    for row in rows:
        cells = [textwrap.wrap(row[name], column - 2) for name in KERNEL_BACKENDS]
        for i in range(max(map(len, cells))):
            name = row["op"] if i == 0 else ""
            out.append((name.ljust(first) + "".join((c[i] if i < len(c) else "").ljust(column) for c in cells)).rstrip())
    if not any("on NVIDIA" in row[name] for row in rows for name in KERNEL_BACKENDS):
        out += ["", "No kernel has run on a GPU yet: triton and cuda are unverified there (bench/gpu.sh OUT proves them)."]
    return out


def main() -> None:
    print("\n".join(lines(max(shutil.get_terminal_size().columns, 90))))


if __name__ == "__main__":
    main()
