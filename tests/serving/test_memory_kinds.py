"""Adapters of every kind through the adapter memory, which is too small for all: each batch is what merged models give."""

import random

import pytest
import torch

import fastft
from fastft import _native
from fastft.serving.memory import AdapterMemory
from fastft.serving.sites import install
from tests.methods.models import llama

from .kinds import methods, write

NAMES = ["lora", "rslora", "patterns", "columns", "rows", "spiel", "mask"]
IDS = torch.arange(12).view(3, 4)


@pytest.mark.skipif(_native.runtime()[0] is None, reason=str(_native.runtime()[1]))
def test_every_batch_is_what_merged_models_give(tmp_path):
    want = {}
    for seed, name in enumerate(NAMES):
        write(tmp_path / name, methods(llama())[name], seed=seed, dtype=torch.float32)
        alone = llama()
        fastft.load(alone, tmp_path / name).merge()
        with torch.no_grad():
            want[name] = alone(IDS).logits
    model, rng = llama(), random.Random(0)
    routed = install(model)
    sizes = {"slots": 3, "page_bytes": 4096, "device_bytes": 40 * 4096}
    memory = AdapterMemory(routed.sites, model=model, device="cpu", dtype=torch.float32, adapter_dir=tmp_path, **sizes)
    with memory, torch.no_grad(), fastft.testing.use("reference"):
        routed.bind(memory)
        for _ in range(15):
            chosen = rng.sample(NAMES, 3)
            for name in chosen:
                memory.load(name, 30)
            leases = [memory.acquire(name) for name in chosen]
            rows = sorted((lease.slot, 4 * i + t) for i, lease in enumerate(leases) for t in range(4))
            segments = [[slot, 4 * i, 4 * i + 4] for i, slot in enumerate(sorted(lease.slot for lease in leases))]
            tensors = torch.tensor(segments, dtype=torch.int32), torch.tensor([row for _, row in rows], dtype=torch.int32)
            for route in (routed.tokens, routed.heads):
                route.set(*tensors, True, 12)
            got = model(IDS).logits
            for i, name in enumerate(chosen):
                torch.testing.assert_close(got[i], want[name][i], rtol=1e-4, atol=2e-5)
            for lease in leases:
                memory.release(lease)
        assert memory.stats()["evictions_total"] > 5
    routed.uninstall()
