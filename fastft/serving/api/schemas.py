"""The bodies of requests and answers. What this server can't do is in the schema with the only value it has: a client that
asks for more gets an error, not an answer to another question."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# What is not supported, and the value that asks for nothing.
NEUTRAL = {
    "frequency_penalty": "0",
    "presence_penalty": "0",
    "logit_bias": "{}",
    "best_of": "1",
    "echo": "false",
    "suffix": '""',
    "response_format": '{"type": "text"}',
    "tools": "[]",
    "tool_choice": '"none"',
    "modalities": '["text"]',
    "store": "false",
}


# What is looked at of one body, so that no one body keeps the others waiting: 4 MiB hold two million values.
_MOST_VALUES, _MOST_KEYS, _MOST_MESSAGES = 65_536, 256, 4096


def _unsupported(name: str) -> Any:
    return Field(None, description=f"Not supported: {NEUTRAL[name]}.")


def _unused() -> Any:
    return Field(None, description="Accepted and not used.")


ModelName = Annotated[str, Field(min_length=1, max_length=256, description="The base model or an adapter: GET /v1/models.")]
Stop = Annotated[str, Field(min_length=1)]
# fail_fast everywhere: of a list of a million wrong items, the first one is told, not all.
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1, fail_fast=True)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]  # bounded, as it is written into errors
Zero = Annotated[float, Field(ge=0, le=0)]
Empty = Annotated[dict[str, Any], Field(max_length=0)]
Nothing = Annotated[list[Any], Field(max_length=0)]
_PROMPT = "a string, a list of strings, a list of token ids, or a list of such lists"


class Strict(BaseModel):
    """Keys that it does not have may be null, as some clients send all they know of: that asks for nothing."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra={"additionalProperties": {"type": "null"}}
    )

    @model_validator(mode="before")
    @classmethod
    def _nulls(cls, value):
        if not isinstance(value, dict):
            return value
        return {key: one for key, one in value.items() if one is not None or key in cls.model_fields}


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Sampling(Strict):
    model: ModelName
    n: Count | None = Field(None, description="Answers to each prompt.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0: the likeliest token. Default: the model's own, if it says how to draw, else 1."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="Default as of temperature.")
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        None, description="The same seed, request and adapter give the same answer; the i-th choice uses seed + i."
    )
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = _unused()
    frequency_penalty: Zero | None = _unsupported("frequency_penalty")
    presence_penalty: Zero | None = _unsupported("presence_penalty")
    logit_bias: Empty | None = _unsupported("logit_bias")

    @model_validator(mode="before")
    @classmethod
    def _texts(cls, value):
        try:
            _check_texts(value, itertools.count(1))
        except UnicodeEncodeError as error:
            raise ValueError("a string has half of a surrogate pair (\\ud800 to \\udfff), which is no character") from error
        except RecursionError as error:
            raise ValueError("it is nested too deep") from error
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _stop(cls, value):
        if (
            value is None
            or isinstance(value, str)
            or (isinstance(value, list) and all(isinstance(one, str) for one in value))
        ):
            return value
        raise ValueError(f"given a {type(value).__name__}, supported are a string and a list of strings")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class CompletionRequest(_Sampling):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    )
    max_tokens: Count | None = Field(None, description="Default 16, or what fits.")
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = Field(
        None, description="0: those of the chosen tokens. 1: also the likeliest token's, at temperature 0."
    )
    best_of: Annotated[int, Field(ge=1, le=1)] | None = _unsupported("best_of")
    echo: Literal[False] | None = _unsupported("echo")
    suffix: Literal[""] | None = _unsupported("suffix")

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompt(cls, value):
        if (problem := _prompt_problem(value)) is not None:
            raise ValueError(f"given {problem}, supported is {_PROMPT}; no list may be empty, and ids are below 2^31")
        return value

    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt


def _check_texts(value: Any, counter: Iterator[int]) -> None:
    """Raises UnicodeEncodeError where a string can't be written as UTF-8, which JSON's escapes allow; ValueError where there
    are too many values (token ids don't count)."""
    if next(counter) > _MOST_VALUES:
        raise ValueError(
            f"given more than {_MOST_VALUES:,} texts, lists and objects, supported are {_MOST_VALUES:,}; send fewer"
        )
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, list):
        for one in value:
            if not isinstance(one, int):
                _check_texts(one, counter)
    elif isinstance(value, dict):
        if len(value) > _MOST_KEYS:
            raise ValueError(f"given an object of {len(value):,} keys, supported are {_MOST_KEYS}; leave out the others")
        for key, one in value.items():
            key.encode()
            _check_texts(one, counter)


def _prompt_problem(value: Any) -> str | None:
    if isinstance(value, str) or _is_ids(value):
        return None
    if not isinstance(value, list):
        return f"a {type(value).__name__}"
    if value and (all(isinstance(one, str) for one in value) or all(map(_is_ids, value))):
        return None
    kinds = sorted({type(one).__name__ for one in value})
    return f"a list of {' and '.join(kinds)}" if kinds else "an empty list"


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(one) is int and 0 <= one < 2**31 for one in value)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    """What follows `name` is in the answers that clients send back as they got them, with nothing in it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)] | None = Field(
        None, validate_default=True, description="null or not there, an assistant's alone: nothing."
    )
    name: str | None = None
    refusal: Literal[""] | None = None
    annotations: Nothing | None = None
    tool_calls: Nothing | None = None
    function_call: None = None
    audio: None = None
    parsed: None = None

    @field_validator("content", mode="before")
    @classmethod
    def _content(cls, value, info):
        if isinstance(value, str) or (value is None and info.data.get("role") == "assistant"):
            return value
        given = f"a {type(value).__name__}"
        if isinstance(value, list) and value:
            kinds = {str(part.get("type")) if isinstance(part, dict) else type(part).__name__ for part in value}
            if kinds == {"text"}:
                return value
            given = f"parts of type {ascii(sorted(kinds))[:80]}"
        raise ValueError(f'given {given}, supported are a string and a list of {{"type": "text", "text": "..."}}')

    def plain(self) -> dict[str, str]:
        content = self.content or ""
        content = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": self.role, "content": content} | ({"name": self.name} if self.name is not None else {})


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatRequest(_Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=_MOST_MESSAGES, fail_fast=True)]
    max_tokens: Count | None = Field(None, description="Default: what fits. Older name of the next.")
    max_completion_tokens: Count | None = Field(None, description="Default: what fits.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=1)] | None = Field(
        None, description="1: also the likeliest token's, at temperature 0."
    )
    response_format: ResponseFormat | None = _unsupported("response_format")
    tools: Nothing | None = _unsupported("tools")
    tool_choice: Literal["none", "auto"] | None = _unsupported("tool_choice")
    parallel_tool_calls: bool | None = _unused()
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = _unsupported("modalities")
    metadata: dict[str, Any] | None = _unused()
    store: Literal[False] | None = _unsupported("store")
    service_tier: str | None = _unused()
    prompt_cache_key: str | None = _unused()
    prompt_cache_retention: str | None = _unused()
    safety_identifier: str | None = _unused()


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None = Field(description="Which version of the adapter answered: the start of its digest.")
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None = Field(description="Which version of the adapter answered: the start of its digest.")
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]
