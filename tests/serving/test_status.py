"""Health, metrics and the operator's routes."""

import time

import pytest

from fastft.serving.api import status
from fastft.serving.api.config import Limits
from fastft.serving.requests import AdaptersUnavailable

from .server_fixtures import ADMIN, HELLO, FakeEngine, client, load_tokenizer, post


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def engine(tokenizer):
    return FakeEngine(tokenizer)


def test_health_asks_the_engine_for_a_token(engine, monkeypatch):
    http = client(engine)
    assert http.get("/health").json() == {"status": "ok", "reason": None} and len(engine.submitted) == 1
    http.get("/health")
    assert len(engine.submitted) == 1  # fresh enough: nobody can keep the engine busy with it
    engine.reason = "the step thread died"
    monkeypatch.setattr(status, "_FRESH", 0.0)
    answer = http.get("/health")
    assert answer.status_code == 503 and answer.json()["reason"] == "the step thread died"


def test_a_dead_engine_is_told_of_at_once(engine):
    http = client(engine)
    assert http.get("/health").status_code == 200
    engine.reason = "the step thread died"
    assert http.get("/health").json()["reason"] == "the step thread died"


def test_health_of_an_engine_that_hangs(engine, monkeypatch):
    monkeypatch.setattr(status, "_PROBE_SECONDS", 0.1)
    engine.hold()
    answer = client(engine).get("/health")
    assert answer.status_code == 503 and "within 0.1 s" in answer.json()["reason"]
    assert engine.cancelled == engine.submitted  # the probe is not left in the queue
    engine.go()


def test_health_behind_a_long_prompt(engine, monkeypatch):
    """Its steps take all room for longer than the probe waits; no token comes, and nothing is wrong."""
    monkeypatch.setattr(status, "_PROBE_SECONDS", 0.1)
    engine.hold()
    submit = engine.submit

    def submitted(*arguments, **options):
        engine.steps += 1
        return submit(*arguments, **options)

    monkeypatch.setattr(engine, "submit", submitted)
    assert client(engine).get("/health").status_code == 200
    engine.go()


def test_health_of_a_busy_engine(engine, monkeypatch):
    http = client(engine)
    post(http, HELLO)
    monkeypatch.setattr(status, "_FRESH", 0.0)
    engine.max_waiting = 0
    monkeypatch.setattr(status, "_BUSY_SECONDS", 0.05)
    assert http.get("/health").status_code == 200  # however long nobody asked for anything before
    time.sleep(0.1)
    assert "has made no step for" in http.get("/health").json()["reason"]
    engine.steps += 1
    assert http.get("/health").status_code == 200


def test_health_tells_of_a_failing_engine(tokenizer):
    engine = FakeEngine(tokenizer)
    engine.fail[None] = RuntimeError("CUDA error: /secret")
    answer = client(engine).get("/health")
    assert answer.status_code == 503 and "secret" not in answer.text


def test_metrics(tokenizer):
    engine = FakeEngine(tokenizer, delay=0.002)
    http = client(engine)
    for model in ("base", "math", "math"):
        post(http, {**HELLO, "model": model})
    post(http, {**HELLO, "n": 0}, status=422)
    lines = http.get("/metrics").text.splitlines()
    for line in (
        'fastft_requests_total{finish_reason="length",model="math"} 2.0',
        'fastft_requests_total{finish_reason="length",model="base"} 1.0',
        'fastft_generated_tokens_total{model="math"} 16.0',
        'fastft_prompt_tokens_total{model="base"} 2.0',
        'fastft_time_to_first_token_seconds_count{model="math"} 2.0',
        'fastft_inter_token_seconds_count{model="math"} 14.0',
        'fastft_request_seconds_count{model="base"} 1.0',
        'fastft_errors_total{code="invalid_value"} 1.0',
        "fastft_adapter_memory_bytes 0.0",
        "fastft_adapter_memory_evictions_total 3.0",
        "fastft_adapter_memory_hits_host_total 7.0",
        "fastft_engine_running 0.0",
    ):
        assert line in lines
    total = next(float(line.split()[1]) for line in lines if line.startswith('fastft_inter_token_seconds_sum{model="math"}'))
    assert 14 * 0.002 <= total < 5


def test_labels_are_bounded(tokenizer):
    engine = FakeEngine(tokenizer, adapters=[f"a{i}" for i in range(20)])
    http = client(engine, limits=Limits(metric_models=5))
    for i in range(20):
        post(http, {**HELLO, "model": f"a{i}", "max_tokens": 1})
        post(http, {**HELLO, "model": f"unknown{i}"}, status=404)
    lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith("fastft_requests_total")]
    assert len(lines) == 6 and 'fastft_requests_total{finish_reason="length",model="(others)"} 15.0' in lines


def test_admin(engine):
    http = client(engine, admin_token=ADMIN)
    key = {"authorization": f"Bearer {ADMIN}"}

    def act(action, name="math", status=200, **query):
        return post(http, None, f"/admin/adapters/{name}/{action}", status, headers=key, params=query)

    assert act("load", timeout=5)["action"] == "load" and engine.adapters.calls == [("load", "math", 5.0)]
    listed = http.get("/admin/adapters", headers=key).json()
    assert [(one["name"], one["state"]) for one in listed["adapters"]] == [("code", "on_disk"), ("math", "on_device")]
    assert listed["adapters"][1]["device_bytes"] == 4096 and listed["memory"]["slots"] == 4
    assert act("pin")["digest"] == "d" * 64
    assert act("unload", status=409)["error"]["code"] == "timeout"
    act("unpin")
    assert act("unload")["freed_bytes"] == 4096
    assert act("update")["digest"] == "e" * 64
    assert act("load", name="none", status=404)["error"]["code"] == "adapter_not_found"
    engine.adapters.broken["code"] = "2 tensors are of the wrong shape"
    assert "wrong shape" in act("load", name="code", status=422)["error"]["message"]
    assert http.get("/admin/adapters", headers=key).json()["adapters"][0]["error"] == "2 tensors are of the wrong shape"
    for name in ("a.b", "..%2fmath", "%2e%2e", "x" * 65, "a%00"):
        assert http.post(f"/admin/adapters/{name}/load", headers=key).status_code in (404, 422)
    assert act("load", timeout=1e9, status=422)["error"]["param"] == "timeout"


def test_admin_unloads_what_is_gone_from_the_folder(engine):
    http = client(engine, admin_token=ADMIN)
    engine.adapters.loaded.add("gone")
    headers = {"authorization": f"Bearer {ADMIN}"}
    assert http.post("/admin/adapters/gone/unload", headers=headers).json()["freed_bytes"] == 4096
    assert http.post("/admin/adapters/gone/unload", headers=headers).status_code == 404


def test_admin_without_adapters(tokenizer):
    http = client(FakeEngine(tokenizer, adapters=None), admin_token=ADMIN)
    answer = http.get("/admin/adapters", headers={"authorization": f"Bearer {ADMIN}"})
    assert answer.status_code == 404 and "--adapters" in answer.json()["error"]["message"]
    assert http.get("/metrics").status_code == 200


def test_an_adapter_of_the_base_models_name_is_no_second_model(tokenizer):
    http = client(FakeEngine(tokenizer, adapters=["base", "math"]))
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["base", "math"]


def test_without_its_folder_the_server_says_so(tokenizer, monkeypatch):
    engine = FakeEngine(tokenizer)
    http, key = client(engine, admin_token=ADMIN), {"authorization": f"Bearer {ADMIN}"}

    def unreadable(*_, **__):
        raise AdaptersUnavailable("the adapter folder '/srv/secret' can't be read")

    monkeypatch.setattr(engine.adapters, "names", unreadable)
    monkeypatch.setattr(engine.adapters, "load", unreadable)
    for method, path in [
        ("GET", "/v1/models"),
        ("GET", "/v1/models/math"),
        ("GET", "/admin/adapters"),
        ("POST", "/admin/adapters/math/load"),
    ]:
        answer = http.request(method, path, headers=key)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "adapters_unavailable"
        assert "secret" not in answer.text and answer.headers["retry-after"]
    assert http.get("/v1/models/base").status_code == 200
    assert post(http, {**HELLO, "model": "math"}, status=503)["error"]["code"] == "adapters_unavailable"
    post(http, HELLO)
    engine.fail["math"] = AdaptersUnavailable("/srv/secret")
    monkeypatch.undo()
    assert post(http, {**HELLO, "model": "math"}, status=503)["error"]["code"] == "adapters_unavailable"
