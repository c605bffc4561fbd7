"""Arguments, on the meta device, that lead the DoRA launchers to every kernel that a shipped configuration can mean."""

import torch

from tests.aot.lora import BY_WIDTH, N, T, dtypes, meta


def arguments(op, when):
    """Yields the arguments of `op` for each dtype and each presence of a bias that a configuration's `when` covers."""
    if op == "dora_grad_y":
        for act in BY_WIDTH[when["dtypes"]]:
            yield meta(act, T, N), meta(act, T, N), meta(torch.float32, N)
        return
    for act, adapter in dtypes(when):
        for bias in (meta(act, N), None):
            u, s, b = meta(act, T, N), meta(torch.float32, T, when["R"]), meta(adapter, N, when["R"])
            yield u, s, b, meta(torch.float32, N), bias, 0.5
