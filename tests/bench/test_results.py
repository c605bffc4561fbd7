import csv
import dataclasses
import multiprocessing
import os
import re
import subprocess
import sys

import pytest

from fastft.bench import page, results, run
from fastft.bench.runner import Fact
from fastft.bench.stats import Interval

from .test_runner import make_case, square

CASE = make_case({"fastft": square}, target=1.05, flops=11, moved=12, floor_flops=1, floor_moved=2)
ENV = {
    "date": "2030-01-01T00:00:00+00:00", "commit": "abc", "device": "Some CPU (R) 9", "capability": "AVX512",
    "threads": "2", "torch": "2.13.0", "triton": "", "peft": "0.21",
}  # fmt: skip


def measurement(name, ratio=None, status="ok", **fields):
    interval = ratio and Interval(ratio, ratio - 0.004, ratio + 0.006)
    floor = ratio and Interval(1.0, 0.998, 1.003)
    return results.Measurement(name, status, ratio=interval, floor=floor, seconds=ratio, rounds=40, **fields)


def rows(found, **env):
    return [{f: str(row.get(f, "")) for f in results.FIELDS} for row in results.rows(CASE, found, ENV | env)]


FOUND = [
    measurement("floor2", 1.0),
    measurement("fastft", 1.031, target=1.05, met=True, saved_bytes=640, backend="fastft_cpu_avx512"),
    measurement("peft", 1.09),
    measurement("late", status="skipped", note="not, installed"),
]


def test_append_only_with_one_header(tmp_path):
    path = results.csv_path(ENV["device"], tmp_path)
    assert path.name == "some-cpu-r-9.csv"
    results.append(path, results.rows(CASE, FOUND, ENV))
    first = path.read_text()
    results.append(path, results.rows(CASE, FOUND, ENV | {"commit": "def"}))
    assert path.read_text().startswith(first) and path.read_text().count("implementation") == 1
    back = results.read([path])
    assert back == rows(FOUND) + rows(FOUND, commit="def")
    times = {row["implementation"]: row for row in back if row["metric"] == "time" and row["commit"] == "abc"}
    ours = times["fastft"]
    assert (ours["ratio"], ours["lo"], ours["hi"]) == ("1.03100", "1.02700", "1.03700")
    assert (ours["target"], ours["met"], ours["void"], ours["flops"], ours["moved"]) == ("1.05", "1", "0", "11", "12")
    assert (times["floor2"]["flops"], times["late"]["ratio"], times["late"]["note"]) == ("1", "", "not, installed")
    assert [(r["metric"], r["value"], r["unit"]) for r in back if r["metric"] != "time"] == [("saved_bytes", "640", "B")] * 2


def test_a_file_of_an_older_version_gets_the_new_columns(tmp_path):
    path, narrow = tmp_path / "x.csv", results.FIELDS[:-1]
    old = [{field: f'{field}, "{i}"' for field in narrow} for i in range(3)]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, narrow, lineterminator="\n")
        writer.writeheader()
        writer.writerows(old)
    assert results.read([path]) == [row | {results.FIELDS[-1]: ""} for row in old]
    results.append(path, results.rows(CASE, FOUND, ENV))
    assert path.read_text().splitlines()[0].split(",") == results.FIELDS
    assert results.read([path]) == [row | {results.FIELDS[-1]: ""} for row in old] + rows(FOUND)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("field, bad", [("threads", ""), ("threads", "two"), ("ratio", ""), ("hi", "nan"), ("value", None)])
def test_a_row_that_counts_and_lacks_a_number_is_named(tmp_path, monkeypatch, capsys, field, bad):
    path = tmp_path / "x.csv"
    results.append(path, results.rows(CASE, FOUND, ENV))
    results.append(path, [row | ({field: bad} if row["implementation"] == "peft" else {}) for row in rows(FOUND)])
    line = 1 + len(rows(FOUND)) + [row["implementation"] for row in rows(FOUND)].index("peft") + 1
    said = f"{path}, line {line}: a row whose status is ok needs a number as {field}, not {bad or ''!r}"
    with pytest.raises(ValueError, match=re.escape(said)):
        results.read([path], check=True)
    assert len(results.read([path])) == 2 * len(rows(FOUND)), "who appends keeps what is there"
    monkeypatch.setattr(page.write, "__defaults__", (None, tmp_path))
    with pytest.raises(SystemExit) as error:
        run.main(["--html", "--out", str(tmp_path / "all.html")])
    assert error.value.code == 2 and said in capsys.readouterr().err


def test_committed_results_have_all_columns():
    for path in (results.ROOT / "bench" / "results").glob("*.csv"):
        with open(path, newline="") as file:
            assert next(csv.reader(file)) == results.FIELDS, path


def test_other_columns_are_refused_and_nothing_is_written(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        results.append(path, results.rows(CASE, FOUND, ENV))
    assert path.read_text() == "a,b\n1,2\n"


def test_processes_append_one_after_the_other(tmp_path):
    path = tmp_path / "x.csv"
    append = (path, results.rows(CASE, FOUND, ENV))
    other = multiprocessing.get_context("fork").Process(target=results.append, args=append)
    with results._alone(tmp_path):
        other.start()
        other.join(0.5)
        assert other.is_alive() and not path.exists()
    other.join(30)
    results.append(*append)
    assert other.exitcode == 0 and results.read([path]) == rows(FOUND) * 2


def test_a_row_that_was_cut_off_spoils_no_other(tmp_path):
    path = tmp_path / "x.csv"
    results.append(path, results.rows(CASE, FOUND, ENV))
    path.write_text(path.read_text() + "2030-01-01T00:00:00+00:00,abc,Some")
    results.append(path, results.rows(CASE, FOUND, ENV))
    assert results.read([path])[len(rows(FOUND)) + 1 :] == rows(FOUND)


def test_files_that_no_commit_has_are_dirty_where_they_are_found(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTFT_COMMIT", raising=False)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    for name in ("bench/results/x.csv", "kernels/configs/gpu/lora.json", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)

    def git(*args):
        subprocess.run(
            ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *args], check=True, capture_output=True
        )

    git("init")
    (tmp_path / "setup.py").touch()
    git("add", ".")
    git("commit", "-m", "first")
    for name, dirty in (("notes.txt", False), ("bench/results/x.csv", False), ("kernels/configs/gpu/lora.json", True)):
        (tmp_path / name).touch()
        assert results.environment("cpu")["commit"].endswith("+dirty") == dirty, name


def test_native_code_older_than_its_sources_is_dirty(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results._native, "LIB", tmp_path / "lib")
    source, library = tmp_path / "csrc" / "cpu" / "lora.cpp", tmp_path / "lib" / "libfastft_cpu_default.so"
    assert not results._native_is_old()  # a pure-Python install
    for path, changed in (source, 100), (library, 200):
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (changed, changed))
    assert not results._native_is_old()
    os.utime(source, (300, 300))
    assert results._native_is_old()


def test_environment_says_where_and_what():
    env = results.environment("cpu")
    assert all(env[f] for f in ("date", "commit", "device", "capability", "threads", "torch"))
    assert set(env) <= set(results.FIELDS)


def test_a_cpu_with_amx_is_a_device_of_its_own(monkeypatch):
    monkeypatch.setattr(results._native, "cpu_flags", lambda: frozenset({"avx512f"}))
    plain = results.environment("cpu")["device"]
    monkeypatch.setattr(results._native, "cpu_flags", lambda: frozenset({"avx512f", "amx_bf16"}))
    assert results.environment("cpu")["device"] == f"{plain}, AMX"


def test_commit_can_be_given(monkeypatch):
    monkeypatch.setenv("FASTFT_COMMIT", "0123456789ab")
    assert results.environment("cpu")["commit"] == "0123456789ab"


def other(case, found, family="toy", **env):
    renamed = dataclasses.replace(CASE, name=case, family=family)
    return [{f: str(row.get(f, "")) for f in results.FIELDS} for row in results.rows(renamed, found, ENV | env)]


def test_facts_are_rows():
    fact = Fact("state_bytes", 18.0, "B/entry", target=20, met=True)
    kept = Fact("speedup", 1.76, "x over full", Interval(0.981, 0.975, 0.99))
    timed = Fact("accelerate", 0.4, "s", target=0.5, timed=True)
    found = other("step", [measurement("fastft", 1.0, "void", facts=[fact, kept, timed])])
    by_metric = {row["metric"]: row for row in found}
    state, speedup = by_metric["state_bytes"], by_metric["speedup"]
    assert (state["value"], state["unit"], state["target"], state["met"]) == ("18", "B/entry", "20", "1")
    assert (speedup["value"], speedup["ratio"], speedup["lo"], speedup["met"]) == ("1.76", "0.98100", "0.97500", "")
    assert (state["status"], speedup["status"]) == ("ok", "void"), "counts are not disturbed by other load"
    assert by_metric["accelerate"]["status"] == "void", "times are"


@pytest.mark.parametrize("rich", [True, False])
def test_terminal_table_with_and_without_rich(monkeypatch, capsys, rich):
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    results.show("toy tiny", results.table(FOUND))
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("toy tiny", "1.031", "1.027 - 1.037", "640 B", "skipped: not, installed"))
