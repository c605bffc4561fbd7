"""From an HTTP request to the engine's and back: tokens come from the engine's thread, answers leave the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio

from ...checkpoint.files import AdapterFileError
from ..folder import NAME
from ..requests import AdaptersUnavailable, EngineStopped, QueueFull, UnknownAdapter
from .config import ServerConfig
from .errors import ApiError, logger, shown, unavailable
from .mail import Courier, Mailbox
from .metrics import Metrics
from .output import Delta, Output

PING_SECONDS = 15.0


@dataclass(frozen=True)
class Sampling:
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stops: list[str]
    logprobs: bool
    stop_token_ids: tuple[int, ...] = ()


class Service:
    """What all routes share: the engine, the limits, and the jobs in progress."""

    def __init__(self, engine: Any, tokenizer: Any, config: ServerConfig):
        self.engine, self.tokenizer, self.config = engine, tokenizer, config
        self.metrics = Metrics(engine, config.limits.metric_models)
        self.started = int(time.time())
        self.last_token = 0.0  # time.monotonic()
        self.jobs: set[Job] = set()
        self.stopping = False
        self._courier: Courier | None = None
        self._looks = anyio.CapacityLimiter(8)  # of their own: what else is done in threads doesn't wait for a folder

    def courier(self) -> Courier:
        """That of the running event loop."""
        loop, courier = asyncio.get_running_loop(), self._courier
        if courier is None or courier.loop is not loop:
            courier = self._courier = Courier(loop)
        return courier

    def adapter(self, model: str) -> str | None:
        """The adapter that clients call `model`, if there is one; None for the base model.

        Raises:
            ApiError: 404, no adapter can have this name.
        """
        if model == self.config.model:
            return None
        if NAME.fullmatch(model):
            return model
        raise self.unknown(model)

    def unknown(self, model: str) -> ApiError:
        return ApiError(
            404,
            "model_not_found",
            f"There is no model {shown(model)}. GET /v1/models lists those that there are; the base model is "
            f"{self.config.model!r}.",
            "model",
        )

    async def look(self, adapter: str | None) -> None:
        """Whether there is such an adapter, before `submit`. In a thread: a folder on a network may take seconds, in which
        others are answered.

        Raises:
            ApiError: 404, there is none; 503, it can't be told.
        """
        if adapter is None:
            return
        try:
            await anyio.to_thread.run_sync(self.engine.look, adapter, limiter=self._looks)
        except AdaptersUnavailable as error:
            raise unavailable(error) from error
        except UnknownAdapter as error:
            raise self.unknown(adapter) from error

    def submit(self, prompts: Sequence[list[int]], choices: int, adapter: str | None, sampling: Sampling) -> Job:
        """All sequences of one HTTP request, or none of them, after `look`.

        Raises:
            ApiError: 404, there is no such adapter; 429 or 503, the engine takes no more requests now.
        """
        if self.stopping:
            raise ApiError(503, "stopping", "The server is stopping and takes no new requests.")
        limits = self.config.limits
        running = sum(job.unfinished for job in self.jobs)
        if running + len(prompts) * choices > limits.sequences:
            raise ApiError(
                429, "too_many_requests", f"{running} sequences are in progress, of {limits.sequences}. Try again later."
            )
        adapters = {job.adapter for job in self.jobs if job.unfinished} - {None}
        if adapter is not None and adapter not in adapters and len(adapters) >= limits.adapters:
            raise ApiError(
                429,
                "too_many_adapters",
                f"Requests for {len(adapters)} different adapters are in progress, as many as are allowed at a time. "
                "Try again later.",
                "model",
            )
        job = Job(self, adapter, sampling)
        try:
            for prompt in prompts:
                for choice in range(choices):
                    job.add(prompt, choice)
        except QueueFull as error:
            job.close("rejected")
            raise ApiError(429, "queue_full", f"The queue is full: {error}.") from error
        except EngineStopped as error:
            job.close("rejected")
            raise ApiError(503, "engine_stopped", f"The engine takes no requests: {error}.") from error
        except AdaptersUnavailable as error:
            job.close("rejected")
            raise unavailable(error) from error
        except UnknownAdapter as error:
            job.close("rejected")
            raise self.unknown(str(adapter)) from error
        except ValueError as error:
            job.close("rejected")
            raise ApiError(422, "invalid_value", f"The engine can't run this request: {error}.") from error
        except BaseException:
            job.close("error")
            raise
        return job

    def end_jobs(self) -> None:
        """End what is still in progress; its clients are told."""
        for job in list(self.jobs):
            job.end()


class Job:
    """The sequences of one HTTP request."""

    def __init__(self, service: Service, adapter: str | None, sampling: Sampling):
        self.adapter, self.sampling = adapter, sampling
        self.requests: list[Any] = []
        self.outputs: list[Output] = []
        self.prompt_tokens = 0
        self._service = service
        self._metrics: Any = None
        self._mail, courier = Mailbox(), service.courier()
        self._post = partial(courier.put, self._mail)
        self._open: set[int] = set()
        self._last: list[float] = []
        self._lease: Any = None
        service.jobs.add(self)

    def add(self, prompt: list[int], choice: int) -> None:
        sampling, index = self.sampling, len(self.requests)
        seed = None if sampling.seed is None else (sampling.seed + choice) % 2**63
        submitted = time.monotonic()
        output = Output(self._service.tokenizer, prompt, sampling.stops)  # may fail, when there is nothing to cancel yet
        request = self._service.engine.submit(
            prompt,
            adapter=self.adapter,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed,
            stop_token_ids=sampling.stop_token_ids,
            logprobs=sampling.logprobs,
            looked=True,
        )
        self._metrics = self._metrics or self._service.metrics.of(self.adapter or self._service.config.model)
        self.requests.append(request)
        self.outputs.append(output)
        self._open.add(index)
        self._last.append(submitted)
        if choice == 0:
            self.prompt_tokens += len(prompt)
            self._metrics.prompt_tokens.inc(len(prompt))
        request.on_token(lambda token: self._post((index, token, time.monotonic())))

    @property
    def unfinished(self) -> int:
        """Sequences that the engine has to do with; not those whose answers only wait for a client that does not read."""
        return sum(request.finish_reason is None for request in self.requests)

    async def deltas(self) -> AsyncIterator[tuple[int, Delta] | None]:
        """(choice, what is new of it), until each has its finish_reason; None after PING_SECONDS without news.

        Raises:
            ApiError: a sequence failed, or the server stops. The other sequences are cancelled.
        """
        taken = [0] * len(self.requests)
        try:
            while self._open:
                items = await self._mail.take(PING_SECONDS)
                if not items:
                    yield None
                for index, token, at in items:
                    if index is None:
                        raise ApiError(503, "stopping", "The server stopped before the answer was complete.")
                    if index not in self._open:
                        continue
                    if token is None:
                        yield index, self._finish(index, at)
                        continue
                    self._measure(index, taken[index], at)
                    logprob = self.requests[index].logprobs[taken[index]] if self.sampling.logprobs else None
                    taken[index] += 1
                    ends = token in self.requests[index].sampling.stop_token_ids
                    delta = self.outputs[index].push(token, logprob, ends)
                    if delta.finish_reason is not None:
                        self.requests[index].cancel()
                        self._ended(index, "stop", at)
                    if delta.text or delta.tokens or delta.finish_reason:
                        yield index, delta
        finally:
            self.close("cancelled")

    def end(self) -> None:
        self._post((None, None, 0.0))

    def close(self, reason: str) -> None:
        """Cancel what still runs; it is counted with this reason."""
        for index in list(self._open):
            self.requests[index].cancel()
            self._ended(index, reason, time.monotonic())
        self._service.jobs.discard(self)

    def usage(self) -> dict[str, int]:
        completion = sum(output.count for output in self.outputs)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        }

    def fingerprint(self) -> str | None:
        """The start of the digest of the adapter that answered: of one choice, the same in all chunks."""
        self._lease = self._lease or next((request.lease for request in self.requests if request.lease is not None), None)
        return None if self._lease is None else self._lease.digest[:16]

    def _finish(self, index: int, at: float) -> Delta:
        request = self.requests[index]
        reason = request.finish_reason
        if reason in ("stop", "length"):
            self._ended(index, reason, at)
            return self.outputs[index].finish(reason)
        self._ended(index, reason, at)
        if reason == "cancelled":
            raise ApiError(503, "cancelled", "The engine ended this request before its answer was complete.")
        raise self._failure(request.id, request.error)

    def _failure(self, request: str, error: Exception) -> ApiError:
        """For the client, who learns nothing of files and devices; the log gets the rest."""
        logger.error("%s of %s failed: %s", request, self.adapter or "the base model", error)
        if isinstance(error, AdaptersUnavailable):
            return unavailable(error)
        if isinstance(error, UnknownAdapter):  # its folder was removed meanwhile
            return self._service.unknown(str(self.adapter))
        if isinstance(error, AdapterFileError):
            message = f"The adapter {self.adapter} can't be loaded; the server's log says why."
            return ApiError(503, "adapter_unavailable", message)
        if isinstance(error, EngineStopped):
            return ApiError(503, "engine_stopped", "The engine stopped before the answer was complete. Try again later.")
        if isinstance(error, FloatingPointError):
            message = "The model's output is not finite for this request: try the base model, or another adapter."
            return ApiError(500, "not_finite", message)
        return ApiError(500, "engine_error", "The engine failed on this request; the server's log says why.")

    def _measure(self, index: int, count: int, at: float) -> None:
        (self._metrics.inter_token if count else self._metrics.first_token).observe(at - self._last[index])
        self._last[index] = self._service.last_token = at
        self._metrics.tokens.inc()

    def _ended(self, index: int, reason: str, at: float) -> None:
        self._open.discard(index)
        self._metrics.seconds.observe(max(0.0, at - self.requests[index].submitted))
        self._metrics.ended(reason)
