"""What stands before every route: who may ask, and how much may be sent."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers

from .config import Limits, ServerConfig, is_loopback
from .errors import ApiError, shown

PUBLIC = "/health"
ADMIN = "/admin"


class Guard:
    """ASGI middleware. Every path but /health needs an API key (where there are keys), and /admin the admin token, whether
    the path exists or not. A server without keys only answers to local names: a web page that points a name of its own at
    127.0.0.1 could otherwise use the server through its visitor's browser."""

    def __init__(self, app, config: ServerConfig, count_error):
        self.app, self.count_error = app, count_error
        self.keys = [_digest(key) for key in config.api_keys]
        self.admin = [_digest(config.admin_token)] if config.admin_token is not None else []

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            try:
                self._check(scope["path"], Headers(scope=scope))
            except ApiError as error:
                self.count_error(error.code)
                return await error.response()(scope, receive, send)
        elif scope["type"] != "lifespan":
            raise RuntimeError(f"{scope['type']} is not served")
        await self.app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        if path == PUBLIC:
            if headers.get("content-length", "0").strip("0") or "transfer-encoding" in headers:
                raise ApiError(413, "body_too_large", f"{PUBLIC} takes no body; send GET {PUBLIC} alone.")
            return
        if not self.keys:
            host = headers.get("host", "")
            name = host[: host.rfind(":")] if host.rpartition(":")[2].isdigit() else host
            if not is_loopback(name.lower()):
                raise ApiError(
                    403,
                    "host_not_allowed",
                    f"Given the Host {shown(host)}; a server without an API key only answers to localhost and addresses of "
                    "this machine alone (127.0.0.1). Start it with --api-key-file to use it under other names.",
                )
        admin = path == ADMIN or path.startswith(ADMIN + "/")
        if admin and not self.admin:
            raise ApiError(
                404, "not_found", "The server has no /admin routes; start it with --admin-token-file to get them."
            )
        wanted = self.admin if admin else self.keys
        if wanted and not _matches(headers.get("authorization", ""), wanted):
            given = (
                "no Authorization header" if "authorization" not in headers else "an Authorization header that is not valid"
            )
            what = "the admin token" if admin else "an API key of this server"
            raise ApiError(401, "invalid_api_key", f"Given {given}; send `Authorization: Bearer KEY` with {what}.")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _matches(header: str, wanted: Iterable[bytes]) -> bool:
    """Takes the same time whichever key it is, and wherever the first difference lies."""
    scheme, _, key = header.partition(" ")
    given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
    matches = [hmac.compare_digest(given, one) for one in wanted]
    return scheme.lower() == "bearer" and any(matches)


class BodyLimit:
    """ASGI middleware: reads the body before the app does, and stops as soon as it is too long, also where no Content-Length
    announces it, or takes too long to arrive. Refuses what is not sent as JSON: a web page may send anything else to a
    server of this machine without asking, through its visitor's browser."""

    def __init__(self, app, limits: Limits, count_error):
        self.app, self.limits, self.count_error = app, limits, count_error

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        try:
            body = await asyncio.wait_for(self._read(headers, receive), self.limits.body_seconds)
            if body:
                _check_type(headers.get("content-type", ""))
        except (ApiError, asyncio.TimeoutError) as caught:
            error = (
                caught
                if isinstance(caught, ApiError)
                else ApiError(
                    408,
                    "body_too_slow",
                    f"The body did not arrive within {self.limits.body_seconds:g} s; send the request again.",
                )
            )
            self.count_error(error.code)
            return await error.response()(scope, receive, send)
        if body is None:  # the client has gone
            return
        first = True

        async def replay():
            nonlocal first
            if first:
                first = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self.app(scope, replay, send)

    async def _read(self, headers: Headers, receive) -> bytes | None:
        encoding = headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise ApiError(
                415,
                "unsupported_encoding",
                f"Given Content-Encoding: {shown(encoding)}; send the body as it is, without one.",
            )
        announced = headers.get("content-length", "")
        if announced.isdigit() and int(announced[:20]) > self.limits.body_bytes:
            raise self._too_long(f"{announced[:20]} bytes")
        parts, length = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            length += len(parts[-1])
            if length > self.limits.body_bytes:
                raise self._too_long("more")
            if not message.get("more_body"):
                return b"".join(parts)

    def _too_long(self, given: str) -> ApiError:
        return ApiError(
            413,
            "body_too_large",
            f"The body has {given}; at most {self.limits.body_bytes} bytes are read. Send shorter or fewer prompts.",
        )


def _check_type(given: str) -> None:
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        what = f"Content-Type: {shown(given)}" if given else "no Content-Type"
        raise ApiError(422, "unsupported_type", f"Given {what}; send JSON with Content-Type: application/json.")
