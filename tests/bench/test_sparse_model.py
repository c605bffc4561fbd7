"""The model of sparse training's GPU times: which engine, and what the costs follow; its table is the one in README."""

import csv

import pytest

from fastft.bench import model, plot, shapes, sparse_model


def test_engines():
    engines = [sparse_model.engine(shapes.LINEARS["llama3-8b/q_proj"], density) for density in sparse_model.DENSITIES]
    assert engines == ["entries", "blocks", "blocks"]


def test_the_model_is_near_what_was_measured():
    """On an H200, bfloat16: over the floor, by the rows of its results."""
    measured = plot.counted(plot.results.read([plot.results.ROOT / "bench" / "results" / "nvidia-h200.csv"]))
    found = {
        (row["linear"], float(row["density"])): float(row["ratio"]) for row in sparse_model.rows() if row["gpu"] == "H200"
    }
    for (_, _, family, case, shape, _), arms in measured.items():
        if family == "sparse" and case in ("layer 1 %", "layer 5 %"):
            density = float(case.split()[1]) / 100
            assert float(arms["fastft"]["ratio"]) - 1 == pytest.approx(found[shape, density] - 1, rel=0.25), (case, shape)


def test_costs():
    linear, gpu = shapes.LINEARS["llama3-8b/q_proj"], model.GPUS["H200"]
    at = [sparse_model.gradient_seconds(linear, gpu, density) for density in sparse_model.DENSITIES]
    assert at == sorted(at) and at[0] < sparse_model.floor_seconds(linear, gpu) / 5
    assert at[2] == at[1]  # from where a GEMM forms them, more entries cost nothing
    updates = [sparse_model.update_seconds(linear, gpu, density) for density in sparse_model.DENSITIES]
    sectors = 2 * 32 * 1e-3 * linear.k * linear.n / gpu.memory  # nearly every entry has one of its own
    assert updates[0] == pytest.approx(1.5 * sectors, rel=0.02) and updates[2] < 50 * updates[0]


def test_readme_and_file_are_what_the_model_says():
    found = sparse_model.rows()
    with open(model.FOLDER / f"{model.MODEL}-sparse.csv", newline="") as file:
        assert list(csv.DictReader(file)) == found
    readme = (plot.results.ROOT / "README.md").read_text()
    assert readme == plot.with_table(readme, sparse_model.markdown(found), sparse_model.BEGIN, sparse_model.END)
