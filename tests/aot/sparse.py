"""Arguments, on the meta device, that lead the sparse launchers to every kernel that a shipped configuration can mean."""

import torch

from tests.aot.lora import BY_WIDTH, T, meta

# E is not compiled in; 16 divides the weight's sizes, as in real models.
A, B, E = 4096, 2048, 84000
HYPER = 1e-3, 0.9, 0.99, 1e-8, 0.1


def arguments(op, when):
    """Yields the arguments of `op` for each dtype of weight and moments and each optional argument that a `when` covers."""
    index = meta(torch.int64, A + 1), meta(torch.int32, E)
    floats = [meta(torch.float32, E)] * 4
    if op == "match_entries":
        yield *index, *index
    for act in BY_WIDTH[when["dtype"]] if when else ():
        weight, base = meta(act, A, B), meta(act, E)
        if op == "gather_entries":
            yield weight, *index
        elif op == "write_entries_":
            yield weight, *index, base, floats[0]
            yield weight, *index, base, None
        elif op == "sampled_product_":
            for add in (False, True):
                yield floats[0], meta(act, T, A), meta(act, T, B), *index, add
        elif op == "sparse_adamw_":
            for moments in (floats[:2], [meta(torch.bfloat16, E)] * 2):
                for ages in ((None, None), (meta(torch.int32, E), meta(torch.float32, 1000, 2))):
                    yield weight, *index, base, *floats[:2], *moments, *ages, *HYPER, 7, 2**31
        elif op == "sparse_sm3_":
            yield weight, *index, base, *floats[:2], meta(torch.float32, A), meta(torch.float32, B), 1e-3, 1e-8, 0.1
        else:
            yield meta(act, T, A), meta(act, T, B), *index, floats[0]
