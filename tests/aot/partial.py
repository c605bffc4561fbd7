"""Arguments, on the meta device, that lead the partial launchers to every kernel that a shipped configuration can mean."""

import torch

from tests.aot.lora import BY_WIDTH, T, meta

# C is not compiled in; 16 divides the weight's sizes, as in real models.
A, B, C = 4096, 2048, 430


def arguments(op, when):
    """Yields the arguments of `op` for each dtype, each dtype of z and each presence of a delta that a `when` covers."""
    index = meta(torch.int32, C)
    for act in BY_WIDTH[when["dtype"]]:
        if op == "gather_columns":
            yield meta(act, T, B), index
        elif op == "scatter_add_columns_":
            for z in {act, torch.float32}:
                yield meta(act, T, B), index, meta(z, T, C)
        else:
            dim = int(when["dim"])
            shape = (C, B) if dim == 0 else (A, C)
            start, state = (meta(act, A, B), index, dim, meta(act, *shape)), [meta(torch.float32, *shape)] * 4
            if op == "slice_adamw_":
                yield *start, *state, 1e-3, 0.9, 0.99, 1e-8, 0.1, 7
            else:
                yield *start, state[0]
                yield *start, None
