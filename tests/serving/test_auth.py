"""Who may ask what: every route of the app, with and without keys."""

import os

import pytest
from fastapi.routing import iter_route_contexts

from fastft.serving.api.config import ConfigError, Limits, ServerConfig, is_loopback, read_keys
from fastft.serving.server import create_app

from .server_fixtures import ADMIN, KEY, FakeEngine, client, load_tokenizer

COMPLETION = {"model": "base", "prompt": "hello", "max_tokens": 2}


@pytest.fixture
def engine():
    return FakeEngine(load_tokenizer())


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def routes(app):
    """(method, path with names put in) of all that the app answers, also what is not in its OpenAPI file."""
    for context in iter_route_contexts(app.routes):
        path = context.path.replace("{model:path}", "base").replace("{name}", "math")
        assert "{" not in path, f"no value for {path}"
        for method in context.methods:
            yield method, path


def test_every_route_needs_its_key(engine):
    http = client(engine, api_keys=(KEY, "other" * 5), admin_token=ADMIN)
    walked = sorted(set(routes(http.app)))
    assert {path for _, path in walked} >= {
        "/health",
        "/metrics",
        "/openapi.json",
        "/v1/models",
        "/v1/models/base",
        "/v1/completions",
        "/v1/chat/completions",
        "/admin/adapters",
        "/admin/adapters/math/load",
        "/admin/adapters/math/unpin",
    }
    wrong = [{}, bearer("x" * 20), bearer(""), {"authorization": KEY}, {"authorization": f"Basic {KEY}"}, bearer(KEY[:-1])]
    for method, path in walked:
        admin = path.startswith("/admin")
        other = KEY if admin else ADMIN
        if path == "/health":
            assert http.request(method, path).status_code == 200
            continue
        for headers in [*wrong, bearer(other), bearer("ключ")]:
            headers = {name: value.encode() for name, value in headers.items()}
            answer = http.request(method, path, headers=headers)
            assert answer.status_code == 401, (method, path, headers)
            assert answer.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert answer.json()["error"]["code"] == "invalid_api_key"
    assert not engine.adapters.calls and len(engine.submitted) == 1  # the health probe's
    for method, path in walked:
        right = ADMIN if path.startswith("/admin") else KEY
        assert http.request(method, path, headers=bearer(right)).status_code in (200, 409, 422), (method, path)
    assert engine.adapters.calls


def test_paths_that_do_not_exist_need_the_key_too(engine):
    http = client(engine, api_keys=(KEY,))
    for path in (
        "/",
        "/docs",
        "/redoc",
        "/v1/nothing",
        "//health",
        "/health/",
        "/admin",
        "/HEALTH",
        "/health%2f..%2fmetrics",
    ):
        assert http.get(path).status_code in (401, 404), path
        assert http.get(path, headers=bearer(KEY)).status_code == 404, path


def test_all_keys_open(engine):
    http = client(engine, api_keys=(KEY, "other" * 5))
    for key in (KEY, "other" * 5):
        assert http.post("/v1/completions", json=COMPLETION, headers=bearer(key)).status_code == 200
    assert http.get("/v1/models", headers={"authorization": f"bearer {KEY}"}).status_code == 200


def test_no_body_is_read_without_a_key(engine):
    http = client(engine, api_keys=(KEY,), limits=Limits(body_bytes=10))
    assert http.post("/v1/completions", content=b"x" * 100).status_code == 401


@pytest.mark.parametrize("api_keys", [(), (KEY,)])
def test_no_body_is_read_for_health(engine, api_keys):
    """Which needs no key: 30 connections with a body each took 120 MiB from the server."""
    http = client(engine, api_keys=api_keys)
    for body in (b"{}", iter([b"{}"])):
        answer = http.request("GET", "/health", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 413 and answer.headers["connection"] == "close"
    assert not engine.submitted
    assert http.get("/health", headers={"content-length": "0"}).status_code == 200


def test_admin_routes_are_not_there_without_a_token(engine):
    http = client(engine)
    for headers in ({}, bearer(KEY)):
        answer = http.post("/admin/adapters/math/load", headers=headers)
        assert answer.status_code == 404 and "--admin-token-file" in answer.json()["error"]["message"]
    assert "/admin/adapters" not in {path for _, path in routes(http.app)}
    assert not engine.adapters.calls


def test_without_keys_only_local_names(engine):
    http = client(engine)
    for host in ("127.0.0.1", "127.0.0.1:8000", "localhost", "LOCALHOST:80", "[::1]:8000", "[::1]", "127.0.0.2:80"):
        assert http.get("/v1/models", headers={"host": host}).status_code == 200, host
    for host in ("evil.example", "localhost.evil.example:8000", "127.0.0.1.evil.example", "127.1", "", "[::2]"):
        assert http.get("/v1/models", headers={"host": host}).status_code == 403, host
    keyed = client(engine, api_keys=(KEY,))
    assert keyed.get("/v1/models", headers={"host": "models.example", **bearer(KEY)}).status_code == 200


def test_pages_of_other_sites_can_not_post(engine):
    """A browser sends such a body without asking first; JSON it would ask for, and is not allowed."""
    http = client(engine)
    answer = http.post(
        "/v1/completions", content=b'{"model": "base", "prompt": "x"}', headers={"content-type": "text/plain"}
    )
    assert answer.status_code == 422 and not engine.submitted
    assert "access-control-allow-origin" not in http.options("/v1/completions", headers={"origin": "http://a"}).headers


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "", "0"])
def test_hosts_that_others_reach_need_a_key(host):
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match="--api-key-file"):
        ServerConfig("base", host=host)
    ServerConfig("base", host=host, api_keys=(KEY,))


def test_keys_are_checked_and_not_shown():
    for key in ("short", "", "with space in the middle", "ключ" * 5):
        with pytest.raises(ConfigError, match="an API key has .* at least 16"):
            ServerConfig("base", api_keys=(key,))
    with pytest.raises(ConfigError, match="the admin token has 5 characters"):
        ServerConfig("base", admin_token="short")
    with pytest.raises(ConfigError, match="admin token is also an API key"):
        ServerConfig("base", api_keys=(KEY,), admin_token=KEY)
    assert KEY not in repr(ServerConfig("base", api_keys=(KEY,), admin_token=ADMIN)) and all(
        map(is_loopback, ("::1", "localhost"))
    )


def test_keys_from_files_and_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text(f"# team a\n{KEY}\n\n  {ADMIN}  \n")
    file.chmod(0o600)
    monkeypatch.setenv("FASTFT_TEST_KEY", ADMIN + "\n")
    assert read_keys(str(file), "FASTFT_NOT_SET") == (KEY, ADMIN)
    assert read_keys(None, "FASTFT_TEST_KEY") == (ADMIN,)
    assert "FASTFT_TEST_KEY" not in os.environ
    assert read_keys(None, "FASTFT_TEST_KEY") == ()
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_keys(str(file), "FASTFT_NOT_SET")
    file.chmod(0o600)
    file.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_keys(str(file), "FASTFT_NOT_SET")
    with pytest.raises(ConfigError, match="none: No such file or directory$"):
        read_keys(str(tmp_path / "none"), "FASTFT_NOT_SET")


def test_openapi_says_which_key(engine):
    with_keys = create_app(engine, ServerConfig("base", api_keys=(KEY,), admin_token=ADMIN)).openapi()["paths"]
    assert with_keys["/v1/completions"]["post"]["security"] == [{"ApiKey": []}]
    assert with_keys["/admin/adapters"]["get"]["security"] == [{"AdminToken": []}]
    assert "security" not in with_keys["/health"]["get"]
