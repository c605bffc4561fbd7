"""An engine with the real one's interface and no model: tokens follow from adapter, prompt and seed, or from a script."""

import hashlib
import threading
import time
import types
import zlib

import torch

from fastft.checkpoint.files import AdapterFileError
from fastft.serving.requests import EngineStopped, QueueFull, Request, Sampling, UnknownAdapter


class ByteTokenizer:
    """A token is a byte."""

    chat_template = None

    def __len__(self):
        return 256

    def get_vocab(self):
        return {f"<0x{byte:02X}>": byte for byte in range(256)}

    def convert_ids_to_tokens(self, token):
        return f"<0x{token:02X}>"

    def __call__(self, text, **_):
        return {"input_ids": list(text.encode())}

    def decode(self, ids, **_):
        return bytes(ids).decode(errors="replace")


class FakeMemory:
    def __init__(self, names):
        self._names, self.loaded, self.pinned, self.calls = list(names), set(), set(), []
        self.broken = {}

    def names(self):
        return list(self._names)

    def __contains__(self, name):
        return name in self._names

    def state(self, name):
        return "on_device" if name in self.loaded else "on_disk"

    def residents(self):
        return [
            types.SimpleNamespace(name=name, digest="d" * 64, bytes=4096, leases=0, pinned=name in self.pinned)
            for name in self.loaded
        ]

    def error(self, name):
        return self.broken.get(name)

    def load(self, name, timeout):
        self.calls.append(("load", name, timeout))
        if name in self.broken:
            raise AdapterFileError(self.broken[name])
        self.loaded.add(name)
        return "d" * 64

    def unload(self, name, timeout):
        if name in self.pinned:
            raise TimeoutError(f"{name} is still used after {timeout} s")
        self.loaded.discard(name)
        return 4096

    def update(self, name, timeout):
        self.calls.append(("update", name, timeout))
        return "e" * 64

    def pin(self, name, timeout):
        self.pinned.add(name)
        return self.load(name, timeout)

    def unpin(self, name):
        self.pinned.discard(name)

    def stats(self):
        return {"bytes": 4096 * len(self.loaded), "slots": 4, "evictions_total": 3, "hits": {"host_total": 7}}


class FakeEngine:
    """script(prompt_ids, adapter, sampling) -> tokens. delay: seconds a token takes. fail: {adapter: the exception its
    requests end with}. stops: tokens that end its answers. `hold()` keeps tokens back until `go()`."""

    def __init__(self, tokenizer, adapters=("math", "code"), *, script=None, delay=0.0, max_waiting=64, max_length=512):
        self.tokenizer, self.max_length, self.max_waiting, self.delay = tokenizer, max_length, max_waiting, delay
        self.adapters = FakeMemory(adapters) if adapters is not None else None
        self.script = script or self._random
        weight = torch.empty(len(tokenizer), 1)
        self.model = types.SimpleNamespace(get_input_embeddings=lambda: types.SimpleNamespace(weight=weight))
        self.submitted, self.cancelled, self.fail, self.reason, self.failure = [], [], {}, None, None
        self.running, self._lock, self._stopped, self.steps = set(), threading.Lock(), False, 0
        self.stops = frozenset()
        self._free = threading.Event()
        self._free.set()

    def adapter_names(self):
        return [] if self.adapters is None else self.adapters.names()

    def look(self, adapter):
        if adapter not in self.adapter_names():
            raise UnknownAdapter(f"no adapter {adapter!r}")

    def hold(self):
        self._free.clear()

    def go(self):
        self._free.set()

    def submit(
        self,
        prompt_ids,
        *,
        adapter=None,
        max_tokens,
        temperature=0.0,
        top_p=1.0,
        seed=None,
        stop_token_ids=(),
        logprobs=False,
        looked=False,
    ):
        assert prompt_ids and 0 <= min(prompt_ids) <= max(prompt_ids) < len(self.tokenizer)
        assert len(prompt_ids) + max_tokens <= self.max_length
        if self._stopped:
            raise EngineStopped("the engine was stopped")
        if adapter is not None and not looked:
            self.look(adapter)
        with self._lock:
            if len(self.running) >= self.max_waiting:
                raise QueueFull(f"{self.max_waiting} requests wait: try again later")
            sampling = Sampling(max_tokens, temperature, top_p, seed or 0, self.stops.union(stop_token_ids), logprobs)
            request = Request(f"r{len(self.submitted)}", list(prompt_ids), adapter, sampling, self._cancel)
            self.submitted.append(request)
            self.running.add(request)
        threading.Thread(target=self._run, args=(request,), daemon=True).start()
        return request

    def _cancel(self, request):
        self.cancelled.append(request)
        request._finish("cancelled")
        self.running.discard(request)

    def _run(self, request):
        if request.adapter in self.fail:
            request._finish("error", self.fail[request.adapter])
            self.running.discard(request)
            return
        request.admitted = time.monotonic()
        if request.adapter is not None:
            request.lease = types.SimpleNamespace(digest=hashlib.sha256(request.adapter.encode()).hexdigest())
        tokens = list(self.script(request.prompt_ids, request.adapter, request.sampling))
        reason = "length" if len(tokens) >= request.sampling.max_tokens else "stop"
        for at, token in enumerate(tokens[: request.sampling.max_tokens]):
            self._free.wait()
            time.sleep(self.delay)
            if request.finish_reason is not None:
                return
            self.steps += 1
            request._produce(token, -0.5 - at if request.sampling.logprobs else None)
            if token in request.sampling.stop_token_ids:
                reason = "stop"
                break
        request._finish(reason)
        self.running.discard(request)

    def _random(self, prompt_ids, adapter, sampling):
        seed = zlib.crc32(repr((prompt_ids, adapter, sampling.seed if sampling.temperature else 0)).encode())
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(8, len(self.tokenizer), (sampling.max_tokens,), generator=generator).tolist()

    def healthy(self):
        return self.reason

    def stats(self):
        return {"running": len(self.running), "waiting": 0, "steps_total": self.steps}

    def stop(self, drain=True, timeout=None):
        self._stopped = True

    def close(self):
        self.stop()
