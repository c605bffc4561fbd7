"""From the texts and messages of a request to token ids that the model can take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio

from ..limits import drawing
from .errors import ApiError, shown
from .generation import Sampling, Service
from .schemas import ChatRequest, CompletionRequest

_LEGACY_MAX_TOKENS = 16  # what OpenAI's completions produce where nothing is asked for


class Prompts:
    """Tokenizes in one side thread: a long text takes a second, and a tokenizer is not for several threads at once."""

    def __init__(self, service: Service):
        self._service, self._tokenizer = service, service.tokenizer
        self._one = anyio.CapacityLimiter(1)
        self._temperature, self._top_p = drawing(service.engine.model)
        self.vocabulary = service.engine.model.get_input_embeddings().weight.shape[0]
        # Characters that one token can stand for.
        self._widest = max(map(len, self._tokenizer.get_vocab()), default=1)
        # Their text is in no answer.
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        self._special = {token.content: at for at, token in added.items() if token.special}

    async def of_completion(self, request: CompletionRequest) -> tuple[list[list[int]], Sampling]:
        self._check(request, len(request.prompts()) * (request.n or 1))
        if request.logprobs == 1 and request.temperature != 0:
            raise _no_top_logprobs("logprobs", "0")
        prompts = request.prompts()
        if isinstance(prompts[0], str):
            self._check_length(max(map(len, prompts)), "prompt")
            prompts = await self._in_thread(lambda: [self._tokenizer(text, verbose=False)["input_ids"] for text in prompts])
        sampling = self._sampling(request, prompts, request.max_tokens, "max_tokens", _LEGACY_MAX_TOKENS)
        return prompts, sampling

    async def of_chat(self, request: ChatRequest) -> tuple[list[list[int]], Sampling]:
        self._check(request, request.n or 1)
        if request.top_logprobs and not request.logprobs:
            raise ApiError(422, "invalid_value", "top_logprobs needs logprobs: true.", "top_logprobs")
        if request.top_logprobs and request.temperature != 0:
            raise _no_top_logprobs("top_logprobs", "0 with logprobs: true")
        if not self._tokenizer.chat_template:
            raise ApiError(
                422,
                "no_chat_template",
                "The model's tokenizer has no chat template, so messages can't be written as its prompt; "
                "write the prompt yourself and use /v1/completions.",
                "messages",
            )
        self._check_length(sum(len(message.plain()["content"]) for message in request.messages), "messages")
        prompt = await self._in_thread(lambda: self._render(request))
        most = request.max_completion_tokens or request.max_tokens
        name = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
        return [prompt], self._sampling(request, [prompt], most, name)

    def _render(self, request: ChatRequest) -> list[int]:
        messages = [message.plain() for message in request.messages]
        try:
            encoded = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # templates refuse what they don't know in their own ways
            raise ApiError(
                422, "chat_template_failed", f"The model's chat template does not take these messages: {error}", "messages"
            ) from error
        return list(encoded["input_ids"])

    async def _in_thread(self, work: Any) -> Any:
        return await anyio.to_thread.run_sync(work, limiter=self._one)

    def _check(self, request: CompletionRequest | ChatRequest, choices: int) -> None:
        limits = self._service.config.limits
        most = min(limits.choices, limits.sequences)
        if choices > most:
            raise ApiError(
                422,
                "too_many_choices",
                f"Given {choices} answers in one request (prompts × n), supported are {most}; send more requests.",
                "n" if (request.n or 1) > 1 else "prompt",
            )
        if request.stream_options is not None and not request.stream:
            raise ApiError(422, "invalid_value", "stream_options needs stream: true.", "stream_options")
        stops = request.stops
        if len(stops) > limits.stop_strings:
            raise ApiError(
                422, "too_many_stops", f"Given {len(stops)} stop strings, supported are {limits.stop_strings}.", "stop"
            )
        longest = max(map(len, stops), default=0)
        if longest > limits.stop_length:
            raise ApiError(
                422,
                "stop_too_long",
                f"Given a stop string of {longest} characters, supported are {limits.stop_length}.",
                "stop",
            )
        for stop in stops:
            within = next((token for token in self._special if token in stop and token != stop), None)
            if within is not None and stop not in self._special:
                raise ApiError(
                    422,
                    "special_token_in_stop",
                    f"Given the stop string {shown(stop)}; {shown(within)} in it is a special token of the model, which "
                    "answers are written without, so it would never match. Supported is such a token alone; give that.",
                    "stop",
                )

    def _most_tokens(self) -> int:
        whole = self._service.engine.max_length - 1
        return min(self._service.config.limits.prompt_tokens or whole, whole)

    def _check_length(self, characters: int, where: str) -> None:
        """Before a text that can't fit is tokenized, for seconds in which no other one is."""
        most = self._most_tokens()
        if characters > most * self._widest:
            raise _too_long(
                f"Given a prompt of {characters} characters, supported are {most} tokens, which are no more than "
                f"{most * self._widest} characters; shorten it.",
                where,
            )

    def _sampling(
        self,
        request: CompletionRequest | ChatRequest,
        prompts: Sequence[list[int]],
        max_tokens: int | None,
        name: str,
        default: int | None = None,
    ) -> Sampling:
        """default: max_tokens where none is given, if it fits; None: all that fits."""
        limits, whole = self._service.config.limits, self._service.engine.max_length
        where = "messages" if isinstance(request, ChatRequest) else "prompt"
        for prompt in prompts:
            if not prompt:
                raise ApiError(422, "empty_prompt", "The prompt has no tokens; give it at least one character.", where)
            worst = max(prompt)
            if worst >= self.vocabulary:
                raise ApiError(
                    422, "invalid_token", f"Given the token id {worst}; the model has 0 to {self.vocabulary - 1}.", where
                )
        longest = max(map(len, prompts))
        most = self._most_tokens()
        if longest > most:
            raise _too_long(f"Given a prompt of {longest} tokens, supported are {most}; shorten it.", where)
        room = whole - longest
        if max_tokens is None:
            max_tokens = min(room, limits.max_tokens or room, default or room)
        if max_tokens > room:
            raise _too_long(
                f"Given {name} = {max_tokens}, supported are {room} ({whole} tokens hold prompt ({longest}) and answer); "
                "ask for fewer, or shorten the prompt.",
                name,
            )
        if max_tokens > (limits.max_tokens or room):
            raise ApiError(
                422,
                "too_many_tokens",
                f"Given {name} = {max_tokens}, supported are {limits.max_tokens} (the server's limit); ask for fewer.",
                name,
            )
        logprobs = request.logprobs is not None and request.logprobs is not False
        return Sampling(
            max_tokens=max_tokens,
            temperature=self._temperature if request.temperature is None else request.temperature,
            top_p=self._top_p if request.top_p is None else request.top_p,
            seed=request.seed,
            stops=request.stops,
            logprobs=logprobs,
            stop_token_ids=tuple(self._special[stop] for stop in request.stops if stop in self._special),
        )


def _too_long(message: str, name: str) -> ApiError:
    """As OpenAI has it: clients that see this status and code shorten the conversation and ask again."""
    return ApiError(400, "context_length_exceeded", message, name)


def _no_top_logprobs(name: str, instead: str) -> ApiError:
    return ApiError(
        422,
        "no_top_logprobs",
        f"Given {name} = 1 and a temperature above 0; only the chosen token's log-probability is kept, which is the "
        f"likeliest one's at temperature 0 alone. Give {name} = {instead}, or temperature 0.",
        name,
    )
