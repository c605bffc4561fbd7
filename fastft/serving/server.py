"""The HTTP server: an app over an engine, and uvicorn around it with a stop that finishes what was begun."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from .. import __version__
from .api import admin, completions, errors, status
from .api.config import ServerConfig
from .api.generation import Service
from .api.guard import ADMIN, PUBLIC, BodyLimit, Guard
from .connections import Connection

_SECOND_SIGNAL = 130
# After the drain's end clients are told that their answers end; then connections are cut.
_CUT_SECONDS = 2.0
_HEADER_BYTES = 32 * 1024


def create_app(engine: Any, config: ServerConfig, tokenizer: Any = None) -> FastAPI:
    """The app over a started engine (or anything with its methods). Its `state.service` can be told to stop.

    tokenizer: the engine's, if not given.
    """
    app = FastAPI(
        title="fastft",
        version=__version__,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
    )
    service = Service(engine, tokenizer if tokenizer is not None else engine.tokenizer, config)
    count_error = service.metrics.count_error
    app.state.service = service
    errors.install(app, count_error)
    for routes in (status.router(service), completions.router(service)):
        app.include_router(routes)
    if config.admin_token is not None:
        app.include_router(admin.router(service))
    # The last one added stands first: nobody without a key makes the server read a body.
    app.add_middleware(BodyLimit, limits=config.limits, count_error=count_error)
    app.add_middleware(Guard, config=config, count_error=count_error)
    app.openapi = lambda: _openapi(app, config)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI, config: ServerConfig) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemes = schema.setdefault("components", {}).setdefault("securitySchemes", {})
        for path, operations in schema["paths"].items():
            name = "AdminToken" if path.startswith(ADMIN) else "ApiKey"
            if path != PUBLIC and (name == "AdminToken" or config.api_keys):
                schemes[name] = {"type": "http", "scheme": "bearer"}
                for operation in operations.values():
                    operation["security"] = [{name: []}]
        app.openapi_schema = schema
    return app.openapi_schema


class Server(uvicorn.Server):
    """The first SIGTERM or SIGINT: no new connections and requests; what runs may finish within the drain time. The second
    ends the process at once. After a drain `run` returns, so that the process can exit with 0. It also returns when the
    engine has failed, which nothing mends: whoever watches the process can start another."""

    def __init__(self, app: FastAPI, *, on_stop: Callable[[int], None] = lambda running: None, access_log: bool = False):
        """on_stop: called with the number of unfinished sequences when the server begins to stop."""
        self.service: Service = app.state.service
        self._on_stop, self._drained = on_stop, None
        drain = self.service.config.drain_seconds
        super().__init__(
            uvicorn.Config(
                app,
                host=self.service.config.host,
                log_level="warning",
                access_log=access_log,
                server_header=False,
                h11_max_incomplete_event_size=_HEADER_BYTES,
                timeout_graceful_shutdown=max(1, round(drain + _CUT_SECONDS)),
                ws="none",
                http=Connection,
                lifespan="off",
            )
        )
        if access_log:  # log_level is this logger's too, and its lines are of level INFO
            logging.getLogger("uvicorn.access").setLevel(logging.INFO)

    def stop(self) -> None:
        """Begin to stop, from any thread."""
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        self.should_exit = self.should_exit or self.service.engine.failure is not None
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.stopping = True
        ending = asyncio.get_running_loop().call_later(self.service.config.drain_seconds, self.service.end_jobs)
        try:
            with contextlib.suppress(OSError):  # Ctrl-C in `fastft serve | tee log` ends the reader too
                self._on_stop(sum(job.unfinished for job in self.service.jobs))
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    @contextlib.contextmanager
    def capture_signals(self):
        # uvicorn's own sends the signal to the process again at the end, which then does not exit with 0.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.should_exit:
            os._exit(_SECOND_SIGNAL)
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises OSError."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    listener.set_inheritable(False)
    return listener
