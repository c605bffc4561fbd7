"""The server against its own OpenAPI file: no request makes it fail, and every answer is of the shape that it promises."""

import json
from functools import cache

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from fastft.serving.api.config import Limits, ServerConfig
from fastft.serving.server import create_app

from .fakes import FakeEngine
from .server_fixtures import ADMIN, KEY, load_tokenizer

ROUTES = [
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/admin/adapters"),
    *(("POST", f"/admin/adapters/{{name}}/{action}") for action in ("load", "unload", "update", "pin", "unpin")),
]
EXAMPLES = {"/v1/completions": 100, "/v1/chat/completions": 100}


@cache
def api():
    config = ServerConfig("base", api_keys=(KEY,), admin_token=ADMIN, limits=Limits(choices=4, max_tokens=64))
    app = create_app(FakeEngine(load_tokenizer()), config)
    return schemathesis.openapi.from_asgi("/openapi.json", app, headers={"Authorization": f"Bearer {KEY}"})


def test_every_route_is_fuzzed():
    assert {(op.ok().method.upper(), op.ok().path) for op in api().get_all_operations()} == set(ROUTES)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["fitting", "unfitting"])
@pytest.mark.parametrize("method,path", ROUTES, ids=lambda v: v)
def test_every_answer_is_one_of_those_promised(method, path, mode):
    schemathesis.checks.load_all_checks()
    # The schema does not say what depends on the server's limits, so a request that fits it may get a 422.
    excluded = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")]
    operation = api()[path][method]
    if mode is GenerationMode.NEGATIVE and not (operation.body or operation.path_parameters or operation.query):
        pytest.skip("takes nothing that could be wrong")
    answered = set()

    @settings(
        max_examples=EXAMPLES.get(path, 10),
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def fuzz(case):
        case.headers = {"Authorization": f"Bearer {ADMIN if path.startswith('/admin') else KEY}"}
        if mode is GenerationMode.POSITIVE:  # a name that exists, so that the request gets further
            if isinstance(case.body, dict):
                case.body["model"] = "math" if len(json.dumps(case.body)) % 2 else "base"
            if case.path_parameters:
                case.path_parameters = dict.fromkeys(case.path_parameters, "math")
        answered.add(case.call_and_validate(excluded_checks=excluded).status_code)

    fuzz()
    assert mode is GenerationMode.NEGATIVE or 200 in answered, answered
