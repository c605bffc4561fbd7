"""`fastft serve` in a process of its own, and clients that send it a trace of requests and note when each token came.

The served model's tokenizer writes every token as a number of `DIGITS` digits, so that a client reads the tokens off the
text, and what is checked is what came out of the server.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, count
from pathlib import Path

BASE, DIGITS = "base", 5
BASE_SHARE = 0.1
PROMPT, NEW = (8, 64), (16, 48)  # tokens: from, to
_ANSWER_SECONDS, _END_SECONDS = 60.0, 60.0


def save_tokenizer(folder: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"{token:0{DIGITS}}": token for token in range(vocabulary)}))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def tokens_of(text: str) -> list[int]:
    return [int(text[at : at + DIGITS]) for at in range(0, len(text), DIGITS)]


@dataclass(frozen=True)
class Trace:
    """An endless list of requests: one in ten for the base, the others' adapters by Zipf's law, the i-th of them with a
    probability in proportion to 1 / (i + 1)."""

    adapters: int
    vocabulary: int
    seed: int = 0

    @cached_property
    def _weights(self) -> list[float]:
        return list(accumulate(1 / (i + 1) for i in range(self.adapters)))

    def request(self, at: int, salt: str) -> tuple[int | None, list[int], int]:
        """(adapter, prompt, new tokens) of request `at`. Only the prompt's tokens depend on `salt`: where the trace is
        replayed, the server must not find its prompts in its cache."""
        draw = random.Random(f"{self.seed} {at}")
        adapter = draw.choices(range(self.adapters), cum_weights=self._weights)[0]
        adapter = None if draw.random() < BASE_SHARE else adapter
        length, new = draw.randint(*PROMPT), draw.randint(*NEW)
        return adapter, random.Random(f"{self.seed} {at} {salt}").choices(range(self.vocabulary), k=length), new


@dataclass
class Answer:
    """What a client asked and got. arrivals: time.monotonic() of each token. error: None where all tokens came."""

    model: str
    prompt: list[int]
    new: int
    sent: float
    tokens: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    error: str | None = "no answer"

    def gaps(self, end: float) -> list[float]:
        """Seconds between one token and the next, as far as that came before `end`."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:]) if after <= end]


@dataclass(frozen=True)
class Block:
    """Answers of some seconds. Those in progress at the end were waited for, without sending more."""

    answers: list[Answer]
    begin: float
    end: float
    stats: dict[str, int] = field(default_factory=dict)  # by how much the adapter memory's counters grew
    client_seconds: float = 0.0  # of this process' CPU time

    def gaps(self) -> list[float]:
        return [gap for answer in self.answers for gap in answer.gaps(self.end)]

    def first_tokens(self) -> list[float]:
        return [answer.arrivals[0] - answer.sent for answer in self.answers if answer.arrivals]

    def tokens(self) -> int:
        return sum(arrival <= self.end for answer in self.answers for arrival in answer.arrivals)


def drive(url: str, trace: Trace, first: int, name: Callable[[int], str], salt: str, seconds: float, clients: int) -> Block:
    """So many clients send requests `first`, `first` + 1, … of the trace, each the next one when it has its answer.

    name: of an adapter, by its number in the trace.
    """
    return asyncio.run(_drive(url, trace, count(first), name, salt, seconds, clients))


async def _drive(url, trace, numbers: Iterator[int], name, salt, seconds, clients) -> Block:
    import openai

    answers: list[Answer] = []
    begin, busy = time.monotonic(), time.process_time()
    options = {"base_url": f"{url}/v1", "api_key": "-", "max_retries": 0, "timeout": _ANSWER_SECONDS}
    direct = openai.DefaultAsyncHttpxClient(trust_env=False)  # through no proxy
    async with openai.AsyncOpenAI(http_client=direct, **options) as sdk:

        async def client():
            while time.monotonic() < begin + seconds:
                adapter, prompt, new = trace.request(next(numbers), salt)
                answer = Answer(BASE if adapter is None else name(adapter), prompt, new, time.monotonic())
                answers.append(answer)
                try:
                    answer.error = await _ask(sdk, answer)
                except Exception as error:  # whatever it is, the client's answer is not complete
                    answer.error = f"{type(error).__name__}: {error}"

        await asyncio.gather(*(client() for _ in range(clients)))
    return Block(answers, begin, begin + seconds, client_seconds=time.process_time() - busy)


async def _ask(sdk, answer: Answer) -> str | None:
    """What is wrong with the answer, or None. The lines are parsed here: openai's own objects would keep a core busy."""
    stream = sdk.completions.with_streaming_response.create(
        model=answer.model, prompt=answer.prompt, max_tokens=answer.new, temperature=0, stream=True
    )
    reason = None
    async with stream as response:
        async for line in response.iter_lines():
            now = time.monotonic()
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                return str(event["error"])
            (choice,) = event["choices"]
            new = tokens_of(choice["text"])
            answer.tokens += new
            answer.arrivals += [now] * len(new)
            reason = choice["finish_reason"] or reason
    if reason != "length" or len(answer.tokens) != answer.new:
        return f"{len(answer.tokens)} tokens of {answer.new}, finish_reason {reason}"
    return None


class Server:
    """`fastft serve` on a free port of 127.0.0.1, as a context manager; its standard error goes to a file in `folder`."""

    def __init__(self, folder: Path, model: Path, adapters: Path, *, slots: int, threads: int, host_memory: str | None):
        options = {"model": model, "adapters": adapters, "slots": slots, "host-memory": host_memory}
        options |= {"name": BASE, "port": 0, "device": "cpu", "dtype": "float32"}
        given = [part for key, value in options.items() if value is not None for part in (f"--{key}", str(value))]
        self._token, self._log = secrets.token_urlsafe(24), folder / "server.log"
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "COLUMNS": "200", "FASTFT_ADMIN_TOKEN": self._token}
        environment.pop("FASTFT_API_KEY", None)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fastft.cli.main", "serve", *given],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        self.url = ""

    def __enter__(self):
        shown = ""
        try:
            while "Ctrl-C stops it" not in shown:
                if not (line := self._process.stdout.readline()):
                    raise RuntimeError(f"the server did not start:\n{shown}{self.log()}")
                shown += line
        except BaseException:
            self._kill()
            raise
        self.url = re.search(r"http://127\.0\.0\.1:\d+", shown)[0]
        return self

    def __exit__(self, kind, *_):
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            status = f"nothing within {_END_SECONDS:g} s"
        self._kill()
        if kind is None and status != 0:
            raise RuntimeError(f"the server ended with {status}:\n{self.log()}")

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def log(self) -> str:
        """The end of its standard error."""
        return self._log.read_text()[-4000:]

    def residents(self) -> list[str]:
        """The adapters in device memory."""
        return [one["name"] for one in self._memory()["adapters"] if one["state"] == "on_device"]

    def stats(self) -> dict[str, int]:
        """The adapter memory's counters."""
        return {key: value for key, value in self._memory()["memory"].items() if key.endswith("_total")}

    def _memory(self) -> dict:
        request = urllib.request.Request(f"{self.url}/admin/adapters", headers={"authorization": f"Bearer {self._token}"})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=_ANSWER_SECONDS) as answer:
            return json.load(answer)
