"""Arguments, on the meta device, that lead the LoRA launchers to every kernel that a shipped configuration can mean."""

from itertools import product

import torch

# 16 divides every size, as in real models: Triton then moves whole vectors, with the largest buffers.
T, K, N = 4096, 4096, 2048
BY_WIDTH = {"16": (torch.bfloat16, torch.float16), "32": (torch.float32,)}


def arguments(op, when):
    """Yields the arguments of `op` for each dtype and dropout switch that a configuration's `when` covers."""
    act_width, adapter_width = when["dtypes"].split("/")
    for act, adapter in product(BY_WIDTH[act_width], BY_WIDTH[adapter_width]):
        if adapter in (act, torch.float32):
            for p in (0.5, 0.0):
                yield _arguments(op, act, adapter, when["R"], p)


def _arguments(op, act, adapter, rank, p):
    x, y = _meta(act, T, K), _meta(act, T, N)
    a, b, s = _meta(adapter, rank, K), _meta(adapter, N, rank), _meta(torch.float32, T, rank)
    seed, mask = (_meta(torch.int64, 1), _meta(torch.uint8, T, K // 8)) if p else (None, _meta(torch.uint8, 0))
    return {
        "lora_shrink": (x, a, p, seed),
        "lora_expand_": (y, s, b, 0.5),
        "lora_grad_sb": (y, s, b, 0.5),
        "lora_grad_a": (s, x, a, mask, p),
        "lora_grad_x_": (x, s, a, mask, p),
    }[op]


def _meta(dtype, *shape):
    return torch.empty(shape, dtype=dtype, device="meta")
