import pytest
import torch

from fastft.bench import calibration, results, run
from fastft.bench.calibration import Rates

from .test_results import ENV, measurement
from .test_runner import make_case, square

RATES = Rates(copy=100.0, gemm={"fp32": 10.0, "bf16": 40.0}, caches={"L2": 1 << 20})


def test_fraction_is_of_what_takes_longer():
    assert RATES.fraction(flops=20, moved=100, dtype="fp32", seconds=4.0) == pytest.approx(0.5), "operations"
    assert RATES.fraction(flops=20, moved=100, dtype="bf16+fp32", seconds=4.0) == pytest.approx(0.25), "bytes"
    assert RATES.fraction(flops=0, moved=100, dtype="fp16", seconds=4.0) == pytest.approx(0.25)
    assert RATES.fraction(flops=1, moved=100, dtype="fp16", seconds=4.0) is None, "no rate of that dtype"
    assert RATES.fraction(flops=0, moved=0, dtype="fp32", seconds=4.0) is None, "nothing was counted"


def test_rows_of_times_tell_it():
    case = make_case({"fastft": square}, flops=10, moved=20, floor_flops=5, floor_moved=20)
    found = [measurement("floor2", 1.0), measurement("fastft", 2.0), measurement("late", status="skipped")]
    calibration.place(case, found, RATES)
    assert [m.roofline for m in found] == [0.5, 0.5, None]
    rows = results.rows(case, found, ENV)
    assert [row.get("roofline", "") for row in rows if row["metric"] == "time"] == ["0.5000", "0.5000", ""]
    assert [line[4] for line in results.table(found)[1:]] == ["50 %", "50 %", "-"]


def test_rates_are_rows():
    found = {(r["case"], r.get("dtype") or r.get("shape", "")): r for r in calibration.rows(RATES, ENV)}
    assert found.keys() == {("copy", ""), ("gemm", "fp32"), ("gemm", "bf16"), ("cache", "L2")}
    said = {key: (row["metric"], float(row["value"]), row["unit"]) for key, row in found.items()}
    assert said["copy", ""] == ("bandwidth", 100.0, "B/s") and said["gemm", "bf16"] == ("gemm_rate", 40.0, "FLOP/s")
    assert said["cache", "L2"] == ("cache_bytes", 1048576.0, "B")
    assert {(r["family"], r["implementation"], r["status"]) for r in found.values()} == {("calibration", "machine", "ok")}
    assert all(set(row) <= set(results.FIELDS) for row in found.values())


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(calibration, "SIDES", {"cpu": (64, 128)})
    monkeypatch.setattr(calibration, "COPIED", {"cpu": (1 << 20, 1 << 20)})
    monkeypatch.setattr(calibration, "SECONDS", 0.01)


def test_this_machine(small):
    rates = calibration.measure("cpu")
    assert rates.copy > 1e8 and rates.gemm.keys() == {"fp32", "bf16", "fp16"} and min(rates.gemm.values()) > 1e6
    assert all(size > 0 for size in rates.caches.values())


def test_products_grow_until_they_take_too_long(monkeypatch, small):
    made, product = [], calibration._product
    monkeypatch.setattr(calibration, "_product", lambda side, *rest: made.append(side) or product(side, *rest))
    calibration._gemm(torch.float32, torch.device("cpu"))
    assert made == [64, 128]
    monkeypatch.setattr(calibration, "SLOW", 0.0)
    calibration._gemm(torch.float32, torch.device("cpu"))
    assert made == [64, 128, 64]


def test_cache_sizes_are_read_as_the_system_writes_them(monkeypatch, tmp_path):
    for i, (level, kind, size) in enumerate([(1, "Data", "32K"), (1, "Instruction", "64K"), (2, "Unified", "2048K"),
                                             (3, "Unified", "32M"), (4, "Unified", "what")]):  # fmt: skip
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{text}\n")
    monkeypatch.setattr(calibration, "CACHES", tmp_path)
    assert calibration.cache_sizes("cpu") == {"L1d": 32 << 10, "L2": 2 << 20, "L3": 32 << 20}
    monkeypatch.setattr(calibration, "CACHES", tmp_path / "absent")
    assert calibration.cache_sizes("cpu") == {}


def test_alone_and_before_a_run(small, tmp_path, capsys, monkeypatch):
    threads = torch.get_num_threads()
    out = ["--device", "cpu", "--out", str(tmp_path)]
    assert run.main(["calibration", *out]) == 0
    assert "matrix product, fp32" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.csv")
    alone = results.read([path])
    assert {row["case"] for row in alone} == {"copy", "gemm", "cache"} and {row["threads"] for row in alone} == {
        str(threads)
    }
    tiny = ["lora", *out, "--shape", "tiny", "--dtype", "fp32", "--dropout", "0", "--peers", "none", "--quick"]
    assert run.main(tiny) == 0
    assert all(row["family"] == "lora" and not row["roofline"] for row in results.read([path])[len(alone) :])
    rows = len(results.read([path]))
    assert run.main([*tiny, "--calibrate"]) == 0
    new = results.read([path])[rows:]
    assert new[0]["family"] == "calibration" and {row["status"] for row in new} == {"quick"}
    assert all(float(row["roofline"]) > 0 for row in new if row["metric"] == "time")
