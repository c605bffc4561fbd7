"""Ranks and alphas by name: PEFT's meaning, whether a key is looked up or tried."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fastft
from fastft.methods.name_patterns import NamePatterns, is_name

NAMES = ["a", "q", "b.q", "bxq", "a.b.q", "aab.q", "b.1.0", "b.110", "h.1.0.q", "h.110.q", "bb.q", "q.b"]
KEYS = [
    "q",
    "b.q",
    r"b\.q",
    "^b.q",
    "q$",
    "^a$",
    "1.0",
    r"h\.1.0.q",
    "h.1.0.q",
    ".q",
    "b|q",
    ".*q",
    r"h\..*q",
    "(b|a).q",
    "",
]


def as_peft(key, name):
    return re.match(rf"(.*\.)?({key})$", name) is not None


@given(st.lists(st.sampled_from(KEYS) | st.text("ab.q1^$\\", max_size=6), unique=True), st.sampled_from(NAMES))
@example(["b.q", r"b\.q", "q"], "bxq")
@example(["1.0"], "b.110")
@settings(deadline=None)
def test_the_first_key_that_matches_counts(keys, name):
    try:
        matching = [number for number, key in enumerate(keys) if as_peft(key, name)]
        patterns = NamePatterns("rank_pattern", {key: number for number, key in enumerate(keys)})
    except (re.error, ValueError):
        return
    assert patterns.get(name, None) == min(matching, default=None)
    assert patterns.idle([name]) == [key for number, key in enumerate(keys) if number not in matching]


def test_names_are_looked_up_and_not_tried():
    """As many keys as a model has modules, once by name, anchored, and escaped; tried one by one they took minutes."""
    names = [f"model.layers.{layer}.{module}" for layer in range(80) for module in ("q_proj", "v_proj", "mlp.up_proj")]
    for write in (str, lambda name: f"^{name}$", re.escape):
        lora = fastft.LoRA(r=4, rank_pattern={write(name): at + 1 for at, name in enumerate(names)})
        assert [lora.rank(name) for name in names] == list(range(1, len(names) + 1)) and lora.rank("lm_head") == 4
        assert not lora._ranks.expressions and lora._ranks.tries <= 6


def test_expressions_are_compiled_once(monkeypatch):
    lora = fastft.LoRA(r=4, rank_pattern={f"x{at}.*": 3 for at in range(600)}, alpha_pattern={".*q": 8})
    monkeypatch.setattr(re, "compile", None)
    monkeypatch.setattr(re, "match", None)
    assert (lora.rank("m.x599y"), lora.rank("m.q"), lora.scale("m.q")) == (3, 4, 2)


@pytest.mark.parametrize("key,named", [("q_proj", True), ("^a.b$", True), (r"a\.b", True), ("a.*", False), (r"\d", False)])
def test_what_is_a_name(key, named):
    assert is_name(key) is named


def test_keys_that_are_no_expressions():
    for key in ("q(", "(?i)q"):  # the second one only where PEFT puts it, behind the name's start
        with pytest.raises(ValueError, match="rank_pattern: .* is no regular expression"):
            fastft.LoRA(rank_pattern={key: 2})
