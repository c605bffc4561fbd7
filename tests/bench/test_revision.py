"""`fastft bench --base`: another revision's fastft in a process of its own, in the rounds of ours."""

import os
import subprocess
import sys

import pytest
import torch

from fastft.bench import results, revision, rounds, run, runner
from fastft.bench.revision import RevisionError
from fastft.bench.runner import Measurement

from .test_runner import by_name, fixed_times, make_case, square

TINY = ["lora", "--device", "cpu", "--shape", "tiny", "--dropout", "0", "--peers", "none", "--quick"]


@pytest.fixture
def tree(monkeypatch, tmp_path):
    """HEAD's files, with the libraries that are built here, wherever their sources stand."""
    if not results.in_checkout():
        pytest.skip("not a git checkout")
    monkeypatch.setattr(revision, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(revision, "_same_native", lambda commit, device: True)
    return revision.checkout(revision.commit_of("HEAD"), "cpu")


def prepend(path, text):
    path.write_text(text + path.read_text())


def test_another_revision_is_measured_and_what_it_cannot_run_is_skipped(tree, tmp_path, capsys):
    prepend(tree / "fastft" / "__init__.py", "import os\nos.environ['FASTFT_BACKEND'] = 'reference'\n")
    with (tree / "fastft" / "modules" / "lora.py").open("a") as file:
        file.write(
            "\n\n_made = LoRALinear.from_linear\n"
            "def _only_float32(base, **options):\n"
            "    if base.weight.dtype != torch.float32:\n"
            "        raise TypeError('float32 alone')\n"
            "    return _made(base, **options)\n"
            "LoRALinear.from_linear = _only_float32\n"
        )
    out = tmp_path / "out"
    assert run.main([*TINY, "--dtype", "fp32", "--dtype", "bf16", "--base", "HEAD", "--out", str(out)]) == 0
    (path,) = out.glob("*.csv")
    label = revision.commit_of("HEAD")[:9]
    times = {(r["dtype"], r["implementation"]): r for r in results.read([path]) if r["metric"] == "time"}
    arms = ("floor2", "fastft", f"floor@{label}", f"fastft@{label}")
    assert times.keys() == {*(("fp32", arm) for arm in arms), *(("bf16", arms[i]) for i in (0, 1, 3))}
    theirs, skipped = times["fp32", arms[3]], times["bf16", arms[3]]
    assert theirs["backend"] == "reference" and times["fp32", "fastft"]["backend"] != "reference"
    assert theirs["status"] == "quick" and float(theirs["lo"]) <= float(theirs["ratio"]) <= float(theirs["hi"])
    assert skipped["status"] == "skipped" and "TypeError: float32 alone" in skipped["note"] and not skipped["ratio"]
    (change,) = (r for r in results.read([path]) if r["metric"] == runner.OVER_BASE)
    assert (change["implementation"], change["unit"], change["dtype"]) == ("fastft", f"x fastft@{label}", "fp32")
    assert f"LOOK   lora layer r=16 p=0 tiny fp32: fastft takes {float(change['ratio']):.3f}" in capsys.readouterr().out


def test_a_revision_that_does_not_import_is_said(tree, capfd):
    prepend(tree / "fastft" / "__init__.py", "raise SystemExit(7)\n")
    with pytest.raises(SystemExit) as error:
        run.main([*TINY, "--base", "HEAD"])
    assert error.value.code == 2 and "has ended, exit status 7" in capfd.readouterr().err


def test_checkouts_are_kept_and_their_bench_is_this_trees(tree, monkeypatch):
    assert tree.name.endswith(f"-cpu-torch{torch.__version__}"), "what native code is built against"
    assert (tree / "fastft" / "bench").resolve() == results.ROOT / "bench"
    assert {p.name for p in (tree / "fastft" / "lib").iterdir()} == {p.name for p in revision._native.LIB.glob("*.so")}
    assert [p.name for p in revision.CACHE.iterdir()] == [tree.name]
    monkeypatch.setattr(revision, "_copy_native", lambda tree: pytest.fail("it is there"))
    assert revision.checkout(revision.commit_of("HEAD"), "cpu") == tree


def test_a_build_that_fails_leaves_nothing_but_its_output(monkeypatch, tmp_path):
    if not results.in_checkout():
        pytest.skip("not a git checkout")
    monkeypatch.setattr(revision, "CACHE", tmp_path)
    monkeypatch.setattr(revision, "_same_native", lambda commit, device: False)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    commit = revision.commit_of("HEAD")
    with pytest.raises(RevisionError, match=f"doesn't build, see .*{commit[:12]}.log"):
        revision.checkout(commit, "cpu")
    assert [path.name for path in tmp_path.iterdir()] == [f"{commit[:12]}.log"]


def test_what_is_no_revision_is_refused(monkeypatch, tmp_path, capsys):
    if results.in_checkout():
        with pytest.raises(SystemExit) as error:
            run.main([*TINY, "--base", "nothing-of-that-name"])
        assert error.value.code == 2 and "no revision 'nothing-of-that-name'" in capsys.readouterr().err
    monkeypatch.setattr(results, "ROOT", tmp_path)
    with pytest.raises(RevisionError, match="needs a git checkout"):
        revision.commit_of("HEAD")


def test_native_sources_are_compared_with_those_of_the_commit(monkeypatch, tmp_path):
    def git(*args):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e@e", *args], check=True)

    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(revision._native, "LIB", tmp_path / "fastft" / "lib")
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc" / "a.cpp"
    source.write_text("1\n")
    (tmp_path / "CMakeLists.txt").write_text("\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = revision.commit_of("HEAD")
    assert revision._same_native(commit, "cpu")
    (tmp_path / "else.py").write_text("1\n")
    assert revision._same_native(commit, "cpu")
    source.write_text("2\n")
    assert not revision._same_native(commit, "cpu")
    source.write_text("1\n")
    (tmp_path / "csrc" / "b.cpp").write_text("1\n")
    assert not revision._same_native(commit, "cpu"), "not known to git, but built"
    (tmp_path / "csrc" / "cuda").mkdir()
    (tmp_path / "csrc" / "b.cpp").rename(tmp_path / "csrc" / "cuda" / "b.cu")
    assert revision._same_native(commit, "cpu") and not revision._same_native(commit, "cuda")
    library = tmp_path / "fastft" / "lib" / "libfastft_cpu_default.so"
    library.parent.mkdir(parents=True)
    library.touch()
    assert revision._same_native(commit, "cpu")
    os.utime(library, (1, 1))
    assert not revision._same_native(commit, "cpu"), "sources that were edited, built and taken back are newer"
    library.touch()
    monkeypatch.setattr(revision._native, "LIB", tmp_path / "else")
    assert not revision._same_native(commit, "cpu"), "FASTFT_LIB's libraries are of whatever sources"


class FakeBase:
    """Another revision whose samples `fixed_times` makes up."""

    ours, floor = "fastft@old", "floor@old"

    def __init__(self, status="ok", backend=""):
        self.status, self.backend = status, backend

    def offer(self, case):
        return {name: Measurement(name, self.status, backend=self.backend) for name in (self.floor, self.ours)}

    def samplers(self, group, found):
        return dict.fromkeys((self.floor, self.ours)) if "fastft" in group.runs and self.status == "ok" else {}


@pytest.mark.parametrize(
    "ours, old, floor, word", [(1.0, 1.1, 1.0, "FASTER"), (1.1, 1.0, 1.0, "SLOWER"), (1.0, 1.0, 1.0, "SAME"),
                               (1.1, 1.0, 1.12, "SAME"), (1.0, 1.1, 0.88, "SAME")]
)  # fmt: skip
def test_change_is_told_beyond_what_processes_differ(monkeypatch, ours, old, floor, word):
    fixed_times(monkeypatch, **{"fastft": ours, "fastft@old": old, "floor@old": floor})
    case = make_case({"fastft": square}, target=2.0)
    found = runner.measure(case, "cpu", base=FakeBase())
    (fact,) = by_name(found)["fastft"].facts
    assert fact.metric == runner.OVER_BASE and fact.value == pytest.approx(ours / old)
    (said,) = results.losses(case, found)
    assert said.split()[0] == word and f"takes {ours / old:.3f}" in said and "of fastft@old's time" in said
    assert by_name(found)["fastft@old"].ratio.median == pytest.approx(old) and by_name(found)["fastft@old"].met is None


def test_quick_runs_and_wrong_results_there_judge_nothing(monkeypatch):
    fixed_times(monkeypatch, **{"fastft": 1.1})
    case = make_case({"fastft": square})
    assert results.losses(case, runner.measure(case, "cpu", rounds=2, base=FakeBase()))[0].startswith("LOOK")
    found = runner.measure(case, "cpu", base=FakeBase("wrong"))
    assert not by_name(found)["fastft"].facts and not any(
        runner.is_ours(m.implementation) for m in found if m.status != "ok"
    )


def test_a_revision_that_ran_without_kernels_gives_no_verdict(monkeypatch):
    fixed_times(monkeypatch, **{"fastft": 0.5})
    found = runner.measure(case := make_case({"fastft": square}), "cpu", base=FakeBase(backend="reference"))
    (said,) = results.losses(case, found)
    assert said.startswith("LOOK") and "no verdict: that ran on the PyTorch reference" in said
    assert by_name(found)["fastft"].facts[0].met is None, "nor does the row"


def test_samples_of_elsewhere_are_in_every_round_and_all_begin_untimed(monkeypatch):
    ran, pauses = [], []
    monkeypatch.setitem(rounds.MIN_SAMPLE, "cpu", 0.0)  # one call a sample
    monkeypatch.setattr(rounds.time, "sleep", pauses.append)
    runs = {name: [lambda name=name: ran.append(name)] for name in ("floor", "fastft")}
    there = {"fastft@old": lambda calls: ran.append("fastft@old") or 3.0 * calls}
    times = rounds.interleaved(runs, "cpu", 10, 0, there)
    in_rounds = ran[-50:]
    orders = [in_rounds[i : i + 5] for i in range(0, 50, 5)]
    assert all(sorted(order) == ["fastft", "fastft", "fastft@old", "floor", "floor"] for order in orders)
    assert len({tuple(order) for order in orders}) > 3 and len(pauses) == 30
    assert times["fastft@old"] == [3.0] * 10 and len(times["floor"]) == len(times["fastft"]) == 10
