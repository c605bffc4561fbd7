"""`pytest bench/`: every family's cases, ours beside its peers in groups that can be saved and compared."""

import json

import pytest

from fastft.bench import results, run

pytest.importorskip("pytest_benchmark")
pytest.importorskip("transformers")
pytest.importorskip("peft")


def bench(*options):
    """What a run of its own prints, in this process, where all that takes long to import is there."""
    common = ["--bench-rounds=2", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
    return pytest.main([str(results.ROOT / "bench" / "test_families.py"), *common, *options])


def test_every_family_is_there(capsys):
    assert bench("--bench-shape=tiny-llama", "--collect-only") == 0
    ids = [line.split("[")[1] for line in capsys.readouterr().out.splitlines() if "::test_case[" in line]
    assert {family for family in run.families() if not any(test.startswith(f"{family}-") for test in ids)} == set()


def test_groups_are_saved_and_compared(tmp_path, capsys, monkeypatch):
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):  # a worker of pytest-xdist is not to time anything
        monkeypatch.delenv(name, raising=False)
    asked = [
        "--bench-shape=tiny",
        "--bench-dtype=fp32",
        "-k",
        "dora and not inference",
        f"--benchmark-storage=file://{tmp_path}",
    ]
    assert bench(*asked, "--benchmark-save=before") == 0
    (saved,) = tmp_path.rglob("*_before.json")
    found = {(one["group"], one["params"]["arm"]): one for one in json.loads(saved.read_text())["benchmarks"]}
    group = "dora DoRA layer r=16 tiny fp32"
    assert found.keys() == {(group, arm) for arm in ("floor", "fastft", "peft", "addmm")}
    assert all(one["stats"]["rounds"] == 2 and one["extra_info"]["moved"] > 0 for one in found.values())
    capsys.readouterr()
    assert bench(*asked, "--benchmark-compare") == 0
    printed = capsys.readouterr().out
    assert f"benchmark '{group}': 8 tests" in printed and "(0001_before)" in printed
