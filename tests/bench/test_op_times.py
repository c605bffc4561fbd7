"""The times of single ops, with the GPU's parts replaced: every op has a row on every backend."""

import torch

from fastft.bench import graphs, op_times

OPS = ["lora_shrink", "lora_expand_", "lora_grad_sb", "lora_grad_a", "lora_grad_x_"]


def test_every_op_has_a_row_on_every_backend(monkeypatch):
    ran = []
    monkeypatch.setattr(op_times, "sets_beyond_l2", lambda one, device: 2)
    monkeypatch.setattr(op_times.testing, "available", lambda device: ["reference", "cuda", "cpu"])
    monkeypatch.setattr(op_times, "BACKENDS", {"cpu": op_times.BACKENDS["cuda"]})
    monkeypatch.setattr(graphs, "new_pool", lambda: None)
    monkeypatch.setattr(graphs, "capture", lambda run, pool: lambda: ran.append(len(run())))
    monkeypatch.setattr(op_times, "seconds", lambda replay: replay() or 16e-3)
    for p in (0.0, 0.1):
        for dtype in ("bf16", "bf16+fp32"):
            rows = list(op_times.measure("tiny", dtype, p, 16, torch.device("cpu")))
            assert [row["op"] for row in rows] == list(
                op_times.arguments(op_times.shapes.LINEARS["tiny"], dtype, 16, p, "cpu")
            )
            assert {row["backend"] for row in rows} == {"cpu"} and {row["us"] for row in rows} == {"1000.0"}
    assert set(ran) == {2 * op_times.REPEATS}
