"""What runs here and how it is: models, health, metrics."""

from __future__ import annotations

import asyncio
import time

import anyio
from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from ..requests import EngineStopped, QueueFull
from .errors import ErrorBody, logger, responses
from .generation import Service
from .schemas import Model, ModelList

_FRESH = 5.0  # seconds: a token, or a probe's answer, that recent tells that the engine works
_PROBE_SECONDS = 30.0
_BUSY_SECONDS = 60.0  # without a step although the queue is full


class Health(BaseModel):
    status: str
    reason: str | None = None


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["status"])
    probe = Probe(service)

    @routes.get("/health", response_model=Health, responses={413: {"model": ErrorBody}, 503: {"model": Health}})
    async def health():
        """Whether the engine produces tokens: it is asked for one, unless it has just produced some. Needs no key."""
        reason = await probe.reason()
        if reason is None:
            return {"status": "ok", "reason": None}
        return JSONResponse({"status": "failing", "reason": reason}, 503)

    @routes.get(
        "/metrics",
        response_class=Response,
        responses={**responses(), 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics():
        """For Prometheus. Needs an API key: the names of adapters are in it."""
        text = await anyio.to_thread.run_sync(service.metrics.text)
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    @routes.get("/v1/models", response_model=ModelList, responses=responses(503))
    async def models():
        """The base model and its adapters; each name can be given as `model`."""
        names = await anyio.to_thread.run_sync(service.engine.adapter_names)
        # An adapter of the base model's name, added since the start, can't be asked for.
        names = sorted({*names} - {service.config.model})
        return {"object": "list", "data": [_model(service, None), *(_model(service, name) for name in names)]}

    @routes.get("/v1/models/{model:path}", response_model=Model, responses=responses(404, 503))
    async def model(model: str):
        adapter = service.adapter(model)
        if adapter is not None and adapter not in await anyio.to_thread.run_sync(service.engine.adapter_names):
            raise service.unknown(adapter)
        return _model(service, adapter)

    return routes


def _model(service: Service, adapter: str | None) -> dict[str, object]:
    base = service.config.model
    return {
        "id": base if adapter is None else adapter,
        "object": "model",
        "created": service.started,
        "owned_by": "fastft",
        "root": base,
        "parent": None if adapter is None else base,
    }


class Probe:
    """One token from the base model through the whole engine. Those who ask meanwhile wait for the same answer, so that
    /health, which needs no key, can't be used to keep the engine busy."""

    def __init__(self, service: Service):
        self._service = service
        self._lock = asyncio.Lock()
        self._asked, self._reason = float("-inf"), None
        self._steps, self._stepped = -1, 0.0  # as many were seen, at that time

    async def reason(self) -> str | None:
        """Why the server can't be used now, or None."""
        if self._service.stopping:
            return "the server is stopping"
        reason = self._service.engine.healthy()  # costs nothing: an engine that has died is told of at once
        if reason is not None:
            return reason
        async with self._lock:
            if time.monotonic() - self._asked > _FRESH:
                self._reason = await self._ask()
                self._asked = time.monotonic()
            return self._reason

    async def _ask(self) -> str | None:
        if time.monotonic() - self._service.last_token < _FRESH:
            return None
        stepped = self._last_step()
        try:
            request = self._service.engine.submit([0], max_tokens=1)
        except QueueFull:
            quiet = time.monotonic() - stepped
            return None if quiet < _BUSY_SECONDS else f"the queue is full and the engine has made no step for {quiet:.0f} s"
        except EngineStopped as error:
            return str(error)
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        request.on_token(lambda token: loop.call_soon_threadsafe(ended.set) if token is None else None)
        try:
            await asyncio.wait_for(ended.wait(), _PROBE_SECONDS)
        except asyncio.TimeoutError:
            if self._last_step() > stepped:  # a long prompt stands before it
                return None
            return f"the engine has made no step within {_PROBE_SECONDS:g} s"
        finally:
            request.cancel()
        if request.finish_reason == "error":
            logger.error("the health probe failed: %s", request.error)
            return "the engine failed to produce a token; the server's log says why"
        return None

    def _last_step(self) -> float:
        """When the engine was first seen to have made as many steps as now: one that nobody asked anything makes none."""
        steps = self._service.engine.stats()["steps_total"]
        if steps != self._steps:
            self._steps, self._stepped = steps, time.monotonic()
        return self._stepped
