"""/v1/completions and /v1/chat/completions, whole and streamed."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from .errors import ApiError, logger, responses
from .generation import Job, Service
from .output import Delta, Token
from .prompts import Prompts
from .schemas import ChatRequest, ChatResponse, CompletionRequest, CompletionResponse

_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "A chunk or an error as JSON; [DONE] at the end."}},
    "required": ["data"],
}
_STREAM = {"text/event-stream": {"schema": _EVENT}}


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["generation"])
    prompts = Prompts(service)
    described = {**responses(404, 429, 503), 200: {"content": _STREAM, "description": "The answer; events with `stream`."}}

    @routes.post("/completions", response_model=CompletionResponse, responses=described)
    async def completions(body: CompletionRequest, request: Request):
        """Continue a text, or several."""
        adapter = service.adapter(body.model)
        tokens, sampling = await prompts.of_completion(body)
        await service.look(adapter)
        job = service.submit(tokens, body.n or 1, adapter, sampling)
        return await _answer(_Completion(body, job), request, service)

    @routes.post("/chat/completions", response_model=ChatResponse, responses=described)
    async def chat(body: ChatRequest, request: Request):
        """Answer a conversation, written as the model's chat template says."""
        adapter = service.adapter(body.model)
        tokens, sampling = await prompts.of_chat(body)
        await service.look(adapter)
        job = service.submit(tokens, body.n or 1, adapter, sampling)
        return await _answer(_Chat(body, job), request, service)

    return routes


class _Format:
    """Bodies of one kind of answer."""

    prefix, kind, chunk_kind = "", "", ""

    def __init__(self, body: Any, job: Job):
        self.body, self.job = body, job
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}

    def choice(self, index: int, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError

    def chunk_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        return self.choice(index, delta)

    def opening(self) -> list[dict[str, Any]]:
        """Choices of the first chunks."""
        return []

    def whole(self, deltas: list[Delta]) -> dict[str, Any]:
        choices = [self.choice(index, delta) for index, delta in enumerate(deltas)]
        ending = {"system_fingerprint": self.job.fingerprint(), "choices": choices, "usage": self.job.usage()}
        return {**self.head, "object": self.kind, **ending}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        ending = {"system_fingerprint": self.job.fingerprint(), "choices": choices, **more}
        return {**self.head, "object": self.chunk_kind, **ending}


class _Completion(_Format):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, delta: Delta) -> dict[str, Any]:
        logprobs = self._logprobs(delta.tokens) if self.job.sampling.logprobs else None
        return {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{token.text: token.logprob} for token in tokens] if self.body.logprobs else None,
            "text_offset": [token.offset for token in tokens],
        }


class _Chat(_Format):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, delta: Delta) -> dict[str, Any]:
        return self._choice(index, delta, message={"role": "assistant", "content": delta.text, "refusal": None})

    def chunk_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        return self._choice(index, delta, delta={"content": delta.text} if delta.text else {})

    def opening(self) -> list[dict[str, Any]]:
        first = {"role": "assistant", "content": ""}
        return [
            {"index": index, "delta": first, "logprobs": None, "finish_reason": None}
            for index in range(len(self.job.requests))
        ]

    def _choice(self, index: int, new: Delta, **text: Any) -> dict[str, Any]:
        logprobs = {"content": list(map(self._logprob, new.tokens)), "refusal": None} if self.job.sampling.logprobs else None
        return {"index": index, **text, "logprobs": logprobs, "finish_reason": new.finish_reason}

    def _logprob(self, token: Token) -> dict[str, Any]:
        one = {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode())}
        return {**one, "top_logprobs": [one] if self.body.top_logprobs else []}


async def _answer(form: _Format, request: Request, service: Service) -> Response:
    if form.body.stream:
        return _EventStream(form, service.metrics.count_error)
    try:
        deltas = await _unless_gone(request, _collect(form.job))
    finally:
        form.job.close("cancelled")
    if deltas is None:
        return Response(status_code=499)  # nobody reads it
    return JSONResponse(form.whole(deltas))


async def _collect(job: Job) -> list[Delta]:
    whole = [Delta() for _ in job.requests]
    texts: list[list[str]] = [[] for _ in job.requests]
    async for news in job.deltas():
        if news is not None:
            index, delta = news
            texts[index].append(delta.text)
            whole[index].tokens += delta.tokens
            whole[index].finish_reason = delta.finish_reason
    for delta, pieces in zip(whole, texts):
        delta.text = "".join(pieces)
    return whole


async def _unless_gone(request: Request, work: Any) -> Any:
    """The work's result; None if the client disconnects before, which ends the work."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _EventStream(StreamingResponse):
    """Server-sent events. However it ends, the job's sequences are cancelled."""

    def __init__(self, form: _Format, count_error: Callable[[str], None]):
        self._job = form.job
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(_events(form, count_error), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.close("cancelled")


async def _events(form: _Format, count_error: Callable[[str], None]) -> AsyncIterator[str]:
    options = form.body.stream_options
    usage = bool(options and options.include_usage)
    # Clients that ask for usage get the key in every chunk.
    more = {"usage": None} if usage else {}
    opening = form.opening()
    try:
        async for news in form.job.deltas():
            if news is None:
                yield ": waiting\n\n"
                continue
            # Not before the first token: only then it is known which version of the adapter answers.
            for choice in [*opening, form.chunk_choice(*news)]:
                yield _event(form.chunk([choice], **more))
            opening = []
        if usage:
            yield _event(form.chunk([], usage=form.job.usage()))
    except Exception as caught:
        error = caught
        if not isinstance(caught, ApiError):
            logger.exception("a stream failed")
            error = ApiError(500, "internal_error", "The server failed on this request; its log says why.")
        count_error(error.code)
        yield _event(error.body())
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    # In ASCII: some clients end lines also at Unicode's line separators.
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"
