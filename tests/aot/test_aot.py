"""Triton kernels compiled ahead of time, in processes of their own: Triton's interpreter excludes its compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden import prove

pytest.importorskip("triton", reason="triton is not installed")

HARNESS = Path(__file__).parent / "aot.py"
CONFIGS = Path(__file__).resolve().parents[2] / "kernels" / "configs" / "default"


def python(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_committed_table_is_that_of_the_sources_and_has_no_spills():
    python(HARNESS, "--table")


def test_every_kernel_compiles_for_every_target():
    python(HARNESS, "--quick")
    for table in CONFIGS.glob("*.json"):
        for op in json.loads(table.read_text()):
            prove(op, "triton", "compiled ahead of time for sm_80, sm_90, sm_100, gfx942")


@pytest.mark.aot_all
def test_every_launch_compiles_for_every_target():
    python(HARNESS, "--all")


def test_scale_dropout_step_and_numbers_of_tokens_or_indices_do_not_recompile():
    python("-c", SAME_LAUNCH, HARNESS.parent)


SAME_LAUNCH = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, aot
from fastft.kernels import dora, lora, partial
from fastft.kernels._launch import _sum_slabs_kernel

def meta(*size, dtype=torch.float32):
    return torch.empty(size, dtype=dtype, device="meta")

def launched(op, T=4096, scale=0.5, p=0.5, ranks=(8, 24)):
    R, G = sum(ranks), len(ranks)
    x, s, mask = meta(T, 64), meta(T, R), meta(G, T, 8, dtype=torch.uint8)
    a, b, seed, g = meta(R, 64), meta(64, R), meta(G, dtype=torch.int64), meta(64)
    args = {
        "lora_shrink": (x, a, ranks, p, seed), "lora_expand_": (x, s, b, scale), "lora_grad_sb": (x, s, b, scale),
        "lora_grad_a": (s, x, a, ranks, mask, p), "lora_grad_x_": (x, s, a, ranks, mask, p),
        "dora_expand_": (x, s, b, g, g, scale), "dora_grad_y": (x, x, g),
    }[op]
    module = dora if op.startswith("dora") else lora
    calls = aot.intercept(getattr(module, op), args, module.config_for(op, *args))
    # Whether partial results are summed depends on their number, which depends on T.
    return {call.source_hash() for call in calls if call.kernel is not _sum_slabs_kernel}

for op in (*lora._OPERANDS, "dora_expand_", "dora_grad_y"):
    # A long T is several chunks of lora_grad_sb.
    for change in ({"scale": 1.0}, {"scale": 2}, {"p": 0.1}, {"p": 1.0}, {"p": 2**-16}, {"T": 1}, {"T": 17}, {"T": 10**6}):
        assert launched(op, **change) == launched(op) != set(), (op, change)
    assert len(launched(op)) == 1, op
grouped = ("lora_shrink", "lora_grad_a", "lora_grad_x_")
for op in grouped:
    assert launched(op, ranks=(8, 16, 8)) != launched(op), "the number of groups is compiled in"

def launched_partial(op, T=4096, C=430, dim=1, step=7, lr=1e-3):
    x, index = meta(T, 64), meta(C, dtype=torch.int32)
    if op in ("gather_columns", "scatter_add_columns_"):
        args = (x, index, meta(T, C))[: 2 if op == "gather_columns" else 3]
    else:
        part, w = meta(C, 64) if dim == 0 else meta(64, C), meta(64, 128) if dim == 1 else meta(128, 64)
        args = w, index, dim, *[part] * (2 if op == "write_slice_" else 5)
        args += (lr, 0.9, 0.99, 1e-8, 0.1, step) * (op == "slice_adamw_")
    return {call.source_hash() for call in aot.intercept(getattr(partial, op), args, partial.config_for(op, *args))}

for op in ("gather_columns", "scatter_add_columns_", "write_slice_", "slice_adamw_"):
    for dim in (0, 1):
        for change in ({"T": 1}, {"T": 17}, {"T": 10**6}, {"C": 1}, {"C": 16}, {"C": 17}, {"step": 1}, {"lr": 0}, {"lr": 1}):
            assert launched_partial(op, dim=dim, **change) == launched_partial(op, dim=dim) != set(), (op, dim, change)

from fastft.kernels import selection, sparse

def launched_sparse(op, T=4096, E=300, step=7, lr=1e-3, seed=5, aged=False, bin=9):
    index, w, f = (meta(65, dtype=torch.int64), meta(E, dtype=torch.int32)), meta(64, 128), meta(E)
    age, table = (meta(E, dtype=torch.int32), meta(E, 2)) if aged else (None, None)
    ints, counts = [meta(E, dtype=torch.int32)] * 2, meta(65536, dtype=torch.int64)
    args = {
        "gather_entries": (w, *index), "write_entries_": (w, *index, f, f), "match_entries": (*index, *index),
        "sparse_adamw_": (w, *index, *[f] * 5, age, table, lr, 0.9, 0.99, 1e-8, 0.1, step, seed),
        "sparse_sm3_": (w, *index, *[f] * 3, meta(64), meta(128), lr, 1e-8, 0.1),
        "tiles": (f, meta(T, 64), meta(T, 128), *index, False), "entries": (f, meta(T, 64), meta(T, 128), *index, False),
        "add_sparse_product_": (meta(T, 64), meta(T, 128), *index, f), "count_bins_": (counts, w),
        "count_at_least": (w, bin), "take_at_least_": (*ints, w, meta(64, dtype=torch.int64), bin),
    }[op]
    name = "sampled_product_" if op in ("tiles", "entries") else op
    module = sparse if hasattr(sparse, name) else selection
    config = module.config_for(name, *args)
    if name != op:
        config = next(e["config"] for e in aot._config.table("default", "sparse")[name] if e["config"]["engine"] == op)
    calls = aot.intercept(getattr(module, name), args, config)
    return {call.source_hash() for call in calls}

changes = [{"T": 1}, {"T": 17}, {"T": 4097}, {"E": 1}, {"E": 16}, {"E": 17}, {"step": 1}, {"lr": 0}, {"lr": 1}, {"bin": 1}]
changes += [{"bin": 16}, {"seed": 0}, {"seed": 1}, {"seed": 16}, {"seed": -1}, {"seed": 2**31}, {"seed": 2**63 - 1}]
for op in ("gather_entries", "write_entries_", "match_entries", "sparse_adamw_", "sparse_sm3_", "tiles", "entries",
           "add_sparse_product_", "count_bins_", "count_at_least", "take_at_least_"):
    for change in changes:
        assert launched_sparse(op, **change) == launched_sparse(op) != set(), (op, change)
for change in changes:
    assert launched_sparse("sparse_adamw_", aged=True, **change) == launched_sparse("sparse_adamw_", aged=True), change
"""
