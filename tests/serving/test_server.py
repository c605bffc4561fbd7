"""The server as others see it: the openai package's clients, clients that leave, and signals. All on 127.0.0.1."""

import asyncio
import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest

from fastft.checkpoint.files import AdapterFileError
from fastft.serving.api.config import Limits
from fastft.serving.server import listen

from .server_fixtures import ADMIN, HELLO, KEY, FakeEngine, load_tokenizer, saying, serving

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this did not happen in time"
        time.sleep(0.01)


@contextlib.contextmanager
def connected(url):
    host, port = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    try:
        yield connection
    finally:
        connection.close()


# The openai package


@pytest.fixture(scope="module")
def url(tokenizer):
    with serving(FakeEngine(tokenizer), api_keys=(KEY,)) as (url, _):
        yield url


@pytest.fixture
def sdk(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_openai_lists_models(sdk):
    assert [model.id for model in sdk.models.list()] == ["base", "code", "math"]
    assert sdk.models.retrieve("math").id == "math"


def test_openai_completions(sdk):
    whole = sdk.completions.create(model="math", prompt="hello", max_tokens=30, temperature=0, logprobs=1)
    assert whole.usage.completion_tokens == 30 and whole.choices[0].finish_reason == "length"
    assert len(whole.choices[0].logprobs.token_logprobs) == 30
    stream = sdk.completions.create(model="math", prompt="hello", max_tokens=30, temperature=0, stream=True)
    chunks = list(stream)
    assert len(chunks) > 10 and "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    other = sdk.completions.create(model="base", prompt="hello", max_tokens=30, temperature=0)
    assert other.choices[0].text != whole.choices[0].text


def test_openai_chat(sdk):
    asked = {"model": "math", "messages": MESSAGES, "max_tokens": 20, "seed": 3, "n": 2}
    whole = sdk.chat.completions.create(**asked)
    assert len(whole.choices) == 2 and whole.choices[0].message.role == "assistant"
    texts, usage = ["", ""], None
    for chunk in sdk.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices] and usage == whole.usage


def test_openai_conversations_go_on(tokenizer):
    """The client's answers come back as it holds them, with the nulls of what they don't have."""
    engine = FakeEngine(tokenizer, script=saying(tokenizer, "yes"))
    with serving(engine) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sdk:
        chat, asked = sdk.chat.completions, list(MESSAGES)
        for make in (chat.create, chat.parse):
            answer = make(model="math", messages=MESSAGES, service_tier="auto").choices[0].message
            asked += [answer, *MESSAGES, answer.model_dump(), *MESSAGES]
        assert chat.create(model="math", messages=asked).choices[0].message.content == "yes"


def test_others_are_answered_while_a_folder_is_slow(tokenizer):
    engine, looking, go = FakeEngine(tokenizer), threading.Event(), threading.Event()
    look = engine.look
    engine.look = lambda adapter: (looking.set(), go.wait(20), look(adapter))
    with serving(engine) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=15) as sdk:
        asked = []

        def ask():
            asked.append(sdk.completions.create(model="math", prompt="hello", max_tokens=4))

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            assert looking.wait(15)
            assert sdk.completions.create(model="base", prompt="hello", max_tokens=4).choices and not asked
        finally:
            go.set()
            thread.join(20)
        assert asked[0].model == "math"
        with pytest.raises(openai.NotFoundError):
            sdk.completions.create(model="nobody", prompt="hello")


def test_openai_async(url):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
            names = ["base", "math", "code"] * 4
            asked = [client.completions.create(model=n, prompt="hi", max_tokens=8, temperature=0) for n in names]
            answers = await asyncio.gather(*asked)
            assert len({answer.choices[0].text for answer in answers}) == 3
            stream = await client.completions.create(model="math", prompt="hi", max_tokens=8, temperature=0, stream=True)
            assert "".join([c.choices[0].text async for c in stream]) == answers[1].choices[0].text

    asyncio.run(ask())


def test_openai_errors(sdk, url):
    with pytest.raises(openai.NotFoundError, match="GET /v1/models"):
        sdk.completions.create(model="nope", prompt="hello")
    with pytest.raises(openai.BadRequestError, match="supported are 511; shorten it") as too_long:
        sdk.completions.create(model="base", prompt=[5] * 600)
    assert too_long.value.code == "context_length_exceeded"  # agents look for it, and shorten the conversation
    with pytest.raises(openai.UnprocessableEntityError, match="echo: not supported"):
        sdk.completions.create(model="base", prompt="hello", echo=True)
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_openai_hears_of_failures_in_streams(tokenizer):
    engine = FakeEngine(tokenizer)
    engine.fail["code"] = AdapterFileError("damaged")
    with serving(engine) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sdk:
        with pytest.raises(openai.APIError, match="can't be loaded"):
            list(sdk.completions.create(model="code", prompt="hello", stream=True))
        with pytest.raises(openai.InternalServerError, match="can't be loaded"):
            sdk.completions.create(model="code", prompt="hello")
        assert sdk.completions.create(model="math", prompt="hello").choices[0].text


# Clients that leave, and that dawdle


@pytest.mark.parametrize("stream", [False, True])
def test_requests_of_clients_that_leave_are_cancelled(tokenizer, stream):
    engine = FakeEngine(tokenizer, delay=0.02)
    with serving(engine) as (url, server):
        with connected(url) as connection:
            body = {**HELLO, "max_tokens": 500, "n": 2, "stream": stream}
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            until(lambda: len(engine.submitted) == 2 and all(request.tokens for request in engine.submitted))
            if stream:
                assert connection.getresponse().read(20)
            connection.sock.shutdown(socket.SHUT_RDWR)
        until(lambda: len(engine.cancelled) == 2)
        until(lambda: not server.service.jobs)
        assert all(len(request.tokens) < 400 for request in engine.submitted)
        metrics = server.service.metrics.text().decode()
        assert 'fastft_requests_total{finish_reason="cancelled",model="base"} 2.0' in metrics


def test_one_leaving_disturbs_no_other(tokenizer):
    engine = FakeEngine(tokenizer, script=saying(tokenizer, "what all the others get"), delay=0.02)
    with serving(engine) as (url, _):
        with connected(url) as leaving, connected(url) as staying:
            for connection in (leaving, staying):
                connection.request(
                    "POST", "/v1/completions", json.dumps(HELLO | {"max_tokens": 100}), {"content-type": "application/json"}
                )
            until(lambda: len(engine.submitted) == 2)
            leaving.close()
            answer = json.loads(staying.getresponse().read())
        assert answer["choices"][0]["text"] == "what all the others get"


def test_endless_bodies_are_cut_off(tokenizer):
    with serving(FakeEngine(tokenizer), limits=Limits(body_bytes=10_000)) as (url, _), connected(url) as connection:
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("transfer-encoding", "chunked")
        connection.putheader("content-type", "application/json")
        connection.endheaders()
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 10_000_000:
                connection.send(b"400\r\n" + b" " * 1024 + b"\r\n")
                sent += 1024
                time.sleep(0.001)
        assert sent < 5_000_000
        with contextlib.suppress(ConnectionError):
            answer = connection.getresponse()
            assert answer.status == 413 and answer.getheader("connection") == "close"


def test_slow_bodies_time_out(tokenizer):
    with serving(FakeEngine(tokenizer), limits=Limits(body_seconds=0.2)) as (url, _), connected(url) as connection:
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("content-length", "100")
        connection.endheaders(b"{")
        answer = connection.getresponse()
        assert answer.status == 408 and json.loads(answer.read())["error"]["code"] == "body_too_slow"


def test_what_an_operator_waits_for_holds_up_nothing_else(tokenizer):
    engine, ended = FakeEngine(tokenizer), threading.Event()
    unloads = []

    def unload(name, timeout):
        unloads.append(name)
        ended.wait(20)
        return 0

    engine.adapters.unload = unload
    headers = {"authorization": f"Bearer {ADMIN}"}
    with serving(engine, admin_token=ADMIN) as (url, _), contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(connected(url)) for _ in range(6)]
        for connection in waiting:
            connection.request("POST", "/admin/adapters/math/unload", headers=headers)
        until(lambda: len(unloads) == 4)
        with connected(url) as quick:
            for method, path in (("GET", "/admin/adapters"), ("POST", "/admin/adapters/math/unpin")):
                quick.request(method, path, headers=headers)
                assert quick.getresponse().read() and len(unloads) == 4
        ended.set()
        assert {connection.getresponse().status for connection in waiting} == {200}


# Stopping


def test_a_stopping_server_finishes_what_was_begun(tokenizer):
    engine = FakeEngine(tokenizer, script=saying(tokenizer, "said to its end"), delay=0.02)
    engine.hold()
    with serving(engine) as (url, server), connected(url) as begun, connected(url) as idle:
        idle.request("GET", "/health")
        threading.Timer(0.2, engine.go).start()
        assert idle.getresponse().read()
        engine.hold()
        begun.request(
            "POST",
            "/v1/completions",
            json.dumps(HELLO | {"stream": True, "max_tokens": 100}),
            {"content-type": "application/json"},
        )
        until(lambda: server.service.jobs)
        server._on_stop = unread
        server.stop()
        until(lambda: server.service.stopping)
        until(lambda: refused(url))
        engine.go()
        text = begun.getresponse().read().decode()
        pieces = [json.loads(line[6:]) for line in text.split("\n\n") if line and line != "data: [DONE]"]
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == "said to its end"


def unread(running):
    """`fastft serve | tee log`, where Ctrl-C ended tee too."""
    raise BrokenPipeError


def refused(url):
    host, port = url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return True
    return False


@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_end_in_time_is_told_so(tokenizer, stream):
    engine = FakeEngine(tokenizer)
    engine.hold()
    with serving(engine, drain_seconds=0.3) as (url, server), connected(url) as connection:
        connection.request(
            "POST", "/v1/completions", json.dumps(HELLO | {"stream": stream}), {"content-type": "application/json"}
        )
        until(lambda: server.service.jobs)
        server.stop()
        answer = connection.getresponse()
        assert answer.status == (200 if stream else 503) and '"code":"stopping"' in answer.read().decode().replace(" ", "")
        assert engine.cancelled == engine.submitted


# Without transformers, which takes seconds to import.
PROGRAM = """
import sys
from tests.serving.fakes import ByteTokenizer, FakeEngine
from fastft.serving.api.config import ServerConfig
from fastft.serving.server import Server, create_app, listen
engine = FakeEngine(ByteTokenizer(), delay=float(sys.argv[1]))
server = Server(create_app(engine, ServerConfig("base", drain_seconds=20)))
listener = listen("127.0.0.1", 0)
print(listener.getsockname()[1], flush=True)
server.run(sockets=[listener])
print("ended", flush=True)
"""


@contextlib.contextmanager
def program(delay):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(delay)], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True
    )
    try:
        yield process, f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


def test_a_signal_drains_and_exits_0():
    with program(0.02) as (process, url), connected(url) as connection:
        connection.request(
            "POST", "/v1/completions", json.dumps(HELLO | {"max_tokens": 40}), {"content-type": "application/json"}
        )
        until(lambda: running(url))
        process.send_signal(signal.SIGTERM)
        assert json.loads(connection.getresponse().read())["usage"]["completion_tokens"] == 40
        assert process.wait(10) == 0 and process.stdout.read() == "ended\n"


def test_a_second_signal_ends_at_once():
    with program(10) as (process, url), connected(url) as connection:
        connection.request("POST", "/v1/completions", json.dumps(HELLO), {"content-type": "application/json"})
        until(lambda: running(url))
        process.send_signal(signal.SIGTERM)
        until(lambda: refused(url))
        assert process.poll() is None
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130 and time.monotonic() - begun < 3


def running(url):
    with connected(url) as connection:
        connection.request("GET", "/metrics")
        return "fastft_engine_running 1.0" in connection.getresponse().read().decode()


def test_a_port_in_use_is_said(tokenizer):
    listener = listen("127.0.0.1", 0)
    with pytest.raises(OSError, match="in use"), contextlib.closing(listener):
        listen("127.0.0.1", listener.getsockname()[1])
