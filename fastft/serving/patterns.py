"""Regular expressions in adapters' configs: matched against module names while everybody's requests wait for Python, so
those that can take long are refused before they are tried."""

from collections.abc import Iterable
from functools import reduce
from itertools import product, takewhile
from math import factorial

from ..methods.name_patterns import NamePatterns, is_name

try:
    from re import _parser as parser
except ImportError:  # Python 3.10
    import sre_parse as parser

# Of a name's 60 or so characters, k repeats that can end anywhere are tried in about 60^k / k! ways: 5 ms for four, and a
# little is left for what stands beside them.
MOST_REPEATS, LONGEST = 4, 4096
# What is tried for one name: a model has up to some 20,000 modules. Plain names of one shape, however many, are one try.
MOST_TRIES, MOST_WAYS = 256, 600_000
_ONE_WAY, _TOO_MANY = {0: 1}, {MOST_REPEATS + 1: 1}
_REPEATS = {"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"}


def slow_because(pattern: str) -> str | None:
    """Why a pattern may take long, or None. One that is no pattern is left to whoever compiles it."""
    if len(pattern) > LONGEST:
        return f"it has {len(pattern)} characters; at most {LONGEST} are tried"
    try:
        ways = _number(_ways(parser.parse(pattern)))
    except (parser.error, OverflowError):
        return None
    except RecursionError:
        return "it is nested too deep"
    if ways > MOST_WAYS:
        return "it repeats what repeats or varies, or has too many repeats, optional parts or alternatives in a row"
    return None


def slow_together_because(patterns: Iterable[str]) -> str | None:
    """Why patterns of names, none of which takes long, may do so together, or None."""
    patterns = list(patterns)
    expressions = [pattern for pattern in patterns if not is_name(pattern)]
    if len(expressions) > MOST_TRIES:  # before any is compiled
        return f"it has {len(expressions)} regular expressions; at most {MOST_TRIES} are tried"
    if sum(_number(_ways(parser.parse(pattern))) for pattern in expressions) > MOST_WAYS:
        return "its regular expressions together have too many repeats, optional parts or alternatives"
    tries = NamePatterns("", dict.fromkeys(patterns)).tries
    if tries > MOST_TRIES:
        return f"its names have {tries} different lengths and places of dots; at most {MOST_TRIES} are tried"
    return None


def _number(ways: dict[int, int]) -> int:
    return sum(count * 60**repeats // factorial(repeats) for repeats, count in ways.items())


def _ways(parsed) -> dict[int, int]:
    """In how many ways it can match at one place: {repeats of any length: ways in everything else, with so many of them}."""
    total = _ONE_WAY
    for operation, value in parsed:
        name = str(operation)
        if name in _REPEATS:
            least, most, body = value
            inside = _ways(body)
            if most == 1:
                total = _times(total, _plus(inside, {0: 1 - least}))
            elif inside != _ONE_WAY:
                return _TOO_MANY
            elif least != most:
                total = _times(total, {1: 1})
        elif name == "BRANCH":
            total = _times(total, _of_alternatives(value[1]))
        else:  # groups, assertions, conditions: whatever patterns they hold
            total = reduce(_times, map(_ways, _patterns(value)), total)
    return total


def _of_alternatives(alternatives) -> dict[int, int]:
    """One text can match several only where the first letters of one are those of the other and more."""
    found: dict[str, dict[int, int]] = {}
    for one in alternatives:
        letters = _first_letters(one)
        found[letters] = _plus(found.get(letters, {}), _ways(one))
    together = ([found[text[:end]] for end in range(len(text) + 1) if text[:end] in found] for text in found)
    return max((reduce(_plus, ways) for ways in together), key=_number)


def _first_letters(parsed) -> str:
    letters = takewhile(lambda item: str(item[0]) == "LITERAL", parsed)
    return "".join(chr(value) for _, value in letters).casefold()  # patterns may ignore case


def _plus(a: dict[int, int], b: dict[int, int]) -> dict[int, int]:
    return {repeats: a.get(repeats, 0) + b.get(repeats, 0) for repeats in a | b}


def _times(a: dict[int, int], b: dict[int, int]) -> dict[int, int]:
    total: dict[int, int] = {}
    for (i, x), (j, y) in product(a.items(), b.items()):
        repeats = min(i + j, MOST_REPEATS + 1)
        total[repeats] = total.get(repeats, 0) + x * y
    return total


def _patterns(value):
    if isinstance(value, parser.SubPattern):
        return [value]
    return [p for part in value for p in _patterns(part)] if isinstance(value, tuple | list) else []
