"""One choice of an answer as it grows: which text goes out with which tokens."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .text import Detokenizer, StopStrings

LEAST_LOGPROB = -9999.0  # JSON has no -inf; what OpenAI writes


@dataclass
class Token:
    """text: what the token added ("" for the first parts of a character); offset: where that begins in the answer."""

    text: str
    offset: int
    logprob: float | None


@dataclass
class Delta:
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None


class Output:
    """Turns tokens into deltas. Their texts add up to the answer, and each token goes out once its text is out whole or in
    part; tokens of a stop string never do."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stops: Sequence[str]):
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        self._stops = StopStrings(stops)
        self._decoded = 0  # characters of all tokens
        self._sent = 0  # characters that went out
        self._waiting: deque[Token] = deque()
        self.count = 0
        self.finish_reason: str | None = None

    def push(self, token: int, logprob: float | None = None, ends: bool = False) -> Delta:
        """Its finish_reason is "stop" when a stop string is complete: the caller then cancels the engine's request.

        ends: it is the one at which the engine stops, which has no text, also where the tokenizer has one for it.
        """
        self.count += 1
        piece = "" if ends else self._detokenizer.push(token)
        if logprob is not None and not math.isfinite(logprob):
            logprob = LEAST_LOGPROB
        self._waiting.append(Token(piece, self._decoded, logprob))
        self._decoded += len(piece)
        return self._delta(self._stops.push(piece), "stop" if self._stops.matched is not None else None)

    def finish(self, reason: str) -> Delta:
        """What was held back, at the end of the engine's tokens."""
        piece = self._detokenizer.flush()
        if piece and self._waiting:
            self._waiting[-1].text += piece
        text = self._stops.push(piece)
        if self._stops.matched is not None:
            return self._delta(text, "stop")
        return self._delta(text + self._stops.flush(), reason)

    def _delta(self, text: str, reason: str | None) -> Delta:
        self.finish_reason = reason
        self._sent += len(text)
        tokens = []
        # Incomplete characters' first tokens have no text: they go with the token that completes them.
        while self._waiting and self._waiting[0].offset < self._sent:
            tokens.append(self._waiting.popleft())
        if reason is not None and self._stops.matched is None:
            tokens += self._waiting
        return Delta(text, tokens, reason)
