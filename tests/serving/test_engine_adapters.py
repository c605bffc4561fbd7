"""Adapters that come, go and change while requests run, and requests that don't touch each other."""

import gc
import shutil
import threading
import time
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastft.checkpoint.files import AdapterFileError
from fastft.serving import Engine, UnknownAdapter
from fastft.serving.packing import Packer
from tests.serving.tiny import KINDS, greedy, llama, merged, prompt, save_adapter, waits_until

SIZES = {"device_bytes": 16 << 20, "num_blocks": 512, "page_size": 4, "max_batch_tokens": 64, "max_running": 16}


@pytest.fixture
def folder(tmp_path):
    for seed, kind in enumerate(("lora1", "lora4", "s2ft")):
        save_adapter(tmp_path / kind, kind, seed)
    return tmp_path


@pytest.fixture
def make(folder):
    engines = []

    def make(**options):
        engines.append(Engine(llama(), adapter_dir=folder, **{**SIZES, **options}))
        return engines[-1].start()

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def gate(monkeypatch):
    """`gate[name] = Event`: packing of that adapter waits for it."""
    gates, original = {}, Packer.pack

    def pack(self, folder, name=None):
        gates.get(name, _OPEN).wait(20)
        return original(self, folder, name)

    monkeypatch.setattr(Packer, "pack", pack)
    yield gates
    for event in gates.values():
        event.set()


_OPEN = threading.Event()
_OPEN.set()


def test_the_output_head_can_have_adapters(make, folder):
    save_adapter(folder / "head", "head", 9, std=0.1)
    engine = make(max_batch_tokens=16)
    names = ["head", None, "head", "lora4"]
    prompts = [prompt(20, 1), prompt(3, 2), prompt(1, 3), prompt(17, 4)]  # chunks: rows of the head that give no token
    for completion in engine.generate(prompts, names, max_tokens=8):
        name = completion.adapter
        reference = llama() if name is None else merged(llama(), folder / name)
        assert completion.tokens == greedy(reference, completion.prompt_ids, 8)


def test_others_go_on_while_an_adapter_loads(make, gate):
    gate["s2ft"] = threading.Event()
    engine = make()
    running = engine.submit(prompt(5, 1), adapter="lora4", max_tokens=100)
    late = engine.submit(prompt(5, 2), adapter="s2ft", max_tokens=4)
    base = engine.submit(prompt(5, 3), max_tokens=4)
    assert len(running.result(20).tokens) == 100 and len(base.result(20).tokens) == 4
    assert late.admitted is None and engine.healthy() is None
    gate["s2ft"].set()
    assert len(late.result(20).tokens) == 4


def test_an_adapter_that_appears_on_disk_is_served(make, folder):
    engine = make()
    with pytest.raises(UnknownAdapter):
        engine.submit([1], adapter="new", max_tokens=1)
    save_adapter(folder / "new", "lora16", 7)
    assert "new" in engine.adapter_names()
    completion = engine.submit(prompt(6, 1), adapter="new", max_tokens=6).result(20)
    assert completion.tokens == greedy(merged(llama(), folder / "new"), prompt(6, 1), 6)


def test_an_adapter_that_is_gone_when_it_is_loaded_is_an_unknown_one(make):
    """Whoever asks in the engine's name has looked before; the engine doesn't, as a folder may be slow."""
    engine = make()
    request = engine.submit([1], adapter="gone", max_tokens=1, looked=True)
    assert request.result(20).finish_reason == "error" and isinstance(request.error, UnknownAdapter)


def test_a_broken_adapter_ends_its_own_requests_alone(make, folder):
    (folder / "lora1" / "adapter_model.safetensors").write_bytes(b"not tensors")
    engine = make()
    bad, good = (engine.submit(prompt(5, 1), adapter=name, max_tokens=5) for name in ("lora1", "lora4"))
    assert bad.result(20).finish_reason == "error" and isinstance(bad.error, AdapterFileError)
    assert good.result(20).finish_reason == "length" and engine.healthy() is None
    shutil.rmtree(folder / "lora1")
    save_adapter(folder / "lora1", "lora1", 0)
    engine.adapters.update("lora1", timeout=20)
    assert engine.submit(prompt(5, 1), adapter="lora1", max_tokens=5).result(20).finish_reason == "length"


def test_unload_waits_for_users_and_waiting_requests_load_it_again(make, folder):
    engine = make(max_running=1)
    running = engine.submit(prompt(5, 1), adapter="lora4", max_tokens=120)
    next(iter(running))
    waiting = engine.submit(prompt(5, 2), adapter="lora4", max_tokens=6)
    with pytest.raises(TimeoutError):
        engine.adapters.unload("lora4", timeout=0.01)
    freed = engine.adapters.unload("lora4", timeout=20)
    assert freed > 0 and running.finish_reason == "length"
    assert waiting.result(20).tokens == greedy(merged(llama(), folder / "lora4"), prompt(5, 2), 6)


def test_an_update_changes_new_requests_and_no_running_one(make, folder):
    engine = make()
    old = merged(llama(), folder / "lora4")
    running = engine.submit(prompt(5, 1), adapter="lora4", max_tokens=60)
    next(iter(running))
    save_adapter(folder / "lora4", "lora4", 77)
    digest = engine.adapters.update("lora4", timeout=20)
    assert running.finish_reason is None, "the test's request was too short"
    fresh = engine.submit(prompt(5, 1), adapter="lora4", max_tokens=60).result(20)
    finished = running.result(20)
    assert finished.tokens == greedy(old, prompt(5, 1), 60)
    assert fresh.tokens == greedy(merged(llama(), folder / "lora4"), prompt(5, 1), 60) != finished.tokens
    assert fresh.digest == digest != finished.digest


def _matches(engine):
    """Prefix lengths that the library's cache finds, request by request."""
    found, cache = [], engine._manager.batch_processor.cache
    search = cache.search_prefix_match

    def search_prefix_match(request_id, prompt_ids):
        found.append(search(request_id, prompt_ids))
        return found[-1]

    cache.search_prefix_match = search_prefix_match
    return found


def test_prefixes_are_shared_within_the_same_content_of_an_adapter_alone(make, folder):
    engine = make()
    found, system = _matches(engine), prompt(24, 1)
    asked, expected = [], []
    for name, matched in (("lora4", 0), ("lora4", 24), ("lora1", 0), (None, 0), (None, 24), ("lora1", 24), ("lora4", 24)):
        asked.append(engine.submit([*system, len(asked)], adapter=name, max_tokens=5).result(20))
        expected.append(matched)
    assert found == expected
    save_adapter(folder / "lora4", "lora4", 78)  # the same name, another content
    engine.adapters.update("lora4", timeout=20)
    asked.append(engine.submit([*system, 99], adapter="lora4", max_tokens=5).result(20))
    asked.append(engine.submit([*system, 98], adapter="lora4", max_tokens=5).result(20))
    assert found[len(expected) :] == [0, 24]
    engine.adapters.update("lora4", timeout=20)  # read again, nothing changed
    engine.submit([*system, 97], adapter="lora4", max_tokens=5).result(20)
    assert found[-1] == 24
    for completion in asked[-2:]:
        assert completion.tokens == greedy(merged(llama(), folder / "lora4"), completion.prompt_ids, 5)
    for completion in asked[2:5]:
        reference = llama() if completion.adapter is None else merged(llama(), folder / completion.adapter)
        assert completion.tokens == greedy(reference, completion.prompt_ids, 5)


def test_other_users_of_the_library_hash_as_before():
    from transformers.generation.continuous_batching.cache_allocators import cache_allocator

    from fastft.serving import batching

    batching.library()
    salted = cache_allocator.compute_block_hash
    for parent in (None, 5):
        assert salted(parent, [1, 2]) == salted.__wrapped__(parent, [1, 2])
        hashed = batching._salted(99, salted, parent, [1, 2])
        assert (hashed == salted.__wrapped__(parent, [1, 2])) == (parent is not None)
    assert salted(None, [1, 2]) == salted.__wrapped__(None, [1, 2])


def make_absurd(adapter):
    """Finite numbers, which a check of the file lets pass, whose products are not."""
    path = adapter / "adapter_model.safetensors"
    save_file({key: torch.full_like(tensor, 1e30) for key, tensor in load_file(path).items()}, path, {"format": "pt"})


def _logits(folder, names):
    """Logits of every step of requests that start together."""
    engine = Engine(llama(), adapter_dir=folder, trial=False, **SIZES)
    seen, sample = [], engine._steps.sample

    def keep(scores, output_ids):
        seen.append(scores[0].clone())
        sample(scores, output_ids)

    engine._steps.sample = keep
    with engine:
        for name in set(filter(None, names)):
            engine.adapters.load(name, timeout=20)
        with engine._manager.pause():  # so that all start in the same step
            requests = [engine.submit(prompt(4 + i % 3, i), adapter=name, max_tokens=6) for i, name in enumerate(names)]
        return seen, [request.result(20) for request in requests]


def test_an_adapter_of_absurd_numbers_changes_no_bit_of_others_rows(folder):
    names = ["lora4", None, "lora1", "s2ft", "lora4"]
    healthy, completions = _logits(folder, names)
    make_absurd(folder / "lora1")
    ill, after = _logits(folder, names)
    others = [i for i, name in enumerate(names) if name != "lora1"]
    assert after[2].finish_reason == "error" and isinstance(after[2].error, FloatingPointError) and not after[2].tokens
    assert [after[i].tokens for i in others] == [completions[i].tokens for i in others]
    # The first step has the same rows in both; afterwards the sick request is gone, and the batch has another shape.
    assert torch.equal(healthy[0][others], ill[0][others]) and not ill[0][2].isfinite().all()


def test_cache_blocks_of_a_sick_request_hurt_nobody_later(folder):
    make_absurd(folder / "lora1")
    with Engine(llama(), adapter_dir=folder, **{**SIZES, "num_blocks": 64}) as engine:
        for seed in range(12):  # 64 blocks of 4 tokens: every block was a sick request's once
            assert engine.submit(prompt(40, seed), adapter="lora1", max_tokens=2).result(20).finish_reason == "error"
            completion = engine.submit(prompt(30, seed), max_tokens=4).result(20)
            assert completion.tokens == greedy(llama(), prompt(30, seed), 4)


@pytest.mark.parametrize("where", ["clear", "read_done"])
def test_without_its_loading_thread_the_base_goes_on_and_others_are_told(make, monkeypatch, where):
    engine = make()
    running = engine.submit(prompt(4, 1), max_tokens=200)
    assert engine.generate([prompt(4, 1)], ["lora1"], max_tokens=3)[0].finish_reason == "length"

    def broken(*_):
        raise ArithmeticError("the device broke")

    if where == "clear":
        monkeypatch.setattr(engine.adapters.pool, "clear", broken)
        engine.adapters._table.evict("lora1")
    else:
        monkeypatch.setattr(engine.adapters._loader, "step", broken)
    request = engine.submit(prompt(4, 1), adapter="lora4", max_tokens=3)
    for name in ("lora4", "s2ft") if where == "read_done" else ("s2ft",):
        request = engine.submit(prompt(4, 1), adapter=name, max_tokens=3)
        if request.result(20).finish_reason == "error":
            break
    assert "the device broke" in str(request.error) and "the device broke" in engine.healthy()
    assert running.result(20).finish_reason == "length" and engine.failure is None


def test_a_closed_engine_holds_no_memory_of_adapters(make):
    """However long its owner keeps the variable, or asks it for numbers."""
    engine = make()
    engine.generate([prompt(4, 1)] * 2, ["lora1", "s2ft"], max_tokens=3)
    memory = engine.adapters
    tensors = [memory.store, memory.offsets, *memory.pieces.values(), *(c.blob for c in memory._loader.copies.values())]
    gone = [weakref.ref(tensor) for tensor in (memory.pool.bytes, *tensors)]
    del tensors
    engine.close()
    gc.collect()
    assert len(gone) > 5 and not any(one() is not None for one in gone)
    assert engine.stats()["steps_total"] > 0 and memory.stats()["loads_total"] == 2
    assert memory.unload("lora1", 5) > 0 and memory.evict("s2ft")
    engine.close()


def test_newer_requests_dont_keep_slots_for_ever(make):
    """Two threads ask for two adapters all the time, and hold both slots; a third adapter's request gets its turn."""
    engine = make(slots=2, patience=0.2)
    stop = threading.Event()

    def ask(name):
        requests = []
        while not stop.is_set():
            requests = [r for r in requests if r.finish_reason is None]
            if len(requests) < 3:
                requests.append(engine.submit(prompt(4, 1), adapter=name, max_tokens=40))
            else:
                time.sleep(0.001)

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("lora1", "lora4")]
    for thread in threads:
        thread.start()
    try:
        waits_until(lambda: engine.stats()["running"] >= 4)
        request = engine.submit(prompt(4, 2), adapter="s2ft", max_tokens=3)
        assert request.result(60).finish_reason == "length"
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert engine.adapters.stats()["evictions_total"] >= 1


def test_all_kinds_at_once_with_two_slots(make, folder):
    for seed, kind in enumerate(KINDS):
        save_adapter(folder / kind, kind, seed)
    engine = make(slots=2, patience=0.05)
    names = [*KINDS, None] * 3
    completions = engine.generate([prompt(3 + i % 5, i) for i in range(len(names))], names, max_tokens=5)
    references = {None: llama(), **{kind: merged(llama(), folder / kind) for kind in KINDS}}
    for name, completion in zip(names, completions):
        assert completion.tokens == greedy(references[name], completion.prompt_ids, 5), name
