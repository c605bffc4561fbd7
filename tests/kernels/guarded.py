"""What the tests of Triton launchers share: where they run, and tensors whose surroundings are watched."""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("without a GPU these tests run Triton's interpreter; start Python with TRITON_INTERPRET=1")

PAD = 512


def guarded(values, between=0):
    """A copy of the matrix `values` with NaN around it in memory, and a check that they are still there.

    `between` NaN lie between its rows; with 0 it is contiguous.
    """
    rows, columns = values.shape
    row = columns + between
    memory = torch.full((rows * row + 2 * PAD,), float("nan"), dtype=values.dtype, device=DEVICE)
    inside = memory[PAD : PAD + rows * row].view(rows, row)[:, :columns]
    inside.copy_(values)

    def intact():
        outside = memory.clone()
        outside[PAD : PAD + rows * row].view(rows, row)[:, :columns] = float("nan")
        return outside.isnan().all()

    return inside, intact
