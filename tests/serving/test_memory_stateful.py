"""Random sequences of everything one can do with an adapter memory, on a pool too small for it.

After every step each lease's slot, read through pieces and tables as a kernel reads it, must hold exactly the version that
the lease is of.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from fastft.checkpoint.files import AdapterFileError
from fastft.serving.memory import AdapterMemory
from tests.lengths import for_long, options
from tests.serving import made_up
from tests.serving.made_up import PAGE, check_content, digest_of, write

NAMES = ["a", "b", "c", "d"]
names = st.sampled_from(NAMES)


class Memory(RuleBasedStateMachine):
    @initialize(slots=st.integers(1, 3), pages=st.integers(4, 7), host_pages=st.sampled_from([0, 2, 5, 20]))
    def build(self, slots, pages, host_pages):
        self.root = Path(tempfile.mkdtemp())
        self.packer = made_up.Packer()
        self.pages, self.host_pages = pages, host_pages
        self.memory = AdapterMemory(
            made_up.sites(),
            device="cpu",
            dtype=torch.float32,
            adapter_dir=self.root,
            packer=self.packer,
            slots=slots,
            device_bytes=pages * PAGE,
            host_bytes=host_pages * PAGE,
            page_bytes=PAGE,
            reserve_seconds=0,
            retry_seconds=0,
            start=False,
        )
        self.slots, self.table, self.urgency = slots, self.memory._table, self.memory._runtime.Urgency
        self.version = {}  # by name, what lies on disk
        self.size = {}  # pages by (name, version)
        self.of_digest = {}  # (name, version)
        self.least = dict.fromkeys(NAMES, 0)  # no new lease may have an older version
        self.held, self.tickets, self.pinned = [], [], set()
        for i, name in enumerate(NAMES):
            self.write(name, 1 + i % 3)

    def write(self, name, pages):
        version = self.version.get(name, -1) + 1
        self.version[name] = version
        self.size[name, version] = pages
        self.of_digest[digest_of(name, version)] = (name, version)
        write(self.root, name, version=version, pages=pages)

    # What requests do

    @rule(name=names)
    def acquire(self, name):
        lease = self.memory.acquire(name)
        if lease is not None:
            of, version = self.of_digest[lease.digest]
            assert of == lease.name == name and version >= self.least[name]
            self.held.append(lease)

    @rule(name=names)
    def serve(self, name):
        """A request comes, waits for its adapter, and starts, if there is room beside those that run."""
        self.acquire(name)
        self.load(20)
        self.acquire(name)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99))
    def release(self, which):
        self.memory.release(self.held.pop(which % len(self.held)))

    @rule(name=names)
    def prefetch(self, name):
        self.memory.prefetch(name)

    # What the thread does, with or without somebody doing something at the worst moment

    @rule(times=st.integers(1, 8))
    def load(self, times):
        for _ in range(times):
            self.memory.step()
        self.settle()

    @rule(what=st.sampled_from(["acquire", "prefetch", "want", "update", "unload", "evict", "forget", "pin"]), name=names)
    def load_disturbed(self, what, name):
        """Something else happens while a folder is read or pages are copied."""
        disturbances = []

        def disturb(*_):
            if not disturbances:
                disturbances.append(what)
                getattr(self, what)(name)
                if self.held:
                    self.release(0)

        copy = self.memory.pool.write
        self.packer.hook = disturb
        self.memory.pool.write = lambda slot, pages, copied: (disturb(), copy(slot, pages, copied), self.intact())
        try:
            while self.memory.step() and not disturbances:
                pass
        finally:
            self.packer.hook, self.memory.pool.write = (lambda name: None), copy
        self.settle()

    @rule(name=names)
    def break_or_repair(self, name):
        if self.packer.fail.pop(name, None) is None:
            self.packer.fail[name] = AdapterFileError(f"{name} is damaged")

    # What the administrator does

    @rule(name=names)
    def want(self, name):
        self.tickets.append((name, 0, self.table.want(name, self.urgency.load)))

    @rule(name=names, pages=st.integers(1, 3))
    def change(self, name, pages):
        self.write(name, pages)

    @rule(name=names)
    def update(self, name):
        self.tickets.append((name, self.version[name], self.table.update(name)))

    @rule(name=names)
    def unload(self, name):
        self.table.start_unload(name)
        assert self.memory.acquire(name) is None and self.memory.state(name) == "draining"
        self.table.cancel_unload(name)
        self.memory._loader.collect()
        before = self.memory.stats()
        used = any(lease.name == name for lease in self.held)
        try:
            freed = self.memory.unload(name, 0)
        except TimeoutError:
            assert used or not self.idle
            return
        assert not used
        after = self.memory.stats()
        pages = before["pages_used"] - after["pages_used"]
        assert freed == pages * PAGE + before["host_bytes"] - after["host_bytes"]
        self.pinned.discard(name)
        self.least[name] = self.version[name]

    @rule(name=names)
    def evict(self, name):
        there = self.memory.state(name) == "on_device"
        used = any(lease.name == name and self.is_current(lease) for lease in self.held)
        assert self.memory.evict(name) == (there and not used and name not in self.pinned)

    def is_current(self, lease):
        return any(r.generation == lease.generation and r.state.name == "on_device" for r in self.memory.residents())

    @rule(name=names)
    def forget(self, name):
        self.memory.forget(name)
        self.pinned.discard(name)
        self.least[name] = self.version[name]

    @rule(name=names)
    def pin(self, name):
        self.table.pin(name, True)
        self.pinned.add(name)
        self.want(name)

    @rule(name=names)
    def unpin(self, name):
        self.memory.unpin(name)
        self.pinned.discard(name)

    # What must be true

    def settle(self):
        """Updates that ended in success are seen by whoever comes after."""
        open_tickets = []
        for name, version, ticket in self.tickets:
            outcome = self.table.wait(ticket, 0)
            if outcome is None:
                open_tickets.append((name, version, ticket))
            elif outcome.failure.name == "none":
                assert self.of_digest[outcome.digest][0] == name and self.of_digest[outcome.digest][1] >= version
                self.least[name] = max(self.least[name], version)
        self.tickets = open_tickets

    @property
    def idle(self):
        """No load is going on, which an unload would have to wait for."""
        return self.packer.hook.__name__ == "<lambda>" and self.memory.pool.write.__name__ == "write"

    def intact(self):
        for lease in self.held:
            name, version = self.of_digest[lease.digest]
            check_content(self.memory, lease.slot, name, version, self.size[name, version])

    @invariant()
    def every_lease_has_its_bytes_and_the_books_are_right(self):
        self.memory._loader.collect()
        self.intact()
        self.table.check()
        stats, residents = self.memory.stats(), self.memory.residents()
        assert stats["pages_used"] <= self.pages and len(residents) == stats["slots_used"] <= self.slots
        assert stats["host_bytes"] <= self.host_pages * PAGE or stats["host_copies"] == 1
        assert stats["host_bytes"] == sum(copy.blob.numel() for copy in self.memory._loader.copies.values())
        assert stats["leases"] == len(self.held) == sum(r.leases for r in residents)
        for slot in set(range(self.slots)) - {r.slot for r in residents}:
            assert not any(pieces[slot].any() for pieces in self.memory.pieces.values())
        for name in self.pinned:  # may be on its way, but once there it stays
            assert all(r.pinned for r in residents if r.name == name and r.state.name == "on_device")

    def teardown(self):
        if not hasattr(self, "memory"):
            return
        while self.held:
            self.release(0)
        self.packer.fail.clear()
        for name in list(self.pinned):
            self.unpin(name)
        while self.memory.step():
            pass
        for name in NAMES:  # all are still served, as they are on disk
            self.write(name, 2)
            self.update(name)
            while self.memory.step():
                pass
            self.settle()
            self.acquire(name)
            assert self.held, name
            self.intact()
            self.release(0)
        for name in NAMES:
            self.unload(name)
        self.memory._loader.collect()
        self.table.check()
        stats = self.memory.stats()
        assert not any(stats[key] for key in ("pages_used", "slots_used", "host_bytes", "known", "queued", "leases"))
        assert not self.memory._loader.copies and not self.tickets
        self.memory.close()
        shutil.rmtree(self.root)


def test_memory():
    for_long(run_state_machine_as_test, Memory, settings=options(50, stateful_step_count=40))
