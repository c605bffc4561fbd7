"""What an operator decides about the server, and the errors of a wrong decision."""

from __future__ import annotations

import ipaddress
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

_KEY_LENGTH = 16
_MAKE_KEY = 'make one with: python -c "import secrets; print(secrets.token_urlsafe(32))"'


class ConfigError(ValueError):
    """The server's options don't go together; the message says what to change."""


@dataclass(frozen=True)
class Limits:
    """What one request, and all requests together, may ask for. None: what the engine can hold."""

    body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    choices: int = 32
    prompt_tokens: int | None = None
    max_tokens: int | None = None
    stop_strings: int = 8
    stop_length: int = 256
    sequences: int = 1024
    adapters: int = 256
    metric_models: int = 100


@dataclass(frozen=True)
class ServerConfig:
    """model: the base model's name for clients. api_keys: any of them opens everything but `/admin`, which only
    `admin_token` opens, and which is not there without one.

    Raises:
        ConfigError: a host other than this machine without a key, keys that are too short or the same as the admin token.
    """

    model: str
    host: str = "127.0.0.1"
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_token: str | None = field(default=None, repr=False)
    limits: Limits = Limits()
    drain_seconds: float = 30.0

    def __post_init__(self):
        if not self.api_keys and not is_loopback(self.host):
            raise ConfigError(
                f"host {self.host!r} can be reached from other machines, and there is no API key: set one with "
                "--api-key-file or FASTFT_API_KEY, or listen on 127.0.0.1"
            )
        secrets = [("an API key", key) for key in self.api_keys]
        secrets += [("the admin token", self.admin_token)] if self.admin_token is not None else []
        for what, key in secrets:
            if len(key) < _KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    f"{what} has {len(key)} characters; it needs at least {_KEY_LENGTH} of printable ASCII without spaces: "
                    + _MAKE_KEY
                )
        if self.admin_token in self.api_keys:
            raise ConfigError(
                "the admin token is also an API key, so every client could change adapters: give it another value"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that host. Names other than localhost are not looked up: they count as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_keys(file: str | None, variable: str) -> tuple[str, ...]:
    """The keys of a file (one a line; # comments), or of an environment variable, which is then removed from the environment
    so that no child process gets it.

    Raises:
        ConfigError: the file is missing, empty, or others may read it.
    """
    value = os.environ.pop(variable, None)
    if file is None:
        return (value.strip(),) if value is not None else ()
    path = Path(file).expanduser()
    try:
        mode = path.stat().st_mode
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"key file {file}: {reason}") from error
    if mode & (stat.S_IRGRP | stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"key file {file} is open to other users of this machine: chmod 600 {file}, or give the key in {variable}"
        )
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"key file {file} holds no key; {_MAKE_KEY}")
    return keys
