"""Errors as OpenAI's clients know them: a status, and a body that says what was given, what is supported, what to do."""

from __future__ import annotations

import logging
import reprlib
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ..requests import AdaptersUnavailable
from .schemas import NEUTRAL

logger = logging.getLogger("fastft.serving")
RETRY_SECONDS = "1"
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxlong = _SHOWN.maxother = 80
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class ApiError(Exception):
    """Ends one HTTP request with a status and OpenAI's error body; nothing else is touched."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        # Names and texts of clients may hold what UTF-8 can't carry.
        message = self.message.encode("utf-8", "backslashreplace").decode()
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {"retry-after": RETRY_SECONDS} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status in (408, 413, 415):  # the rest of the body is not read
            headers["connection"] = "close"
        return JSONResponse(self.body(), self.status, headers=headers)


def unavailable(error: AdaptersUnavailable) -> ApiError:
    """For the client, who learns nothing of folders; the log gets the rest."""
    logger.error("%s", error)
    return ApiError(
        503,
        "adapters_unavailable",
        "The server can't read its adapter folder now; the base model and adapters that are loaded go on answering. "
        "Try again later.",
    )


def shown(value: Any) -> str:
    """What a client gave, short and safe for a message."""
    # Of lists and objects a few entries: writing millions out takes a second in which nobody is answered.
    text = ascii(value) if isinstance(value, str | int | float) else ascii(_SHOWN.repr(value))[1:-1]
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries of the statuses a route may answer with, beside those of every route."""
    return {status: {"model": ErrorBody} for status in sorted({400, 401, 408, 413, 415, 422, 500, *statuses})}


def install(app: FastAPI, count_error) -> None:
    """count_error(code): told of every error that is answered."""

    def answer(error: ApiError) -> JSONResponse:
        count_error(error.code)
        return error.response()

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError):
        return answer(error)

    @app.exception_handler(AdaptersUnavailable)
    async def no_folder(_: Request, error: AdaptersUnavailable):
        return answer(unavailable(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError):
        return answer(_validation_error(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException):
        code = {404: "not_found", 405: "method_not_allowed", 400: "bad_request"}.get(error.status_code, "http_error")
        message = f"{request.method} {shown(request.url.path)}: {error.detail}."
        if error.status_code == 404:
            message = f"No route {shown(request.url.path)}. GET /openapi.json lists the routes of this server."
        elif error.status_code == 400:
            message = _unreadable(error.__cause__)
        response = answer(ApiError(error.status_code, code, message))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception):
        logger.error("%s %s failed: %r", request.method, request.url.path, error)
        return answer(ApiError(500, "internal_error", "The server failed on this request; its log says why."))


def _unreadable(cause: BaseException | None) -> str:
    """What FastAPI's answer to a body that it can't parse keeps to itself."""
    if isinstance(cause, UnicodeDecodeError):
        return f"The body is not UTF-8 ({cause.reason} at byte {cause.start}); send JSON in UTF-8."
    if isinstance(cause, RecursionError):
        return "The body is JSON that can't be read: it is nested too deep; nest fewer lists and objects."
    return "The body is JSON that can't be read: a number has too many digits; give a shorter one."


def _validation_error(error: RequestValidationError) -> ApiError:
    problems = error.errors()
    first = problems[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "invalid_json", f"The body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}.")
    lines = [_problem(problem) for problem in problems[:5]]
    more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
    path = first["loc"][1:]
    return ApiError(422, "invalid_value", "; ".join(dict.fromkeys(lines)) + more, _named(path[0]) if path else None)


def _named(part: str | int) -> str:
    """A key of a client's, in one printable piece."""
    text = str(part)[:64]
    return text if text.isprintable() else ascii(text)[1:-1]


def _problem(problem: dict[str, Any]) -> str:
    where = ".".join(map(_named, problem["loc"][1:])) or "the body"
    if problem["type"] == "extra_forbidden":
        return f"{where}: not supported by this server; leave it out"
    if len(problem["loc"]) > 1 and (neutral := NEUTRAL.get(str(problem["loc"][1]))):
        return f"{where}: not supported by this server; leave it out, or give {neutral}"
    if problem["type"] == "missing":
        return f"{where}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: given {shown(problem['input'])}, {message[0].lower()}{message[1:]}"
