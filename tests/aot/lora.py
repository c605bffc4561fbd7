"""Arguments, on the meta device, that lead the LoRA launchers to every kernel that a shipped configuration can mean."""

from itertools import product

import torch

# 16 divides every size, as in real models: Triton then moves whole vectors, with the largest buffers.
T, K, N = 4096, 4096, 2048
BY_WIDTH = {"16": (torch.bfloat16, torch.float16), "32": (torch.float32,)}
GROUPED = ("lora_shrink", "lora_grad_a", "lora_grad_x_")


def arguments(op, when):
    """Yields the arguments of `op` for each dtype, dropout switch and number of groups that a `when` covers."""
    for act, adapter in dtypes(when):
        # Without dropout, and in ops without x, groups are a larger rank.
        for p, groups in [(0.5, when.get("G", 3))] * (op in GROUPED) + [(0.0, 1)] * (when.get("G", 1) == 1):
            yield _arguments(op, act, adapter, [when["R"]] * groups, p)


def dtypes(when):
    """Pairs of activation and adapter dtypes that a `when` covers."""
    act_width, adapter_width = when["dtypes"].split("/")
    for act, adapter in product(BY_WIDTH[act_width], BY_WIDTH[adapter_width]):
        if adapter in (act, torch.float32):
            yield act, adapter


def _arguments(op, act, adapter, ranks, p):
    G, rank = len(ranks), sum(ranks)
    x, y = meta(act, T, K), meta(act, T, N)
    a, b, s = meta(adapter, rank, K), meta(adapter, N, rank), meta(torch.float32, T, rank)
    seed, mask = (meta(torch.int64, G), meta(torch.uint8, G, T, K // 8)) if p else (None, meta(torch.uint8, 0))
    return {
        "lora_shrink": (x, a, ranks, p, seed),
        "lora_expand_": (y, s, b, 0.5),
        "lora_grad_sb": (y, s, b, 0.5),
        "lora_grad_a": (s, x, a, ranks, mask, p),
        "lora_grad_x_": (x, s, a, ranks, mask, p),
    }[op]


def meta(dtype, *shape):
    return torch.empty(shape, dtype=dtype, device="meta")
