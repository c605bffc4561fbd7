"""Triton kernels compiled ahead of time, in processes of their own: Triton's interpreter excludes its compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import machine_code
from tests.golden import prove

pytest.importorskip("triton", reason="triton is not installed")

HARNESS = Path(__file__).parent / "aot.py"
CONFIGS = Path(__file__).resolve().parents[2] / "kernels" / "configs" / "default"


def python(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_committed_table_is_that_of_the_sources_and_has_no_spills():
    python(HARNESS, "--table")


def test_every_kernel_compiles_for_every_target():
    python(HARNESS, "--quick")
    for table in CONFIGS.glob("*.json"):
        for op in json.loads(table.read_text()):
            prove(op, "triton", "compiled ahead of time for sm_80, sm_90, sm_100, gfx942")


@pytest.mark.aot_all
@pytest.mark.timeout(3600)  # without a cache, and all machine code disassembled: some 15 minutes of two cores
def test_every_launch_compiles_for_every_target():
    python(HARNESS, "--all")


def test_a_kernel_that_became_worse_or_lacks_what_is_meant_is_told():
    python("-c", WORSE, HARNESS.parent)


WORSE = """
import sys
sys.path.insert(0, sys.argv[1])
import copy, json, aot
committed = json.loads(aot.TABLE.read_text())
assert aot.worse(committed, committed) == [] == aot.broken(committed)
label = next(k for k in committed if k.startswith("_lora_shrink_kernel x=bf16 a=bf16"))
changed = copy.deepcopy(committed)
changed[label]["sm_90"] |= {"registers": 255, "tensor_cores": False, "shared": 2**18}
before = committed[label]["sm_90"]
assert aot.worse(changed, committed) == [
    f"{label} on sm_90: registers was {before['registers']}, is 255",
    f"{label} on sm_90: shared was {before['shared']}, is 262144",
    f"{label} on sm_90: tensor_cores was True, is False",
]
assert aot.broken(changed) == [
    f"{label} on sm_90 needs 262144 of 232448 bytes shared memory",
    f"{label} on sm_90: tensor_cores is False, meant is True",
]
assert aot.stale(changed) == []
del changed[label]["gfx942"]
assert aot.stale(changed) == [label]
"""


def test_every_op_and_every_kernel_is_in_the_table():
    """Ops with a Triton launcher and kernels that launchers start, of every family; device functions are inlined."""
    done = python("-c", COVERED, HARNESS.parent)
    assert "ops" in done, done


COVERED = """
import sys
sys.path.insert(0, sys.argv[1])
import importlib, json, aot
from triton.runtime import JITFunction
from fastft.ops import registry
families = [p.stem for p in (aot.ROOT / "kernels").glob("*.py") if (aot.ROOT / "fastft" / "ops" / p.name).exists()]
for module in (aot.ROOT / "fastft" / "ops").glob("*.py"):
    importlib.import_module(f"fastft.ops.{module.stem}")
launchers = {op for op in registry.OPS for f in families if hasattr(importlib.import_module(f"fastft.kernels.{f}"), op)}
configured = {op for f in families for op in aot._config.table("default", f)}
# The exchange of slices has its write's kernel and configuration.
assert launchers - configured <= {"exchange_slice_"} and configured <= launchers, launchers ^ configured
kernels = {name for path in (aot.ROOT / "kernels").glob("*.py")
           for name, value in vars(importlib.import_module(f"fastft.kernels.{path.stem}")).items()
           if isinstance(value, JITFunction) and name.endswith("_kernel")}
seen = {label.split()[0] for label in json.loads(aot.TABLE.read_text())}
assert kernels == seen, kernels ^ seen
print(len(launchers), "ops,", len(kernels), "kernels")
"""


@pytest.mark.parametrize(
    "before, now, said",
    [
        ({"registers": 100}, {"registers": 116}, []),
        ({"registers": 100}, {"registers": 117}, ["k<1> on sm_90: registers was 100, is 117"]),
        ({"shared": 1024, "load": 16}, {"shared": 1025, "load": 8}, ["load was 16, is 8", "shared was 1024, is 1025"]),
        ({"tensor_cores": True, "store": 4}, {"tensor_cores": False, "store": 16}, ["tensor_cores was True, is False"]),
        ({"tensor_cores": False, "spills": 0}, {"tensor_cores": True, "spills": 8}, ["spills was 0, is 8"]),
        ({"load": 16}, {"registers": 1}, []),
    ],
)
def test_a_regression_is_told_with_kernel_target_before_and_after(before, now, said):
    found = machine_code.worse("k<1>", "sm_90", before, now)
    assert len(found) == len(said) and all(text.endswith(end) for text, end in zip(found, said)), found


@pytest.mark.parametrize(
    "code, tensor_cores, load, store",
    [
        ("LDG.E.NA.128.CONSTANT R2, [R4] ; STG.E [R4], R2", False, 16, 4),
        ("HMMA.16816.F32.BF16 R4 ; LDG.E.U16 R2 ; LDG.E.64 R8 ; STG.E.U8 R2", True, 8, 1),
        ("HGMMA.64x16x16.F32 R4 ; LDGSTS.E.BYPASS.128 [R2] ; LDS.128 R4 ; STS.64 R4", True, 16, 0),
        ("UTCHMMA gdesc[UR4] ; LDG.E.ENL2.256 R2 ; STG.E.S16 [R2]", True, 32, 2),
        ("v_mfma_f32_16x16x16_bf16 a[0:3] ; global_load_dwordx2 v[0:1] ; buffer_store_dwordx4 v[0:3]", True, 8, 16),
        ("global_load_ushort v0 ; global_store_byte v0 ; ds_read_b128 v[0:3] ; v_fma_f32 v0", False, 2, 1),
    ],
)
def test_what_machine_code_shows(code, tensor_cores, load, store):
    assert machine_code.seen(code) == {"tensor_cores": tensor_cores, "load": load, "store": store}


def test_what_is_meant_is_asked_of_the_kernels_and_targets_named():
    meant = (("^a_kernel", r"sm_\d+", {"tensor_cores": True, "load": 16}), ("^a_kernel", "gfx.*", {"store": 8}))
    code = {"tensor_cores": False, "load": 8, "store": 16}
    assert machine_code.unmet(meant, "a_kernel x=1", "sm_80", code) == [
        "a_kernel x=1 on sm_80: tensor_cores is False, meant is True",
        "a_kernel x=1 on sm_80: load is 8, meant is 16",
    ]
    assert (
        machine_code.unmet(meant, "a_kernel", "gfx942", code) == machine_code.unmet(meant, "b_kernel", "sm_80", code) == []
    )


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

from fastft.kernels import grouped

def launched_grouped(op, T=4096, D=4, E=3, numbers=4096, kinds=700, scale=0, k=1):
    # Whatever adapters, segments and store there are: D is a capacity that is compiled in as the next power of two.
    x, y, s = meta(T, 64), meta(T, 128), meta(k * T, 48)
    store, offsets = meta(numbers), meta(kinds, dtype=torch.int64)
    columns = meta(numbers, dtype=torch.int16)
    routing = meta(E, 3, 10, dtype=torch.int64), meta(D, 3, dtype=torch.int32), meta(k * T, dtype=torch.int32)
    weights = None if k == 1 else meta(T, k)
    args = {
        "grouped_shrink": (x, store, offsets, *routing, k, 48),
        "grouped_expand_": (y, x, s, store, offsets, columns, *routing, weights, k),
        "grouped_outer_": (store, x, y, s, offsets, *routing, weights, k),
    }[op]
    # Which of the configurations it is depends on the tokens.
    calls = aot.intercept(getattr(grouped, op), args, aot._config.table("default", "grouped")[op][-1]["config"])
    return {call.source_hash() for call in calls if call.kernel is not _sum_slabs_kernel}

routed = [{"T": 1}, {"T": 17}, {"T": 10**6}, {"E": 1}, {"E": 1000}, {"numbers": 1}, {"kinds": 1}, {"kinds": 16}, {"D": 3}]
for op in grouped._OPERANDS:
    for k in (1, 2):
        for change in routed:
            assert launched_grouped(op, k=k, **change) == launched_grouped(op, k=k) != set(), (op, k, change)
"""
