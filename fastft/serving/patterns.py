"""Regular expressions in adapters' configs: matched against module names while everybody's requests wait for Python, so
those that can take long are refused before they are tried."""

from collections.abc import Iterable
from math import factorial

from ..methods.name_patterns import NamePatterns, is_name

try:
    from re import _parser as parser
except ImportError:  # Python 3.10
    import sre_parse as parser

# Of a name's 60 or so characters, k repeats that can end anywhere are tried in about 60^k / k! ways: 5 ms for four.
MOST_REPEATS, LONGEST = 4, 4096
# What is tried for one name: a model has up to some 20,000 modules. Plain names of one shape, however many, are one try.
MOST_TRIES, MOST_WAYS = 256, 60**4 // 24
_REPEATS = {"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"}


def slow_because(pattern: str) -> str | None:
    """Why a pattern may take long, or None. One that is no pattern is left to whoever compiles it."""
    if len(pattern) > LONGEST:
        return f"it has {len(pattern)} characters; at most {LONGEST} are tried"
    try:
        repeats = _repeats(parser.parse(pattern))
    except (parser.error, OverflowError, RecursionError):
        return None
    if repeats > MOST_REPEATS:
        return "it repeats what repeats or varies, or has more than four repeats of any length in a row"
    return None


def slow_together_because(patterns: Iterable[str]) -> str | None:
    """Why patterns of names, none of which takes long, may do so together, or None."""
    patterns = list(patterns)
    expressions = [pattern for pattern in patterns if not is_name(pattern)]
    if len(expressions) > MOST_TRIES:  # before any is compiled
        return f"it has {len(expressions)} regular expressions; at most {MOST_TRIES} are tried"
    if sum(60**k // factorial(k) for k in map(_repeats, map(parser.parse, expressions))) > MOST_WAYS:
        return "its regular expressions together have too many repeats of any length"
    tries = NamePatterns("", dict.fromkeys(patterns)).tries
    if tries > MOST_TRIES:
        return f"its names have {tries} different lengths and places of dots; at most {MOST_TRIES} are tried"
    return None


def _repeats(parsed) -> int:
    """How many repeats of any length follow each other at most; many more where one is inside another."""
    total = 0
    for operation, value in parsed:
        name = str(operation)
        if name in _REPEATS:
            _, most, body = value
            inside = _repeats(body) + _varies(body)
            total += inside if most == 1 else 1 if not inside else MOST_REPEATS + 1
        elif name == "BRANCH":
            total += max(map(_repeats, value[1]), default=0)
        else:  # groups, assertions, conditions: whatever patterns they hold
            total += sum(map(_repeats, _patterns(value)))
    return total


def _varies(parsed) -> int:
    """Does it match in several ways at one place?"""
    return int(any(str(op) == "BRANCH" or any(map(_varies, _patterns(value))) for op, value in parsed))


def _patterns(value):
    if isinstance(value, parser.SubPattern):
        return [value]
    return [p for part in value for p in _patterns(part)] if isinstance(value, tuple | list) else []
