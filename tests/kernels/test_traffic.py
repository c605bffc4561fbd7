"""The counted bytes against those that the kernels move in Triton's interpreter, tensor by tensor."""

from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime.interpreter import interpreter_builder

from fastft.kernels import _tiles, _traffic, dora, lora
from fastft.ops._philox import dropout_mask

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts memory accesses in Triton's interpreter")
SMALL = {"BLOCK_M": 16, "BLOCK_R": 16, "num_warps": 4, "num_stages": 1}
TILES = {
    "lora_shrink": {"BLOCK_K": 32, "programs": 8},
    "lora_expand_": {"BLOCK_N": 32},
    "lora_grad_sb": {"BLOCK_N": 32, "programs": 8},
    "lora_grad_a": {"BLOCK_K": 32, "programs": 8},
    "lora_grad_x_": {"BLOCK_N": 32},
    "dora_expand_": {"BLOCK_N": 32},
    "dora_grad_y": {"BLOCK_N": 32, "programs": 8},
}


class Meter:
    """Counts the bytes that kernels move to and from named tensors; the rest of memory is "partial"."""

    def __init__(self, tensors):
        self.ranges = {
            name: (t.data_ptr(), t.data_ptr() + t.untyped_storage().nbytes()) for name, t in tensors.items() if t is not None
        }
        self.loads, self.stores = {}, {}

    def _count(self, moved, pointer, mask):
        addresses = pointer.data[mask.data]
        width = max(pointer.dtype.element_ty.primitive_bitwidth // 8, 1)
        for name, (begin, end) in self.ranges.items():
            inside = (addresses >= begin) & (addresses < end)
            moved[name] = moved.get(name, 0) + int(inside.sum()) * width
            addresses = addresses[~inside]
        moved["partial"] = moved.get("partial", 0) + len(addresses) * width

    def __enter__(self):
        load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

        def counted_load(pointer, mask, *args):
            self._count(self.loads, pointer, mask)
            return load(pointer, mask, *args)

        def counted_store(pointer, value, mask, *args):
            self._count(self.stores, pointer, mask)
            return store(pointer, value, mask, *args)

        self.patches = [
            mock.patch.object(interpreter_builder, "create_masked_load", counted_load),
            mock.patch.object(interpreter_builder, "create_masked_store", counted_store),
        ]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_):
        for patch in self.patches:
            patch.stop()


def measured(op, T, F, ranks, p, act, adapter, config):
    """{"loads": bytes by tensor, "stores": ...} of one call."""
    R, G = sum(ranks), len(ranks)
    x, out = torch.randn(T, F).to(act), torch.randn(T, F).to(act)
    a, b, s = torch.randn(R, F).to(adapter), torch.randn(F, R).to(adapter), torch.randn(T, R)
    seed = torch.arange(G) if p else None
    mask = torch.stack([dropout_mask(one, T, F, p) for one in seed.split(1)]) if p else torch.empty(0, dtype=torch.uint8)
    g, bias = torch.randn(F), torch.randn(F).to(act)
    arguments = {
        "lora_shrink": {"x": x, "a": a, "ranks": ranks, "p": p, "seed": seed},
        "lora_expand_": {"y": out, "s": s, "b": b, "scale": 0.5},
        "lora_grad_sb": {"dy": x, "s": s, "b": b, "scale": 0.5},
        "lora_grad_a": {"ds": s, "x": x, "a": a, "ranks": ranks, "mask": mask, "p": p},
        "lora_grad_x_": {"dx": out, "ds": s, "a": a, "ranks": ranks, "mask": mask, "p": p},
        "dora_expand_": {"u": out, "s": s, "b": b, "g": g, "bias": bias, "scale": 0.5},
        "dora_grad_y": {"dy": x, "u": out, "g": g},
    }[op]
    launcher = getattr(dora if op.startswith("dora") else lora, op)
    with Meter({name: t for name, t in arguments.items() if isinstance(t, torch.Tensor) and t.numel()}) as meter:
        launcher(**arguments, config=config)
    return {"loads": meter.loads, "stores": meter.stores}


def counted(op, T, F, ranks, p, dtypes, config):
    """The same from `_traffic`; results and workspaces are told apart there and are "partial" here."""
    moved = _traffic.traffic(op, T=T, features=F, ranks=ranks, p=p, dtypes=dtypes, config=config)
    found = {}
    for kind, table in (("loads", moved.loads), ("stores", moved.stores)):
        found[kind] = {}
        for name, (size, times) in table.items():
            known = name not in ("partial", "partial_db", "s", "ds", "db", "da", "dots", "dyg") or kind == "loads"
            name = name if known and not name.startswith("partial") and (kind, name) not in RESULTS[op] else "partial"
            found[kind][name] = found[kind].get(name, 0) + size * times
    return found


# Tensors that the launcher makes itself, so that the meter has no name for them.
RESULTS = {op: set() for op in TILES} | {
    "lora_shrink": {("stores", "mask")},
    "lora_grad_sb": {("loads", "db")},
    "dora_expand_": {("stores", "y")},
}


def same(op, T, F, ranks, p, act, adapter, dtypes, programs=8):
    config = SMALL | TILES[op]
    if "programs" in config:
        config["programs"] = programs
    got = measured(op, T, F, ranks, p, act, adapter, config)
    want = counted(op, T, F, ranks, p, dtypes, config)
    for kind, table in got.items():
        assert {k: v for k, v in table.items() if v} == {k: v for k, v in want[kind].items() if v}, (op, kind)


F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("act,adapter,dtypes", [(BF16, F32, "16/32"), (BF16, BF16, "16/16")])
@pytest.mark.parametrize("programs", [1, 8])
@pytest.mark.parametrize("op", list(TILES))
def test_counts_are_those_of_the_kernels(op, programs, act, adapter, dtypes):
    for ranks, p in (((20,), 0.0), ((7, 20, 0), 0.5), ((7, 20), 0.0)):
        same(op, 50, 71, list(ranks), p, act, adapter, dtypes, programs)
    same(op, 3, 20, [5], 0.0, act, adapter, dtypes, programs)  # a single tile


def test_counts_of_a_gradient_in_chunks(monkeypatch):
    monkeypatch.setattr(_tiles, "WORKSPACE", 4 * 20 * 16)
    for width in (71, 20):  # several strips, one strip
        for programs in (1, 8):
            same("lora_grad_sb", 50, width, [20], 0.0, F32, F32, "32/32", programs)
            same("lora_grad_sb", 50, width, [20], 0.0, BF16, BF16, "16/16", programs)
    moved = _traffic.traffic(
        "lora_grad_sb", T=50, features=71, ranks=[20], dtypes="32/32", config=SMALL | TILES["lora_grad_sb"]
    )
    assert moved.kernels > 3


def test_totals_by_hand():
    """Shrink of one rank tile, all of K in one slab: x once, A once per tile of tokens, s once."""
    config = SMALL | {"BLOCK_K": 64, "programs": 1}
    moved = _traffic.traffic("lora_shrink", T=64, features=128, ranks=[16], config=config)
    assert moved.total() == 2 * 64 * 128 + 4 * 2 * 16 * 128 + 4 * 64 * 16
    assert moved.once() == 2 * 64 * 128 + 2 * 16 * 128 + 4 * 64 * 16
    assert moved.kernels == 1


def test_groups_add_nothing_to_the_reads_of_x():
    for op, name in (("lora_shrink", "x"), ("lora_grad_a", "x"), ("lora_grad_x_", "dx")):
        for p in (0.0, 0.1):
            moved = _traffic.traffic(op, T=4096, features=4096, ranks=[16, 16, 16], p=p)
            assert moved.loads[name] == (2 * 4096 * 4096, 1), (op, p)


def test_an_empty_problem_has_no_traffic():
    with pytest.raises(ValueError, match="nothing is launched"):
        _traffic.traffic("lora_expand_", T=0, features=8, ranks=[4])
