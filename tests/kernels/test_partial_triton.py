"""What `tests/ops/test_partial.py` does not ask of the Triton partial kernels; on the GPU, or in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastft import testing
from fastft.kernels import partial
from fastft.ops import partial as ops
from tests.kernels.guarded import DEVICE, guarded

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OPS = ["gather_columns", "scatter_add_columns_", "write_slice_", "slice_adamw_"]
HYPER = 1e-2, 0.9, 0.99, 1e-8, 0.1, 3
# Tiles that the problem is a part of, that it fills several of, and that its edges cross.
CONFIGS = [{"BLOCK_M": m, "BLOCK_N": n, "num_warps": 4, "num_stages": 1} for m, n in ((1, 16), (16, 32), (64, 1024))]


def draw(rows, cols, dtype, seed):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def arguments(op, dtype=BF16, dim=1, rows=37, cols=50, count=9):
    """Arguments of an op, the changed ones among them; indices in no order."""
    size = (rows, cols)[dim]
    index = torch.randperm(size, generator=torch.Generator().manual_seed(1))[:count].to(torch.int32).to(DEVICE)
    matrix, slice_shape = draw(rows, cols, dtype, 2), (count, cols) if dim == 0 else (rows, count)
    if op == "gather_columns":
        return matrix, index
    if op == "scatter_add_columns_":
        return matrix, index, draw(rows, count, F32, 3)
    state = [draw(*slice_shape, F32, seed).abs() for seed in (5, 6, 7, 8)]
    start = matrix, index, dim, draw(*slice_shape, dtype, 4)
    return (*start, state[0]) if op == "write_slice_" else (*start, *state, *HYPER)


def run(op, args, config=None, between=0):
    """What the launcher returns and the matrices after it, each of which had NaN around it that are still there."""
    values, checks = [], []
    for i, value in enumerate(args):
        if isinstance(value, torch.Tensor) and value.dim() == 2:
            value, intact = guarded(value, between if i == 0 else 0)
            checks.append(intact)
        values.append(value)
    result = getattr(partial, op)(*values, config=config)
    assert all(intact() for intact in checks), "wrote outside its tensors"
    matrices = [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return matrices if result is None else [*matrices, result]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("op,dim", [*((op, 1) for op in OPS), *((op, 0) for op in OPS[2:])])
def test_any_configuration_gives_the_bits_of_the_shipped_one(op, dtype, dim):
    args = arguments(op, dtype, dim)
    want = run(op, args)
    for config in CONFIGS:
        for between in (0, 5):
            got = run(op, args, config, between)
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True)), (config, between)


@pytest.mark.parametrize("op", OPS)
def test_the_registry_runs_the_launcher_and_records_its_configuration(op):
    args = arguments(op)
    with testing.use("triton"), testing.record() as calls:
        getattr(ops, op)(*args)
    assert [(c.op, c.backend) for c in calls] == [(op, "triton")]
    assert calls[0].config == partial.config_for(op, *args)
    assert calls[0].config["BLOCK_N"] >= 16


@pytest.mark.parametrize("op", OPS)
def test_launchers_refuse_what_their_kernels_would_misread(op):
    args, launcher = arguments(op), getattr(partial, op)
    for i, argument in enumerate(args):
        if not isinstance(argument, torch.Tensor):
            continue
        wrong = torch.int64 if argument.dtype == torch.int32 else torch.int32
        with pytest.raises(TypeError, match=f"{op}: .* is torch.{str(wrong)[6:]}|{op}: base is .*, must be torch.int32"):
            launcher(*args[:i], argument.to(wrong), *args[i + 1 :])
        strided = torch.stack([argument, argument], dim=-1)[..., 0]
        with pytest.raises(ValueError, match=f"{op}: .* not contiguous"):
            launcher(*args[:i], strided, *args[i + 1 :])
        if argument.dim() == 2 and i > 0:
            wider = torch.cat([argument, argument[..., :1]], dim=-1)
            for other in (wider, wider[:, :-1], argument[1:]):
                with pytest.raises(ValueError, match=f"{op}: .* must be a contiguous"):
                    launcher(*args[:i], other, *args[i + 1 :])


def test_dim_and_step_are_checked():
    args = arguments("slice_adamw_")
    with pytest.raises(ValueError, match="slice_adamw_: dim is 2, must be 0 or 1"):
        partial.slice_adamw_(*args[:2], 2, *args[3:])
    with pytest.raises(ValueError, match="slice_adamw_: step is 0, the first is 1"):
        partial.slice_adamw_(*args[:-1], 0)
    with pytest.raises(ValueError, match="write_slice_: dim is -1, must be 0 or 1"):
        partial.write_slice_(*args[:2], -1, args[3], None)
