"""The model of GPU times: its launches are those of a real layer, its table is the one in README."""

import csv
from collections import Counter
from dataclasses import replace

import pytest
import torch

import fastft
from fastft.bench import model, plot, shapes
from fastft.bench.e2e import step


def test_the_launches_are_those_of_a_decoder_layer():
    pytest.importorskip("transformers")
    shape = shapes.MODELS["tiny-llama"]
    d = step.make_inputs(shape, "fp32", 4, 0.0, torch.device("cpu"), 0)
    run = step.training(step.ours)(d)
    with fastft.testing.record() as calls:
        run()
    one_layer = Counter(op for op, *_ in model.calls(shape, 4))
    found = Counter(call.op for call in calls)
    # Layer 0's input, an embedding, needs no gradient: its q, k and v have no dX.
    want = Counter({op: n * shape.layers for op, n in one_layer.items()}) - Counter({"lora_grad_x_": 1})
    assert found == want


def test_times_fall_with_bandwidth_and_grow_with_rank():
    llama, gpu = shapes.MODELS[model.MODEL], model.GPUS["H200"]
    for backend in model.BACKENDS:
        base = model.adapter_seconds(llama, gpu, backend, "bf16", 16, 0.0)
        faster = replace(gpu, memory=2 * gpu.memory, l2=2 * gpu.l2, fma=2 * gpu.fma, gemm=2 * gpu.gemm)
        assert model.adapter_seconds(llama, faster, backend, "bf16", 16, 0.0) == pytest.approx(base / 2)
        assert model.adapter_seconds(llama, gpu, backend, "bf16", 64, 0.0) > base
        assert model.adapter_seconds(llama, gpu, backend, "bf16", 16, 0.05) > base
    assert model.floor_seconds(llama, gpu, 2) == pytest.approx(872.4e6 * 4096 / 650e12, rel=0.02), "GEMMs are the floor"


def test_readme_and_the_kept_rows_are_what_the_code_gives():
    found = model.rows()
    with open(model.FOLDER / f"{model.MODEL}.csv", newline="") as file:
        assert list(csv.DictReader(file)) == found, "python -m fastft.bench.model --write"
    readme = (model.results.ROOT / "README.md").read_text()
    assert plot.with_table(readme, model.markdown(found), model.BEGIN, model.END) == readme, (
        "python -m fastft.bench.model --write"
    )
    assert all(row["status"] == "modelled" for row in found)
