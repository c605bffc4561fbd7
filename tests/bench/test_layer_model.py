"""The model of every op's cases on GPUs: it covers what GPUs are measured with, and stands beside what they took."""

import csv
import re

import pytest

from fastft.bench import layer_model, measured_beside, model, results, run

SCRIPT = (results.ROOT / "bench" / "gpu.sh").read_text()


def test_every_case_of_every_op_family_has_a_model_or_is_named_as_without():
    assert set(layer_model.FAMILIES) == {f for f, module in run.families().items() if ".ops." in module}
    for family in layer_model.FAMILIES:
        for case in layer_model.cases(family):
            assert (layer_model.launches(case) is None) == case.name.startswith(layer_model.NOT_MODELLED), str(case)


def test_dtypes_are_those_that_gpu_sh_measures():
    arms = re.search(r"dtypes_of\(\) \{\n    case \$1 in\n(.*?)\n    esac", SCRIPT, re.S)[1].splitlines()
    given = {}
    for arm in arms:
        names, _, command = arm.strip().partition(") ")
        for name in names.split(" | "):
            given[name] = tuple(re.findall(r"--dtype (\S+)", command))
    for family, dtypes in layer_model.FAMILIES.items():
        assert given.get(family, given["*"]) == dtypes, family


def test_a_launch_takes_what_it_needs_most_of():
    gpu = model.Gpu(gemm=8e12, fma=1e12, memory=1e12, l2=4e12)
    launch = layer_model.Launch("any", memory=1e6, operations=6e6, l2=8e6)
    assert launch.bounds(gpu) == pytest.approx({"memory": 1e-6, "L2": 2e-6, "fma": 6e-6})
    assert launch.seconds(gpu) == pytest.approx(6e-6)
    on_tensor_cores = layer_model.Launch("any", memory=1e6, operations=6e6, unit="tensor", l2=8e6, products=3)
    assert on_tensor_cores.bounds(gpu)["tensor"] == pytest.approx(3 * 6e6 / (0.5 * 8e12))
    product = layer_model.gemm("any", 1000, 1000, 1000, 2, 4)
    assert product.bounds(gpu) == pytest.approx({"memory": 8e-6, "L2": 0, "gemm": 2.5e-4})


def test_sectors_that_random_columns_touch():
    assert layer_model.touched(10, 1600, 1600, 2) == 10 * 1600 * 2
    assert layer_model.touched(10, 16000, 1, 2) == pytest.approx(10 * 32, rel=0.01), "one sector a row"


def test_floors_are_those_of_the_formulas():
    """What a launch moves and computes once is what `runner.Case` says of the floor, up to the biases of q, k and v."""
    for family in ("lora", "dora", "grouped"):
        for case in layer_model.cases(family):
            floor = layer_model.launches(case).floor
            assert sum(launch.operations for launch in floor) == case.floor_flops, str(case)
            assert sum(launch.memory for launch in floor) == pytest.approx(case.floor_moved, rel=0.01), str(case)


@pytest.mark.parametrize("family", layer_model.FAMILIES)
def test_the_kept_rows_are_what_the_code_gives(family):
    with open(model.FOLDER / f"{family}.csv", newline="") as file:
        kept = list(csv.DictReader(file))
    assert kept == layer_model.rows(family), "python -m fastft.bench.layer_model --write"
    assert {row["status"] for row in kept} == {"modelled"} and {row["gpu"] for row in kept} == set(model.GPUS)


def row(**changes):
    base = {
        "device": "NVIDIA H200",
        "metric": "time",
        "status": "ok",
        "family": "lora",
        "case": "layer r=16 p=0",
        "shape": "llama3-8b/q_proj",
        "dtype": "bf16",
        "implementation": "fastft",
        "backend": "fastft_cuda",
        "date": "2026-01-01",
        "ratio": "1.5",
        "lo": "1.4",
        "hi": "1.6",
        "value": "6e-4",
    }
    return base | changes


def test_measured_rows_are_paired_with_the_model_of_their_gpu_and_backend():
    (pair,) = measured_beside.pairs([row()])
    assert pair.gpu == "H200" and pair.backend == "cuda" and pair.floor[0] == pytest.approx(4e-4)
    case = next(c for c in layer_model.cases("lora") if c.name == "layer r=16 p=0" and c.dtype == "bf16")
    assert (pair.floor[1], pair.ours[1]) == layer_model.launches(case).seconds(model.GPUS["H200"], "cuda")
    assert pair.adds[0] == pytest.approx(2e-4) and pair.off == pytest.approx(2e-4 / (pair.ours[1] - pair.floor[1]))
    assert pair.far == (pair.off > 1.5)
    text = measured_beside.markdown([pair])
    assert "1.500 (1.400 to 1.600)" in text and f"**{pair.off:.2f}**" in text and "| lora | H200 | 1 |" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "Intel Xeon"},
        {"status": "void"},
        {"metric": "saved_bytes"},
        {"implementation": "peft", "backend": ""},
        {"backend": "reference"},
        {"family": "step"},
        {"shape": "qwen2.5-7b/q_proj"},
        {"family": "selection", "case": "LIFT mask f=128 vs exact SVD"},
    ],
)
def test_other_rows_are_not(changes):
    assert measured_beside.pairs([row(**changes)]) == []


def test_of_several_runs_the_latest_counts_and_of_one_run_the_arm_that_was_not_forced():
    old, new = row(backend="triton", value="9e-4"), row(implementation="fastft:triton", backend="triton", date="2026-01-02")
    (pair,) = measured_beside.pairs([old, new])
    assert pair.row is new
    (pair,) = measured_beside.pairs([row(), row(implementation="fastft:cuda", value="7e-4")])
    assert pair.ours[0] == 6e-4


def test_where_ours_takes_less_than_the_floor_all_of_it_is_compared():
    measured = row(family="selection", case="histogram vs torch.bincount", shape="llama3-8b/down_proj", ratio="0.04")
    (pair,) = measured_beside.pairs([measured])
    assert pair.adds == pair.ours


def test_the_page_is_of_the_present_rows():
    assert measured_beside.PATH.read_text() == measured_beside.page(measured_beside.measured()), (
        "python -m fastft.bench.layer_model --write"
    )
