"""Helpers for tests, reports and benchmarks: force a backend, record which backend ran, list what can run here."""

from contextlib import contextmanager

from . import _native
from .ops import registry
from .ops.registry import BackendError, Call, FallbackWarning

__all__ = ["BackendError", "Call", "FallbackWarning", "available", "cpu_isa", "record", "use"]


@contextmanager
def use(backend: str):
    """Force every op onto `backend`, in forward and in the backward of what ran forward inside.

    Raises:
        BackendError: at the call, with the reason, if the op can't run there.
    """
    with registry.Scope(forced=backend).entered():
        yield


@contextmanager
def record():
    """List every launch inside, and in the backward of what ran forward inside, as `Call(op, backend, config)`."""
    with registry.Scope(calls=[]).entered() as calls:
        yield calls


@contextmanager
def cpu_isa(name: str):
    """Run the C++ kernels of one instruction set (``default``, ``avx2``, ``avx512``, ``avx512_bf16``, ``amx``) inside.

    Raises:
        RuntimeError: that library is not built, or this CPU can't run it.
    """
    with _native.forced_isa(name):
        yield


def available(device: str) -> list[str]:
    """Backends that have a kernel for at least one op on `device` ("cpu" or "cuda")."""
    return [b for b in registry.BACKENDS if any(op.missing(b, device) is None for op in registry.OPS.values())]
