"""Values of modules by name or regular expression, as PEFT's rank_pattern and alpha_pattern give them."""

import re
from collections.abc import Iterable
from typing import Any

# A name, with PEFT's anchors or not, in which only dots mean something: any character, or with a backslash a dot.
_PLAIN = re.compile(r"(\^?)((?:[\w-]|\\?\.)+)\$?", re.ASCII)
_DOTS = re.compile(r"\\?\.")


def is_name(key: str) -> bool:
    """Whether it is looked up rather than tried as an expression."""
    return _PLAIN.fullmatch(key) is not None


class NamePatterns:
    """What to take for a module: the value of the first key that matches, where a key matches a name that is, or ends with
    a dot and, a match of it.

    A file may have a key for every module. Tried one by one, 1,000 keys for 21 modules took 13 s; so names among the keys
    are looked up, all of one length with dots at the same places at once, and expressions compiled once.

    Raises:
        ValueError: a key is no regular expression.
    """

    def __init__(self, option: str, values: dict[str, Any]):
        self._keys, self._values = list(values), list(values.values())
        # (length, places of dots that match any character, from the name's start alone) -> text -> numbers of keys
        self._plain: dict[tuple[int, tuple[int, ...], bool], dict[str, list[int]]] = {}
        self.expressions: dict[int, re.Pattern[str]] = {}
        self._found: dict[str, int | None] = {}
        for number, key in enumerate(self._keys):
            if plain := _PLAIN.fullmatch(key):
                dots = list(_DOTS.finditer(plain[2]))
                # Without the backslashes before it, a dot stands that much further left.
                wild = tuple(dot.start() - plain[2].count("\\", 0, dot.start()) for dot in dots if dot[0] == ".")
                text = plain[2].replace("\\", "")
                texts = self._plain.setdefault((len(text), wild, bool(plain[1])), {})
                texts.setdefault(text, []).append(number)
                continue
            try:
                re.compile(key)  # alone, for its own error
                self.expressions[number] = re.compile(rf"(.*\.)?({key})$")
            except re.error as error:
                raise ValueError(f"{option}: {key!r} is no regular expression: {error}") from error

    @property
    def tries(self) -> int:
        """How many things are tried for one name."""
        return len(self._plain) + len(self.expressions)

    def get(self, name: str, default: Any) -> Any:
        """The value for a module of this name."""
        if name not in self._found:
            self._found[name] = self._first(name)
        number = self._found[name]
        return default if number is None else self._values[number]

    def idle(self, names: Iterable[str]) -> list[str]:
        """The keys that match none of the names."""
        names = list(names)
        used = {number for name in names for number in self._named(name)}
        used.update(number for number, key in self.expressions.items() if any(map(key.match, names)))
        return [key for number, key in enumerate(self._keys) if number not in used]

    def _first(self, name: str) -> int | None:
        first = min(self._named(name), default=len(self._keys))
        for number, expression in self.expressions.items():
            if number > first:
                break
            if expression.match(name):
                return number
        return first if first < len(self._keys) else None

    def _named(self, name: str) -> Iterable[int]:
        """Numbers of the plain keys that match a name."""
        for (length, wild, whole), texts in self._plain.items():
            at = len(name) - length
            if at == 0 or (at > 0 and not whole and name[at - 1] == "."):
                text = name[at:]
                for place in wild:
                    text = f"{text[:place]}.{text[place + 1 :]}"
                yield from texts.get(text, ())
