"""Text from tokens as they come: only complete characters, and nothing that a stop string may still take back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from .characters import bytes_of, continues, unfinished

_CONTEXT = 6  # tokens before those to be decoded, so that the tokenizer sees a word's start as it does in whole texts
_WHOLE = 8  # more of them, where the first would be inside a character
_HELD = 32  # tokens; a character has at most 4, so what is still incomplete then never will be complete
_INCOMPLETE = "\ufffd"  # what decoders write for bytes that are no character


class Detokenizer:
    """Text of a growing sequence of tokens. The pieces that `push` and `flush` return add up to the text of all of them.

    A token may be part of a character (byte-level and byte-fallback tokenizers), and its text may depend on its neighbours
    (a leading space). So a short window is decoded with and without the new tokens, and the difference is new text, unless
    it ends in an incomplete character.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = ()):
        self._decoded = _decoder(tokenizer)
        ids = list(prompt_ids[-_CONTEXT - _WHOLE :])
        pieces = [bytes_of(tokenizer, self._decoded, token) for token in ids]
        first = max(len(ids) - _CONTEXT, 0)
        # Some decoders take all bytes in a row for wrong if the first ones are.
        while first > 0 and continues(pieces[first]):
            first -= 1
        # A prompt may end inside a character, which the first tokens then complete.
        count, alone = unfinished(pieces[first:])
        self._ids = ids[first:]
        self._read = len(self._ids) - count  # tokens whose text is out
        self._known = len(self._decode(self._ids[: self._read])) if alone else len(self._decode(self._ids)) - 1
        self._new = 0  # tokens since text last came out

    def push(self, token: int) -> str:
        """The text that is certain now ("" while a character is incomplete)."""
        self._ids.append(token)
        self._new += 1
        return self._advance(final=self._new >= _HELD)

    def flush(self) -> str:
        """What was held back, at the end of the sequence."""
        return self._advance(final=True) if self._new else ""

    def _advance(self, final: bool) -> str:
        text = self._decode(self._ids)
        if not final and text.endswith(_INCOMPLETE):
            return ""
        piece = text[self._known :]
        if piece or final:  # what was new is the next window's context
            self._ids = self._ids[self._read :]
            self._read = len(self._ids)
            self._known, self._new = len(self._decode(self._ids)), 0
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._decoded(ids) if ids else ""


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """The text of tokens without special ones, as the tokenizer's own `decode` has it: from the library below it, unless its
    class decodes in its own way (2 us a call instead of 8, twice a token)."""
    ways = [getattr(type(tokenizer), name, None) for name in ("decode", "_decode")]
    if hasattr(tokenizer, "backend_tokenizer") and all(
        getattr(way, "__module__", "").startswith("transformers.tokenization_utils") for way in ways
    ):
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=True)
    return partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopStrings:
    """Passes text on up to the first stop string, which may come in pieces. Text that could begin one is held back."""

    def __init__(self, stops: Sequence[str]):
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that no stop string can take back. Nothing more comes after a match (`matched`)."""
        if self.matched is not None:
            return ""
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:  # the one that is complete first, so that it does not matter in which pieces the text came
            _, at, self.matched = min(found)
            out, self._held = self._held[:at], ""
            return out
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def flush(self) -> str:
        """What was held back, at the end of the sequence."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
