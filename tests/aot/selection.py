"""Arguments, on the meta device, that lead the selection launchers to every kernel that a shipped configuration can mean."""

import torch

from tests.aot.lora import BY_WIDTH, meta

R, B, N, BINS = 512, 4096, 20000, 1 << 16


def arguments(op, when):
    """Yields the arguments of `op` for each dtype of scores that a `when` covers."""
    for act in BY_WIDTH[when["dtype"]]:
        scores = meta(act, R, B)
        if op == "count_bins_":
            yield meta(torch.int64, BINS), scores
        elif op == "count_at_least":
            yield scores, 0x7E81
        else:
            yield meta(torch.int32, N), meta(torch.int32, N), scores, meta(torch.int64, R), 0x7E81
