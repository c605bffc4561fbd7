import pytest
import torch

from fastft.bench import stats
from fastft.bench.stats import Interval


def synthetic(ratio, noise, rounds, seed):
    """Times of (arm, floor) whose drift is shared within a round and ten times the ratio's distance from 1."""
    g = torch.Generator().manual_seed(seed)
    drift = 1 + 0.5 * torch.rand(rounds, generator=g, dtype=torch.float64)
    own = 1 + noise * torch.randn(2, rounds, generator=g, dtype=torch.float64)
    return ratio * drift * own[0], drift * own[1]


def test_interval_covers_the_known_ratio_about_95_times_in_100():
    inside = 0
    for seed in range(100):
        found = stats.paired_ratio(*synthetic(1.05, 0.01, 40, seed), seed=seed)
        assert abs(found.median - 1.05) < 0.02
        assert found.lo <= found.median <= found.hi
        inside += found.lo <= 1.05 <= found.hi
    # The percentile bootstrap of a median covers a little less or more than it says: 3 sigma of 100 draws around 95 %.
    assert 88 <= inside <= 100


def test_pairing_removes_what_rounds_share():
    arm, floor = synthetic(1.05, 0.0, 40, 0)
    found = stats.paired_ratio(arm, floor)
    assert found.lo == pytest.approx(1.05) and found.hi == pytest.approx(1.05)
    # The same times in another order are no longer pairs.
    assert stats.paired_ratio(arm, floor.flip(0)).half_width > 0.03


def test_interval_is_repeatable_and_shrinks_with_rounds():
    few, many = (stats.paired_ratio(*synthetic(1.05, 0.02, n, 3)) for n in (10, 1000))
    assert many.half_width < few.half_width / 3
    assert many == stats.paired_ratio(*synthetic(1.05, 0.02, 1000, 3))


def test_what_is_kept_of_a_gain():
    """An arm 2 % over the floor keeps 1 / 1.02 of the floor's speed over a rival, whatever the rounds drift by."""
    arm, floor = synthetic(1.02, 0.001, 40, 0)
    rival = 1.8 * floor
    kept = stats.kept_gain(rival, arm, floor)
    assert kept.lo <= 1 / 1.02 <= kept.hi and kept.half_width < 0.002
    exact = stats.kept_gain(rival, floor * 1.25, floor)
    assert (exact.lo, exact.median, exact.hi) == pytest.approx((0.8, 0.8, 0.8))


@pytest.mark.parametrize(
    "arm, floor", [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([1.0, 0.0], [1.0, 1.0]), ([1.0, float("nan")], [1.0, 1.0])]
)
def test_times_that_are_none_are_refused(arm, floor):
    with pytest.raises(ValueError, match="times"):
        stats.paired_ratio(arm, floor)


@pytest.mark.parametrize(
    "floor, void",
    [
        (Interval(1.0, 0.99, 1.01), False),
        (Interval(1.0, 0.986, 1.014), False),
        (Interval(1.0, 0.98, 1.012), True),
        (Interval(1.03, 1.02, 1.04), True),  # narrow, but two equal arms differ
        (Interval(0.97, 0.96, 0.98), True),
        (Interval(1.012, 1.002, 1.022), False),
    ],
)
def test_void(floor, void):
    assert stats.is_void(floor) is void


def test_target_allows_half_the_width_of_the_floor():
    floor = Interval(1.0, 0.995, 1.005)
    assert stats.meets(1.03, Interval(1.02, 1.01, 1.0349), floor)
    assert not stats.meets(1.03, Interval(1.02, 1.01, 1.0351), floor)


def test_pooled_ratio():
    floor = [[1.0] * 98 + [2.0, 2.0], [1.0] * 98 + [4.0, 4.0]]
    arm = [[3 * t for t in block] for block in floor]
    found = stats.pooled_ratio(arm, floor, 0.99)
    assert (found.median, found.lo, found.hi) == (3, 3, 3), "blocks are resampled in pairs"
    slow = stats.pooled_ratio([[1.0] * 97 + [6.0] * 3, [1.0] * 100], [[1.0] * 100] * 2, 0.99)
    assert (slow.median, slow.lo, slow.hi) == (6, 1, 6)
    assert stats.pooled_ratio([[1.0], [5.0]], [[1.0], [1.0]], 0.5).median == 1
    for wrong in (([[1.0]], []), ([[1.0]], [[]]), ([], [])):
        with pytest.raises(ValueError, match="blocks"):
            stats.pooled_ratio(*wrong, 0.5)
