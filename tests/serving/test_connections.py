"""Connections that ask for nothing, or slowly, take nobody else's place."""

import contextlib
import http.client
import json
import resource
import socket
import threading
import types

import pytest

from fastft.serving import connections

from .fakes import ByteTokenizer
from .server_fixtures import HELLO, FakeEngine, serving
from .tiny import waits_until

GET = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.fixture
def engine():
    return FakeEngine(ByteTokenizer())


def connect(url):
    host, port = url.removeprefix("http://").split(":")
    return contextlib.closing(socket.create_connection((host, int(port)), timeout=20))


def answered(reader):
    """The status of the next answer, which is read to its end and no further."""
    status = int(reader.readline().split()[1])
    fields = dict(line.strip().lower().split(b": ") for line in iter(reader.readline, b"\r\n"))
    reader.read(int(fields[b"content-length"]))
    return status


@pytest.mark.parametrize(
    "sent", [b"", GET[:30], GET + GET[:30], GET + GET + GET[:30]], ids=["nothing", "half", "2nd", "3rd"]
)
def test_headers_have_to_arrive(engine, sent, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 1.0)
    with serving(engine) as (url, _), connect(url) as one:
        one.sendall(sent)
        reader = one.makefile("rb")
        for _ in range(sent.count(GET)):
            assert answered(reader) == 200
        assert reader.read(1) == b""


def is_closed_while_bytes_trickle_in(one):
    one.settimeout(0.05)
    with contextlib.suppress(ConnectionError):
        for _ in range(400):
            one.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                if one.recv(1) == b"":
                    return
        raise AssertionError("the connection was kept open for 20 seconds")


def test_pieces_of_a_header_do_not_extend_its_time(engine, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 1.0)
    with serving(engine) as (url, _), connect(url) as one:
        is_closed_while_bytes_trickle_in(one)


def test_a_body_nobody_reads_does_not_keep_a_connection(engine, monkeypatch):
    """The answer went out before the body came, whose pieces would put uvicorn's timer off for ever."""
    monkeypatch.setattr(connections, "HEADER_SECONDS", 1.0)
    with serving(engine, api_keys=("k" * 20,)) as (url, _), connect(url) as one:
        one.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n")
        assert answered(one.makefile("rb")) == 401
        is_closed_while_bytes_trickle_in(one)


def test_requests_in_progress_take_their_time(engine, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 1.0)
    engine.hold()
    threading.Timer(1.8, engine.go).start()
    with serving(engine) as (url, _), connect(url) as one:
        body = json.dumps(HELLO).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        one.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        assert answered(one.makefile("rb")) == 200


def test_answers_that_nobody_takes_are_dropped(monkeypatch):
    """Or each such client would keep its answer in memory for as long as it likes."""
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 0.5)
    engine = FakeEngine(ByteTokenizer(), max_length=100_000)
    with serving(engine) as (url, server), connect(url) as one:
        body = json.dumps(HELLO | {"stream": True, "max_tokens": 50_000, "n": 2}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        one.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        waits_until(lambda: server.service.jobs)
        waits_until(lambda: not server.service.jobs, 20)
        with contextlib.suppress(ConnectionResetError):
            while one.recv(1 << 20):
                pass
    assert all(request.finish_reason is not None for request in engine.submitted)


def test_a_client_that_reads_on_keeps_its_connection():
    """Or an answer of more than a minute would end with whatever its client was once slow to take."""
    timers, connection = [], object.__new__(connections.Connection)

    def call_later(seconds, function):
        timers.append(function)
        return types.SimpleNamespace(cancel=timers.clear)

    connection.loop = types.SimpleNamespace(call_later=call_later)
    connection.transport = types.SimpleNamespace(abort="abort")
    connection.flow = types.SimpleNamespace(pause_writing=list, resume_writing=list)
    for _ in range(2):
        connection.pause_writing()
        assert timers == ["abort"]
        connection.resume_writing()
        assert not timers


def test_idle_connections_give_way(engine, monkeypatch):
    """The one that waited longest: whoever opens many loses them, and others are answered."""
    monkeypatch.setattr(connections, "MOST", 4)
    with serving(engine) as (url, server), contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(url)) for _ in range(4)]
        waits_until(lambda: len(server.server_state.connections) == 4)
        for at in range(2):
            with connect(url) as one:
                one.sendall(GET)
                assert answered(one.makefile("rb")) == 200
                assert idle[at].recv(1) == b""
                idle.append(stack.enter_context(connect(url)))
                waits_until(lambda: len(server.server_state.connections) == 4)


def test_who_was_just_answered_is_not_the_one_that_gives_way(engine, monkeypatch):
    monkeypatch.setattr(connections, "MOST", 2)
    with serving(engine) as (url, server), connect(url) as first, connect(url) as second:
        waits_until(lambda: len(server.server_state.connections) == 2)
        reader = first.makefile("rb")
        first.sendall(GET)
        assert answered(reader) == 200
        with connect(url):
            assert second.recv(1) == b""
            first.sendall(GET)
            assert answered(reader) == 200


def test_too_many_requests_are_told_so(engine, monkeypatch):
    monkeypatch.setattr(connections, "MOST", 2)
    engine.hold()
    with serving(engine) as (url, server), contextlib.ExitStack() as stack:
        host, port = url.removeprefix("http://").split(":")
        asking = [stack.enter_context(contextlib.closing(http.client.HTTPConnection(host, int(port)))) for _ in range(3)]
        for count, one in enumerate(asking):
            waits_until(lambda count=count: len(engine.submitted) == count)
            one.request("POST", "/v1/completions", json.dumps(HELLO), {"content-type": "application/json"})
        answer = asking[2].getresponse()
        error = json.loads(answer.read())["error"]
        assert answer.status == 503 and answer.getheader("retry-after") and error["code"] == "too_many_requests"
        assert 'fastft_errors_total{code="too_many_requests"} 1.0' in server.service.metrics.text().decode()
        engine.go()
        assert [one.getresponse().status for one in asking[:2]] == [200, 200]


def test_as_many_files_may_be_open_as_connections():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        connections.allow_connections()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert hard == before[1] and soft >= min(connections.MOST, hard if hard >= 0 else connections.MOST)
        connections.allow_connections()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
