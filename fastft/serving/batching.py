"""The hooks into transformers' continuous batching. It schedules, keeps the paged cache and runs the model; we add adapters.

Every name of it that is used here stands in `contract.CONTRACT`, and is looked at before an engine is made.
"""

from __future__ import annotations

import functools
import hashlib
import threading
import time

import torch

from . import attention
from .requests import EngineStopped, Request
from .routes import StepBuffers
from .sampling import choose
from .teams import disband

_salt = threading.local()
_NO_LIMIT = 1 << 62


def salt_of(lease) -> int | None:
    """What a request's first block counts as the hash of its parent: 64 bits of adapter name and content. None: the base."""
    return None if lease is None else _salt_of(lease.name, lease.digest)


@functools.lru_cache(1024)  # every block of every request asks
def _salt_of(name: str, digest: str) -> int:
    name = name.encode()
    content = len(name).to_bytes(8, "little") + name + digest.encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=b"fastft adapter").digest(), "little")


class Steps:
    """What happens around the library's steps. Called in the engine's thread alone, but for `stopped`.

    Args:
        admission: whose requests are run. memory, routed: AdapterMemory and RoutedModel; None: no adapters. few_heads: does
        the output head see the rows alone whose tokens are asked for? on_end: told the library's fatal error, or None, when
        its thread ends.
    """

    def __init__(self, admission, memory, routed, *, slots: int, few_heads: bool, on_end):
        self.admission, self.memory, self.routed, self.slots, self.on_end = admission, memory, routed, slots, on_end
        self.few_heads = few_heads
        self.own_attention = self.stopping = False
        self.model = None  # for messages
        self.planner, self.planner_tables = None, {}  # of attention.py, and the cache's blocks by request
        self.plan: attention.Plan | None = None  # of the current step
        self.stream = None  # of the model, on a GPU
        self.count = self.tokens = self.errors = 0
        self.beat = None  # time.monotonic() of the last pass of the loop
        self.current: StepBuffers | None = None

    def prepare(self, buffers: StepBuffers, requests, rows: int, heads: int, cache) -> None:
        """Fill the buffers for the library's next batch of `rows` tokens and `heads` rows of logits, before it moves the
        requests' positions."""
        slots, lengths, spans, answers, head_slots = [], [], [], [], []
        for future in requests:
            state, length = future.state, future.query_length
            request = getattr(state, "request", None)  # None: the library's warm-up
            lease = None if request is None else request.lease
            slots.append(-1 if lease is None else lease.slot)
            lengths.append(length)
            spans.append((state.position_offset, length))
            if future.has_new_token:
                head_slots.append(slots[-1])
                answers.append((None if request is None else request.sampling, state.position_offset + length))
        buffers.sample(answers)
        if self.routed is not None:
            buffers.tokens.fill(slots, lengths, rows)
            if self.few_heads:
                buffers.heads.fill(head_slots, [1] * len(head_slots), heads)
        if self.planner is not None:
            tables = self.planner_tables
            cache.fastft_plan = self.plan = self.planner.plan(
                spans, [tables[future.state.request_id] for future in requests]
            )
        self.current = buffers
        self.count += 1

    def publish(self, buffers: StepBuffers) -> None:
        """Let the model's layers read the step that comes next."""
        if self.routed is not None:
            buffers.tokens.publish(self.routed.tokens)
            (buffers.heads if self.few_heads else buffers.tokens).publish(self.routed.heads)

    def retire(self) -> None:
        """No step comes any more: the model's layers add nothing, whatever the last one's rows asked for."""
        if self.routed is not None:
            for route in (self.routed.tokens, self.routed.heads):
                route.set(None, None, False, 0)

    def sample(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        """In place of the library's: tokens to row 0 of output_ids, log-probabilities' bits to row 1."""
        if self.plan is not None and not self.plan.read:  # the library took the class for another than it is
            raise RuntimeError(attention.cannot_be_served(self.model))
        logits = scores[0]
        now = self.current
        tokens, logprobs = choose(logits, now.knobs(logits.shape[0]), now.nucleus, now.logprobs)
        output_ids[0, : len(tokens)].copy_(tokens)
        output_ids[1, : len(tokens)].copy_(logprobs.view(torch.int32))

    def produced(self, state, token: int, logprob: float, finished: bool) -> None:
        request = state.request
        self.tokens += 1
        request._produce(token, logprob)
        if finished:
            self.end(request, "stop" if token in request.sampling.stop_token_ids else "length")

    def end(self, request: Request, reason: str, error: Exception | None = None) -> None:
        self.errors += reason == "error"
        # A step in flight may still read its adapter. It was issued, so the memory waits for it before it writes there.
        self.admission.left(request)
        request._finish(reason, error)

    def failed(self, request: Request, error: Exception) -> None:
        """The library gives up on a request: it does so with all of them, when it is stopped or has failed."""
        self.end(request, "error", _over(None if self.stopping else error))

    def stopped(self, error: Exception | None) -> None:
        """The library's thread is over: so are all requests."""
        reason = _over(error)
        self.on_end(error)

        def end(request):
            self.errors += request._finish("error", reason)

        self.admission.end_all(end)


def _over(error: Exception | None) -> EngineStopped:
    reason = EngineStopped("the engine was stopped" if error is None else f"the engine failed: {error!r}")
    reason.__cause__ = error
    return reason


@functools.cache
def library():
    """The manager and the request state for this engine: subclasses, made when transformers is needed."""
    from transformers.generation.continuous_batching import continuous_api, requests
    from transformers.generation.continuous_batching.cache_allocators import cache_allocator

    attention.register()
    _salt_block_hashes(cache_allocator)

    class State(requests.RequestState):
        """The library's state of one of our requests."""

        def update_and_check_completion(self, token_id, logprob):
            if logprob != logprob:
                self.status = requests.RequestStatus.FINISHED
                error = FloatingPointError("the model's output is not finite for this request")
                self.steps.end(self.request, "error", error)
                return True
            before = len(self.generated_tokens)
            finished = super().update_and_check_completion(token_id, None)
            if len(self.generated_tokens) > before:
                self.steps.produced(self, token_id, logprob, finished)
            return finished

        def create_equivalent_initial_request(self):
            # The library takes its cache away and starts again with what there is as the prompt.
            plain = super().create_equivalent_initial_request()
            return self.follow(
                State(
                    request_id=plain.request_id,
                    initial_tokens=plain.initial_tokens,
                    max_new_tokens=plain.max_new_tokens,
                    eos_token_id=plain.eos_token_id,
                    _true_initial_tokens=plain._true_initial_tokens,
                )
            )

        def follow(self, state):
            state.request, state.steps = self.request, self.steps
            return state

    class Router(continuous_api.OutputRouter):
        """Tokens went to their requests already; only failures are left to tell."""

        def __init__(self, steps):
            super().__init__()
            self.steps = steps

        def deliver(self, output):
            pass

        def deliver_batch(self, outputs):
            pass

        def fail_and_deliver(self, state, error):
            self.steps.failed(state.request, error)

    class Manager(continuous_api.ContinuousBatchingManager):
        def __init__(self, steps, model, generation_config, config):
            self.steps = steps
            super().__init__(model=model, generation_config=generation_config, continuous_batching_config=config)
            self.output_router = Router(steps)

        def switch_to_cb_friendly_attn(self, model, auto_switch_to_flash=True):
            if model.device.type != "cpu" and auto_switch_to_flash:
                super().switch_to_cb_friendly_attn(model, auto_switch_to_flash)
            if "flash" not in model.config._attn_implementation:
                before = self._original_attn_impl = self._original_attn_impl or model.config._attn_implementation
                model.set_attn_implementation(attention.NAME)  # which only warns where it can't
                configs = model.config, model.config.get_text_config()
                if any(config._attn_implementation != attention.NAME for config in configs):
                    model.set_attn_implementation(before)
                    raise ValueError(attention.cannot_be_served(model))
                self.steps.own_attention, self.steps.model = True, model

        def start(self):
            self.background_thread_status.clear()
            disband()  # this thread loaded the model; now the engine's computes
            # A daemon: a program that forgets to stop its engine must be able to end.
            self._generation_thread = threading.Thread(target=self._run_generation_loop, name="fastft-engine", daemon=True)
            self._generation_thread.start()

        def add(self, request: Request) -> None:
            state = State(
                request_id=request.id,
                initial_tokens=request.prompt_ids,
                max_new_tokens=request.sampling.max_tokens,
                eos_token_id=list(request.sampling.stop_token_ids),
            )
            state.request, state.steps = request, self.steps
            self.input_queue.put(state)

        def wake(self) -> None:
            self._wake_up_loop.set()

        def _create_batch_processor(self):
            fresh = self.batch_processor is None
            processor = super()._create_batch_processor()
            if fresh:
                _hook(processor, self.steps, self.continuous_batching_config)
            return processor

        def _generation_loop_body(self, batch_processor, bootstrapping):
            steps = self.steps
            steps.beat = time.monotonic()
            with torch.cuda.stream(steps.stream):  # leases are for the stream that reads; None: nothing
                admitted = steps.admission.admit()
            for request in admitted:
                self.add(request)
            return super()._generation_loop_body(batch_processor, bootstrapping)

        def _handle_critical_error(self, error, batch_processor):
            self.steps.on_end(error)  # before it tells the requests, whose owners may ask what has happened
            super()._handle_critical_error(error, batch_processor)

        def _run_generation_loop(self):
            try:
                super()._run_generation_loop()
            finally:
                self.steps.stopped(self.background_thread_status.fatal_error)

    return Manager


def _salt_block_hashes(cache_allocator) -> None:
    """Blocks are shared by a hash of their tokens and their parent's hash. The first has no parent: there goes the adapter.

    Where no salt is set, as in other engines of this process, nothing changes.
    """
    original = cache_allocator.compute_block_hash

    @functools.wraps(original)
    def compute_block_hash(parent_hash, tokens):
        return original(getattr(_salt, "value", None) if parent_hash is None else parent_hash, tokens)

    cache_allocator.compute_block_hash = compute_block_hash


def _hook(processor, steps: Steps, config) -> None:
    """Put ours around the methods of a new batch processor's parts."""
    cache, scheduler, ios = processor.cache, processor.scheduler, processor.inputs_and_outputs
    asynchronous = processor.use_async_batching
    steps.stream, steps.planner, steps.plan = ios.compute_stream, None, None
    if steps.own_attention:
        allocator = next(iter(cache.cache_allocators.values()))
        steps.planner_tables = allocator.block_table
        sizes = allocator.tokens_per_page, allocator.block_physical_stride
        steps.planner = attention.Planner(*sizes, torch.device(cache.device))

    search, mark, clear = cache.search_prefix_match, cache.mark_complete_blocks, scheduler.clear_cancelled_requests

    def search_prefix_match(request_id, prompt_ids):
        state = scheduler.waiting_requests[request_id]
        return _salted(salt_of(state.request.lease), search, request_id, prompt_ids)

    def mark_complete_blocks(state, complete_blocks):
        if complete_blocks:
            _salted(salt_of(state.request.lease), mark, state, complete_blocks)

    def clear_cancelled_requests():
        states = clear() if scheduler._requests_to_cancel else []
        for state in states:
            state.status = type(state.status).FINISHED  # a step in flight, which has it, then leaves it alone
            steps.end(state.request, "cancelled")
        if states:  # the library lets new requests in again when one finishes, which perhaps none does any more
            scheduler.block_new_requests = False
        return states

    if steps.own_attention:
        schedule = scheduler.schedule_batch
        # Its budget of what a step reads is the room of a list that isn't made then. Shared prefixes count in it as often as
        # they are shared: requests that fit well would wait until others end.
        scheduler.schedule_batch = lambda token_budget, cache_budget: schedule(token_budget, _NO_LIMIT)
    cache.search_prefix_match, cache.mark_complete_blocks = search_prefix_match, mark_complete_blocks
    scheduler.clear_cancelled_requests = clear_cancelled_requests
    runner = processor.model_runner
    runner._sample = steps.sample
    if steps.memory is not None:
        runner._capture_graph = functools.partial(_quietly, steps.memory, runner._capture_graph)

    size = steps.slots, processor.max_batch_tokens, config.max_requests_per_batch
    for host, device in [(p.host_io, p.device_io) for p in ios.io_pairs] if asynchronous else [(ios, ios)]:
        _hook_inputs(host, device, StepBuffers(*size, processor.model_device), steps, cache, size[-1])


def _hook_inputs(host, device, buffers: StepBuffers, steps: Steps, cache, max_requests: int) -> None:
    prepare, transfer, key = host.prepare_batch_tensors, host._transfer_inputs, device._get_graph_key
    find, plain, routed, widths = device.get_graph, device.graphs, None, None

    def prepare_batch_tensors(
        requests_in_batch, logits_processors, use_decode_fast_path, num_q_tokens, max_kv_read, use_padding
    ):
        heads = min(num_q_tokens, max_requests) if use_padding else len(requests_in_batch)
        steps.prepare(buffers, requests_in_batch, num_q_tokens, heads, cache)
        if steps.own_attention:
            max_kv_read = 0  # then the library neither lists what to read (1.6 ms at 32 x 1024 tokens) nor masks it
        prepare(requests_in_batch, logits_processors, use_decode_fast_path, num_q_tokens, max_kv_read, use_padding)
        if host is device:
            buffers.transfer(non_blocking=False)
        steps.publish(buffers)

    def transfer_inputs(other, stream, non_blocking=False):
        transfer(other, stream=stream, non_blocking=non_blocking)
        with torch.cuda.stream(stream):
            buffers.transfer(non_blocking)

    def get_graph(prefix=""):
        """The library never lets go of a graph. One with adapters has in it the widths of S, which only grow: once they did,
        what was captured since the last look is of no use either, whichever of them it saw."""
        nonlocal routed, widths
        if buffers.active and (now := list(steps.memory.widths.values())) != widths:
            routed, widths = type(plain)(), now
        device.graphs = routed if buffers.active else plain
        return find(prefix)

    host.prepare_batch_tensors, host._transfer_inputs = prepare_batch_tensors, transfer_inputs
    device.get_graph, device._get_graph_key = get_graph, lambda: (*key(), *buffers.key())


def _quietly(memory, capture, *arguments):
    with memory.quiet():  # a copy of an adapter while a graph is captured would end the capture
        capture(*arguments)


def _salted(salt, function, *arguments):
    _salt.value = salt
    try:
        return function(*arguments)
    finally:
        _salt.value = None
