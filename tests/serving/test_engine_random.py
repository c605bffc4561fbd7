"""Random loads, unloads, updates, evictions, cancellations and requests: no request gets a token that is not its adapter's.

A token is wrong if its logit lies more than 1e-3 below the largest one of the plain model with that content merged. Which
content a request had, its digest tells; it must be one that its adapter's name had between submission and end.
"""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from safetensors.torch import load_file

from fastft.checkpoint.files import write_adapter
from fastft.serving import Engine
from fastft.serving.packing import Packer
from fastft.serving.sites import find_sites
from tests.serving.tiny import llama, merged, prompt, save_adapter, worst_gap

NAMES = ["a", "b", "c", "d", "e"]
CONTENTS = [("lora1", 0), ("lora4", 1), ("lora16", 2), ("s2ft", 3), ("spiel", 4), ("lora4", 5), ("s2ft", 6), ("spiel", 7)]


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """(config, tensors, model with it merged) by digest, as the packer names it."""
    model, found = llama(), {}
    packer = Packer(model, find_sites(model), dtype=model.dtype)
    for kind, seed in CONTENTS:
        folder = tmp_path_factory.mktemp(kind)
        save_adapter(folder, kind, seed)
        config = json.loads((folder / "adapter_config.json").read_text())
        found[packer.pack(folder).digest] = config, load_file(folder / "adapter_model.safetensors"), merged(model, folder)
    assert len(found) == len(CONTENTS)
    return found


class Serving(RuleBasedStateMachine):
    contents: dict

    @initialize(
        slots=st.integers(1, 4),
        first=st.lists(st.integers(0, len(CONTENTS) - 1), min_size=len(NAMES), max_size=len(NAMES)),
        page_size=st.sampled_from([4, 16]),
        batch=st.sampled_from([16, 64]),
        host=st.sampled_from([1 << 18, 1 << 30]),
    )
    def start(self, slots, first, page_size, batch, host):
        self.folder, self.model = Path(tempfile.mkdtemp()), llama()
        self.digests = list(self.contents)
        self.now = {name: self.digests[i] for name, i in zip(NAMES, first)}
        for name in NAMES:
            self.write(name)
        self.requests, self.allowed, self.checked = [], {}, 0
        self.engine = Engine(
            self.model,
            adapter_dir=self.folder,
            slots=slots,
            device_bytes=16 << 20,
            host_bytes=host,
            page_size=page_size,
            num_blocks=512 // page_size,
            max_batch_tokens=batch,
            max_running=8,
            patience=0.05,
        ).start()

    def write(self, name):
        config, tensors, _ = self.contents[self.now[name]]
        write_adapter(self.folder / name, config, tensors)

    @rule(
        wanted=st.lists(st.sampled_from([*NAMES, None]), min_size=1, max_size=6),
        length=st.integers(1, 24),
        tokens=st.integers(1, 12),
        seed=st.integers(0, 2),
    )
    def request(self, wanted, length, tokens, seed):
        for name in wanted:
            request = self.engine.submit(prompt(length, seed), adapter=name, max_tokens=tokens)
            self.requests.append(request)
            self.allowed[request.id] = {self.now.get(name)}

    @rule(name=st.sampled_from(NAMES), content=st.integers(0, len(CONTENTS) - 1))
    def update(self, name, content):
        self.now[name] = self.digests[content]
        for request in self.requests:
            if request.adapter == name and request.finish_reason is None:
                self.allowed[request.id].add(self.now[name])
        self.write(name)
        assert self.engine.adapters.update(name, timeout=30) == self.now[name]

    @rule(name=st.sampled_from(NAMES))
    def load(self, name):
        assert self.engine.adapters.load(name, timeout=30) == self.now[name]

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name):
        self.engine.adapters.unload(name, timeout=30)

    @rule(name=st.sampled_from(NAMES))
    def evict(self, name):
        self.engine.adapters.evict(name)

    @rule(name=st.sampled_from(NAMES))
    def forget(self, name):
        self.engine.adapters.forget(name)

    @rule(which=st.integers(0, 5))
    def cancel(self, which):
        if which < len(self.requests):
            self.requests[-1 - which].cancel()

    @rule(count=st.integers(1, 8))
    def wait(self, count):
        for request in self.requests[-count:]:
            request.result(timeout=30)

    @invariant()
    def finished_requests_are_right(self):
        while self.checked < len(getattr(self, "requests", ())) and self.requests[self.checked].finish_reason:
            self.check(self.requests[self.checked].result())
            self.checked += 1

    def check(self, completion):
        assert completion.finish_reason in ("length", "cancelled"), completion.error
        if completion.digest is not None:
            assert completion.digest in self.allowed[self.requests[self.checked].id]
        if completion.tokens:
            assert (completion.digest is None) == (completion.adapter is None)
            reference = self.contents[completion.digest][2] if completion.adapter else self.base
            assert worst_gap(reference, completion) <= 1e-3, completion

    def teardown(self):
        if hasattr(self, "engine"):
            try:
                for request in self.requests:
                    request.result(timeout=60)
                self.finished_requests_are_right()
                assert self.engine.healthy() is None
                assert not any(adapter.leases for adapter in self.engine.adapters.residents())
            finally:
                self.engine.close()
                shutil.rmtree(self.folder)


def test_no_wrong_token(contents):
    machine = type("Serving", (Serving,), {"contents": contents, "base": llama()})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=12,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.reuse, Phase.generate],  # threads make it another each time: it can't be made smaller
        ),
    )
