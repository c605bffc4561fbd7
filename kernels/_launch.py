"""Launch mechanics that the kernel families share.

A sum over a long axis is cut into slabs. Each slab writes its own float32 partial result and `sum_slabs` adds them in
order: no atomics, the same bits every time.
"""

import functools

import torch
import triton
import triton.language as tl

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


def launch(kernel, grid: int, *args, num_warps: int, num_stages: int, **constants):
    """Run `kernel` in `grid` programs on the device of its first argument."""
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(args[0]):
        # Fusion is stated because Triton's default depends on its version.
        kernel[(grid,)](*args, **constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)


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


def sum_slabs(parts, dtype, out=None):
    """[...] in `dtype`: the sum of float32 [slabs, ...] over slabs; in `out`, contiguous, if given."""
    n_slabs, *shape = parts.shape
    if out is None:
        if n_slabs == 1 and dtype == torch.float32:
            return parts[0]
        out = torch.empty(shape, dtype=dtype, device=parts.device)
    size = out.numel()
    if size:
        constants = {"BLOCK": 512, "AHEAD": 8, "num_warps": 4, "num_stages": 1}
        launch(_sum_slabs_kernel, triton.cdiv(size, constants["BLOCK"]), parts, out, n_slabs, size, **constants)
    return out
