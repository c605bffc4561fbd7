"""The insides of transformers that the engine stands on. When this fails, transformers has changed: read what it says, look
at the new source, change `fastft/serving/batching.py` and `contract.py` together, then the range of versions."""

import inspect
import types

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AttentionInterface, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.continuous_batching import (
    cache,
    continuous_api,
    input_outputs,
    model_runner,
    requests,
    scheduler,
)
from transformers.generation.continuous_batching.cache_allocators import cache_allocator

from fastft.serving import batching, contract
from fastft.serving.routes import StepBuffers


def test_every_name_is_what_it_was():
    assert not contract.changes()
    contract.check_library()


def test_everything_that_is_replaced_stands_in_the_contract():
    """What `library()` overrides and `_hook` puts in place is known to the contract."""
    source = inspect.getsource(batching)
    named = {name.rpartition(".")[2] for name in contract.CALLED}
    manager = batching.library()
    overridden = {name for name in vars(manager) if hasattr(continuous_api.ContinuousBatchingManager, name)}
    overridden -= {"__module__", "__doc__", "__qualname__", "start", "__static_attributes__", "__firstlineno__"}
    assert overridden <= named, f"not in CALLED: {overridden - named}"
    graphs = "get_graph", "_get_graph_key"
    scheduled = "schedule_batch", "clear_cancelled_requests"
    for hooked in ("search_prefix_match", "mark_complete_blocks", *scheduled, "_sample", *graphs):
        assert hooked in source and hooked in named


@pytest.mark.parametrize(
    "owner,name,new,says",
    [
        (cache.PagedAttentionCache, "search_prefix_match", lambda self, prompt: 0, "search_prefix_match takes (prompt)"),
        (model_runner.ModelRunner, "_sample", None, "ModelRunner._sample is gone"),
        (scheduler.Scheduler, "_infer_request_tokens", lambda self, state: 0, "no longer uses search_prefix_match"),
        (cache_allocator, "compute_block_hash", lambda parent, tokens: 0, "compute_block_hash takes (parent,tokens)"),
        (input_outputs, "HostDeviceIOPair", None, "HostDeviceIOPair"),
        (requests, "FutureRequestState", object, "FutureRequestState has no state, has_new_token, query_length"),
    ],
)
def test_it_says_what_changed(monkeypatch, owner, name, new, says):
    if new is None:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, new)
    assert any(says in change for change in contract.changes()), contract.changes()
    contract.check_library.cache_clear()
    with pytest.raises(contract.UnsupportedLibrary, match="has changed inside"):
        contract.check_library()


@pytest.mark.parametrize("version", ["5.22.3", "5.24.0", "6.0.0.dev0"])
def test_other_versions_are_refused(monkeypatch, version):
    monkeypatch.setattr(contract, "version", lambda name: version)
    contract.check_library.cache_clear()
    with pytest.raises(contract.UnsupportedLibrary, match=rf"transformers {version}.*>=5.23,<5.24"):
        contract.check_library()


@pytest.fixture(autouse=True)
def _looked_at_again():
    yield
    contract.check_library.cache_clear()


def _processor():
    """A batch processor of the library's own, of a model of one layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32, eos_token_id=None
    )
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    manager = continuous_api.ContinuousBatchingManager(
        LlamaForCausalLM(config).eval(),
        GenerationConfig(do_sample=False, eos_token_id=-1),
        ContinuousBatchingConfig(
            page_size=4, num_blocks=16, max_batch_tokens=32, max_requests_per_batch=8, return_logprobs=True
        ),
    )
    return manager, manager._create_batch_processor()


def test_the_shape_of_a_step():
    """What `Steps.prepare` reads: requests lie behind each other in the batch, rows of logits in the order of those that get
    a token, the cache's blocks are allocated before, and block 0 is nobody's and stays zero."""
    manager, processor = _processor()
    for request_id, prompt in (("a", [1, 2, 3, 4, 5]), ("b", [6, 7])):
        manager.add_request(prompt, request_id=request_id, max_new_tokens=3)
    seen = []
    original = processor.inputs_and_outputs.prepare_batch_tensors

    def spy(requests_in_batch, logits_processors, use_decode_fast_path, num_q_tokens, max_kv_read, use_padding):
        seen.append(
            [(f.state.request_id, f.state.position_offset, f.query_length, f.has_new_token) for f in requests_in_batch]
        )
        assert (
            num_q_tokens == sum(f.query_length for f in requests_in_batch) and not use_padding and not use_decode_fast_path
        )
        allocator = next(iter(processor.cache.cache_allocators.values()))
        for future in requests_in_batch:
            blocks = allocator.block_table[future.state.request_id]
            assert len(blocks) * 4 >= future.state.position_offset + future.query_length and 0 not in blocks
        original(requests_in_batch, logits_processors, use_decode_fast_path, num_q_tokens, max_kv_read, use_padding)

    processor.inputs_and_outputs.prepare_batch_tensors = spy
    with torch.no_grad():
        for _ in range(2):
            assert processor.prepare_next_batch()
            inputs = processor.inputs_and_outputs.get_model_kwargs()
            processor._generation_step(manager.model)
            processor.update_batch()
    assert seen == [[("a", 0, 5, True), ("b", 0, 2, True)], [("a", 5, 1, True), ("b", 2, 1, True)]]
    assert inputs["input_ids"].shape == (1, 2) and inputs["logits_indices"].tolist() == [0, 1]
    allocator = next(iter(processor.cache.cache_allocators.values()))
    keys, values = allocator.get_cache_for_block_table(0)
    assert not keys[0].any() and not values[0].any() and keys.shape == values.shape and keys.is_contiguous()
    assert allocator.read_trash_index == 0


def test_graphs_are_found_while_the_widths_of_s_are_what_they_were_captured_with():
    """Others are let go, which the library never does; those without adapters have no such widths."""
    _, processor = _processor()
    ios, buffers = processor.inputs_and_outputs, StepBuffers(2, 32, 8, torch.device("cpu"))
    widths, gone = {"q": None, "o": None}, []
    steps = types.SimpleNamespace(memory=types.SimpleNamespace(widths=widths))
    batching._hook_inputs(ios, ios, buffers, steps, processor.cache, 8)

    def step(name, adapters=True, **loaded_meanwhile):
        buffers.tokens.active = adapters
        graph = ios.get_graph()
        if graph is None:
            widths.update(loaded_meanwhile)
            ios.set_graph(types.SimpleNamespace(name=name, reset=lambda: gone.append(name)))
        return graph and graph.name

    assert step("plain", adapters=False) is None
    for rank in (4, 8, 16):
        widths.update(q=rank, o=rank)
        assert step(rank) is None and step("again") == rank
    assert gone == [4, 8]
    ios.num_q_tokens += 1
    assert step("other size", q=32) is None and gone == [4, 8]
    assert step("next") is None and sorted(map(str, gone)) == ["16", "4", "8", "other size"]
    assert step("again") == "next"
    ios.num_q_tokens -= 1
    assert step("again", adapters=False) == "plain" and step("first size") is None


def test_an_attention_function_can_be_registered():
    assert list(inspect.signature(AttentionInterface.register).parameters) == ["key", "value"]
    batching.attention.register()
    assert batching.attention.NAME in AttentionInterface()
