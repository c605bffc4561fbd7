"""The operator's routes. They name adapters of the server's own folder; no path, URL or weights ever come from a client."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Path, Query
from pydantic import BaseModel

from ...checkpoint.files import AdapterFileError
from ..requests import AdaptersUnavailable, UnknownAdapter
from .errors import ApiError, responses, unavailable
from .generation import Service

_SIDE_THREADS = 4
Name = Annotated[str, Path(pattern="^[A-Za-z0-9_-]{1,64}$", description="An adapter's folder name.")]
Timeout = Annotated[float, Query(ge=0, le=600, description="Seconds to wait at most.")]


class AdapterState(BaseModel):
    name: str
    state: str
    digest: str | None = None
    device_bytes: int = 0
    requests: int = 0
    pinned: bool = False
    error: str | None


class AdapterList(BaseModel):
    adapters: list[AdapterState]
    memory: dict[str, Any]


class Done(BaseModel):
    name: str
    action: str
    seconds: float
    digest: str | None = None
    freed_bytes: int | None = None


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/admin/adapters", tags=["admin"])
    memory = service.engine.adapters
    threads = anyio.CapacityLimiter(_SIDE_THREADS)
    described = responses(404, 409, 503)

    async def in_thread(work: Callable, limiter: anyio.CapacityLimiter | None = None) -> Any:
        if memory is None:
            raise ApiError(404, "no_adapters", "The server was started without adapters; give it --adapters FOLDER.")
        return await anyio.to_thread.run_sync(work, limiter=limiter)

    def known(work: Callable, name: str, *arguments: Any) -> Any:
        if memory.state(name) == "on_disk" and name not in memory:
            raise UnknownAdapter(f"no adapter {name!r}")
        return work(name, *arguments)

    async def act(action: str, name: str, *arguments: Any) -> dict[str, Any]:
        begun = time.monotonic()
        try:
            # Those with a timeout may wait, and are not to hold up what does not.
            limiter = threads if arguments else None
            result = await in_thread(lambda: known(getattr(memory, action), name, *arguments), limiter)
        except Exception as error:
            raise _refusal(action, error) from error
        done = {"freed_bytes": result} if action == "unload" else {"digest": result}
        return {"name": name, "action": action, "seconds": round(time.monotonic() - begun, 3), **done}

    @routes.get("", response_model=AdapterList, responses=described)
    async def adapters():
        """Every adapter of the folder and of the memory, and the memory's numbers."""
        return await in_thread(lambda: _listed(memory))

    @routes.post("/{name}/load", response_model=Done, responses=described)
    async def load(name: Name, timeout: Timeout = 60.0):
        """Bring it into device memory before the first request asks for it."""
        return await act("load", name, timeout)

    @routes.post("/{name}/unload", response_model=Done, responses=described)
    async def unload(name: Name, timeout: Timeout = 60.0):
        """Wait for its running requests, free its memory, and say how many bytes that were."""
        return await act("unload", name, timeout)

    @routes.post("/{name}/update", response_model=Done, responses=described)
    async def update(name: Name, timeout: Timeout = 60.0):
        """Read its folder again. Running requests finish on the old version, new ones get the new."""
        return await act("update", name, timeout)

    @routes.post("/{name}/pin", response_model=Done, responses=described)
    async def pin(name: Name, timeout: Timeout = 60.0):
        """Load it and keep it in device memory, however long nobody asks for it."""
        return await act("pin", name, timeout)

    @routes.post("/{name}/unpin", response_model=Done, responses=described)
    async def unpin(name: Name):
        return await act("unpin", name)

    return routes


def _listed(memory: Any) -> dict[str, Any]:
    loaded = {one.name: one for one in memory.residents()}
    adapters = []
    for name in sorted({*memory.names(), *loaded}):
        entry = {"name": name, "state": memory.state(name), "error": memory.error(name)}
        if (one := loaded.get(name)) is not None:
            entry |= {"digest": one.digest, "device_bytes": one.bytes, "requests": one.leases, "pinned": one.pinned}
        adapters.append(entry)
    return {"adapters": adapters, "memory": memory.stats()}


def _refusal(action: str, error: Exception) -> Exception:
    """As an answer, what the memory says of what it can't do; anything else is an error of the server's own."""
    if isinstance(error, AdaptersUnavailable):
        return unavailable(error)
    if isinstance(error, UnknownAdapter | FileNotFoundError):
        return ApiError(404, "adapter_not_found", f"{error}. GET /admin/adapters lists those that there are.")
    if isinstance(error, TimeoutError):
        return ApiError(409, "timeout", f"{error}. Ask again, or with a larger timeout.")
    if isinstance(error, AdapterFileError):
        return ApiError(422, "invalid_adapter", f"{error}. When its files are right, {action} it again.")
    if isinstance(error, RuntimeError | ValueError):
        return ApiError(409, f"{action}_failed", f"{error}.")
    return error
