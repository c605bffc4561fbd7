"""The grouped family in Triton: adapters of many kinds in one batch. Words, maths and shapes: ``fastft/ops/grouped.py``.

Which adapters a batch has is known on the device alone. Grids are bounds from what the host knows: a tile of tokens never
crosses a segment, so M assignments in D segments have at most min(D, M) + (M - min(D, M)) / BLOCK_M tiles, whatever the
segments are. Programs beyond what is there read the segments and end: the same launch, in a CUDA graph too, is right for any
number of adapters, and reads no weight that no token needs.

With few tokens (decoding) products are made by vector units, where a program has BLOCK_M <= 4 tokens, else by tensor cores.
`config_for` decides by M: D is a capacity, and how many tokens an adapter has is not known. At up to about 64 tokens vector
units need 1 us for a shrink of K = 4096 on an H100 even if all have one adapter, less than the memory latency of a program
that walks through K for 16 of its rows (a model); BLOCK_R = 2 rows a program make 24 programs of q, k and v in rank 16.

Sums are float32 without atomics. A float32 number that multiplies 16-bit ones is split for tensor cores (`_lang.split_dot`).
"""

import torch
import triton

from . import _config
from ._grouped_expand import grouped_expand_kernel
from ._grouped_outer import grouped_outer_kernel
from ._grouped_shrink import grouped_shrink_kernel
from ._launch import ACTIVATION, FLOAT32, Launch, Sum, adapter_dtypes, check, device_name, planned
from ._tiles import cdiv, slabs, split

_OPERANDS = {"grouped_shrink": (0, 1, 5), "grouped_expand_": (0, 3, 8), "grouped_outer_": (1, 0, 7)}
_FIELDS, _MOST_VECTOR_TOKENS = 10, 4


def config_for(op: str, *args) -> dict:
    """The configuration that ``op(*args)`` is launched with: a pure function of device, dtypes and assignments."""
    act, store, assignments = (args[i] for i in _OPERANDS[op])
    dtypes = f"{8 * act.element_size()}/{8 * store.element_size()}"
    return _config.lookup(device_name(act.device), "grouped", op, dtypes=dtypes, M=assignments.shape[0])


def token_tiles(M: int, D: int, block: int) -> int:
    """The most tiles that M assignments in D segments can have."""
    full = min(M, D)
    return full + (M - full) // block


def _checked(op, act, store, offsets, pieces, segments, assignments, k, weights=None, **others) -> tuple[int, int, int]:
    """D, M and P. `act` and `others` are matrices whose rows may lie apart, all of one dtype."""
    (T, columns), (E, P, _), D, M = act.shape, pieces.shape, segments.shape[0], assignments.shape[0]
    layouts = {name: (matrix, (act.dtype,), (T, matrix.shape[1])) for name, matrix in others.items()}
    layouts |= {
        "store": (store, adapter_dtypes(act), (store.numel(),)),
        "offsets": (offsets, (torch.int64,), (offsets.numel(),)),
        "pieces": (pieces, (torch.int64,), (E, P, _FIELDS)),
        "segments": (segments, (torch.int32,), (D, 3)),
        "assignments": (assignments, (torch.int32,), (M,)),
    }
    if weights is not None:
        layouts["weights"] = weights, FLOAT32, (T, k)
    check(op, apart=("activation", *others), activation=(act, ACTIVATION, (T, columns)), **layouts)
    if k < 1 or T * k < M:
        raise ValueError(f"{op}: {M} assignments of {T} tokens with {k} each")
    return D, M, P


def _blocks(constants: dict, D: int, P: int) -> dict:
    """What a kernel needs beside its configuration to know all segments and pieces at once."""
    more = {"BLOCK_D": triton.next_power_of_2(D), "BLOCK_P": triton.next_power_of_2(P)}
    return constants | more | {"TENSOR_CORES": constants["BLOCK_M"] > _MOST_VECTOR_TOKENS}


def _launch(kernel, grid: int, *scalars, **constants) -> Launch:
    # Of its own accord ptxas stops at 168, 128 or 96 registers (so many programs fit an SM) and spills a few numbers for it.
    registers = {} if torch.version.hip else {"maxnreg": 255}
    return Launch(kernel, grid, *scalars, **registers, **constants)


def _nothing(*tensors):
    """The plan of no tokens or no adapters."""


def _plan_shrink(config, x, store, offsets, pieces, segments, assignments, k, width):
    op = "grouped_shrink"
    D, M, P = _checked(op, x, store, offsets, pieces, segments, assignments, k)
    constants, programs = split(config or config_for(op, x, store, offsets, pieces, segments, assignments))
    K, shape = x.shape[1], (M, width)
    if not (D and M and P and K and width):
        return lambda x, *tensors: x.new_zeros(shape, dtype=torch.float32)
    constants = _blocks(constants, D, P)
    n_tiles, n_columns = token_tiles(M, D, constants["BLOCK_M"]), cdiv(width, constants["BLOCK_R"])
    column_programs = min(n_columns, max(1, constants.pop("MOST") // n_tiles))
    # Windows are cut where K is cut, into equal slabs from their start.
    others = cdiv(M, constants["BLOCK_M"]) * column_programs
    n_slabs, slab_tiles = slabs(cdiv(K, constants["BLOCK_K"]), others, programs)
    scalars = M, D, P, width, column_programs, n_slabs, slab_tiles, k, x.stride(0)
    launch = _launch(grouped_shrink_kernel, n_tiles * n_slabs * column_programs, *scalars, **constants)
    total = Sum(n_slabs, shape, torch.float32)

    def run(x, *tensors):
        parts = x.new_empty(total.workspace, dtype=torch.float32)
        launch(x, *tensors, parts)
        return total(parts)

    return run


def grouped_shrink(x, store, offsets, pieces, segments, assignments, k, width, *, config=None):
    tensors = x, store, offsets, pieces, segments, assignments
    return planned(_plan_shrink, config, tensors, k, width)(*tensors)


def _plan_expand(config, y, x, s, store, offsets, columns, pieces, segments, assignments, weights, k):
    op = "grouped_expand_"
    D, M, P = _checked(op, y, store, offsets, pieces, segments, assignments, k, weights, x=x)
    constants = config or config_for(op, y, x, s, store, offsets, columns, pieces, segments, assignments)
    layouts = {"s": (s, FLOAT32, (M, s.shape[1])), "columns": (columns, (torch.int16,), (columns.numel(),))}
    check(op, store=(store, (store.dtype,), store.shape), **layouts)
    N = y.shape[1]
    if not (D and M and P and N):
        return _nothing
    constants = _blocks(constants, D, P)
    constants["BLOCK_T"] = min(constants["BLOCK_T"], constants["BLOCK_M"])
    grid = token_tiles(M, D, constants["BLOCK_M"]) * cdiv(N, constants["BLOCK_N"])
    sizes = D, P, N, s.shape[1]
    # Two assignments of one token add to one row of y: in a launch each, one after the other.
    launches = [_launch(grouped_expand_kernel, grid, *sizes, j, k, y.stride(0), x.stride(0), **constants) for j in range(k)]

    def run(*tensors):
        for launch in launches:
            launch(*tensors)

    return run


def grouped_expand_(y, x, s, store, offsets, columns, pieces, segments, assignments, weights, k, *, config=None):
    tensors = y, x, s, store, offsets, columns, pieces, segments, assignments, weights
    planned(_plan_expand, config, tensors, k)(*tensors)


def _plan_outer(config, grad, values, other, s, offsets, pieces, segments, assignments, weights, k):
    op = "grouped_outer_"
    D, M, P = _checked(op, values, grad, offsets, pieces, segments, assignments, k, weights, other=other)
    constants = dict(config or config_for(op, grad, values, other, s, offsets, pieces, segments, assignments))
    check(op, grad=(grad, (grad.dtype,), grad.shape), s=(s, FLOAT32, (M, s.shape[1])))
    if not (D and M and P and values.shape[1]):
        return _nothing
    row_programs, n_k = constants.pop("row_programs"), cdiv(values.shape[1], constants["BLOCK_K"])
    scalars = P, s.shape[1], n_k, row_programs, k, values.stride(0), other.stride(0)
    return _launch(grouped_outer_kernel, D * P * row_programs * n_k, *scalars, **constants)


def grouped_outer_(grad, values, other, s, offsets, pieces, segments, assignments, weights, k, *, config=None):
    tensors = grad, values, other, s, offsets, pieces, segments, assignments, weights
    planned(_plan_outer, config, tensors, k)(*tensors)
