"""Arguments, on the meta device, that lead the grouped launchers to every kernel that a shipped configuration can mean."""

import torch

from tests.aot.lora import K, N, dtypes, meta

# 16 divides every size, as in real models. Segments and pieces are the capacities of a server: q, k and v of 64 adapters.
D, P, WIDTH, T = 64, 3, 48, 4096


def arguments(op, when):
    """Yields the arguments of `op` for each pair of dtypes that a `when` covers, in a server and in a mixture of LoRA."""
    for act, adapter in dtypes(when):
        for k in (1, 2):
            M = when.get("M", T)
            tokens = M // k
            x, y, s = meta(act, tokens, K), meta(act, tokens, N), meta(torch.float32, M, WIDTH)
            store, offsets, columns = meta(adapter, 2**20), meta(torch.int64, 2**10), meta(torch.int16, 2**20)
            routing = meta(torch.int64, D, P, 10), meta(torch.int32, D, 3), meta(torch.int32, M)
            weights = None if k == 1 else meta(torch.float32, tokens, k)
            if op == "grouped_shrink":
                yield x, store, offsets, *routing, k, WIDTH
            elif op == "grouped_expand_":
                yield y, x, s, store, offsets, columns, *routing, weights, k
            else:
                yield store, x, y, s, offsets, *routing, weights, k
