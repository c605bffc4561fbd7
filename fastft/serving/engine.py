"""Serving one base model with many adapters, in this process, on transformers' continuous batching.

with Engine(model, tokenizer, adapter_dir="adapters") as engine:
    request = engine.submit(prompt_ids, adapter="support", max_tokens=64)
    for token in request: ...
    engine.generate([prompt_ids, prompt_ids], adapters=["support", None], max_tokens=16)
"""

from __future__ import annotations

import atexit
import itertools
import secrets
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

from . import limits
from . import trial as trials
from .admission import Admission
from .batching import Steps, library
from .contract import check_library
from .memory import AdapterMemory
from .requests import Completion, EngineStopped, QueueFull, Request, Sampling, UnknownAdapter
from .sites import install

_STALLED_SECONDS = 60.0


class Engine:
    """Runs requests, each with its own adapter or none, in common batches. Its methods may be called from any thread.

    Args:
        model: a transformers causal language model in the state it is to be served. While the engine exists its linears are
            routed ones, and while it runs its attention is paged: don't use it otherwise.
        adapter_dir: a folder with one folder for each adapter: PEFT LoRA, or what fastft's handles save (LoRA, S²FT, SpIEL,
            LIFT, SHiRA). Their names are [A-Za-z0-9_-]{1,64}.
        slots: adapters in device memory at a time. device_bytes, host_bytes: memory for them there, and in waiting.
        cache_bytes: memory of the paged cache of keys and values (CPU: 512 MiB; GPU: what is free).
            num_blocks: the same, in blocks of `page_size` tokens.
        max_batch_tokens: tokens a step: a longer prompt takes several, in which others go on.
        max_running, max_waiting: requests that run, and that wait, at a time. patience: see `admission.Admission`, for
            how long a request may wait for its adapter.
        prefix_sharing: keep and share the cache of equal prefixes, within one content of one adapter.
        flash: None or True: flash attention on GPUs if it is there; False: never.
        trial: before the first start, answer four short prompts without the cache and then from it, and raise ValueError if
            the answers differ: some models' code makes them wrong without a word.

    Raises: UnsupportedLibrary, for a version of transformers whose insides are others than those used here.

    A request's output: greedy tokens are those of the model with its adapter merged, but for rounding (sums are formed in
    another order in batches of other shapes). Drawn tokens depend on its seed and on nothing else in the batch, but for the
    same rounding. A request whose logits are not finite ends with finish_reason "error" and changes no bit of others' rows.
    """

    def __init__(
        self,
        model,
        tokenizer=None,
        adapter_dir: str | Path | None = None,
        *,
        slots: int = 64,
        device_bytes: int | None = None,
        host_bytes: int | None = None,
        max_batch_tokens: int | None = None,
        num_blocks: int | None = None,
        page_size: int | None = None,
        cache_bytes: int | None = None,
        max_running: int | None = None,
        max_waiting: int = 1024,
        patience: float = 2.0,
        prefix_sharing: bool = True,
        flash: bool | None = None,
        trial: bool = True,
    ):
        check_library()
        limits.check_model(model)
        if max_waiting < 1:
            raise ValueError(f"max_waiting is {max_waiting}, must be at least 1: every request waits until a step begins")
        limits.warn_of_generation_config(model)
        self.model, self.tokenizer = model, tokenizer
        self._config = limits.batching_config(
            model, max_batch_tokens, num_blocks, page_size, cache_bytes, max_running, prefix_sharing, flash
        )
        self._stops = limits.stop_tokens(model, tokenizer)
        self._manager = self._failure = None
        self._closed = self._stopping = False
        self._trial = trial
        self._switching = threading.RLock()  # one thread at a time starts the engine's thread, or ends it
        self._ids = itertools.count()
        self.adapters = self._routed = None
        if adapter_dir is not None:
            self._routed = install(model)
            try:
                self.adapters = AdapterMemory(
                    self._routed.sites,
                    model=model,
                    device=model.device,
                    dtype=model.dtype,
                    adapter_dir=adapter_dir,
                    slots=slots,
                    device_bytes=device_bytes,
                    host_bytes=host_bytes,
                )
                self._routed.bind(self.adapters)
            except BaseException:
                self._routed.uninstall()
                raise
        self._admission = Admission(
            self.adapters,
            slots=slots,
            max_running=self._config.max_requests_per_batch,
            max_waiting=max_waiting,
            patience=patience,
        )
        few = getattr(model, "_supports_logits_to_keep", lambda: False)()
        self._steps = Steps(self._admission, self.adapters, self._routed, slots=slots, few_heads=few, on_end=self._ended)
        if self.adapters is not None:
            self.adapters.on_change(self._look_again)

    def start(self) -> Engine:
        """Make the cache and start the engine's thread. Raises what is wrong with the sizes or the device."""
        from transformers import GenerationConfig

        with self._switching:
            if self._closed:
                raise EngineStopped("the engine was closed; make a new one")
            if self._manager is not None and self._manager.is_running():
                if self._stopping:
                    raise EngineStopped("the engine is being stopped: start it when stop() has returned")
                return self
            self.stop(drain=False)  # what is left of a thread that failed
            self._failure = None
            self._steps.stopping = self._stopping = False
            # Drawing and stopping are ours: the library is to take every token as it comes.
            generation = GenerationConfig(do_sample=False, eos_token_id=-1)
            answers = trials.expected(self.model, self.max_length) if self._trial else []
            manager = library()(self._steps, self.model, generation, self._config)
            try:
                manager.batch_processor = manager._create_batch_processor()
                manager.start()
                trials.run(self.model, answers, lambda request: self._when_room(self._enqueue, request, manager))
            except BaseException:  # a cache too large, say: the model gets its own attention back
                if manager._generation_thread is not None:
                    self._steps.stopping = True
                    manager.stop(block=True, hard_stop=True)
                if manager._original_attn_impl is not None:
                    self.model.set_attn_implementation(manager._original_attn_impl)
                raise
            if self._trial:
                self._trial = False
                self._steps.count = self._steps.tokens = self._admission.longest_wait = 0
            self._manager = manager
        stop = weakref.WeakMethod(self.stop)
        atexit.register(lambda: stop() and stop()(drain=False, timeout=5))
        return self

    def stop(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests; finish those that are there (`drain`) for at most `timeout` seconds, and end the rest.

        Another thread may end a drain with ``stop(drain=False)`` or `close`. Not from a callback of a request: RuntimeError.
        """
        manager = self._manager
        if manager is None:
            return
        if threading.current_thread() is manager._generation_thread:
            raise RuntimeError("a callback of a request can't stop the engine, whose thread it is called from")
        self._stopping = True
        drained = False
        try:
            drained = drain and manager.is_running() and self._admission.wait_empty(timeout)
        finally:  # also where Ctrl-C ends the wait: the thread would go on on a model that is used otherwise
            with self._switching:
                if self._manager is manager:
                    self._steps.stopping = True
                    manager.stop(block=True, hard_stop=not drained)
                    self._steps.retire()
                    self._manager = None

    def close(self) -> None:
        """Stop at once, free the adapters' memory and give the model its own linears back."""
        with self._switching:
            self.stop(drain=False)
            if not self._closed:
                self._closed = True
                if self.adapters is not None:
                    self.adapters.close()
                    self._routed.uninstall()

    def __enter__(self) -> Engine:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, kind, *_):
        try:
            self.stop(drain=kind is None)
        finally:
            self.close()

    @property
    def max_length(self) -> int:
        """Prompt tokens and max_tokens that one request may have together: what the model and the cache hold."""
        blocks = self._config.num_blocks
        positions = limits.positions(self.model)
        manager = self._manager
        if manager is not None and manager.batch_processor is not None:
            blocks = manager.batch_processor.cache.num_blocks
        return positions if blocks is None else min(positions, blocks * self._config.page_size)

    def submit(
        self,
        prompt_ids: Sequence[int],
        *,
        adapter: str | None = None,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_token_ids: Sequence[int] = (),
        logprobs: bool = False,
        looked: bool = False,
    ) -> Request:
        """Queue a request; returns at once.

        Args:
            max_tokens: of the answer, at least 1. stop_token_ids: beside the model's own end-of-text tokens.
            temperature: 0 takes the likeliest token. top_p: the share of probability, from the likeliest on, to draw from.
            seed: with the same seed the same tokens are drawn, whatever else the engine does. None: another each time.
            looked: `look` was called for the adapter just now, so that the folder isn't looked at again.

        Raises: ValueError (a request that could never run), UnknownAdapter, QueueFull, EngineStopped.
        """
        prompt = limits.check_prompt(prompt_ids, self.model, max_tokens, self.max_length)
        limits.check_sampling(temperature, top_p)
        if adapter is not None:
            self._adapters_for(adapter).prefetch(adapter, looked)
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=float(temperature),
            top_p=float(top_p),
            seed=secrets.randbits(63) if seed is None else int(seed),
            stop_token_ids=self._stops.union(int(token) for token in stop_token_ids),
            logprobs=bool(logprobs),
        )
        request = Request(f"r{next(self._ids)}", prompt, adapter, sampling, self._cancel)
        manager = self._running_manager()
        self._enqueue(request, manager)
        if self._stopping and self._admission.withdraw(request):  # it is ending, and may never see it
            raise EngineStopped("the engine is being stopped")
        return request

    def _enqueue(self, request: Request, manager) -> None:
        self._admission.add(request)
        manager.wake()
        if self._failure is not None or not manager.is_running():  # it ended in between, and may not have seen the request
            self._steps.stopped(self._failure)

    def _when_room(self, call, *arguments, **options):
        """The call, again until the queue isn't full."""
        while True:
            try:
                return call(*arguments, **options)
            except QueueFull:
                self._admission.wait_for_room()

    def look(self, adapter: str) -> None:
        """Raises UnknownAdapter. Takes as long as the adapter folder's file system: not for an event loop's thread."""
        self._adapters_for(adapter).look(adapter)

    def generate(self, prompts, adapters=None, **sampling) -> list[Completion]:
        """Complete all prompts (token ids, or texts if there is a tokenizer), in order; see `submit` for the rest. Waits
        where the queue is full. If one is refused, none goes on.

        Raises also: TypeError for one prompt instead of a list of them, ValueError for a text without a tokenizer.
        """
        prompts = limits.check_prompts(prompts, self.tokenizer)
        adapters = [None] * len(prompts) if adapters is None else adapters
        requests = []
        try:
            for prompt, adapter in zip(prompts, adapters, strict=True):
                ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
                requests.append(self._when_room(self.submit, ids, adapter=adapter, **sampling))
            return [request.result() for request in requests]
        except BaseException:  # Ctrl-C too: nobody will read the others
            for request in requests:
                request.cancel()
            raise

    def adapter_names(self) -> list[str]:
        """Names of the adapters in the adapter folder."""
        return [] if self.adapters is None else list(self.adapters.names())

    def stats(self) -> dict[str, float]:
        """Numbers: requests running and waiting, the longest wait for admission, steps and tokens so far, the cache."""
        steps, numbers = self._steps, {}
        manager = self._manager
        processor = None if manager is None else manager.batch_processor
        if processor is not None:
            numbers = {
                "cache_blocks": processor.cache.num_blocks,
                "cache_bytes": processor.cache.num_blocks * limits.block_bytes(self.model, self._config.page_size),
                "cache_free": limits.free_share(processor.cache),
            }
        return {
            "running": len(self._admission.running),
            "waiting": len(self._admission),
            "longest_wait_seconds": self._admission.longest_wait,
            "steps_total": steps.count,
            "tokens_total": steps.tokens,
            "errors_total": steps.errors,
            **numbers,
        }

    @property
    def failure(self) -> Exception | None:
        """What the engine's thread died of. Nothing runs any more until `start`."""
        return self._failure

    def healthy(self) -> str | None:
        """None, or in a line why requests don't get on. Looks, and waits for nothing."""
        if self._failure is not None:
            return f"the engine's thread failed: {self._failure!r}"
        manager = self._manager
        if manager is None or self._stopping or not manager.is_running():
            return "the engine is not running"
        if self.adapters is not None and self.adapters.closed is not None:
            return f"adapters can't be loaded any more: {self.adapters.closed}"
        since = time.monotonic() - (self._steps.beat or time.monotonic())
        if since > _STALLED_SECONDS:
            return f"the engine's thread has been in one step for {since:.0f} s"
        return None

    def _adapters_for(self, adapter) -> AdapterMemory:
        if self.adapters is None or not isinstance(adapter, str):
            raise UnknownAdapter(f"no adapter {adapter!r}")
        return self.adapters

    def _running_manager(self):
        manager = self._manager
        if self._failure is not None:
            raise EngineStopped(f"the engine failed: {self._failure!r}") from self._failure
        if manager is None or self._stopping or not manager.is_running():
            raise EngineStopped("the engine is not running: call start(), or use it in a with statement")
        return manager

    def _cancel(self, request: Request) -> None:
        if self._admission.withdraw(request):
            request._finish("cancelled")
            return
        manager = self._manager
        if manager is not None and request.finish_reason is None:
            manager.cancel_request(request.id)

    def _look_again(self, *_) -> None:
        self._admission.look_again()
        manager = self._manager
        if manager is not None:
            manager.wake()

    def _ended(self, error: Exception | None) -> None:
        self._failure = error or self._failure  # told twice of one end, the second time perhaps without the reason
