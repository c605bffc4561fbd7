"""How much one request, and all together, may ask for."""

import json
import threading
import time

import httpx2
import pytest

from fastft.serving.api import errors, prompts
from fastft.serving.api.config import Limits
from fastft.serving.api.generation import Sampling
from fastft.serving.api.guard import BodyLimit
from fastft.serving.requests import AdaptersUnavailable, EngineStopped, UnknownAdapter

from .server_fixtures import CHAT, HELLO, FakeEngine, client, load_tokenizer, post, serving
from .tiny import waits_until


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def engine(tokenizer):
    return FakeEngine(tokenizer)


def test_limits_of_one_request(engine):
    limits = Limits(choices=4, prompt_tokens=20, max_tokens=30, stop_strings=2, stop_length=5)
    http = client(engine, limits=limits)
    for body, code in [
        ({"n": 5}, "too_many_choices"),
        ({"prompt": ["a", "b", "c"], "n": 2}, "too_many_choices"),
        ({"prompt": [5] * 21}, "context_length_exceeded"),
        ({"max_tokens": 31}, "too_many_tokens"),
        ({"stop": ["a", "b", "c"]}, "too_many_stops"),
        ({"stop": "abcdef"}, "stop_too_long"),
    ]:
        error = post(http, {**HELLO, **body}, status=400 if code == "context_length_exceeded" else 422)["error"]
        assert error["code"] == code and error["message"].startswith("Given ") and "supported" in error["message"]
    assert not engine.submitted
    post(http, {**HELLO, "n": 4, "prompt": [5] * 20, "max_tokens": 30, "stop": ["a", "abcde"]})


def test_prompt_and_answer_fit_the_engine(engine):
    http = client(engine)
    error = post(http, {**HELLO, "prompt": [5] * 500, "max_tokens": 13}, status=400)["error"]
    assert error["code"] == "context_length_exceeded" and "supported are 12" in error["message"]
    assert post(http, {**HELLO, "prompt": [5] * 512}, status=400)["error"]["code"] == "context_length_exceeded"
    post(http, {**HELLO, "prompt": [5] * 500, "max_tokens": 12})
    post(http, {**CHAT, "max_tokens": 1000}, "/v1/chat/completions", 400)


def test_body_size_is_counted_while_it_arrives(engine):
    http = client(engine, limits=Limits(body_bytes=1000))
    assert post(http, {**HELLO, "prompt": "x" * 2000}, status=413)["error"]["code"] == "body_too_large"
    sent = []

    def chunks():
        for _ in range(100):
            sent.append(1)
            yield b" " * 100

    answer = http.post("/v1/completions", content=chunks(), headers={"content-type": "application/json"})
    assert answer.status_code == 413 and "content-length" not in answer.request.headers
    post(http, {**HELLO, "prompt": "x" * 500})


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_of_as_many_bytes_as_are_read_is_taken(engine, announced):
    http = client(engine, limits=Limits(body_bytes=1000))
    for size, status in ((1000, 200), (1001, 413)):
        body = json.dumps(HELLO).encode().ljust(size)
        headers = {"content-type": "application/json"}
        answer = http.post("/v1/completions", content=body if announced else iter([body]), headers=headers)
        assert answer.status_code == status and ("content-length" in answer.request.headers) == announced


@pytest.mark.anyio
@pytest.mark.parametrize("messages,status", [([b"x" * 600] * 3, 413), ([b"x"], 408)])
async def test_reading_stops_at_the_limit_and_at_the_time(messages, status, anyio_backend):
    import anyio

    taken, sent = [], []

    async def receive():
        if not messages:
            await anyio.sleep(60)
        taken.append(messages.pop())
        return {"type": "http.request", "body": taken[-1], "more_body": True}

    async def send(message):
        sent.append(message)

    async def app(*_):
        raise AssertionError("the app must not be reached")

    guard = BodyLimit(app, Limits(body_bytes=1000, body_seconds=0.2), lambda code: None)
    await guard({"type": "http", "headers": []}, receive, send)
    assert sent[0]["status"] == status and len(taken) == (2 if status == 413 else 1)


@pytest.fixture
def anyio_backend():
    return "asyncio"


def test_a_full_queue_says_try_again(tokenizer):
    engine = FakeEngine(tokenizer, max_waiting=2)
    engine.hold()  # or the first could have been answered before the third came
    answer = client(engine).post("/v1/completions", json={**HELLO, "n": 3})
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    error = answer.json()["error"]
    assert error["code"] == "queue_full" and error["type"] == "rate_limit_error"
    assert error["message"] == "The queue is full: 2 requests wait: try again later."
    assert engine.cancelled == engine.submitted and len(engine.submitted) == 2  # the two that got in are not left behind


@pytest.mark.parametrize(
    "error,status,code",
    [
        (EngineStopped("it is being stopped"), 503, "engine_stopped"),
        (AdaptersUnavailable("the adapter folder can't be read"), 503, "adapters_unavailable"),
        (UnknownAdapter("gone"), 404, "model_not_found"),
        (ValueError("it could never run"), 422, "invalid_value"),
        (RuntimeError("no more memory"), 500, "internal_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_sequence_that_is_refused_leaves_none_of_its_request_behind(engine, error, status, code, monkeypatch):
    submit = engine.submit

    def only_one(*arguments, **options):
        if engine.submitted:
            raise error
        return submit(*arguments, **options)

    engine.hold()
    monkeypatch.setattr(engine, "submit", only_one)
    http = client(engine)
    assert post(http, {**HELLO, "n": 2}, status=status)["error"]["code"] == code
    assert engine.cancelled == engine.submitted and len(engine.submitted) == 1 and not http.app.state.service.jobs
    engine.go()


def test_what_can_never_be_in_progress_is_not_told_to_try_again(engine):
    error = post(client(engine, limits=Limits(sequences=3)), {**HELLO, "n": 4}, status=422)["error"]
    assert error["code"] == "too_many_choices" and "supported are 3" in error["message"]


def test_sequences_and_adapters_in_progress_are_limited(engine):
    engine.hold()
    with serving(engine, limits=Limits(sequences=3, adapters=1)) as (url, _), httpx2.Client(base_url=url) as http:
        threads = [
            threading.Thread(target=http.post, args=("/v1/completions",), kwargs={"json": {**HELLO, "model": "math"}})
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 20
        while len(engine.submitted) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert post(http, {**HELLO, "model": "code"}, status=429)["error"]["code"] == "too_many_adapters"
        assert post(http, {**HELLO, "n": 2}, status=429)["error"]["code"] == "too_many_requests"
        engine.go()
        for thread in threads:
            thread.join()
        post(http, {**HELLO, "model": "code"})


@pytest.mark.anyio
async def test_answers_that_nobody_reads_take_nobodys_place(engine):
    """The engine is done with them, while a client that reads nothing may keep its connection for hours."""
    service = client(engine, limits=Limits(sequences=2, adapters=1)).app.state.service
    sampling = Sampling(max_tokens=8, temperature=0, top_p=1, seed=None, stops=[], logprobs=False)
    for adapter in ("math", "code"):
        unread = service.submit([[5]], 2, adapter, sampling)
        waits_until(lambda unread=unread: all(request.finish_reason for request in unread.requests))
    assert len(service.jobs) == 2


def test_a_stopped_engine(engine):
    engine.stop()
    answer = client(engine).post("/v1/completions", json=HELLO)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_stopped"


@pytest.mark.parametrize(
    "path,body",
    [
        ("/v1/chat/completions", {**CHAT, "messages": [1] * 100_000}),
        ("/v1/chat/completions", {**CHAT, "messages": [{}] * 100_000}),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "x"}] * 5000}),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": [{"type": "text"}] * 60_000}]}),
        ("/v1/chat/completions", {**CHAT, "modalities": ["audio"] * 60_000}),
        ("/v1/completions", {**HELLO, "stop": [""] * 60_000}),
        ("/v1/completions", {**HELLO, "stop": [""] * 100_000}),
        ("/v1/completions", {**HELLO, **{f"x{i}": 1 for i in range(1000)}}),
        ("/v1/completions", {**HELLO, "prompt": [[1]] * 100_000}),
    ],
    ids=lambda value: ", ".join(value)[:30] if isinstance(value, dict) else "",
)
def test_a_body_of_many_wrong_values_is_one_problem(engine, path, body, monkeypatch):
    """Not one each: of two million values they took a minute and gigabytes, while nobody else was answered."""
    problems = []

    def counted(error):
        problems.append(len(error.errors()))
        return validation_error(error)

    validation_error = errors._validation_error
    monkeypatch.setattr(errors, "_validation_error", counted)
    error = post(client(engine), body, path, 422)["error"]
    assert problems and problems[0] <= 3 and len(error["message"]) < 600
    assert not engine.submitted


def test_texts_that_cannot_fit_are_not_tokenized(tokenizer, monkeypatch):
    """Four megabytes took 14 s, in which nobody else's text was tokenized."""
    engine = FakeEngine(tokenizer)
    http = client(engine)
    widest = max(map(len, tokenizer.get_vocab()))
    fits = (engine.max_length - 1) * widest
    for text, body, path in [
        ("prompt", {**HELLO, "prompt": ["x", "x" * (fits + 1)]}, "/v1/completions"),
        ("messages", {**CHAT, "messages": [{"role": "user", "content": "x" * (fits // 2 + 1)}] * 2}, "/v1/chat/completions"),
    ]:
        with monkeypatch.context() as context:
            context.setattr(prompts.Prompts, "_in_thread", None)
            error = post(http, body, path, 400)["error"]
        assert error["code"] == "context_length_exceeded" and error["param"] == text
        assert f"supported are {engine.max_length - 1} tokens, which are no more than {fits} characters" in error["message"]
    # The longest text that could fit is tokenized before it is refused.
    error = post(http, {**HELLO, "prompt": "x" * fits}, status=400)["error"]
    assert error["code"] == "context_length_exceeded" and "tokens, supported are" in error["message"]


def test_an_answer_of_what_fits_where_nothing_is_asked_for(engine):
    http = client(engine, limits=Limits(max_tokens=12))
    for length, count in ((505, 7), (5, 12)):
        body = {"model": "base", "prompt": [5] * length}
        assert post(http, body)["usage"]["completion_tokens"] == count


def test_numbers_of_many_digits_are_not_repeated(engine):
    for name in ("max_tokens", "n"):
        error = post(client(engine), {**HELLO, "prompt": ["a", "b"], name: int("9" * 4300)}, status=422)["error"]
        assert error["param"] == name and "(4300 characters)" in error["message"] and len(error["message"]) < 300


def test_the_parameter_that_makes_too_many_choices(engine):
    for body, name in (({"n": 33}, "n"), ({"prompt": ["a"] * 33}, "prompt"), ({"prompt": ["a"] * 33, "n": 1}, "prompt")):
        assert post(client(engine), {**HELLO, **body}, status=422)["error"]["param"] == name
