"""The registry: one op name, many backends, and the only place that chooses between them.

An `Op` defines ``fastft::<name>`` for PyTorch's dispatcher and collects its implementations by name:

==========  ===================================================================================================
backend     where the implementation comes from
==========  ===================================================================================================
reference   the plain PyTorch function given to `Op`, on any device and dtype; the definition of the op
cpu         ``csrc/cpu/<family>.cpp``, built once per instruction set (namespaces ``fastft_cpu_<set>``)
cuda        ``csrc/cuda/<family>.cu`` (namespace ``fastft_cuda``)
triton      the launcher of the op's name in ``fastft.kernels.<family>``
==========  ===================================================================================================

A test or another package adds a backend with one entry in `BACKENDS`.
"""

import importlib
import os
import warnings
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from .. import _native

_LIBRARY = torch.library.Library("fastft", "DEF")
_NATIVE_LIBRARIES: dict[str, torch.library.Library] = {}

OPS: dict[str, "Op"] = {}
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

_forced: ContextVar[str | None] = ContextVar("fastft_forced_backend", default=os.environ.get("FASTFT_BACKEND") or None)
_calls: ContextVar[list | None] = ContextVar("fastft_recorded_calls", default=None)
_warned: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Call:
    """One launch: which op, on which backend, with which configuration."""

    op: str
    backend: str
    config: Any = None


class FallbackWarning(UserWarning):
    """An op ran on the reference although a kernel was expected. ``FASTFT_STRICT=1`` turns it into an error."""


class BackendError(RuntimeError):
    """No backend could run an op; the message holds every backend's reason and the inputs."""


def without_autocast(device: str):
    """A context in which autocast rounds nothing, also for devices that have none (meta)."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class ReferenceBackend:
    def missing(self, op: "Op", device: str) -> str | None:
        return None

    def run(self, op: "Op", args):
        # The reference is the definition: autocast must not round its operands.
        with without_autocast(_device_type(args)):
            return op.reference(*args), None

    def function(self, op):
        return lambda *args: self.run(op, args)[0]


class NativeBackend:
    """Implementations compiled from csrc, found by asking the dispatcher, so that nothing is listed twice."""

    def __init__(self, libraries, device: str, dispatch_key: str):
        self.libraries, self.device, self.dispatch_key = libraries, device, dispatch_key
        self._found: dict[tuple[tuple[str, ...], str], Any] = {}

    def missing(self, op, device):
        if device != self.device:
            return f"runs on {self.device} tensors, these are on {device}"
        namespaces, reason = self.libraries()
        if reason is not None:
            return reason
        if self._namespace(op, namespaces) is None:
            return f"no kernel of that name in the {' or the '.join(namespaces)} library"
        return None

    def run(self, op, args):
        namespace, overload = self._find(op)
        return overload(*args), namespace

    def function(self, op):
        return self._find(op)[1]

    def _namespace(self, op, namespaces):
        for namespace in namespaces:
            define_native(namespace)
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{op.name}", self.dispatch_key):
                return namespace
        return None

    def _find(self, op):
        namespaces, _ = self.libraries()
        found = self._found.get((namespaces, op.name))
        if found is None:
            namespace = self._namespace(op, namespaces)
            # The operator itself: an OpOverload's __call__ is a Python frame around it.
            overload = getattr(getattr(torch.ops, namespace), op.name).default._op
            found = self._found[namespaces, op.name] = namespace, overload
        return found


class TritonBackend:
    """Launchers in ``fastft.kernels.<family>``. ``TRITON_INTERPRET=1`` also runs them on CPU tensors (slow: for proof)."""

    def missing(self, op, device):
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton runs on CPU tensors only in its interpreter (set TRITON_INTERPRET=1 before Python starts)"
        if device not in ("cpu", "cuda"):
            return f"no launcher for {device} tensors"
        if device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        try:
            module = self.module(op)
        except ImportError as error:
            return f"{error} (pip install triton)"
        return None if hasattr(module, op.name) else f"fastft.kernels.{op.family} has no launcher of that name"

    def __init__(self):
        self._launchers: dict[str, Any] = {}

    def function(self, op):
        launcher = self._launchers.get(op.name)
        if launcher is None:
            launcher = self._launchers[op.name] = getattr(self.module(op), op.name)
        return launcher

    def run(self, op, args):
        launcher = self.function(op)
        if _calls.get() is None:  # nobody asks which configuration it is
            return launcher(*args), None
        config = self.module(op).config_for(op.name, *args)
        return launcher(*args, config=config), config

    @staticmethod
    def module(op):
        return importlib.import_module(f"fastft.kernels.{op.family}")


def _cuda_libraries():
    namespace, reason = _native.cuda_library()
    return (namespace,), reason


BACKENDS = {
    "reference": ReferenceBackend(),
    "cpu": NativeBackend(_native.cpu_libraries, "cpu", "CPU"),
    "cuda": NativeBackend(_cuda_libraries, "cuda", "CUDA"),
    "triton": TritonBackend(),
}


def define_native(namespace: str) -> None:
    """Give every op's schema to a native namespace (its library holds implementations only)."""
    library = _NATIVE_LIBRARIES.get(namespace)
    if library is None:
        library = _NATIVE_LIBRARIES[namespace] = torch.library.Library(namespace, "DEF")
        library.fastft_defined = set()
    for op in OPS.values():
        if op.name not in library.fastft_defined:
            library.fastft_defined.add(op.name)
            library.define(op.schema)


class Op:
    """One operation with its definition and all its implementations.

    Args:
        schema: PyTorch schema string without namespace, e.g. ``"scale(Tensor x, float s) -> Tensor"``.
        reference: plain PyTorch implementation of the schema, any device, any floating dtype.
        fake: shape function for torch.compile (called with fake tensors).
        unsupported: per backend, a function of the op's arguments that returns why they can't run there, or None.
        order: per device type, the backends to try, where measurements ask for another order than `ORDER`.
        cpu_alone: is it other ops in one call, which pays on CPUs alone, so that there is no kernel for GPUs?
    """

    def __init__(self, schema, reference, fake, unsupported=None, order=None, cpu_alone=False):
        self.schema, self.reference = schema, reference
        self.name = schema.split("(", 1)[0]
        self.family = reference.__module__.rsplit(".", 1)[-1]
        self.unsupported, self.cpu_alone = unsupported or {}, cpu_alone
        self.order = {**ORDER, **(order or {})}
        self._available: dict[tuple, str | None] = {}
        self._functions: dict[tuple, Any] = {}
        # Kernels address memory by the strides they were promised, so Inductor must not re-stride their inputs.
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
        _LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastft::{self.name}", fake, lib=_LIBRARY)
        self._overload = getattr(torch.ops.fastft, self.name).default
        OPS[self.name] = self

    def __call__(self, *args):
        signature = signature_of(args)
        return self._overload(*args) if signature is None else self.signed(signature, *args)

    def signed(self, signature, *args):
        """The op on these arguments, of which somebody has the `signature_of` already: where several ops run on tensors of
        the same dtypes and devices, that of one of them is the signature of all."""
        if signature is None:
            return self(*args)
        function = self._functions.get(signature) or self._remember(signature, args)
        return function(*args)

    def _remember(self, signature, args):
        backend = self._choose(args)
        function = self._function(backend)
        if backend != "reference":  # that may be a fallback, which has to warn
            self._functions[signature] = function
        return function

    def _function(self, backend: str):
        backend = BACKENDS[backend]
        return backend.function(self) if hasattr(backend, "function") else self._run

    def missing(self, backend: str, device: str) -> str | None:
        """Why `backend` has no implementation of this op for tensors on `device`, or None if it has one."""
        key = (backend, device, _native.cpu_library()[0] if backend == "cpu" else None)
        if key not in self._available:
            self._available[key] = BACKENDS[backend].missing(self, device)
        return self._available[key]

    def _refusal(self, backend, device, args):
        reason = self.missing(backend, device)
        if reason is None and backend in self.unsupported:
            reason = self.unsupported[backend](*args)
        return reason

    def direct(self, *args):
        """The function that calls with arguments of these dtypes and devices run, past the registry: for a caller that makes
        many in a row (3 us of the registry's own each). It is that function while `conditions()` is what it was."""
        return self._function(self._choose(args))

    def _choose(self, args) -> str:
        device, forced = _device_type(args), _forced.get()
        if reason := unknown_backend():
            raise BackendError(reason)
        order = (forced,) if forced else self.order.get(device, ("reference",))
        reasons = {}
        for backend in order:
            reason = self._refusal(backend, device, args)
            if reason is None:
                break
            reasons[backend] = reason
        else:
            listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            raise BackendError(f"fastft::{self.name} cannot run on {_describe(args)}. {listed}")
        if reasons and backend == "reference":
            _fell_back(self.name, reasons, args)
        return backend

    def _run(self, *args):
        backend = self._choose(args)
        result, config = BACKENDS[backend].run(self, args)
        calls = _calls.get()
        if calls is not None:
            calls.append(Call(self.name, backend, config))
        return result


def signature_of(args) -> tuple | None:
    """All that the choice of a backend depends on, so that it is made once; None where somebody looks on, or an argument
    has a dispatch of its own: then an op goes through PyTorch's dispatcher, which would otherwise only call `_run` (2.5 us
    of it, and more with cold caches)."""
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch.autograd._profiler_enabled()
        or torch._C._len_torch_dispatch_stack() != 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or _calls.get() is not None
    ):
        return None
    signature = [_forced.get(), _native.chosen_isa]
    for a in args:
        kind = type(a)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            if a.is_meta:  # the dispatcher has the op's shapes; a reference might look at numbers
                return None
            signature += a.dtype, a.device
        elif a is None:
            signature.append(None)
        elif kind not in _NUMBERS and not (kind is list and type(a[0] if a else 0) is int):
            return None  # a tensor subclass, say
    return tuple(signature)


def conditions() -> tuple | None:
    """What the choice of a backend depends on besides an op's arguments; None while launches are recorded."""
    return None if _calls.get() is not None else (_forced.get(), _native.chosen_isa)


def forced_backend() -> str | None:
    """The backend that FASTFT_BACKEND or `testing.use` asks for."""
    return _forced.get()


def unknown_backend() -> str | None:
    """What is to be said if the backend that is asked for does not exist."""
    forced = _forced.get()
    if forced is None or forced in BACKENDS:
        return None
    return f"unknown backend {forced!r} (FASTFT_BACKEND or testing.use asks for it); known: {', '.join(sorted(BACKENDS))}"


def check_forced(device: str) -> None:
    """Before anything is done: raises BackendError if the backend that is asked for is unknown or has no op for `device`."""
    if reason := unknown_backend():
        raise BackendError(reason)
    if (forced := _forced.get()) is None:
        return
    reasons = [op.missing(forced, device) for op in OPS.values()]
    if None not in reasons:
        raise BackendError(f"backend {forced!r}, which FASTFT_BACKEND asks for, runs nothing on {device}: {reasons[0]}")


_NUMBERS = frozenset((float, int, bool))


def _device_type(args) -> str:
    for a in args:
        if isinstance(a, torch.Tensor):
            return a.device.type
    raise TypeError("an op of fastft takes tensors")


def _describe(args) -> str:
    return ", ".join(
        f"{str(a.dtype).removeprefix('torch.')}{list(a.shape)} on {a.device}" if isinstance(a, torch.Tensor) else repr(a)
        for a in args
    )


def _fell_back(op: str, reasons: dict, args) -> None:
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    message = f"fastft::{op} runs on the plain PyTorch reference, which is slower, because {listed}"
    if os.environ.get("FASTFT_STRICT") == "1":
        raise BackendError(f"{message} (inputs: {_describe(args)}; FASTFT_STRICT=1 forbids it)")
    if (op, listed) not in _warned:
        _warned.add((op, listed))
        warnings.warn(message, FallbackWarning, stacklevel=2)


KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = frozenset((*KERNEL_DTYPES, torch.float64))  # the references take float64, too


def refuse_dtypes(*positions: int) -> dict[str, Any]:
    """An op's `unsupported` where kernels take `KERNEL_DTYPES` at these positions (or None), not the reference's float64."""

    def reason(*args):
        given = {args[i].dtype for i in positions if args[i] is not None} - set(KERNEL_DTYPES)
        return f"kernels take {', '.join(map(str, KERNEL_DTYPES))}, not {given.pop()}" if given else None

    return dict.fromkeys(("cpu", "cuda", "triton"), reason)


def check_dtype(x) -> None:
    """Raises TypeError for activations that nothing here is defined for: of complex ones references drop the imaginary part,
    and no backward conjugates."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}; it must be torch.float32, bfloat16, float16 or float64")


def nothing_fake(*args) -> None:
    """The shape function of an op that returns nothing."""


class Scope:
    """The forced backend and the recorder of the present context, to be entered again elsewhere.

    Autograd runs backward on its own thread on GPUs, where context variables are not set: an autograd.Function takes a
    `Scope` in forward and enters it in backward, so that a layer's backward runs where its forward was told to run.
    """

    __slots__ = ("calls", "forced")

    @staticmethod
    def captured():
        """The present scope, for `ctx`; None while torch.compile traces, where a graph is not bound to one."""
        return None if torch.compiler.is_compiling() else Scope()

    @staticmethod
    def run(scope, function, *args):
        """function(*args) inside what `captured` returned."""
        if scope is None or (_forced.get() is scope.forced and _calls.get() is scope.calls):
            return function(*args)
        with scope.entered():
            return function(*args)

    def __init__(self, forced=None, calls=None):
        self.forced = _forced.get() if forced is None else forced
        self.calls = _calls.get() if calls is None else calls

    @contextmanager
    def entered(self):
        """Set both inside; yields the recorder's list. One scope may be entered by several threads at once."""
        tokens = _forced.set(self.forced), _calls.set(self.calls)
        try:
            yield self.calls
        finally:
            _forced.reset(tokens[0])
            _calls.reset(tokens[1])
