"""The options of `fastft serve`."""

from __future__ import annotations

import re
import typing
from dataclasses import dataclass
from typing import Any, Literal

from .config import _coerce, _option
from .errors import UserError

_MOST, _MOST_BYTES = 2**31 - 1, 2**60  # what tensors and the runtime count
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass
class ServeConfig:
    """What `fastft serve` serves, where, and within which limits. None: see each option's help."""

    model: str = _option(
        "Folder of a transformers checkpoint, or a Hub id. Of its generation_config, end tokens count, and temperature and "
        "top_p where a request has none; other fields, such as repetition_penalty, do not and are told of."
    )
    adapters: str | None = _option(
        "Folder with one folder for each adapter (PEFT LoRA, or what fastft saves); its name is the model that "
        "clients ask for.",
        None,
    )
    name: str | None = _option("The base model's name for clients; else its folder's name or Hub id.", None)
    host: str = _option("Address to listen on. Any but this machine's own needs an API key.", "127.0.0.1")
    port: int = _option("Port to listen on (0: a free one).", 8000)
    api_key_file: str | None = _option(
        "File with the keys that clients may use, one a line, which only you can read; or one key in FASTFT_API_KEY.", None
    )
    admin_token_file: str | None = _option(
        "File with the token for /admin/adapters (load, unload, update, pin), which is off without one; or in "
        "FASTFT_ADMIN_TOKEN.",
        None,
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "Of the base model and adapters. auto: bfloat16 on a GPU that has it, else float32.", "auto"
    )
    load_in_4bit: bool = _option("Quantise the base to NF4 when it is loaded (bitsandbytes), as fastft train does.", False)
    device: Literal["auto", "cpu", "cuda"] = _option("Where to run.", "auto")
    slots: int = _option("Adapters in device memory at a time.", 64)
    device_memory: str | None = _option(
        "For adapters on the device, such as 2GiB; else a tenth of a GPU, 1GiB on a CPU.", None
    )
    host_memory: str | None = _option("For adapters in host memory; else 4GiB beside a GPU, 1GiB on a CPU.", None)
    cache_memory: str | None = _option("For keys and values of running requests; else 512MiB on a CPU, a GPU's rest.", None)
    max_batch_tokens: int | None = _option("Tokens a step; else 512 on a CPU, 2048 on a GPU.", None)
    max_running: int | None = _option("Sequences that run at a time; else 64 on a CPU, 256 on a GPU.", None)
    max_waiting: int = _option("Sequences that wait at most; more are told to try again (429).", 1024)
    max_prompt_tokens: int | None = _option("Of one prompt; else what the model and the cache hold.", None)
    max_tokens: int | None = _option("Of one answer; else what the model and the cache hold.", None)
    max_choices: int = _option("Answers in one request (prompts times n); no more than --max-waiting.", 32)
    max_body: str = _option("Bytes of a request's body.", "4MiB")
    drain: float = _option("Seconds that running requests get to finish when the server is stopped.", 30.0)
    no_trial: bool = _option("Don't compare the first answers with those of the model without a cache.", False)
    access_log: bool = _option("Print a line for each request.", False)

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            setattr(self, name, _coerce(name, getattr(self, name), kind))
        for name in (
            "slots",
            "max_waiting",
            "max_choices",
            "max_batch_tokens",
            "max_running",
            "max_prompt_tokens",
            "max_tokens",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value <= _MOST:
                raise UserError(f"{name} must be positive and at most {_MOST:,}, not {value}")
        if not 0 <= self.port < 65536:
            raise UserError(f"port must be 0 to 65535, not {self.port}")
        if not 0 <= self.drain <= 3600:
            raise UserError(f"drain must be 0 to 3600 seconds, not {self.drain}")
        for name in ("device_memory", "host_memory", "cache_memory", "max_body"):
            self.bytes_of(name)

    def bits(self) -> int | None:
        """Of the base's quantised weights."""
        return 4 if self.load_in_4bit else None

    def bytes_of(self, name: str) -> int | None:
        """The bytes of an option such as "2GiB" or "512M" (powers of two); None where it is not given.

        Raises:
            UserError: it is no size.
        """
        text = getattr(self, name)
        if text is None:
            return None
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
        size = float(match[1]) * _UNITS[match[2].upper()] if match else 0
        if not 1 <= size <= _MOST_BYTES:
            raise UserError(f"{name} must be a size such as 512MiB or 2GiB, not {text[:80]!r}")
        return int(size)


def make_serve_config(options: dict[str, Any]) -> ServeConfig:
    """The configuration of `options` (None: not given). Raises UserError for a wrong or missing one."""
    values = {key: value for key, value in options.items() if value is not None}
    if "model" not in values:
        raise UserError("missing --model")
    return ServeConfig(**values)
