"""`fastft serve`: from options to a running server, with what a new user needs to know about it."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from ..listing import listed
from .errors import UserError
from .loading import check_bitsandbytes, check_model, load, load_base
from .serve_config import ServeConfig

KEY_VARIABLE, TOKEN_VARIABLE = "FASTFT_API_KEY", "FASTFT_ADMIN_TOKEN"
_SHOWN_NAMES = 8


def run(config: ServeConfig) -> None:
    """Serve until a signal. Returns after the requests in progress have ended.

    Raises:
        UserError: anything the user can put right; nothing is served then. SystemExit: with 1, the engine has failed.
    """
    from ..serving.api.config import ConfigError
    from ..serving.connections import allow_connections
    from ..serving.server import Server, create_app, listen

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    # Quick checks before the model is loaded.
    if config.adapters is not None and not (config.adapters and Path(config.adapters).expanduser().is_dir()):
        raise UserError(f"adapters {config.adapters}: no such folder; give the folder that holds the adapters' folders")
    check_bitsandbytes(config.bits())
    try:
        server_config = make_server_config(config)
        allow_connections()
        listener = listen(config.host, config.port)
    except ConfigError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(
            f"cannot listen on {config.host} port {config.port}: {error.strerror}; try another --port"
        ) from error
    with contextlib.closing(listener):
        begun = time.monotonic()
        print(f"Loading {config.model} …", flush=True)
        engine, tokenizer = start_engine(config, server_config.model)
        try:
            server = Server(
                create_app(engine, server_config, tokenizer),
                on_stop=lambda running: print(_stopping(running, config.drain), flush=True),
                access_log=config.access_log,
            )
            Welcome(config, server_config, engine, listener.getsockname()[1]).show(time.monotonic() - begun)
            server.run(sockets=[listener])
        finally:
            engine.stop(drain=False)
            engine.close()
    if engine.failure is not None:
        sys.exit(f"fastft: the engine failed: {engine.failure!r}; the log above says where")
    print("Stopped.", flush=True)


def make_server_config(config: ServeConfig) -> Any:
    """Names, keys and limits as the server takes them. Raises ConfigError, UserError."""
    from ..serving.api.config import ConfigError, Limits, ServerConfig, read_keys

    path = check_model(config.model)
    name = config.name or (Path(path).resolve().name if Path(path).is_dir() else path)
    if not re.fullmatch(r"[\w.:@/-]{1,128}", name, re.ASCII):
        raise UserError(f"the base model's name {name!r} has other characters than letters, digits and _.:@/-; give --name")
    tokens = read_keys(config.admin_token_file, TOKEN_VARIABLE)
    if len(tokens) > 1:
        raise ConfigError(f"{config.admin_token_file} holds {len(tokens)} lines; there is one admin token")
    limits = Limits(
        body_bytes=config.bytes_of("max_body"),
        choices=min(config.max_choices, config.max_waiting),  # all of a request wait at first
        prompt_tokens=config.max_prompt_tokens,
        max_tokens=config.max_tokens,
        sequences=config.max_waiting + (config.max_running or 1024),  # the engine's own queue decides
        adapters=max(Limits.adapters, config.slots),
    )
    return ServerConfig(
        model=name,
        host=config.host,
        api_keys=read_keys(config.api_key_file, KEY_VARIABLE),
        admin_token=tokens[0] if tokens else None,
        limits=limits,
        drain_seconds=config.drain,
    )


def start_engine(config: ServeConfig, name: str) -> tuple[Any, Any]:
    """A started engine, whose first answers are what the model gives, and its tokenizer. Raises UserError."""
    from ..serving import Engine
    from .train import choose_device_and_dtype

    device, dtype = choose_device_and_dtype(config)
    tokenizer = load("AutoTokenizer", config.model)
    model = load_base(config.model, device, dtype, config.bits()).eval()
    try:
        engine = Engine(
            model,
            tokenizer,
            None if config.adapters is None else Path(config.adapters).expanduser(),
            slots=config.slots,
            device_bytes=config.bytes_of("device_memory"),
            host_bytes=config.bytes_of("host_memory"),
            cache_bytes=config.bytes_of("cache_memory"),
            max_batch_tokens=config.max_batch_tokens,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            trial=not config.no_trial,
        )
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        raise UserError(f"the engine can't be made: {error}") from error
    try:
        if name in engine.adapter_names():
            raise UserError(f"the base model and an adapter are both called {name!r}: give the base another --name")
        engine.start()
    except BaseException as error:
        engine.close()
        if isinstance(error, ValueError | OSError | RuntimeError | MemoryError):
            raise UserError(f"the engine can't be started: {error}") from error
        raise
    return engine, tokenizer


class Welcome:
    """What is served, where, with how much memory, and a line to try it with."""

    def __init__(self, config: ServeConfig, server_config: Any, engine: Any, port: int):
        self._config, self._server, self._engine = config, server_config, engine
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self.names = engine.adapter_names()

    def show(self, seconds: float) -> None:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        console = Console(highlight=False)
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for left, right in self.rows():
            table.add_row(left, escape(right))
        console.print(f"\n[bold green]fastft serves {escape(self._server.model)}[/] (ready after {seconds:.1f} s)\n")
        console.print(table)
        console.print("\nTry it:\n")
        print(self.curl(), flush=True)  # whole, however wide the terminal is
        console.print("\nCtrl-C stops it.\n")

    def rows(self) -> list[tuple[str, str]]:
        from ..methods.targets import parameter_count
        from ..serving.limits import why_short

        model, config = self._engine.model, self._config
        dtype = str(model.dtype).removeprefix("torch.") + (f", base of {config.bits()} bits" if config.bits() else "")
        return [
            ("model", f"{self._server.model} ({_count(parameter_count(model))} parameters, {dtype}, {model.device.type})"),
            ("adapters", self._adapters()),
            ("memory", self._memory()),
            ("API", f"{self.url}/v1  ({self._who()})"),
            ("health", f"{self.url}/health, {self.url}/metrics"),
            ("operator", f"{self.url}/admin/adapters" if self._server.admin_token else "off (--admin-token-file)"),
            (
                "longest",
                f"{self._engine.max_length:,} tokens of prompt and answer{why_short(model)}; "
                f"{config.max_waiting:,} requests may wait",
            ),
        ]

    def curl(self) -> str:
        """A command to paste into a shell."""
        body: dict[str, Any] = {"model": self.names[0] if self.names else self._server.model}
        path = "chat/completions" if self._engine.tokenizer.chat_template else "completions"
        if path == "completions":
            body["prompt"] = "Once upon a time"
        else:
            body["messages"] = [{"role": "user", "content": "Hello!"}]
        body["max_tokens"] = 32
        key = ""
        if self._server.api_keys:
            file = self._config.api_key_file
            value = f"${KEY_VARIABLE}" if file is None else f"$(grep -m 1 '^[^#]' {shlex.quote(file)})"
            key = f' -H "Authorization: Bearer {value}"'
        json_type = "-H 'Content-Type: application/json'"
        return f"curl {self.url}/v1/{path}{key} {json_type} -d {shlex.quote(json.dumps(body))}"

    def _adapters(self) -> str:
        if self._config.adapters is None:
            return "none (--adapters FOLDER)"
        shown = f": {listed(self.names, _SHOWN_NAMES)}" if self.names else ""
        text = f"{len(self.names):,} in {self._config.adapters}{shown}"
        root = Path(self._config.adapters).expanduser()
        others = sorted(entry for entry in root.iterdir() if entry.is_dir() and entry.name not in set(self.names))
        for entry in others[:3]:
            text += f"\nnot served: {entry.name!r}, {_why_not(entry)}"
        return text + (f"\n… and {len(others) - 3:,} more folders" if len(others) > 3 else "")

    def _memory(self) -> str:
        model = self._engine.model
        parts = [f"weights {_size(sum(p.numel() * p.element_size() for p in model.parameters()))}"]
        stats = self._engine.stats()
        if "cache_bytes" in stats:
            parts.append(f"cache {_size(stats['cache_bytes'])}")
        if self._engine.adapters is not None:
            memory = self._engine.adapters.stats()
            parts.append(f"adapters up to {_size(memory['device_bytes'])} in {memory['slots']} slots")
            parts.append(f"and {_size(memory['host_cap'])} waiting in host memory")
        return ", ".join(parts)

    def _who(self) -> str:
        if self._server.api_keys:
            return (
                f"with {'the API key' if len(self._server.api_keys) == 1 else f'one of {len(self._server.api_keys)} keys'}"
            )
        return "this machine only, no key needed; --api-key-file sets one"


def _why_not(folder: Path) -> str:
    """Why a folder is no adapter's."""
    from ..checkpoint.files import CONFIG
    from ..serving.folder import NAME

    if not NAME.fullmatch(folder.name):
        return "names have 1 to 64 letters, digits, _ and - alone"
    if not (folder / CONFIG).is_file():
        return f"it has no {CONFIG}"
    return "it links to files outside of the folder of adapters"


def _stopping(running: int, drain: float) -> str:
    if not running:
        return "\nStopping."
    answers = "1 answer gets" if running == 1 else f"{running} answers get"
    return f"\nStopping: {answers} up to {drain:g} s to finish. Ctrl-C again ends at once."


def _count(number: int) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:,}"


def _size(number: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number / 2**10:.1f} KiB"
