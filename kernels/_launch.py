"""Launch mechanics that the kernel families share.

A sum over a long axis is cut into slabs. Each slab writes its own float32 partial result and `sum_slabs` adds them in
order: no atomics, the same bits every time.
"""

import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel
from triton.runtime import driver

from ._lang import cast


@functools.cache
def device_name(device: torch.device) -> str:
    """The folder of ``configs`` that holds what was tuned for this device: "sm_90", "gfx942"; "default" for a CPU."""
    if device.type != "cuda":
        return "default"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
ACTIVATION, FLOAT32 = tuple(TRITON_DTYPES), (torch.float32,)


def check(op: str, *, apart: tuple = (), **arguments) -> None:
    """Check every argument, given as name=(tensor, dtypes, shape): kernels address memory by what they were promised.

    Args:
        apart: names of matrices whose rows may lie apart (stride(1) == 1, stride(0) >= a row): columns of a wider one.

    Raises:
        TypeError: another dtype. ValueError: another shape or layout. RuntimeError: not on the first's device.
    """
    device = next(iter(arguments.values()))[0].device
    for name, (tensor, dtypes, shape) in arguments.items():
        if tensor.dtype not in dtypes:
            raise TypeError(f"{op}: {name} is {tensor.dtype}, must be {' or '.join(map(str, dtypes))}")
        dense = tensor.is_contiguous() or (name in apart and _rows_are_dense(tensor))
        if tensor.shape != shape or not dense:
            layout = "" if dense else " and not contiguous"
            raise ValueError(f"{op}: {name} is {list(tensor.shape)}{layout}, must be a contiguous {list(shape)}")
        if tensor.device != device:
            raise RuntimeError(f"{op}: {name} is on {tensor.device}, must be on {device}")


def _rows_are_dense(tensor) -> bool:
    return tensor.dim() == 2 and tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1]


def adapter_dtypes(x) -> tuple:
    """The dtypes that an adapter on activations x may have."""
    return x.dtype, torch.float32


def launch(kernel, grid: int, *args, **options):
    """Run `kernel` in `grid` programs on the device of its first argument; tensors come first among `args`."""
    first = next((i for i, arg in enumerate(args) if not (arg is None or isinstance(arg, torch.Tensor))), len(args))
    Launch(kernel, grid, *args[first:], **options)(*args[:first])


class Launch:
    """A launch of `kernel` in which everything but the tensors is fixed, to be kept between calls.

    Triton binds, specialises and looks up its machine code anew in every call, tens of microseconds of Python. Besides what
    is fixed here its choice depends on the tensors' dtypes and device, which one `Launch` must always see the same, on which
    of them are None, and on which addresses are multiples of 16: for each such case the compiled kernel is kept and run as
    Triton (3.6 to 3.9) runs it. `scalars` follow the tensors among the kernel's parameters, constants follow the scalars.
    """

    __slots__ = ("grid", "kernel", "known", "options", "scalars", "tail")

    def __init__(self, kernel, grid: int, *scalars, num_warps: int, num_stages: int, **constants):
        self.kernel, self.grid, self.scalars = kernel, (grid, 1, 1), scalars
        # Fusion is stated because Triton's default depends on its version.
        self.options = constants | {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
        names = getattr(kernel, "arg_names", ())
        self.tail = (*scalars, *(constants[name] for name in names if name in constants))
        self.known = {}

    def __call__(self, *tensors):
        # Triton launches on the current device, which need not be the tensors'.
        device = tensors[0].get_device()
        if device < 0 or device == torch.cuda.current_device():
            self._run(tensors, device)
        else:
            with torch.cuda.device(device):
                self._run(tensors, device)

    def _run(self, tensors, device):
        case, addresses = 1, []
        for t in tensors:
            address = None if t is None else t.data_ptr()
            addresses.append(address)
            case = 4 * case + (2 if t is None else address % 16 == 0)
        compiled = self.known.get(case)
        if compiled is None:
            compiled = self.kernel[self.grid](*tensors, *self.scalars, **self.options)
            # Not kept: the interpreter's None, what is still being compiled, and AMD's, which also depend on sizes.
            if isinstance(compiled, CompiledKernel) and not torch.version.hip:
                self.known[case] = compiled
        elif _hooked():
            compiled[self.grid](*tensors, *self.tail)
        else:
            stream = driver.active.get_current_stream(device)
            code = compiled.function, compiled.packed_metadata
            # No metadata for hooks and no hooks. Addresses for tensors: Triton would ask the driver about each pointer.
            compiled.run(*self.grid, stream, *code, None, None, None, *addresses, *self.tail)


def _hooked() -> bool:
    """Whether somebody (Triton's profiler) wants to be told about launches."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


_plans: dict[tuple, Callable] = {}
MOST_PLANS = 4096  # sizes that change all the time must not fill the memory


def planned(make, config, tensors: tuple, *rest) -> Callable:
    """make(config, *tensors, *rest), made once for all tensors of the same dtypes, shapes, strides and device.

    `make` checks them and returns a function of tensors that launches: it must not hold any tensor. With a `config` of the
    caller's own it is made anew.
    """
    if config is not None:
        return make(config, *tensors, *rest)
    key = make, rest, *[None if t is None else (t.dtype, t.shape, t.stride(), t.get_device()) for t in tensors]
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = make(None, *tensors, *rest)
    return plan


@triton.jit(do_not_specialize=["n_slabs"])
def _sum_slabs_kernel(p_in, p_out, n_slabs, size, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    """out[i] = sum over slabs, in order, of in[slab, i]. AHEAD loads are in flight at a time."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_in, end = o, n_slabs.to(tl.int64) * size
    b_sum = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, n_slabs, AHEAD):
        for _ in tl.static_range(AHEAD):
            b_sum += tl.load(p_in + o_in, mask=(o < size) & (o_in < end), other=0.0)
            o_in += size
    tl.store(p_out + o, cast(b_sum, p_out.dtype.element_ty), mask=o < size)


class Sum:
    """The sum over slabs of float32 [slabs, *shape], in `dtype`, of which one slab in float32 is its own.

    `workspace` is the shape of what to sum: without the slabs' dimension where there is nothing to do.
    """

    __slots__ = ("dtype", "launch", "shape", "workspace")

    def __init__(self, n_slabs: int, shape: tuple, dtype):
        self.shape, self.dtype, self.launch = shape, dtype, None
        self.workspace = shape
        if n_slabs > 1 or dtype != torch.float32:
            self.workspace, size, block = (n_slabs, *shape), math.prod(shape), 512
            constants = {"BLOCK": block, "AHEAD": 8, "num_warps": 4, "num_stages": 1}
            self.launch = Launch(_sum_slabs_kernel, triton.cdiv(size, block), n_slabs, size, **constants) if size else None

    def __call__(self, parts, out=None):
        """[*shape]: the sum of `parts`; in `out`, contiguous, if given, which `parts` itself may be."""
        if self.workspace is self.shape:
            return parts
        if out is None:
            out = torch.empty(self.shape, dtype=self.dtype, device=parts.device)
        if self.launch is not None:
            self.launch(parts, out)
        return out


def sum_slabs(parts, dtype, out=None):
    """[...] in `dtype`: the sum of float32 [slabs, ...] over slabs; in `out`, contiguous, if given."""
    n_slabs, *shape = parts.shape
    if n_slabs == 1 and dtype == torch.float32 and out is None:
        return parts[0]
    total = Sum(n_slabs, tuple(shape), dtype)
    if out is not None and total.workspace is total.shape:
        return out.copy_(parts[0])
    return total(parts, out)
