"""Run by `tests/cuda/test_host_entries.py` with AddressSanitizer: counted bytes against those that the kernels move."""

import pytest
import torch

import fastft
from fastft.bench.traffic_cuda import traffic
from fastft.ops import dora, lora
from tests.cuda import host
from tests.ops.test_lora import mask_of

host.register()
emulator = torch.ops.fastft_hostcuda
F32, BF16 = torch.float32, torch.bfloat16
RESULTS = {
    "lora_shrink": ("s", "mask"),
    "lora_grad_sb": ("ds", "db"),
    "lora_grad_a": ("da",),
    "dora_expand_": ("y",),
    "dora_grad_y": ("dyg", "dots"),
}


def measured(op, T, F, ranks, p, act, adapter):
    """({tensor: bytes loaded}, {tensor: bytes stored}); workspaces together are "partial"."""
    R = sum(ranks)
    x, out = torch.randn(T, F).to(act), torch.randn(T, F).to(act)
    a, b, s = torch.randn(R, F).to(adapter), torch.randn(F, R).to(adapter), torch.randn(T, R)
    seed = torch.arange(len(ranks))
    mask = mask_of({"x": x, "seed": seed}, p)
    g, bias = torch.randn(F), torch.randn(F).to(act)
    arguments = {
        "lora_shrink": {"x": x, "a": a, "ranks": ranks, "p": p, "seed": seed if p else None},
        "lora_expand_": {"y": out, "s": s, "b": b, "scale": 0.5},
        "lora_grad_sb": {"dy": x, "s": s, "b": b, "scale": 0.5},
        "lora_grad_a": {"ds": s, "x": x, "a": a, "ranks": ranks, "mask": mask, "p": p},
        "lora_grad_x_": {"dx": out, "ds": s, "a": a, "ranks": ranks, "mask": mask, "p": p},
        "dora_expand_": {"u": out, "s": s, "b": b, "g": g, "bias": bias, "scale": 0.5},
        "dora_grad_y": {"dy": x, "u": out, "g": g},
    }[op]
    known = {name: t for name, t in arguments.items() if isinstance(t, torch.Tensor) and t.numel()}
    emulator.count(True)
    with fastft.testing.use("cuda_host"):
        results = getattr(dora if op.startswith("dora") else lora, op)(*arguments.values())
    results = results if isinstance(results, tuple) else (results,)
    known |= {name: t for name, t in zip(RESULTS.get(op, ()), results, strict=op in RESULTS) if t.numel()}
    found = {name: emulator.counted(t) for name, t in known.items()}
    rest = [total - sum(one) for total, one in zip(emulator.counted(None), zip(*found.values()))]
    emulator.count(False)
    return tuple({name: v[i] for name, v in (found | {"partial": rest}).items() if v[i]} for i in (0, 1))


def merged(table, readers):
    """Counted bytes by the names of `measured`; g and bias are counted once and read by `readers` threads of a block."""
    found = {}
    for name, (size, times) in table.items():
        name = "partial" if name.startswith("partial") else name.split("[")[0]
        found[name] = found.get(name, 0) + size * times
    for name in ("g", "bias"):  # the rest is L1's
        if name in found:
            found[name] *= readers
    return found


OPS = ["lora_shrink", "lora_expand_", "lora_grad_sb", "lora_grad_a", "lora_grad_x_", "dora_expand_", "dora_grad_y"]
# T, K or N, ranks, p: one tile, edges, several rank tiles, groups that share a tile or span two, parts and chunks, launches.
SIZES = [
    (3, 20, [5], 0.0),
    (70, 136, [20], 0.5),
    (50, 71, [7, 20, 0], 0.5),
    (50, 71, [7, 20, 0], 0.0),
    (40, 136, [16, 16, 16, 16, 3], 0.5),
    (70, 136, [100, 4], 0.5),
    (300, 1160, [8], 0.0),
    (9, 2300, [3], 0.0),
    (5, 24, [1, 2] * 35, 0.5),
]


@pytest.mark.parametrize("op", OPS)
def test_counts_are_those_of_the_kernels(op):
    for T, F, ranks, p in SIZES:
        for act, adapter, dtypes in ((F32, F32, "32/32"), (BF16, F32, "16/32"), (BF16, BF16, "16/16")):
            counted = traffic(op, T=T, features=F, ranks=ranks, p=p, dtypes=dtypes)
            loads, stores = measured(op, T, F, ranks, p, act, adapter)
            # On tensor cores a thread has two rows of dora_expand_'s 64, else four; dora_grad_y has 16 rows of threads.
            readers = 32 if op == "dora_expand_" and act == BF16 else 16
            assert loads == merged(counted.loads, readers), (T, F, ranks, p, dtypes)
            assert stores == merged(counted.stores, readers), (T, F, ranks, p, dtypes)
