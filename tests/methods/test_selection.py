"""The choice of units: counts, nesting, multiples, seeds, ties."""

import re

import pytest
import torch

from fastft.methods.selection import choose, wanted_slices
from fastft.methods.units import Coupled, UnitSlice


def ffn(name, count, *roles):
    made = {role: UnitSlice(f"{name}.{role}", "columns" if role == "down" else "rows", 1) for role in ("down", *roles)}
    return Coupled(name, "ffn", count, made)


def attention(name, count, size=4):
    slices = {"o": UnitSlice(f"{name}.o", "columns", 2 * size), "v": UnitSlice(f"{name}.v", "rows", size)}
    return Coupled(name, "attention", count, slices)


BLOCKS = [ffn("a", 40, "up"), attention("aa", 8), ffn("b", 50, "up"), attention("bb", 8), ffn("c", 70, "up")]


def pick(ratios, structures=BLOCKS, scores=None, largest=False, multiple=1, seed=0):
    chosen = choose(structures, ratios, scores, largest=largest, multiple=multiple, seed=seed)
    counts = {s.slices[role].module: s.count for s in structures for role in s.slices}
    for module, units in chosen.items():
        assert units.dtype == torch.int64 and (units.diff() > 0).all() and len(units)
        assert units[0] >= 0 and units[-1] < counts[module]
    return {module: units.tolist() for module, units in chosen.items()}


def total(chosen, role):
    return sum(len(units) for module, units in chosen.items() if module.endswith(f".{role}"))


@pytest.mark.parametrize("ratio", [0.01, 0.03, 0.1, 0.5, 1.0])
def test_counts_are_fractions_of_the_whole_model(ratio):
    chosen = pick({"down": ratio, "v": 0.25})
    assert total(chosen, "down") == round(160 * ratio) and total(chosen, "v") == 4
    assert total(chosen, "up") == total(chosen, "o") == 0
    assert pick({"down": 0.0, "up": 0}) == {}


def test_the_seed_alone_decides_a_random_choice():
    ratios = {"down": 0.2, "o": 0.5}
    first = pick(ratios)
    torch.manual_seed(5)
    assert pick(ratios) == first != pick(ratios, seed=1)
    state = torch.random.get_rng_state()
    pick(ratios)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {m: u for m, u in first.items() if m.endswith("down")} == pick({"down": 0.2})  # a family has its own ranking
    # On every machine the same, so that ranks agree and a file's units can be told from its seed.
    assert {module: len(units) for module, units in pick({"down": 0.1}, seed=3).items()} == {
        "a.down": 5,
        "b.down": 4,
        "c.down": 7,
    }
    assert pick({"o": 0.25}, seed=3) == {"aa.o": [5, 6], "bb.o": [1, 2]}


@pytest.mark.parametrize("multiple", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", range(12))
def test_a_smaller_ratio_is_part_of_a_larger_one(multiple, seed):
    for small, large in ((0.06, 0.08), (0.1, 0.3), (0.4, 0.45), (0.7, 1.0)):
        for ratios in ({"down": small, "up": large}, {"down": large, "up": small}):
            chosen = pick(ratios, multiple=multiple, seed=seed)
            lesser, greater = sorted(("down", "up"), key=ratios.get)
            for block in "abc":
                assert set(chosen.get(f"{block}.{lesser}", ())) <= set(chosen.get(f"{block}.{greater}", ()))
            # 40, 50 and 70 units: with multiple=4 only 48 and 68 of the latter can train.
            most = sum(n // multiple * multiple for n in (40, 50, 70))
            for role, ratio in ratios.items():
                assert total(chosen, role) == min(round(160 * ratio) // multiple * multiple, most)
                assert all(len(units) % multiple == 0 for units in chosen.values())


def test_one_ratio_gives_the_same_units_to_all_slices():
    chosen = pick({"down": 0.2, "up": 0.2}, multiple=4)
    assert all(chosen[f"{block}.down"] == chosen[f"{block}.up"] for block in "abc")


def test_scores_rank_over_all_layers_and_ties_go_to_the_first():
    scores = {s.key: torch.zeros(s.count) for s in BLOCKS}
    scores["b:ffn"] += 1
    scores["c:ffn"][[3, 60]] = torch.tensor([3.0, 2.0])
    best = {"largest": True, "scores": scores}
    assert pick({"down": 2 / 160}, **best) == {"c.down": [3, 60]}
    assert pick({"down": 4 / 160}, **best) == {"b.down": [0, 1], "c.down": [3, 60]}
    assert pick({"down": 3 / 160}, scores=scores) == {"a.down": [0, 1, 2]}
    assert pick({"v": 0.2}, **best) == pick({"v": 0.2}, scores=scores) == {"aa.v": [0, 1, 2]}


def test_largest_remainders():
    """7, 6 and 3 of the 16 best: with multiple=4 the layers get 4, 4, 0 at once, and two steps go to the remainders 3, 3."""
    scores = {s.key: torch.arange(s.count).float() for s in BLOCKS}
    for key, best in (("a", 7), ("b", 6), ("c", 3)):
        scores[f"{key}:ffn"][best:] += 100
    assert pick({"down": 0.1}, scores=scores) == {"a.down": [*range(7)], "b.down": [*range(6)], "c.down": [*range(3)]}
    chosen = pick({"down": 0.1}, scores=scores, multiple=4)
    assert {module: len(units) for module, units in chosen.items()} == {"a.down": 8, "b.down": 4, "c.down": 4}
    assert all(units == [*range(len(units))] for units in chosen.values())
    small = [ffn("a", 6), ffn("b", 9)]  # a's remainder is the larger, but it has no room
    scores = {"a:ffn": torch.zeros(6), "b:ffn": torch.arange(1, 10).float()}
    assert pick({"down": 8 / 15}, small, scores, multiple=4) == {"a.down": [0, 1, 2, 3], "b.down": [0, 1, 2, 3]}


def test_a_fused_layer_counts_up_after_gate():
    slices = {
        "down": UnitSlice("down", "columns", 1),
        "up": UnitSlice("both", "rows", 1, 10),
        "gate": UnitSlice("both", "rows", 1),
    }
    structures = [Coupled("m", "ffn", 10, slices)]

    def made(**ratios):
        chosen = choose(structures, ratios, {"m:ffn": torch.arange(10.0)}, largest=False, multiple=1, seed=0)
        return {
            module: wanted_slices(structures, ratios)[module].features(units).tolist() for module, units in chosen.items()
        }

    assert made(up=0.2) == {"both": [10, 11]}
    assert made(gate=0.2) == {"both": [0, 1]}
    assert made(up=0.3, gate=0.2, down=0.1) == {"both": [0, 1, 10, 11, 12], "down": [0]}


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("role", ["down", "v"])
def test_the_smallest_ratio_that_gives_one(role, multiple):
    with pytest.raises(
        ValueError, match=f"{role}: 0.0001 of .* less than {'one' if multiple == 1 else 'multiple=8'}"
    ) as error:
        pick({role: 0.0001}, multiple=multiple)
    least = float(re.search(r"gives one is (\S+)$", str(error.value))[1])
    assert total(pick({role: least}, multiple=multiple), role) == multiple
    with pytest.raises(ValueError, match="the smallest"):
        pick({role: least * 0.999}, multiple=multiple)


@pytest.mark.parametrize(
    "ratios,options,message",
    [
        ({"gate": 0.5}, {}, "gate: 0.5, but there are no units with a 'gate' slice$"),
        ({"v": 0.5}, {"structures": BLOCKS[::2]}, "no units with a 'v' slice; with grouped-query attention"),
        ({"o": 1.0}, {"multiple": 16}, "multiple=16 yields no unit at all: no layer has more than 8"),
        ({"up_proj": 0.5}, {}, "a ratio for 'up_proj'; there are down, up, gate, o, v"),
        ({"up": 1.5}, {}, "the ratio for 'up' is 1.5"),
        ({"up": "0.5"}, {}, "the ratio for 'up' is '0.5'"),
        ({"up": 0.5}, {"multiple": 0}, "multiple=0"),
        ({"up": 0.5}, {"scores": {"a:ffn": torch.zeros(40)}}, "the scores of 'b:ffn' are missing"),
        ({"up": 0.5}, {"scores": {"a:ffn": torch.zeros(4)}}, r"'a:ffn' are of shape \[4\]; \[40\] are needed"),
        ({"up": 0.5}, {"scores": {"a:ffn": torch.full((40,), torch.nan)}}, "'a:ffn' are not finite"),
    ],
)
def test_refused_choices(ratios, options, message):
    with pytest.raises(ValueError, match=message):
        pick(ratios, **options)
