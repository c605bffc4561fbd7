"""What a caller of the engine holds: a request, its tokens as they come, and what became of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_log = logging.getLogger("fastft.serving")


class UnknownAdapter(KeyError):
    """No adapter of this name is in the adapter folder."""

    def __str__(self):
        return str(self.args[0])


class AdaptersUnavailable(UnknownAdapter):
    """Whether there is an adapter of this name can't be told: the adapter folder itself can't be read now."""


class QueueFull(RuntimeError):
    """As many requests wait as the engine allows."""


class EngineStopped(RuntimeError):
    """The engine was not started, was stopped, or its thread died."""


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen. temperature 0 is greedy; `seed` is always set, so a request can be repeated."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: bool = False


@dataclass(frozen=True)
class Completion:
    """What came of a request.

    Attributes:
        tokens: the produced token ids; the token that stopped it is the last one.
        finish_reason: "stop" (a stop token), "length" (max_tokens), "cancelled" or "error" (`error` says why).
        logprobs: the model's log-probability of each token, at temperature 1; None if not asked for.
        adapter, digest: the adapter and the content it had when the request was admitted; None without adapter.
    """

    prompt_ids: list[int]
    tokens: list[int]
    finish_reason: str
    logprobs: list[float] | None
    adapter: str | None
    digest: str | None
    error: Exception | None = None


class Request:
    """A request on its way. Iterate for its tokens as they come, or wait for `result()`.

    Attributes:
        id: unique in its engine. tokens, logprobs: what there is so far. finish_reason, error: None until it is finished.
        submitted, admitted, first_token, finished: time.monotonic() of each, None until then.
    """

    def __init__(self, request_id: str, prompt_ids: list[int], adapter: str | None, sampling: Sampling, cancel: Callable):
        self.id, self.prompt_ids, self.adapter, self.sampling = request_id, prompt_ids, adapter, sampling
        self.tokens: list[int] = []
        self.logprobs: list[float] | None = [] if sampling.logprobs else None
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.lease = None  # of the engine; its digest stays readable after it was given back
        self.submitted = time.monotonic()
        self.admitted = self.first_token = self.finished = None
        self._cancel = cancel
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._waiters = 0
        self._callbacks: list[Callable[[int | None], None]] = []

    def __iter__(self) -> Iterator[int]:
        """The tokens as they come. Ends with the request, whatever its end: see `finish_reason` and `error`."""
        at = 0
        while True:
            with self._lock:
                self._wait(lambda at=at: at < len(self.tokens) or self.finish_reason is not None, None)
                if at >= len(self.tokens):
                    return
                token = self.tokens[at]
            yield token
            at += 1

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end. Raises TimeoutError after `timeout` seconds; the request then goes on."""
        with self._lock:
            if not self._wait(lambda: self.finish_reason is not None, timeout):
                raise TimeoutError(f"request {self.id} has {len(self.tokens)} tokens after {timeout} s and goes on")
        digest = None if self.lease is None else self.lease.digest
        logprobs = None if self.logprobs is None else list(self.logprobs)
        return Completion(
            self.prompt_ids, list(self.tokens), self.finish_reason, logprobs, self.adapter, digest, error=self.error
        )

    def cancel(self) -> None:
        """Stop it, wherever it is. Its result says "cancelled", unless it was finished before. Returns at once."""
        self._cancel(self)

    def on_token(self, callback: Callable[[int | None], None]) -> None:
        """Call back with every token, also those that are there already, and with None at the end.

        From the engine's thread, which all requests wait for: pass it on (`loop.call_soon_threadsafe`) and return.
        """
        with self._lock:
            for token in self.tokens:
                callback(token)
            if self.finish_reason is not None:
                callback(None)
            else:
                self._callbacks.append(callback)

    def _produce(self, token: int, logprob: float) -> None:
        with self._lock:
            if self.finish_reason is not None:
                return
            if self.first_token is None:
                self.first_token = time.monotonic()
            self.tokens.append(token)
            if self.logprobs is not None:
                self.logprobs.append(logprob)
            self._tell(token)

    def _finish(self, reason: str, error: Exception | None = None) -> bool:
        """Whether this was its end: a request ends once."""
        with self._lock:
            if self.finish_reason is not None:
                return False
            self.finished = time.monotonic()
            self.error, self.finish_reason = error, reason
            self._tell(None)
            self._callbacks.clear()
            return True

    def _tell(self, token: int | None) -> None:
        for callback in self._callbacks[:]:
            try:
                callback(token)
            except Exception:  # a caller's mistake must not stop the others' requests
                _log.exception("a callback of request %s failed and is not called again", self.id)
                self._callbacks.remove(callback)
        if self._waiters:  # a step tells 32 requests in 20 us instead of 42
            self._changed.notify_all()

    def _wait(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        self._waiters += 1
        try:
            return self._changed.wait_for(condition, timeout)
        finally:
            self._waiters -= 1

    def __repr__(self):
        state = self.finish_reason or ("waiting" if self.admitted is None else "running")
        return f"<Request {self.id} adapter={self.adapter!r} {state}, {len(self.tokens)} tokens>"
