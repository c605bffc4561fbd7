"""The times of single ops, with the GPU's parts replaced: every op has a row on every backend."""

import pytest
import torch

from fastft.bench import graphs, op_problems, op_times
from fastft.kernels import _config

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


def test_every_configured_op_of_every_family_has_a_row(monkeypatch):
    monkeypatch.setattr(op_times, "sets_beyond_l2", lambda one, device: 2)
    monkeypatch.setattr(op_times.testing, "available", lambda device: ["reference", "cpu"])
    monkeypatch.setattr(op_times, "BACKENDS", {"cpu": None})
    monkeypatch.setattr(graphs, "new_pool", lambda: None)
    monkeypatch.setattr(graphs, "capture", lambda run, pool: run)
    monkeypatch.setattr(op_times, "seconds", lambda replay: replay() and 16e-3)
    assert set(op_times.FAMILIES) == set(op_problems._MAKERS)
    for family in op_times.FAMILIES[1:]:
        rows = list(op_times.measure_family(family, torch.device("cpu"), op_times.shapes.LINEARS["tiny"]))
        assert {row["op"] for row in rows} == _config.table("default", family).keys()
        assert {row["us"] for row in rows} == {"1000.0"} and all(float(row["GB_s"]) >= 0 for row in rows)


def test_a_backend_without_a_kernel_is_said_and_left_out(monkeypatch, capsys):
    monkeypatch.setattr(op_times, "sets_beyond_l2", lambda one, device: 2)
    monkeypatch.setattr(op_times.testing, "available", lambda device: ["cuda"])
    assert list(op_times.measure_family("selection", torch.device("cpu"), op_times.shapes.LINEARS["tiny"])) == []
    assert "count_bins_" in capsys.readouterr().err


def test_unknown_families_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        op_times.main(["step"])
    assert "known: lora, dora" in capsys.readouterr().err
