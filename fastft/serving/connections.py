"""uvicorn's connections with bounds on those that don't ask for anything: it waits for ever for a header's end, and counts
idle connections as requests, so that whoever opens enough of them makes it answer nobody."""

from __future__ import annotations

import asyncio
import resource
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from .api.errors import ApiError

HEADER_SECONDS = 15.0  # for a whole header, from the connection's beginning or the header's first byte on
UNREAD_SECONDS = 60.0  # for a client to take what it was sent, before it is sent more
MOST = 4096  # connections, and requests in progress
_OTHERS = 512  # files and sockets that the server may have open besides


def allow_connections() -> None:
    """Let the process open so many, where the system lets it: 1024 files, a common limit, would end before `MOST` do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST + _OTHERS if hard == resource.RLIM_INFINITY else min(MOST + _OTHERS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Connection(H11Protocol):
    """A connection of the server's. It is closed if a request's header takes too long, or its client takes nothing of an
    answer, the rest of which waits in memory; also, where there are too many connections and no other one has waited longer,
    while it has no request in progress (clients then open another)."""

    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _idle_since = 0.0

    @property
    def answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MOST:
            idle = [one for one in self.connections if one is not self and not one.answering]
            idle = [one for one in idle if not one.transport.is_closing()]
            if idle:
                min(idle, key=lambda one: one._idle_since).transport.close()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def handle_events(self) -> None:
        self.app = self.config.loaded_app if len(self.tasks) < MOST else self._refuse
        super().handle_events()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._idle_since = time.monotonic()
        if self.conn.trailing_data[0]:  # the next header has begun; where nothing has, uvicorn has a timer
            self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Something is to come, unless it has."""
        if self.answering:
            self._stop_watching()
        elif self._timer is None and not self.transport.is_closing():
            self._idle_since = time.monotonic()
            self._timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop_watching(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _refuse(self, scope: Any, receive: Any, send: Any) -> None:
        error = ApiError(
            503, "too_many_requests", f"{MOST} requests are in progress, as many as the server takes. Try again later."
        )
        self.config.app.state.service.metrics.count_error(error.code)
        await error.response()(scope, receive, send)
