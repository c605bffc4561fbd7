"""What README and bench/results/README.md say of the rows: the latest that count, the worst case first, losses by name."""

import importlib.util
import re
import shlex

import pytest

from fastft.bench import figures, losses, plot, results, run, standings, tables
from fastft.bench.runner import Fact
from fastft.bench.stats import Interval

from .test_results import FOUND, measurement, other, rows

LATER, NEWEST = {"date": "2030-02-01T00:00:00+00:00"}, {"date": "2030-03-01T00:00:00+00:00"}


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("| tiny", "- tiny"))]


def test_tables_take_only_what_counts_from_the_latest_run():
    kept = [measurement("fastft", 1.02, target=1.01, met=False), measurement("peft", 1.5)]
    void = [measurement("fastft", 7.0, "void"), measurement("peft", 7.1, "void")]
    quick = [measurement("fastft", 8.0, "quick")]
    peers_only = [measurement("fastft", status="skipped", note="no"), measurement("peft", 9.0)]
    older = [measurement("fastft", 1.03), measurement("fastft@abc", 1.0), measurement("floor@abc", 1.0)]
    table = tables.full(
        rows(FOUND + older[1:])
        + rows(kept, **LATER)
        + rows(void, **NEWEST)
        + rows(quick, **NEWEST)
        + rows(peers_only, **NEWEST)
    )
    assert lines_of(table) == ["| tiny, square | 64 | fp32 | **+2.0 %** (1.6 … 2.6) | +50.0 % | ≤ 1.0 %, missed |"]
    assert "commit abc" in table and "## Some CPU 9, 2 threads" in table and "@" not in table


def test_tables_of_what_is_over_other_things_and_facts():
    kept = Fact("speedup", 1.76, "x over full", Interval(0.981, 0.975, 0.99), target=0.97, met=True)
    state = Fact("state_bytes", 20.0, "B/entry", target=20, met=True)
    step = other("step down 3 %", [measurement("fastft", 1.019, facts=[kept, state]), measurement("full", 1.8)], "s2ft")
    times = []
    for tokens, ratio in ((128, 0.9), (16, 1.1)):
        ours = measurement("fastft", ratio, target=1.0, met=ratio < 1)
        times += other(f"unmerged T={tokens} vs LoRA", [ours, measurement("peft", 1.2)], "partial")
    times += other("switch vs PEFT merge", [measurement("fastft", 0.08, target=0.1, met=True)], "s2ft")
    assert lines_of(tables.full(rows(FOUND) + step + times)) == [
        "| tiny, unmerged vs LoRA, T = 16 / 128 | T× | fp32 | **1.10× / 0.90×** | 1.20× / 1.20× | ≤ 1.00×, missed / met |",
        "| tiny, switch vs PEFT merge | 64 | fp32 | **0.08×** (0.08 … 0.09) | - | ≤ 0.10×, met |",
        "| tiny, step down 3 % | 64 | fp32 | **+1.9 %** (1.5 … 2.5) | +80.0 % | - |",
        "- tiny, step down 3 %, fp32: full fine-tuning takes 1.76 times as long as fastft; of the floor's speed over it "
        "fastft keeps 98.1 % (target ≥ 97 %, met).",
        "- tiny, step down 3 %, fp32: 20 bytes a trained number between steps (target ≤ 20, met).",
        "| tiny, square | 64 | fp32 | **+3.1 %** (2.7 … 3.7) | +9.0 % | ≤ 5.0 %, met |",
    ]


def test_the_summary_shows_the_worst_case_and_counts_the_others():
    def layer(name, ours, peer, met):
        return other(name, [measurement("fastft", ours, target=1.05, met=met), measurement("peft", peer)], "lora")

    found = layer("layer r=16 p=0", 1.02, 1.10, True) + layer("layer r=16 p=0.05", 1.30, 1.20, False)
    found += layer("layer r=64 p=0", 2.0, 1.5, False)  # a rank that only the figure of ranks shows
    found += other("decode D=4 vs LoRA", [measurement("fastft", 1.004), measurement("bmm", 1.0)], "serve")
    text = tables.summary(found, "all.md")
    assert [line for line in text.splitlines() if line.startswith("| ")][1:] == [
        "| LoRA layer | tiny, r=16 p=0.05 | fp32 | **+30.0 %** (29.6 … 30.6) | +20.0 % PEFT: **lost** | ≤ 5.0 %: **missed** "
        "| 2 cases, +2.0 % … +30.0 %; 1 of 2 targets met; ahead in 1, behind in 1 |",
        "| Serving, whole model: decode, over LoRA | tiny, D=4 | fp32 | **1.00×** (1.00 … 1.01) "
        "| 1.00× two batched products: level | - | 1 case |",
    ]
    assert (
        "**[Some CPU 9, 2 threads](all.md#some-cpu-9-2-threads)** (AVX512, torch 2.13.0, PEFT 0.21): 4 cases, 1 of 3 "
        "targets met; beside the best peer ahead in 1, level in 1, **behind in 2** of 4. "
        "(1 of them, of other ranks than 16, are in no line below: 0 of 1 targets met; behind in 1.)\n"
    ) in text, "the lines and what is in none of them add up to the heading"


def test_peers_and_standings():
    def arms(**ratios):
        return standings.counted(other("layer", [measurement(name, ratio) for name, ratio in ratios.items()])).popitem()[1]

    best = standings.best_peer(arms(fastft=1.1, full=0.5, peft=1.3, addmm=1.2))
    assert best[0] == "addmm", "training everything is no rival"
    assert standings.standing(arms(fastft=1.1, peft=1.2)) == "ahead"
    assert standings.standing(arms(fastft=1.1, peft=1.105)) == "level"
    assert standings.standing(arms(fastft=1.1, peft=1.0)) == "behind"
    assert standings.standing(arms(fastft=1.1, full=1.0)) == ""


def test_a_gpu_is_one_device_whatever_machine_it_is_in():
    def layer(rank, threads, ratio, **env):
        gpu = {"device": "NVIDIA Z", "capability": "sm_90", "threads": threads}
        return other(f"layer r={rank} p=0", [measurement("fastft", ratio), measurement("peft", 1.4)], "lora", **gpu, **env)

    found = layer(16, "16", 1.1) + layer(16, "24", 1.2, **LATER) + layer(64, "24", 1.3)
    assert [line for line in tables.full(found).splitlines() if line.startswith("##")] == ["## NVIDIA Z"]
    assert lines_of(tables.full(found))[0].split(" | ")[3] == "**+20.0 %** (19.6 … 20.6)", "the later of both"
    assert tables.summary(found, "x").count("**[NVIDIA Z](x#nvidia-z)**") == 1
    assert {drawing.stem for drawing in figures.drawings(found)} == {"nvidia-z-lora"}


def test_parameters_of_a_case():
    assert standings.parameters("layer r=16 p=0.05") == {"rank": 16}
    assert standings.parameters("beside 0.1 % T=128 vs frozen forward") == {"density": 0.1, "tokens": 128}
    assert standings.parameters("decode D=4 r=16") == {"adapters": 4, "rank": 16}
    assert standings.parameters("step down 3 % + o 5 %") == {}, "two densities are none"
    assert standings.without("decode D=4 r=16", "adapters") == "decode r=16"


def test_readme_markers():
    text = f"head\n{plot.BEGIN}\nold\n{plot.END}\ntail\n"
    new = plot.with_table(text, "table")
    assert new == f"head\n{plot.BEGIN}\ntable\n{plot.END}\ntail\n" and plot.with_table(new, "table") == new
    for broken in ("", plot.BEGIN, plot.END + plot.BEGIN, text + text):
        with pytest.raises(ValueError, match="README needs"):
            plot.with_table(broken, "table")


@pytest.fixture(scope="module")
def committed():
    if not (results.ROOT / "README.md").exists():
        pytest.skip("not in a checkout")
    return results.read(sorted(plot.FOLDER.glob("*.csv")))


def test_readmes_show_what_the_results_say(committed):
    text = (results.ROOT / "README.md").read_text()
    assert plot.readme(text, committed) == text, "run: python -m fastft.bench.plot --readme"
    text = (results.ROOT / "bench" / "README.md").read_text()
    assert plot.method(text, committed) == text, "run: python -m fastft.bench.plot --readme"
    every = (plot.FOLDER / "README.md").read_text()
    assert plot.every_number(committed) == every, "run: python -m fastft.bench.plot --readme"


def test_the_committed_figures_are_those_that_the_results_give(committed):
    wanted = {f"{drawing.stem}.{kind}" for drawing in figures.drawings(committed) for kind in ("png", "svg")}
    found = {path.name for path in (plot.FOLDER / plot.FIGURES).iterdir()}
    assert found == wanted, "run: python -m fastft.bench.plot"
    text = (results.ROOT / "README.md").read_text()
    linked = {word.split("/")[-1] for word in text.replace('"', " ").split() if word.startswith("bench/results/figures/")}
    assert linked <= found, "README shows figures that there are"


def test_losses_are_listed_by_kind_with_the_furthest():
    def layer(name, ours, peer, met):
        return other(name, [measurement("fastft", ours, target=1.05, met=met), measurement("peft", peer)], "lora")

    found = layer("layer r=16 p=0", 1.02, 1.10, True) + layer("layer r=16 p=0.05", 1.30, 1.20, False)
    found += layer("layer r=64 p=0", 1.20, 1.17, False)
    found += other("switch vs PEFT merge", [measurement("fastft", 1.2), measurement("lora-exchange", 1.1)], "s2ft")
    found += other("step", [measurement("fastft", 1.01, target=1.05, met=True)], "step")
    assert losses.markdown(found).splitlines()[2:] == [
        "| Some CPU 9, 2 threads | LoRA layer | fp32 | 2 of 3; furthest: tiny, r=16 p=0.05: +30.0 %, target +5.0 % "
        "| 2 of 3; furthest: tiny, r=16 p=0.05: +30.0 %, PEFT +20.0 % |",
        "| Some CPU 9, 2 threads | S²FT training step: exchange of adapters, over PEFT merge | fp32 | - "
        "| 1 of 1; furthest: tiny, switch: 1.200×, LoRA: unmerge, merge 1.100× |",
    ]
    assert losses.markdown(rows(FOUND)) == losses.NONE


def test_the_commands_in_the_readme_exist():
    path = results.ROOT / "bench" / "README.md"
    if not path.exists():
        pytest.skip("not in a checkout")
    commands = [line.split("#")[0].strip() for line in path.read_text().split("```")[1].splitlines()[1:]]
    assert len(commands) > 8
    for command in commands:
        if command.startswith("fastft bench") and command.split()[2] not in run.WHOLE_RUNS:
            run._parser().parse_args(shlex.split(command)[2:])
        elif command.startswith("python -m fastft.bench."):
            assert importlib.util.find_spec(command.split()[2]), command
    families = re.findall(r"^\| (`.*?`) \|", path.read_text().split("| family |")[1].split("\n\n")[0], re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(families))) == {*run.families(), *run.WHOLE_RUNS}


def test_a_case_whose_latest_result_is_wrong_has_no_number():
    def shown(*runs):
        return [row["fastft"]["ratio"] for row in standings.counted([row for run in runs for row in run]).values()]

    def run(date, status, ratio=None, name="fastft"):
        return rows([measurement(name, ratio, status)], date=f"2030-01-0{date}")

    right = run(1, "ok", 1.1)
    assert (
        shown(right)
        == shown(right, run(2, "void", 1.0))
        == shown(right, run(2, "wrong", name="fastft:triton"))
        == ["1.10000"]
    )
    assert shown(right, run(2, "wrong")) == []
    assert shown(right, run(2, "wrong"), run(3, "ok", 1.2)) == ["1.20000"]


def test_no_rows_no_tables():
    assert tables.full([]) == tables.summary([], "x") == tables.NOTHING
    assert tables.full(rows([measurement("fastft", 1.0, "void")])) == tables.NOTHING
