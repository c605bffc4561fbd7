"""The lookup of launch configurations, on tables written here."""

import json

import pytest

from fastft.kernels import _config

SMALL, LARGE, WIDE = {"BLOCK": 16}, {"BLOCK": 128}, {"BLOCK": 64}


@pytest.fixture
def tables(tmp_path, monkeypatch):
    def write(device, table):
        (tmp_path / device).mkdir()
        (tmp_path / device / "toy.json").write_text(json.dumps(table))

    write(
        "default",
        {
            "op": [
                {"when": {"dtype": "a", "R": 16, "T": 1024}, "config": SMALL},
                {"when": {"dtype": "a", "R": 128, "T": 1024}, "config": LARGE},
                {"when": {"dtype": "b"}, "config": WIDE},
            ],
            "other": [{"when": {}, "config": SMALL}],
        },
    )
    write("sm_90", {"other": [{"when": {}, "config": LARGE}]})
    monkeypatch.setattr(_config, "CONFIGS", tmp_path)
    _config.table.cache_clear()
    _config._nearest.cache_clear()
    yield
    _config.table.cache_clear()
    _config._nearest.cache_clear()


@pytest.mark.parametrize("rank,expected", [(0, SMALL), (1, SMALL), (16, SMALL), (45, SMALL), (46, LARGE), (999, LARGE)])
def test_the_nearest_size_by_ratio_wins(tables, rank, expected):
    assert _config.lookup("default", "toy", "op", dtype="a", R=rank, T=1024, K=77) == expected


def test_strings_match_exactly(tables):
    assert _config.lookup("default", "toy", "op", dtype="b", R=16, T=1024) == WIDE
    with pytest.raises(LookupError, match="no configuration of op"):
        _config.lookup("default", "toy", "op", dtype="c", R=16, T=1024)


def test_a_device_replaces_what_its_own_file_lists(tables):
    assert _config.lookup("sm_90", "toy", "other") == LARGE
    assert _config.lookup("sm_90", "toy", "op", dtype="b", R=16, T=1) == WIDE
    assert _config.lookup("never_seen", "toy", "other") == SMALL


def test_the_caller_may_change_what_it_got(tables):
    _config.lookup("default", "toy", "other")["BLOCK"] = 1
    assert _config.lookup("default", "toy", "other") == SMALL
