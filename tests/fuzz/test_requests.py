"""Requests that nobody sends on purpose: a documented 4xx with its body, or an answer. Never a 500, and nothing unchecked
gets to the engine (the fake one asserts what the real one is promised)."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastft.serving.api.config import Limits
from tests.fuzz.adapter_corpus import DEEP, VALUES, changed_somewhere, written
from tests.lengths import drawn
from tests.serving.server_fixtures import ADMIN, CHAT, HELLO, FakeEngine, client, load_tokenizer

pytestmark = pytest.mark.timeout(300)
BODIES = {"/v1/completions": HELLO, "/v1/chat/completions": CHAT}
MORE = {"temperature": 0.5, "top_p": 0.9, "n": 1, "stop": ["a"], "seed": 1, "stream": False, "logprobs": None, "user": "me"}
STATUSES = {400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 429, 503}  # what api/errors.py and the routes describe
TYPES = {"invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"}
CONTENT_TYPES = ["application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
JSON_TYPE = {"content-type": "application/json"}
NAMES = ["..", "../etc", "math/../code", "%2e%2e", "x" * 5000, "\0", "ma\nth"]


@pytest.fixture(scope="module")
def http():
    engine = FakeEngine(load_tokenizer())
    return client(engine, admin_token=ADMIN, limits=Limits(choices=4, max_tokens=64, body_bytes=1 << 20))


def strict(text):
    """JSON as the standard has it: no NaN, each key once."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    def once(pairs):
        assert len(pairs) == len(dict(pairs)), pairs
        return dict(pairs)

    return json.loads(text, parse_constant=refuse, object_pairs_hook=once)


def check(answer):
    """Is it an answer or a documented error?"""
    if answer.status_code == 200:
        if answer.headers["content-type"].startswith("application/json"):
            strict(answer.text)
        return
    assert answer.status_code in STATUSES, f"{answer.status_code}: {answer.text[:500]}"
    if answer.request.method == "HEAD":
        return
    body = strict(answer.text)
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    error = body["error"]
    assert error["type"] in TYPES and isinstance(error["code"], str)
    assert 10 < len(error["message"]) < 2000 and error["message"].isprintable(), ascii(error["message"])[:2000]


@st.composite
def strange_bodies(draw):
    """(path, body) of a good request, of which one or two places hold something else."""
    path = draw(st.sampled_from(sorted(BODIES)))
    more = draw(st.lists(st.sampled_from(sorted(MORE)), unique=True))
    body = {**BODIES[path], **{name: MORE[name] for name in more}}
    return path, written(changed_somewhere(draw, body))


@st.composite
def damaged_bodies(draw):
    """(path, body) of a good request, as bytes that were cut, flipped, repeated or written in another encoding."""
    path = draw(st.sampled_from(sorted(BODIES)))
    data = bytearray(json.dumps(BODIES[path]).encode(draw(st.sampled_from(["utf-8", "utf-16", "utf-8-sig", "utf-32-be"]))))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        what = draw(st.sampled_from(["cut", "flip", "insert", "repeat"]))
        if what == "cut":
            del data[at:]
        elif what == "flip" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif what == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=5))
        else:
            data += data[at:]
    return path, bytes(data)


def test_strange_values(http):
    @drawn(80)
    @given(strange_bodies())
    def post(request):
        path, body = request
        check(http.post(path, content=body, headers=JSON_TYPE))

    post()


def test_damaged_bytes(http):
    types = st.sampled_from(
        ["application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
    )

    @drawn(60)
    @given(damaged_bodies(), types)
    def post(request, kind):
        path, body = request
        check(http.post(path, content=body, headers={"content-type": kind} if kind else {}))

    post()


WHOLE = [
    b"",
    b"\0",
    b"null",
    b"[]",
    b"{}",
    b'"' + b"x" * 1000 + b'"',
    DEEP.encode(),
    b'{"a":' * 50_000,
    b'{"model": "base", "prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    b'{"model": "base", "prompt": "a", "n": 1e400}',
    b'{"model": "base", "prompt": "a", "n": ' + b"9" * 5000 + b"}",
    b'{"model": "base", "prompt": "a", "temperature": -0.0, "temperature": NaN}',
    b'{"model": "base", "prompt": [' + b"1," * 100_000 + b"1]}",
    b'{"model": "base", "prompt": [' + b'"",' * 10_000 + b'""]}',
    b'{"model": "base", "prompt": "\\ud800"}',
    b'{"model": "base", "prompt": "a", "stop": "\\udfff"}',
    b'{"model": "\\u0000", "prompt": "a"}',
    b'{"model": "base", "prompt": "a", "\\u001f\\n": 1}',
    b'{"model": "base", "prompt": "\xff\xfe"}',
    b'{"model": "base", "prompt": "a", "user": "' + b"u" * 500_000 + b'"}',
    b'{"model": "base", "prompt": "a", ' + b", ".join(b'"x%d": 1' % i for i in range(20_000)) + b"}",
    b'{"model": "base", "prompt": "a"}' + b" " * (1 << 20),
    b'{"model": "base", "prompt": "a", "stream_options": {"include_usage": true}}',
]


@pytest.mark.parametrize("body", WHOLE, ids=lambda body: ascii(body[:30]))
def test_bodies_of_the_corpus(http, body):
    for path in BODIES:
        check(http.post(path, content=body, headers=JSON_TYPE))


def test_names_in_paths(http):
    """Models and adapters that can't be: encoded slashes, dots, line breaks, other alphabets, long ones."""
    from urllib.parse import quote

    @drawn(60)
    @given(
        st.one_of(st.text(max_size=20), st.sampled_from(NAMES)),
        st.sampled_from(["/v1/models/{}", "/admin/adapters/{}/load", "/admin/adapters/{}/{}", "/{}", "/v1/{}"]),
        st.sampled_from(["GET", "POST", "DELETE", "PUT", "HEAD"]),
        VALUES,
    )
    @example("a", "/admin/adapters/{}/load", "POST", float("nan"))
    def ask(name, path, method, timeout):
        name = name.encode("utf-8", "surrogatepass")
        headers = {"authorization": f"Bearer {ADMIN}"}
        query = {"timeout": str(timeout)[:100].encode("utf-8", "replace")}
        where = path.format(*[quote(name, safe="")] * 2)
        check(http.request(method, where, headers=headers, params=query))

    ask()


def test_the_server_still_answers(http):
    """After all of that."""
    assert http.post("/v1/completions", json=HELLO).status_code == 200
    assert http.get("/health").status_code == 200
