"""The engine on a tiny model: every request gets the tokens of the model with its adapter merged, whatever else goes on."""

import contextlib
import threading
import types

import pytest
import torch

from fastft.serving import Engine, EngineStopped, QueueFull, UnknownAdapter, limits
from fastft.serving.requests import Request, Sampling
from tests.serving.tiny import KINDS, greedy, llama, merged, prompt, save_adapter, waits_until, worst_gap

MODEL = llama()
SIZES = {"device_bytes": 16 << 20, "num_blocks": 256, "page_size": 4, "max_batch_tokens": 64, "max_running": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for seed, kind in enumerate(KINDS):
        save_adapter(folder / kind, kind, seed)
    return folder


@pytest.fixture(scope="module")
def references(folder):
    """name -> the model with that adapter merged; None -> the model."""
    return {None: llama(), **{kind: merged(llama(), folder / kind) for kind in KINDS}}


@pytest.fixture
def make(folder):
    engines = []

    def make(model=None, **options):
        engines.append(Engine(llama() if model is None else model, adapter_dir=folder, **{**SIZES, **options}))
        return engines[-1].start()

    yield make
    for engine in engines:
        engine.close()


NAMES = [None, *KINDS]


@pytest.mark.parametrize(
    "options",
    [{}, {"max_batch_tokens": 16}, {"slots": 2}, {"page_size": 16, "num_blocks": 64}, {"prefix_sharing": False}],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()) or "default",
)
def test_every_request_gets_its_own_adapters_tokens(make, references, options):
    engine = make(**options)
    prompts = [prompt(3 + 5 * (i % 4), i % 3) for i in range(2 * len(NAMES))]  # some are prefixes of others
    completions = engine.generate(prompts, [*NAMES, *NAMES], max_tokens=10)
    for name, one, completion in zip([*NAMES, *NAMES], prompts, completions):
        assert completion.tokens == greedy(references[name], one, 10), name
        assert completion.finish_reason == "length" and completion.adapter == name and completion.prompt_ids == one
        assert (completion.digest is None) == (name is None) and completion.error is None and completion.logprobs is None
    assert len({tuple(c.tokens) for c in completions[: len(NAMES)]}) > 3, "adapters that change nothing test nothing"
    stats = engine.stats()
    assert stats["running"] == stats["waiting"] == 0 and stats["tokens_total"] == 10 * len(prompts)


def test_bfloat16(make):
    engine = make(llama(dtype=torch.bfloat16))
    completions = engine.generate([prompt(8, 1)] * 3, [None, "lora16", "spiel"], max_tokens=6)
    assert all(c.finish_reason == "length" and len(c.tokens) == 6 for c in completions)
    # bfloat16's steps in the logits; the base has the same rounding everywhere.
    assert worst_gap(llama(dtype=torch.bfloat16), completions[0]) < 0.2


def test_tokens_come_one_by_one(make, references):
    engine = make()
    request = engine.submit(prompt(5, 1), adapter="lora4", max_tokens=20, logprobs=True)
    heard, late = [], []
    request.on_token(heard.append)
    seen = list(request)
    request.on_token(late.append)
    assert seen == request.tokens == list(request) and heard == late == [*seen, None]
    completion = request.result(timeout=0)
    with torch.no_grad():
        logits = references["lora4"](torch.tensor([request.prompt_ids + seen[:-1]])).logits[0, 4:]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(seen)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-4)
    assert request.submitted <= request.admitted <= request.first_token <= request.finished


def test_a_callback_that_fails_hurts_nobody(make, caplog):
    engine = make()
    request, other = (engine.submit(prompt(5, s), max_tokens=10) for s in (1, 2))
    request.on_token(lambda token: 1 / 0 if token is not None else None) if not request.tokens else None
    assert len(request.result(5).tokens) == len(other.result(5).tokens) == 10 and engine.healthy() is None


def test_result_waits_no_longer_than_asked(make):
    engine = make()
    request = engine.submit(prompt(5, 1), max_tokens=200)
    with pytest.raises(TimeoutError, match="goes on"):
        request.result(timeout=0)
    assert len(request.result().tokens) == 200


def test_stop_tokens(make, references):
    engine = make()
    tokens = greedy(references["s2ft"], prompt(6, 3), 12)
    stop = tokens[7]
    completion = engine.submit(prompt(6, 3), adapter="s2ft", max_tokens=12, stop_token_ids=[stop]).result()
    assert completion.finish_reason == "stop" and completion.tokens == tokens[: tokens.index(stop) + 1]


def test_the_models_own_end_of_text_stops():
    model = llama()
    stop = greedy(model, prompt(6, 3), 5)[4]
    model.generation_config.eos_token_id = [stop, 3]
    with Engine(model, **SIZES) as engine:
        completion = engine.submit(prompt(6, 3), max_tokens=12).result()
        assert engine.adapters is None and engine.adapter_names() == []
    assert completion.finish_reason == "stop" and completion.tokens[-1] in (stop, 3)


def test_a_seed_gives_the_same_tokens_alone_and_in_company(make):
    engine = make()
    knobs = [{"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.3}, {"temperature": 0.5, "top_p": 0.4}]

    def submit(i):
        return engine.submit(prompt(4 + i, i), adapter=NAMES[i], max_tokens=12, seed=i, **knobs[i % 3])

    alone = [submit(i).result().tokens for i in range(6)]
    greedy_one = engine.submit(prompt(9, 50), max_tokens=12)
    together = [submit(i) for i in range(6)]
    assert [r.result().tokens for r in together] == alone
    assert greedy_one.result().tokens == greedy(llama(), prompt(9, 50), 12)
    unlike = engine.submit(prompt(4, 0), max_tokens=12, temperature=0.8, top_p=0.9).result().tokens
    assert unlike != alone[0]


def test_cancel_gives_everything_back(make):
    engine = make(max_running=2)
    running = [engine.submit(prompt(9, s), adapter="lora4", max_tokens=200) for s in range(2)]
    waiting = engine.submit(prompt(9, 3), adapter="spiel", max_tokens=200)
    next(iter(running[0]))
    waiting.cancel()
    assert waiting.result(5).finish_reason == "cancelled" and waiting.tokens == []
    for request in running:
        request.cancel()
        completion = request.result(5)
        assert completion.finish_reason == "cancelled" and 0 < len(completion.tokens) < 200 and completion.digest
    processor = engine._manager.batch_processor
    waits_until(lambda: not processor.scheduler.active_requests)
    allocator = next(iter(processor.cache.cache_allocators.values()))
    assert not allocator.block_table and engine.stats()["running"] == 0
    assert engine.adapters.unload("lora4", timeout=5) > 0  # nobody holds it
    running[0].cancel()
    assert len(engine.submit(prompt(9, 1), max_tokens=3).result(5).tokens) == 3


def test_a_step_in_flight_adds_nothing_to_a_request_that_ended():
    request, told = Request("r0", [1], None, Sampling(9), None), []
    request.on_token(told.append)
    request._produce(5, 0.0)
    assert request._finish("cancelled") and not request._finish("length")
    request._produce(6, 0.0)
    assert told == [5, None] and request.tokens == list(request) == [5] and request.result(0).finish_reason == "cancelled"


def test_nothing_is_kept_of_requests_that_ended(make):
    engine = make()
    engine.generate([prompt(9, s) for s in range(3)], ["lora4", None, "s2ft"], max_tokens=8)
    kept = {name: value for name, value in vars(engine._steps).items() if isinstance(value, dict | list | set)}
    assert kept and not any(kept.values()), kept


def test_what_can_never_run_is_refused_at_once(make):
    engine = make(max_waiting=2, max_running=1)
    for bad, says in (
        ({"prompt_ids": []}, "no tokens"),
        ({"prompt_ids": [1, 128]}, "the model has 0 to 127"),
        ({"prompt_ids": [1, -1]}, "0 to 127"),
        ({"prompt_ids": [1.5]}, "float"),
        ({"prompt_ids": [True]}, "bool"),
        ({"max_tokens": 0}, "at least 1"),
        ({"max_tokens": 256}, "more than 256 together"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
    ):
        with pytest.raises(ValueError, match=says):
            engine.submit(**{"prompt_ids": [1], "max_tokens": 1, **bad})
    for name in ("nobody", "../adapters", "", "lora4/"):
        with pytest.raises(UnknownAdapter, match="no adapter"):
            engine.submit([1], adapter=name, max_tokens=1)
    first = engine.submit([1], max_tokens=250)
    next(iter(first))
    others = [engine.submit([1], max_tokens=1) for _ in range(2)]
    with pytest.raises(QueueFull, match="max_waiting is 2"):
        engine.submit([1], max_tokens=1)
    first.cancel()
    assert all(r.result(5).finish_reason == "length" for r in others)
    assert len(engine.generate([[1]] * 6, max_tokens=2)) == 6  # generate waits for places


def test_what_is_no_list_of_prompts_is_told_of(make):
    engine = make()
    with pytest.raises(TypeError, match=r"prompts is a text, must be a list of prompts: give \['Once upon a time'\]"):
        engine.generate("Once upon a time", max_tokens=1)
    for ids in ([1, 2, 3], torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3]).numpy()):
        with pytest.raises(TypeError, match=r"prompts is one prompt.*give \[prompt\]"):
            engine.generate(ids, max_tokens=1)
    with pytest.raises(ValueError, match="no tokenizer"):
        engine.generate([[1], "Once"], max_tokens=1)
    assert engine.stats()["tokens_total"] == 0
    assert [len(one.tokens) for one in engine.generate(torch.tensor([[1, 2], [3, 4]]), max_tokens=2)] == [2, 2]
    with pytest.raises(ValueError, match="max_waiting is 0, must be at least 1"):
        make(max_waiting=0)


def test_requests_that_share_a_prefix_run_together_where_the_cache_has_room():
    """Eight times 128 tokens and their own are more than the cache's 640, in which they lie once."""
    with Engine(llama(), num_blocks=40, page_size=16, max_running=8) as engine:
        common, together, prepare = prompt(128, 1), [], engine._steps.prepare
        engine.generate([[*common, 1]], max_tokens=1)
        engine._steps.prepare = lambda buffers, requests, *rest: (
            together.append(len(requests)),
            prepare(buffers, requests, *rest),
        )
        requests = [engine.submit([*common, i], max_tokens=40) for i in range(8)]
        assert [request.result(20).tokens for request in requests] == [greedy(MODEL, [*common, i], 40) for i in range(8)]
    assert max(together) == 8


def test_generate_waits_for_places_that_others_have_and_leaves_nothing_running(make):
    engine = make(max_running=1, max_waiting=1)
    others = [engine.submit(prompt(4, s), max_tokens=100) for s in range(1)]
    next(iter(others[0]))
    others.append(engine.submit(prompt(4, 1), max_tokens=5))
    assert len(engine.generate([prompt(4, 2)], max_tokens=3)[0].tokens) == 3
    with pytest.raises(ValueError, match="no tokens"):
        engine.generate([prompt(4, 1), []], max_tokens=200)
    waits_until(lambda: engine.stats()["running"] == engine.stats()["waiting"] == 0)
    assert engine.stats()["tokens_total"] < 100 + 5 + 3 + 200


def test_an_idle_engines_cache_is_free(make):
    """What is kept in case a prompt comes again is given up for others."""
    engine = make()
    engine.generate([prompt(40, 1)], max_tokens=3)
    cache = engine._manager.batch_processor.cache
    waits_until(lambda: any(allocator.ledger.cached_blocks for allocator in cache.cache_allocators.values()))
    assert engine.stats()["cache_free"] == 1.0


def test_a_stopped_engines_model_is_the_base(make):
    """Whatever adapters the last batch had, and with other numbers of rows."""
    engine, base = make(), llama()
    engine.generate([prompt(9, 1)], ["lora16"], max_tokens=1)
    engine.stop()
    with torch.no_grad():
        for length in (9, 10):
            ids = torch.tensor([prompt(length, 1)])
            got, want = (model(ids, use_cache=False).logits for model in (engine.model, base))
            torch.testing.assert_close(got, want)


def test_requests_need_a_running_engine(make):
    engine = make()
    engine.stop()
    assert "not running" in engine.healthy()
    with pytest.raises(EngineStopped, match="start"):
        engine.submit([1], max_tokens=1)
    engine.start()
    assert engine.healthy() is None and len(engine.submit([1], max_tokens=3).result(5).tokens) == 3


def test_stop_drains_or_ends(make):
    engine = make(max_running=1)
    requests = [engine.submit(prompt(4, s), adapter="lora1", max_tokens=30) for s in range(3)]
    engine.stop(drain=True)
    assert [len(r.result(0).tokens) for r in requests] == [30, 30, 30]
    engine.start()
    requests = [engine.submit(prompt(4, s), adapter="lora1", max_tokens=200) for s in range(3)]
    next(iter(requests[0]))
    engine.stop(drain=False)
    for request in requests:
        assert request.result(0).finish_reason == "error" and isinstance(request.error, EngineStopped)
    engine.start()
    assert engine.adapters.unload("lora1", timeout=5) > 0  # nothing was left behind


@pytest.mark.parametrize("end", ["cancel", "close", "Ctrl-C"])
def test_a_drain_can_be_ended(make, references, monkeypatch, end):
    engine = make()
    request = engine.submit(prompt(4, 1), adapter="lora16", max_tokens=250)
    next(iter(request))
    if end == "Ctrl-C":
        monkeypatch.setattr(engine._admission, "wait_empty", lambda _: _interrupt())
        with pytest.raises(KeyboardInterrupt):
            engine.stop()
    else:
        drain = threading.Thread(target=engine.stop)
        drain.start()
        waits_until(lambda: engine.healthy() is not None)
        with pytest.raises(EngineStopped, match="being stopped"):
            engine.start()
        request.cancel() if end == "cancel" else engine.close()
        drain.join(20)
        assert not drain.is_alive()
    assert request.result(5).finish_reason == ("cancelled" if end == "cancel" else "error")
    assert 0 < len(request.tokens) < 250 and not any(t.name == "fastft-engine" for t in threading.enumerate())
    assert request.tokens == greedy(references["lora16"], prompt(4, 1), len(request.tokens))


def _interrupt():
    raise KeyboardInterrupt


def test_a_callback_cant_stop_the_engine_it_is_called_from(make, caplog):
    engine = make()
    request = engine.submit(prompt(4, 1), max_tokens=100)
    request.on_token(lambda token: engine.stop())
    assert request.result(20).finish_reason == "length" and "can't stop the engine" in caplog.text


def test_a_request_that_comes_as_the_engine_ends_is_ended_too(make, monkeypatch):
    """Its thread may have looked at the queue for the last time, or not look at it again."""
    engine = make()
    add = engine._admission.add

    def ended(request):
        engine.stop(drain=False)
        add(request)

    monkeypatch.setattr(engine._admission, "add", ended)
    completion = engine.submit(prompt(5, 1), max_tokens=3).result(20)
    assert completion.finish_reason == "error" and isinstance(completion.error, EngineStopped)
    engine.start()

    def ending(request):
        engine._stopping, engine._admission.max_running = True, 0
        add(request)

    monkeypatch.setattr(engine._admission, "add", ending)
    with pytest.raises(EngineStopped, match="is being stopped"):
        engine.submit(prompt(5, 1), max_tokens=3)
    assert len(engine._admission) == 0


def test_threads_that_start_and_stop_have_one_engine(make):
    engine = make()

    def switch():
        for _ in range(2):
            engine.stop(drain=False)
            with contextlib.suppress(EngineStopped):  # another one is just stopping it
                engine.start()

    threads = [threading.Thread(target=switch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    engine.stop()
    assert not any(thread.name == "fastft-engine" for thread in threading.enumerate())


def test_close_gives_the_model_back(folder):
    model = llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with Engine(model, adapter_dir=folder, **SIZES) as engine:
        engine.generate([prompt(5, 1)], ["spiel"], max_tokens=3)
        with pytest.raises(RuntimeError, match="grad|stop the engine"):
            model(torch.tensor([[1]]))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {type(m) for m in model.modules()} == {type(m) for m in llama().modules()}
    assert model.config._attn_implementation == llama().config._attn_implementation
    assert greedy(model, prompt(5, 1), 3) == greedy(llama(), prompt(5, 1), 3)
    engine.close()
    with pytest.raises(EngineStopped, match="closed"):
        engine.start()


def test_a_failing_step_ends_all_requests_and_says_why(make):
    engine = make(max_running=2)
    requests = [engine.submit(prompt(4, s), adapter="lora1", max_tokens=200) for s in range(3)]
    next(iter(requests[0]))

    def broken(*_):
        raise ArithmeticError("the sampler broke")

    engine._manager.batch_processor.model_runner._sample = broken
    for request in requests:
        completion = request.result(5)
        assert completion.finish_reason == "error" and "the sampler broke" in str(completion.error)
        assert "the sampler broke" in engine.healthy()  # whoever was told finds it failed
    with pytest.raises(EngineStopped, match="the sampler broke"):
        engine.submit([1], max_tokens=1)
    waits_until(lambda: not engine._manager.is_running())
    assert engine.stats()["errors_total"] == 3 and isinstance(engine.failure, ArithmeticError)
    assert engine.start().failure is None and len(engine.generate([[1]], max_tokens=3)[0].tokens) == 3


def test_a_cache_too_small_for_all_still_gives_right_tokens(make, references):
    """Requests lose their cache and start again (the library's soft reset): adapter, tokens and drawing go on."""
    engine = make(num_blocks=24, max_running=6, prefix_sharing=False)
    prompts, names = [prompt(8, s) for s in range(len(NAMES))], NAMES
    drawn = [engine.submit(p, adapter=n, max_tokens=50, temperature=0.7, seed=1) for p, n in zip(prompts, names)]
    drawn = [r.result(30).tokens for r in drawn]
    for name, completion in zip(names, engine.generate(prompts, names, max_tokens=50)):
        assert len(completion.tokens) == 50 and worst_gap(references[name], completion) < 1e-3
    alone = [engine.submit(p, adapter=n, max_tokens=50, temperature=0.7, seed=1) for p, n in zip(prompts[:1], names[:1])]
    assert alone[0].result(30).tokens == drawn[0] and all(len(tokens) == 50 for tokens in drawn)


def test_a_request_that_starts_again_still_ends_at_its_stop_token(make, monkeypatch):
    from transformers.generation.continuous_batching.requests import RequestState

    engine = make(num_blocks=24, max_running=2, prefix_sharing=False)
    again, original = [], RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState, "create_equivalent_initial_request", lambda state: again.append(state.request_id) or original(state)
    )
    prompts, knobs = [prompt(8, s) for s in range(2)], {"max_tokens": 60, "temperature": 3.0, "seed": 2}
    alone = [engine.submit(p, **knobs).result(30).tokens for p in prompts]
    assert not again
    stops = [tokens[50] for tokens in alone]
    together = [engine.submit(p, stop_token_ids=[stop], **knobs) for p, stop in zip(prompts, stops)]
    completions = [request.result(30) for request in together]
    assert again
    for completion, tokens, stop in zip(completions, alone, stops):
        assert completion.finish_reason == "stop" and completion.tokens == tokens[: tokens.index(stop) + 1]


def test_cancelling_all_that_run_in_a_full_cache_lets_others_go_on(make):
    """The library lets no request in from when it took one's cache away until one finishes."""
    engine = make(num_blocks=24, max_running=6, prefix_sharing=False)
    requests = [engine.submit(prompt(8, s), max_tokens=80) for s in (1, 2)]
    scheduler = engine._manager.batch_processor.scheduler
    waits_until(lambda: scheduler.block_new_requests)
    running = [request for request in requests if request.id in scheduler.active_requests]
    for request in running:
        request.cancel()
    requests.append(engine.submit(prompt(4, 3), max_tokens=3))
    for request in requests:
        wanted = "cancelled" if request in running else "length"
        assert request.result(20).finish_reason == wanted
    assert len(running) == 1


def test_a_start_that_fails_leaves_the_model_as_it_was(folder):
    model = llama()
    with pytest.raises((MemoryError, RuntimeError)), Engine(model, adapter_dir=folder, **{**SIZES, "num_blocks": 1 << 40}):
        pass
    assert model.config._attn_implementation == llama().config._attn_implementation
    assert {type(m) for m in model.modules()} == {type(m) for m in llama().modules()}


def test_an_engine_that_is_not_made_leaves_the_model_as_it_was(tmp_path):
    model = llama()
    with pytest.raises(FileNotFoundError):
        Engine(model, adapter_dir=tmp_path / "none", **SIZES)
    assert {type(m) for m in model.modules()} == {type(m) for m in llama().modules()}


def test_sizes_by_default_are_modest():
    model = llama(max_position_embeddings=1 << 20)
    with Engine(model) as engine:
        cache = engine._manager.batch_processor.cache
        held = sum(t.numel() * t.element_size() for t in [cache.cache_tensor])
        assert held <= 520 << 20 and engine.max_length == cache.num_blocks * 16
        assert engine.stats()["cache_blocks"] == cache.num_blocks
    for options, says in (
        ({"max_running": 100, "max_batch_tokens": 50}, "max_batch_tokens 50"),
        ({"page_size": 2}, "page_size 2"),
        ({"cache_bytes": 1000}, "holds no block"),
    ):
        with pytest.raises(ValueError, match=says):
            Engine(model, **options)


def test_stop_tokens_are_those_of_the_model_and_of_the_tokenizer():
    model = llama()
    model.generation_config.eos_token_id, model.config.eos_token_id = [5, 6], 7
    assert limits.stop_tokens(model, types.SimpleNamespace(eos_token_id=8)) == {5, 6, 7, 8}
    assert limits.stop_tokens(model, None) == {5, 6, 7}


def test_attention_with_sinks_or_softcapping_is_refused():
    model = llama()
    limits.check_model(model)
    model.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="sinks"):
        limits.check_model(model)
    model = llama()
    model.config.attn_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="softcapping"):
        limits.check_model(model)


def test_models_that_would_mix_requests_up_are_refused():
    with pytest.raises(ValueError, match="flash"):
        Engine(llama(sliding_window=4, layer_types=["sliding_attention", "full_attention"]))


def test_many_threads_submit_and_read(make, references):
    engine = make(slots=3)
    failures = []

    def client(i):
        try:
            for turn in range(3):
                name = NAMES[(i + turn) % len(NAMES)]
                tokens = list(engine.submit(prompt(5 + i, i), adapter=name, max_tokens=8))
                assert tokens == greedy(references[name], prompt(5 + i, i), 8)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
