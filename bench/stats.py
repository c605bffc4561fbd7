"""Paired ratios, their interval, and the two verdicts: is this run worth anything, and is the target met."""

from dataclasses import dataclass

import torch

RESAMPLES = 2000
VOID_HALF_WIDTH = 0.015
MIN_ROUNDS = 40


@dataclass(frozen=True)
class Interval:
    """A median of paired ratios with its 95 % bootstrap interval."""

    median: float
    lo: float
    hi: float

    @property
    def half_width(self) -> float:
        return (self.hi - self.lo) / 2

    def __str__(self):
        return f"{self.median:.3f} [{self.lo:.3f}, {self.hi:.3f}]"


def paired_ratio(arm, floor, seed: int = 0) -> Interval:
    """Median over rounds of arm[i] / floor[i], seconds in the same round, with a percentile bootstrap over rounds.

    Pairing within a round cancels what drifts from round to round (clock, temperature, neighbours).

    Raises:
        ValueError: lengths differ, fewer than two rounds, or a time that is not positive and finite.
    """
    arm, floor = (torch.as_tensor(t, dtype=torch.float64) for t in (arm, floor))
    if arm.shape != floor.shape or arm.dim() != 1 or len(arm) < 2:
        raise ValueError(f"need two equally long lists of at least 2 times, got {list(arm.shape)} and {list(floor.shape)}")
    times = torch.cat((arm, floor))
    if not (torch.isfinite(times).all() and (times > 0).all()):
        raise ValueError("times must be positive and finite")
    ratios = arm / floor
    picks = torch.randint(len(ratios), (RESAMPLES, len(ratios)), generator=torch.Generator().manual_seed(seed))
    medians = ratios[picks].quantile(0.5, dim=1)
    lo, hi = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(ratios.quantile(0.5).item(), lo, hi)


def kept_gain(rival, arm, floor, seed: int = 0) -> Interval:
    """Of the speed that is to be had over a slower rival, how much the arm gets: (rival / arm) / (rival / floor), medians.

    Args:
        rival, arm, floor: seconds in the same rounds; the bootstrap resamples rounds, of all three together.
    """
    rival, arm, floor = (torch.as_tensor(t, dtype=torch.float64) for t in (rival, arm, floor))
    picks = torch.randint(len(rival), (RESAMPLES, len(rival)), generator=torch.Generator().manual_seed(seed))
    rounds = torch.cat((torch.arange(len(rival))[None], picks))  # the rounds as they were, then the resamples
    kept = (rival / arm)[rounds].quantile(0.5, dim=1) / (rival / floor)[rounds].quantile(0.5, dim=1)
    lo, hi = kept[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(kept[0].item(), lo, hi)


def is_void(floor: Interval) -> bool:
    """Whether a floor measured against itself says that this run measured the machine's noise.

    Void when its interval is wider than +-1.5 %, or when the whole of it lies further than that from 1: then two equal
    arms differ, and so would anything else.
    """
    return floor.half_width > VOID_HALF_WIDTH or floor.lo > 1 + VOID_HALF_WIDTH or floor.hi < 1 - VOID_HALF_WIDTH


def meets(target: float, arm: Interval, floor: Interval) -> bool:
    """Target met: the interval's upper end is at most the target plus half the floor/floor interval's width."""
    return arm.hi <= target + floor.half_width


def pooled_ratio(arm, floor, quantile: float, seed: int = 0) -> Interval:
    """A quantile of all times of an arm over that of the floor's, with a percentile bootstrap over pairs of blocks.

    Args:
        arm, floor: lists of blocks, each a list of seconds; arm[i] and floor[i] were measured next to each other.
    """
    if len(arm) != len(floor) or not arm or not all(map(len, [*arm, *floor])):
        raise ValueError("need equally many blocks of both, and times in each of them")
    picks = torch.randint(len(arm), (RESAMPLES, len(arm)), generator=torch.Generator().manual_seed(seed))
    times = torch.nn.functional.one_hot(picks, len(arm)).sum(1)  # how often a resample has each block
    times = torch.cat((torch.ones_like(times[:1]), times))  # first the blocks as they were
    ratios = _quantiles(arm, times, quantile) / _quantiles(floor, times, quantile)
    lo, hi = ratios[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(ratios[0].item(), lo, hi)


def _quantiles(blocks, times, quantile: float):
    """The quantile of the blocks' numbers, for each row of `times`, which says how often each block counts."""
    numbers, order = torch.cat([torch.as_tensor(block, dtype=torch.float64) for block in blocks]).sort()
    owner = torch.arange(len(blocks)).repeat_interleave(torch.tensor([len(block) for block in blocks]))[order]
    found = []
    for row in times:
        below = row[owner].cumsum(0)
        found.append(numbers[torch.searchsorted(below, quantile * below[-1])])
    return torch.stack(found)
