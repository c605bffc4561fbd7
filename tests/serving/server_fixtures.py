"""A tokenizer, apps over a fake engine, and a server on a free port of this machine, for the tests of the HTTP interface."""

import contextlib
import threading
import time
from pathlib import Path

from starlette.testclient import TestClient

from fastft.serving.api.config import ServerConfig
from fastft.serving.server import Server, create_app, listen

from .fakes import FakeEngine

TOKENIZER = Path(__file__).parents[2] / "demo" / "model"
KEY, ADMIN = "k" * 20, "a" * 20
HELLO = {"model": "base", "prompt": "hello", "max_tokens": 8}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
LOCAL = "http://127.0.0.1"


def load_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


def client(engine, **options):
    """A client of an app in this process, at base model name `base`."""
    app = create_app(engine, ServerConfig("base", **options))
    return TestClient(app, base_url=LOCAL, raise_server_exceptions=False)


def post(http, body, path="/v1/completions", status=200, **options):
    answer = http.post(path, json=body, **options)
    assert answer.status_code == status, answer.text
    return answer.json()


def saying(tokenizer, text):
    """A script for the fake engine: it says that text, then stops."""
    return lambda prompt, adapter, sampling: tokenizer(text)["input_ids"]


@contextlib.contextmanager
def serving(engine, **options):
    """(URL, server) of a real server in a thread, on a free port of 127.0.0.1."""
    server = Server(create_app(engine, ServerConfig("base", **options)))
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < deadline and thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
    finally:
        server.stop()
        engine.go()
        thread.join(30)
        assert not thread.is_alive()


__all__ = ["ADMIN", "CHAT", "HELLO", "KEY", "FakeEngine", "client", "load_tokenizer", "post", "saying", "serving"]
