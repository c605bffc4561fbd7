"""What the routes answer, over a fake engine whose tokens are known."""

import asyncio
import json
import threading
import types

import pytest
from starlette.requests import ClientDisconnect

from fastft.checkpoint.files import AdapterFileError
from fastft.serving.api import completions, generation
from fastft.serving.api.generation import Sampling
from fastft.serving.api.schemas import CompletionRequest
from fastft.serving.requests import EngineStopped, UnknownAdapter

from .server_fixtures import CHAT, HELLO, FakeEngine, client, load_tokenizer, post, saying


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def engine(tokenizer):
    return FakeEngine(tokenizer)


def events(answer):
    """The JSON of a stream's events; the last one has to be [DONE]."""
    lines = [line for line in answer.text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_request_without_temperature_is_drawn_as_the_model_says(engine):
    for config, defaults in (
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.8}, (0.6, 0.8)),
        ({"do_sample": True, "temperature": None, "top_p": 0.8}, (1.0, 0.8)),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.8}, (1.0, 1.0)),
    ):
        engine.model.generation_config = types.SimpleNamespace(**config)
        http, given = client(engine), len(engine.submitted)
        post(http, HELLO)
        post(http, CHAT, "/v1/chat/completions")
        post(http, {**HELLO, "temperature": 0, "top_p": 1})
        found = [(one.sampling.temperature, one.sampling.top_p) for one in engine.submitted[given:]]
        assert found == [defaults, defaults, (0, 1)]


def test_a_choice_whose_text_can_not_be_begun_asks_nothing_of_the_engine(engine, monkeypatch):
    """Some tokenizers know fewer ids than the model; the engine's request would run on, and nobody would know of it."""

    def fail(*_):
        raise IndexError("piece id is out of range")

    monkeypatch.setattr(generation, "Output", fail)
    http = client(engine)
    assert post(http, HELLO, status=500)["error"]["code"] == "internal_error"
    assert not engine.submitted and not http.app.state.service.jobs


def test_models(engine):
    http = client(engine)
    listed = http.get("/v1/models").json()["data"]
    assert [(model["id"], model["parent"]) for model in listed] == [("base", None), ("code", "base"), ("math", "base")]
    assert http.get("/v1/models/math").json() == listed[2] and http.get("/v1/models/base").json() == listed[0]
    assert http.get("/v1/models/none").status_code == 404


def test_the_adapter_named_answers(engine):
    http = client(engine)
    texts = {}
    for name in ("base", "math", "code"):
        answer = post(http, {**HELLO, "model": name, "temperature": 0})
        texts[name] = answer["choices"][0]["text"]
        assert answer["model"] == name and (answer["system_fingerprint"] is None) == (name == "base")
    assert len(set(texts.values())) == 3
    assert [request.adapter for request in engine.submitted] == [None, "math", "code"]


def test_what_reaches_the_engine(engine, tokenizer):
    http = client(engine)
    post(http, {**HELLO, "temperature": 0.5, "top_p": 0.9, "seed": 7, "n": 3})
    post(http, {"model": "base", "prompt": "hello"})
    sampled, default = [request.sampling for request in engine.submitted[:3]], engine.submitted[3].sampling
    assert [one.seed for one in sampled] == [7, 8, 9]
    assert {(one.temperature, one.top_p, one.max_tokens, one.logprobs) for one in sampled} == {(0.5, 0.9, 8, False)}
    assert (default.temperature, default.top_p, default.max_tokens) == (1.0, 1.0, 16)
    assert engine.submitted[0].prompt_ids == tokenizer("hello")["input_ids"]
    post(http, {**CHAT, "max_tokens": None}, "/v1/chat/completions")
    chat = engine.submitted[4]
    assert tokenizer.decode(chat.prompt_ids) == "<|user|>hello<|assistant|>"
    assert chat.sampling.max_tokens == engine.max_length - len(chat.prompt_ids)


def test_several_prompts_and_choices(engine, tokenizer):
    answer = post(client(engine), {**HELLO, "prompt": ["one", "two words"], "n": 2, "seed": 1})
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    asked = [tokenizer.decode(request.prompt_ids) for request in engine.submitted]
    assert asked == ["one", "one", "two words", "two words"]
    lengths = [len(tokenizer(text)["input_ids"]) for text in ("one", "two words")]
    assert answer["usage"] == {
        "prompt_tokens": sum(lengths),
        "completion_tokens": 32,
        "total_tokens": sum(lengths) + 32,
    }
    ids = post(client(engine), {**HELLO, "prompt": [[5, 6], [7]], "temperature": 0})
    assert len(ids["choices"]) == 2 and engine.submitted[-1].prompt_ids == [7]
    assert post(client(engine), {**HELLO, "prompt": [5, 6]})["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize("more", [{}, {"n": 2, "seed": 3}, {"stop": ["e", "th"]}, {"logprobs": 0}], ids=str)
def test_streams_add_up_to_the_whole_answer(engine, more):
    http = client(engine)
    for seed in range(5):
        body = {**HELLO, "max_tokens": 40, "prompt": f"hello {seed}", "seed": seed, **more}
        whole = post(http, body)
        chunks = events(
            http.post("/v1/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}})
        )
        assert "stop" in more or len(chunks) > 4
        for choice in whole["choices"]:
            parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
            assert "".join(part["text"] for part in parts) == choice["text"]
            assert [part["finish_reason"] for part in parts][-1] == choice["finish_reason"]
            assert all(part["finish_reason"] is None for part in parts[:-1])
            if "logprobs" in more:
                for key in ("tokens", "token_logprobs", "text_offset"):
                    assert [one for part in parts for one in part["logprobs"][key]] == choice["logprobs"][key]
        assert chunks[-1]["usage"] == whole["usage"] and not chunks[-1]["choices"]
        assert len({chunk["id"] for chunk in chunks}) == 1 and {chunk["object"] for chunk in chunks} == {"text_completion"}


def test_chat_streams_too(engine):
    http = client(engine)
    body = {**CHAT, "max_completion_tokens": 20, "n": 2, "seed": 5, "logprobs": True}
    whole = post(http, body, "/v1/chat/completions")
    chunks = events(http.post("/v1/chat/completions", json={**body, "stream": True}))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and "usage" not in chunks[0]
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        logprobs = [one for part in parts if part["logprobs"] for one in part["logprobs"]["content"]]
        assert logprobs == choice["logprobs"]["content"] and len(logprobs) == 20
        assert bytes(byte for one in logprobs for byte in one["bytes"]).decode() == choice["message"]["content"]


@pytest.mark.parametrize(
    "path,body", [("/v1/chat/completions", CHAT), ("/v1/completions", HELLO)], ids=["chat", "completions"]
)
def test_all_chunks_have_the_adapters_fingerprint(tokenizer, path, body, monkeypatch):
    """Also those before the engine has come to the first choice, or to any."""
    run, free = FakeEngine._run, threading.Event()

    def late(self, request):
        free.wait(0.5 if request is self.submitted[0] else 0.1)
        run(self, request)

    monkeypatch.setattr(FakeEngine, "_run", late)
    answer = client(FakeEngine(tokenizer)).post(path, json={**body, "model": "math", "n": 2, "stream": True})
    fingerprints = {chunk["system_fingerprint"] for chunk in events(answer)}
    assert len(fingerprints) == 1 and None not in fingerprints


def test_content_in_parts(engine, tokenizer):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    post(client(engine), {**CHAT, "messages": [{"role": "user", "content": parts}]}, "/v1/chat/completions")
    assert tokenizer.decode(engine.submitted[0].prompt_ids) == "<|user|>hello<|assistant|>"


EMPTY = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None, "parsed": None}


def test_answers_sent_back_as_messages(engine, tokenizer):
    http, user = client(engine), {"role": "user", "content": "hello"}
    for own in (
        {"content": "yes", **EMPTY},
        {"content": None, "reasoning_content": None},
        {},
        {"content": "", "refusal": "", "tool_calls": []},
    ):
        post(http, {**CHAT, "messages": [user, {"role": "assistant", **own}, user]}, "/v1/chat/completions")
        said = own.get("content") or ""
        asked = tokenizer.decode(engine.submitted[-1].prompt_ids)
        assert asked == f"<|user|>hello<|assistant|>{said}<|endoftext|><|user|>hello<|assistant|>"
    unused = {"service_tier": "auto", "prompt_cache_key": "k", "safety_identifier": "s", "prompt_cache_retention": "24h"}
    post(http, {**CHAT, **unused}, "/v1/chat/completions")
    for wrong, where in [
        ({"refusal": "no"}, "messages.1.refusal"),
        ({"tool_calls": [{"type": "function"}]}, "messages.1.tool_calls"),
        ({"audio": {"id": "x"}}, "messages.1.audio"),
        ({"role": "user", "content": None}, "messages.1.content: given a NoneType"),
        ({"reasoning_content": ""}, "messages.1.reasoning_content: not supported"),
    ]:
        body = {**CHAT, "messages": [user, {"role": "assistant", "content": "yes", **wrong}]}
        assert where in post(http, body, "/v1/chat/completions", 422)["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_engines_request(tokenizer, stream):
    engine = FakeEngine(tokenizer, script=saying(tokenizer, "one two STOP three four"), delay=0.02)
    body = {**HELLO, "max_tokens": 50, "stop": ["STOP", "four"], "stream": stream}
    answer = client(engine).post("/v1/completions", json=body)
    chunks = events(answer) if stream else [answer.json()]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "one two "
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert engine.cancelled == engine.submitted and len(engine.submitted[0].tokens) < 12


def test_stops_that_are_special_tokens(tokenizer):
    """They have no text that a stop string could match."""
    ids = tokenizer("hello<|assistant|> and more")["input_ids"]
    engine = FakeEngine(tokenizer, script=lambda *_: ids)
    http = client(engine)
    body = {**HELLO, "max_tokens": 50, "stop": ["never", "<|assistant|>"]}
    choice = post(http, body)["choices"][0]
    assert choice["text"] == "hello" and choice["finish_reason"] == "stop"
    error = post(http, {**body, "stop": "x<|assistant|>"}, status=422)["error"]
    assert error["param"] == "stop" and "'<|assistant|>' in it is a special token" in error["message"]
    # Its characters may also be written by other tokens.
    ids = tokenizer("one <|assis")["input_ids"] + tokenizer("tant|> two")["input_ids"]
    assert post(http, body)["choices"][0]["text"] == "one "


def test_the_models_own_end_is_not_shown(tokenizer):
    engine = FakeEngine(tokenizer, script=lambda *_: [*tokenizer("done")["input_ids"], tokenizer.eos_token_id])
    answer = post(client(engine), {**HELLO, "max_tokens": 50, "logprobs": 0})
    assert answer["choices"][0]["text"] == "done" and answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_the_token_that_ends_an_answer_has_no_text(tokenizer, stream):
    """Whatever the tokenizer decodes it to: a model's end need not be one of the tokenizer's special tokens."""
    said, (end,) = tokenizer("so be it", verbose=False)["input_ids"], tokenizer("!")["input_ids"]
    engine = FakeEngine(tokenizer, script=lambda *_: [*said, end, *said])
    engine.stops = frozenset({end})
    body = {**HELLO, "max_tokens": 50, "logprobs": 0, "stream": stream}
    answer = client(engine).post("/v1/completions", json=body)
    choices = [chunk["choices"][0] for chunk in (events(answer) if stream else [answer.json()])]
    assert "".join(choice["text"] for choice in choices) == "so be it" and choices[-1]["finish_reason"] == "stop"
    assert choices[-1]["logprobs"]["tokens"][-1] == ""
    assert sum(len(choice["logprobs"]["token_logprobs"]) for choice in choices) == len(said) + 1


def test_logprobs_of_the_likeliest_at_temperature_0(engine):
    http = client(engine)
    logprobs = post(http, {**HELLO, "logprobs": 1, "temperature": 0})["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-0.5 - at for at in range(8)]
    assert logprobs["top_logprobs"] == [{t: v} for t, v in zip(logprobs["tokens"], logprobs["token_logprobs"])]
    chat = {**CHAT, "logprobs": True, "top_logprobs": 1, "temperature": 0}
    content = post(http, chat, "/v1/chat/completions")["choices"][0]["logprobs"]["content"]
    assert all(one["top_logprobs"][0]["token"] == one["token"] for one in content)
    refused = post(http, {**HELLO, "logprobs": 1}, status=422)["error"]
    assert refused["code"] == "no_top_logprobs" and "temperature 0" in refused["message"]
    assert post(http, {**chat, "temperature": 1}, "/v1/chat/completions", 422)["error"]["param"] == "top_logprobs"


def test_unknown_models_are_named_and_never_reach_the_disk(engine):
    http = client(engine)
    for name in ("nope", "../math", "/etc/passwd", "math/", "http://a/b", "math\x00", "ma th", "x" * 200, "😀", "base "):
        error = post(http, {**HELLO, "model": name}, status=404)["error"]
        assert error["code"] == "model_not_found" and "GET /v1/models" in error["message"] and error["param"] == "model"
    assert not engine.submitted
    assert "nope" not in http.get("/metrics").text


@pytest.mark.parametrize(
    "body,message",
    [
        ({"max_tokens": 0}, "max_tokens: given 0"),
        ({"max_tokens": "5"}, "max_tokens: given '5'"),
        ({"temperature": 3}, "temperature: given 3"),
        ({"top_p": 0}, "top_p: given 0"),
        ({"prompt": []}, "given an empty list, supported is a string"),
        ({"prompt": [[1], []]}, "given a list of list"),
        ({"prompt": ["a", 1]}, "given a list of int and str"),
        ({"prompt": [-1]}, "given a list of int"),
        ({"prompt": {"a": 1}}, "given a dict"),
        ({"prompt": ""}, "prompt has no tokens"),
        ({"prompt": [5000]}, "Given the token id 5000; the model has 0 to 2047"),
        ({"echo": True}, "echo: not supported by this server; leave it out, or give false"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias: not supported"),
        ({"best_of": 2}, "best_of: not supported"),
        ({"top_k": 5, "min_p": None}, "top_k: not supported by this server; leave it out"),
        ({"guided_json": {}}, "guided_json: not supported by this server; leave it out"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "supported are a string and a list of strings"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream: true"),
        ({"model": None}, "model: given None"),
    ],
    ids=str,
)
def test_wrong_requests_are_explained(engine, body, message):
    error = post(client(engine), {**HELLO, **body}, status=422)["error"]
    assert message in error["message"] and error["type"] == "invalid_request_error" and error["code"]
    assert not engine.submitted


def test_neutral_values_of_what_is_not_supported(engine):
    neutral = {"frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "user": "u", "n": None, "stop": None}
    post(client(engine), {**HELLO, **neutral, "best_of": 1, "echo": False, "suffix": None})
    more = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False, "metadata": {"a": "b"}}
    post(client(engine), {**CHAT, **neutral, **more}, "/v1/chat/completions")
    unknown = dict.fromkeys(("functions", "reasoning_effort", "top_k", "min_p"))
    post(client(engine), {**CHAT, **unknown, "stream_options": None}, "/v1/chat/completions")


@pytest.mark.parametrize(
    "raw,code",
    [
        (b'{"model":', 400),
        (b"[" * 100_000, 400),
        (b'{"model": "base", "prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", 400),
        (b'{"model": "base", "prompt": "\\ud800"}', 422),
        (b'{"\\ud800": 1}', 422),
        (b'{"model": "\\ud800", "prompt": "x"}', 422),
        (b'{"model": "base", "prompt": "x", "temperature": NaN}', 422),
        (b'{"model": "base", "prompt": "x", "n": 1e400}', 422),
        (b'{"model": "base", "prompt": "x", "stop": "\\udc00"}', 422),
        (b'{"a": ' * 400 + b"1" + b"}" * 400, 422),
        (b"\xff\xfe", 400),
        (b"[]", 422),
        (b"", 422),
        (b"null", 422),
    ],
    ids=lambda value: str(value)[:30],
)
def test_broken_bodies(engine, raw, code):
    answer = client(engine).post("/v1/completions", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == code and answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "raw,headers,status,message",
    [
        (b'{"prompt": "\xff"}', {}, 400, "The body is not UTF-8 (invalid start byte at byte 12); send JSON in UTF-8."),
        (b"[" * 100_000, {}, 400, "it is nested too deep"),
        (b'{"n": ' + b"9" * 5000 + b"}", {}, 400, "a number has too many digits"),
        (b"\x1f\x8b", {"content-encoding": "gzip"}, 415, "Given Content-Encoding: 'gzip'; send the body as it is"),
        (b"{}", {"content-type": "text/plain"}, 422, "'text/plain'; send JSON with Content-Type: application/json."),
        (b"{}", {"content-type": ""}, 422, "Given no Content-Type; send JSON with Content-Type: application/json."),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bodies_that_cannot_be_read_are_told_why(engine, raw, headers, status, message):
    answer = client(engine).post("/v1/completions", content=raw, headers={"content-type": "application/json", **headers})
    assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_kinds_of_json(engine):
    raw = json.dumps(HELLO).encode()
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/vnd.x+json"):
        headers = {"content-type": kind, "content-encoding": "identity"}
        assert client(engine).post("/v1/completions", content=raw, headers=headers).status_code == 200


def test_no_chat_template(tokenizer):
    engine = FakeEngine(load_tokenizer())
    engine.tokenizer.chat_template = None
    error = post(client(engine), CHAT, "/v1/chat/completions", 422)["error"]
    assert error["code"] == "no_chat_template" and "/v1/completions" in error["message"]


def test_chat_templates_may_refuse():
    engine = FakeEngine(load_tokenizer())
    engine.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    error = post(client(engine), CHAT, "/v1/chat/completions", 422)["error"]
    assert error["code"] == "chat_template_failed" and "roles must alternate" in error["message"]


def test_images_are_refused(engine):
    parts = [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]
    error = post(client(engine), {**CHAT, "messages": [{"role": "user", "content": parts}]}, "/v1/chat/completions", 422)
    assert "image_url" in error["error"]["message"]


def test_prompts_cannot_write_the_templates_own_code(engine, tokenizer):
    """Messages are the template's values, never a part of it."""
    post(client(engine), {**CHAT, "messages": [{"role": "user", "content": "{{ 7 * 7 }}"}]}, "/v1/chat/completions")
    assert "{{ 7 * 7 }}" in tokenizer.decode(engine.submitted[0].prompt_ids)


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_adapter_fails_its_own_requests_only(engine, stream):
    engine.fail["code"] = AdapterFileError("tensors of the wrong shape in /srv/secret/adapters/code")
    http = client(engine)
    answer = http.post("/v1/completions", json={**HELLO, "model": "code", "stream": stream})
    body = events(answer)[-1] if stream else answer.json()
    assert answer.status_code == (200 if stream else 503)
    assert body["error"]["code"] == "adapter_unavailable" and "/srv" not in body["error"]["message"]
    post(http, {**HELLO, "model": "math"})
    metrics = http.get("/metrics").text
    assert 'fastft_errors_total{code="adapter_unavailable"} 1.0' in metrics
    assert 'fastft_requests_total{finish_reason="error",model="code"} 1.0' in metrics


@pytest.mark.parametrize(
    "error,status,code",
    [
        (UnknownAdapter("gone"), 404, "model_not_found"),
        (EngineStopped("the engine failed: /secret"), 503, "engine_stopped"),
        (FloatingPointError("not finite"), 500, "not_finite"),
        (RuntimeError("CUDA error at /secret"), 500, "engine_error"),
    ],
    ids=repr,
)
def test_failures_are_told_without_details(engine, error, status, code):
    engine.fail["math"] = error
    body = post(client(engine), {**HELLO, "model": "math"}, status=status)["error"]
    assert body["code"] == code and "secret" not in body["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_the_engine_ends_is_no_whole_one(tokenizer, stream):
    def script(prompt, adapter, sampling):
        engine.submitted[0]._finish("cancelled")
        return []

    engine = FakeEngine(tokenizer, script=script)
    answer = client(engine).post("/v1/completions", json={**HELLO, "stream": stream})
    body = events(answer)[-1] if stream else answer.json()
    assert answer.status_code == (200 if stream else 503) and body["error"]["code"] == "cancelled"


def test_one_failed_choice_ends_the_others(tokenizer):
    calls = []

    def script(prompt, adapter, sampling):
        calls.append(1)
        if len(calls) == 2:
            request = engine.submitted[1]
            request._finish("error", FloatingPointError("not finite"))
        return [10] * sampling.max_tokens

    engine = FakeEngine(tokenizer, script=script, delay=0.05)
    error = post(client(engine), {**HELLO, "n": 2, "max_tokens": 40}, status=500)["error"]
    assert error["code"] == "not_finite" and engine.submitted[0].finish_reason == "cancelled"


def test_unexpected_errors_have_no_details(engine, monkeypatch):
    monkeypatch.setattr(completions, "_collect", lambda job: 1 / 0)
    http = client(engine)
    error = post(http, HELLO, status=500)["error"]
    assert error["code"] == "internal_error" and "division" not in error["message"]
    monkeypatch.undo()
    post(http, HELLO)


def test_a_stream_whose_client_is_gone_before_it_begins_leaves_nothing_running(engine):
    service = client(engine).app.state.service
    sampling = Sampling(max_tokens=8, temperature=0, top_p=1, seed=None, stops=[], logprobs=False)

    async def gone(*_):
        raise OSError

    async def answer():
        form = completions._Completion(CompletionRequest(**HELLO, stream=True), service.submit([[5]], 2, None, sampling))
        await completions._EventStream(form, id)({"type": "http", "asgi": {"spec_version": "2.4"}}, gone, gone)

    engine.hold()
    with pytest.raises(ClientDisconnect):
        asyncio.run(answer())
    assert engine.cancelled == engine.submitted and len(engine.submitted) == 2 and not service.jobs
    engine.go()


def test_waiting_streams_send_signs_of_life(engine, monkeypatch):
    deltas = generation.Job.deltas

    async def until_the_first(job):
        async for news in deltas(job):
            if news is None:
                engine.go()
            yield news

    monkeypatch.setattr(generation, "PING_SECONDS", 0.05)
    monkeypatch.setattr(generation.Job, "deltas", until_the_first)
    engine.hold()
    answer = client(engine).post("/v1/completions", json={**HELLO, "stream": True})
    assert answer.text.startswith(": waiting\n\n") and len(events(answer)) >= 2
