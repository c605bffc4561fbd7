import dataclasses
import sys

import pytest

from fastft.bench import figures, plot, results
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


def test_other_columns_are_refused_and_nothing_is_written(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        results.append(path, results.rows(CASE, FOUND, ENV))
    assert path.read_text() == "a,b\n1,2\n"


def test_environment_says_where_and_what():
    env = results.environment("cpu")
    assert all(env[f] for f in ("date", "commit", "device", "capability", "threads", "torch"))
    assert set(env) <= set(results.FIELDS)


def test_commit_can_be_given(monkeypatch):
    monkeypatch.setenv("FASTFT_COMMIT", "0123456789ab")
    assert results.environment("cpu")["commit"] == "0123456789ab"


def test_readme_table_takes_only_what_counts_from_the_latest_run():
    later = {"date": "2030-02-01T00:00:00+00:00"}
    kept = [measurement("fastft", 1.02, target=1.01, met=False), measurement("peft", 1.5)]
    void = [measurement("fastft", 7.0, "void"), measurement("peft", 7.1, "void")]
    quick = [measurement("fastft", 8.0, "quick")]
    peers_only = [measurement("fastft", status="wrong", note="no"), measurement("peft", 9.0)]
    newest = {"date": "2030-03-01T00:00:00+00:00"}
    table = plot.readme_table(
        rows(FOUND) + rows(kept, **later) + rows(void, **newest) + rows(quick, **newest) + rows(peers_only, **newest)
    )
    lines = [line for line in table.splitlines() if line.startswith("| tiny")]
    assert lines == ["| tiny, square | 64 | fp32 | **+2.0 %** (1.6 … 2.6) | +50.0 % | ≤ 1.0 %, missed |"]
    assert "commit abc" in table and "Some CPU (R) 9" in table


def other(case, found, family="toy", **env):
    renamed = dataclasses.replace(CASE, name=case, family=family)
    return [{f: str(row.get(f, "")) for f in results.FIELDS} for row in results.rows(renamed, found, ENV | env)]


def test_readme_has_tables_for_what_is_over_other_things():
    kept = Fact("speedup", 1.76, "x over full", Interval(0.981, 0.975, 0.99), target=0.97, met=True)
    state = Fact("state_bytes", 20.0, "B/entry", target=20, met=True)
    step = other("step down 3 %", [measurement("fastft", 1.019, facts=[kept, state]), measurement("full", 1.8)], "s2ft")
    times = []
    for tokens, ratio in ((128, 0.9), (16, 1.1)):
        ours = measurement("fastft", ratio, target=1.0, met=ratio < 1)
        times += other(f"unmerged T={tokens} vs LoRA", [ours, measurement("peft", 1.2)], "partial")
    times += other("switch vs PEFT merge", [measurement("fastft", 0.08, target=0.1, met=True)], "s2ft")
    table = plot.readme_table(rows(FOUND) + step + times)
    lines = [line for line in table.splitlines() if line.startswith(("| tiny", "- tiny"))]
    assert lines == [
        "| tiny, unmerged vs LoRA, T = 16 / 128 | T× | fp32 | **1.10× / 0.90×** | 1.20× / 1.20× | ≤ 1.00×, missed / met |",
        "| tiny, switch vs PEFT merge | 64 | fp32 | **0.08×** (0.08 … 0.09) | - | ≤ 0.10×, met |",
        "| tiny, step down 3 % | 64 | fp32 | **+1.9 %** (1.5 … 2.5) | +80.0 % | - |",
        "- tiny, step down 3 %, fp32: full fine-tuning takes 1.76 times as long as fastft; of the floor's speed over it "
        "fastft keeps 98.1 % (target ≥ 97 %, met).",
        "- tiny, step down 3 %, fp32: 20 bytes a trained number between steps (target ≤ 20, met).",
        "| tiny, square | 64 | fp32 | **+3.1 %** (2.7 … 3.7) | +9.0 % | ≤ 5.0 %, met |",
    ]


def test_facts_are_rows():
    fact = Fact("state_bytes", 18.0, "B/entry", target=20, met=True)
    kept = Fact("speedup", 1.76, "x over full", Interval(0.981, 0.975, 0.99))
    found = other("step", [measurement("fastft", 1.0, "void", facts=[fact, kept])])
    by_metric = {row["metric"]: row for row in found}
    state, speedup = by_metric["state_bytes"], by_metric["speedup"]
    assert (state["value"], state["unit"], state["target"], state["met"]) == ("18", "B/entry", "20", "1")
    assert (speedup["value"], speedup["ratio"], speedup["lo"], speedup["met"]) == ("1.76", "0.98100", "0.97500", "")
    assert (state["status"], speedup["status"]) == ("ok", "void"), "counts are not disturbed by other load"


def test_readme_markers():
    text = f"head\n{plot.BEGIN}\nold\n{plot.END}\ntail\n"
    new = plot.with_table(text, "table")
    assert new == f"head\n{plot.BEGIN}\ntable\n{plot.END}\ntail\n" and plot.with_table(new, "table") == new
    for broken in ("", plot.BEGIN, plot.END + plot.BEGIN, text + text):
        with pytest.raises(ValueError, match="README needs"):
            plot.with_table(broken, "table")


def test_readme_shows_what_the_results_say():
    readme = results.ROOT / "README.md"
    if not readme.exists() or plot.BEGIN not in readme.read_text():
        pytest.skip("README.md has no numbers markers yet")
    table = plot.readme_table(results.read(sorted((results.ROOT / "bench" / "results").glob("*.csv"))))
    assert plot.with_table(readme.read_text(), table) == readme.read_text(), "run: python -m fastft.bench.plot --readme"


def test_figures(tmp_path):
    pytest.importorskip("matplotlib")
    written = figures.draw(rows(FOUND), tmp_path)
    assert [path.name for path in written] == ["some-cpu-r-9-2t-toy.png", "some-cpu-r-9-2t-toy.svg"]
    assert written[0].read_bytes().startswith(b"\x89PNG")
    first = written[1].read_text()
    assert "PEFT" in first
    figures.draw(rows(FOUND), tmp_path)
    assert written[1].read_text() == first
    assert figures.draw(rows([measurement("fastft", 1.0, "void")]), tmp_path) == []


def test_figures_of_other_yardsticks_and_of_bars_that_are_cut(tmp_path):
    pytest.importorskip("matplotlib")
    step = other("step down 3 %", [measurement("fastft", 1.019, target=1.02), measurement("full", 1.8)], "s2ft")
    switch = other("switch down 3 % vs PEFT merge", [measurement("fastft", 0.08)], "s2ft")
    written = figures.draw(step + switch, tmp_path)
    assert [p.stem for p in written[::2]] == ["some-cpu-r-9-2t-s2ft", "some-cpu-r-9-2t-s2ft-vs-peft-merge"]
    cut, over = (p.read_text() for p in written[1::2])
    assert "full fine-tuning" in cut and "<!-- 80 -->" in cut and "time over that of PEFT merge" in over


@pytest.mark.parametrize("rich", [True, False])
def test_terminal_table_with_and_without_rich(monkeypatch, capsys, rich):
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    results.show("toy tiny", results.table(FOUND))
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("toy tiny", "1.031", "1.027 - 1.037", "640 B", "skipped: not, installed"))
