"""The operator's routes. They name adapters of the server's own folder; no path, URL or weights ever come from a client."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Path, Query
from pydantic import BaseModel

from ...checkpoint.files import AdapterFileError
from ..requests import UnknownAdapter
from .errors import ApiError, responses
from .generation import Service

_SIDE_THREADS = 4
Name = Annotated[str, Path(pattern="^[A-Za-z0-9_-]{1,64}$", description="An adapter's folder name.")]
Timeout = Annotated[float, Query(ge=0, le=600, description="Seconds to wait at most.")]


class AdapterState(BaseModel):
    name: str
    error: str | None


class AdapterList(BaseModel):
    adapters: list[AdapterState]
    memory: dict[str, Any]


class Done(BaseModel):
    name: str
    action: str
    seconds: float
    freed_bytes: int | None = None


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/admin/adapters", tags=["admin"])
    memory = service.engine.adapters
    threads = anyio.CapacityLimiter(_SIDE_THREADS)
    described = responses(404, 409, 503)

    async def in_thread(work: Callable, *arguments: Any) -> Any:
        if memory is None:
            raise ApiError(404, "no_adapters", "The server was started without adapters; give it --adapters FOLDER.")
        return await anyio.to_thread.run_sync(lambda: work(*arguments), limiter=threads)

    async def act(action: str, name: str, work: Callable, *arguments: Any) -> dict[str, Any]:
        begun = time.monotonic()
        try:
            result = await in_thread(work, name, *arguments)
        except UnknownAdapter as error:
            raise ApiError(404, "adapter_not_found", f"{error}. GET /admin/adapters lists those of the folder.") from error
        except TimeoutError as error:
            raise ApiError(
                409, "timeout", f"{action} {name} did not finish in time: {error}. It can be repeated."
            ) from error
        except AdapterFileError as error:
            raise ApiError(
                422, "invalid_adapter", f"{error}. Put a right file in its place, then {action} it again."
            ) from error
        except FileNotFoundError as error:
            raise ApiError(404, "adapter_not_found", str(error)) from error
        except (MemoryError, RuntimeError, ValueError) as error:
            raise ApiError(409, f"{action}_failed", f"{action} {name}: {error}") from error
        freed = result if action == "unload" else None
        return {"name": name, "action": action, "seconds": round(time.monotonic() - begun, 3), "freed_bytes": freed}

    @routes.get("", response_model=AdapterList, responses=described)
    async def adapters():
        """Every adapter of the folder with why its last load failed, and the memory's numbers."""

        def read():
            names = sorted(memory.names())
            return {
                "adapters": [{"name": name, "error": _text(memory.error(name))} for name in names],
                "memory": memory.stats(),
            }

        return await in_thread(read)

    @routes.post("/{name}/load", response_model=Done, responses=described)
    async def load(name: Name, timeout: Timeout = 60.0):
        """Bring it into device memory before the first request asks for it."""
        return await act("load", name, memory and memory.load, timeout)

    @routes.post("/{name}/unload", response_model=Done, responses=described)
    async def unload(name: Name, timeout: Timeout = 60.0):
        """Wait for its running requests, free its memory, and say how many bytes that were."""
        return await act("unload", name, memory and memory.unload, timeout)

    @routes.post("/{name}/update", response_model=Done, responses=described)
    async def update(name: Name):
        """Read its folder again. Running requests finish on the old version, new ones get the new."""
        return await act("update", name, memory and memory.update)

    @routes.post("/{name}/pin", response_model=Done, responses=described)
    async def pin(name: Name):
        """Keep it in memory, however long nobody asks for it."""
        return await act("pin", name, memory and memory.pin)

    @routes.post("/{name}/unpin", response_model=Done, responses=described)
    async def unpin(name: Name):
        return await act("unpin", name, memory and memory.unpin)

    return routes


def _text(error: Any) -> str | None:
    return None if error is None else str(error)
