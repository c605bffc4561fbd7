"""Beside the engine's thread no other has a team of OpenMP threads: together they would have more than there are cores.

In processes of their own, whose number of threads is not that of the tests.
"""

import subprocess
import sys
import textwrap

import pytest

from fastft.serving import teams

pytestmark = pytest.mark.skipif(teams._gnu_openmp() is None, reason="PyTorch is not on GNU's OpenMP here")

START = """
    import os, threading, time
    import torch
    from fastft.serving import teams

    torch.set_num_threads(2)

    def in_thread(function):
        found = []
        thread = threading.Thread(target=lambda: found.append(function()))
        thread.start()
        thread.join()
        return found[0]

    def work():
        torch.ones(200_000).add_(1)
        return torch.get_num_threads()

    def threads():
        return len(os.listdir("/proc/self/task"))

    def become(most):  # threads that are told to end take a while
        deadline = time.monotonic() + 20
        while threads() > most:
            assert time.monotonic() < deadline, (threads(), most)
            time.sleep(0.01)
"""


def run(script, *arguments):
    text = textwrap.dedent(START) + textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", text, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_thread_that_works_alone():
    run("""
        work()
        before = threads()

        def alone():
            teams.work_alone()
            return work(), threads()

        assert in_thread(alone) == (1, before + 1)
        assert torch.get_num_threads() == in_thread(work) == 2, "that was its own affair"
    """)


def test_a_team_is_disbanded_and_made_again():
    run("""
        alone = threads()
        work()
        assert threads() == alone + 1
        teams.disband()
        become(alone)
        work()
        assert threads() == alone + 1
    """)


def test_adapters_are_loaded_by_a_thread_that_works_alone(tmp_path):
    run(
        """
        import pathlib, sys
        from tests.serving import made_up
        from tests.serving.test_memory import memory_of

        seen, root, packer = [], pathlib.Path(sys.argv[1]), made_up.Packer()
        packer.hook = lambda name: seen.append((work(), threading.current_thread().name))
        made_up.write(root, "a0", pages=1)
        with memory_of(root, packer) as memory:
            memory.load("a0", 20)
        assert seen == [(1, "fastft-adapters")], seen
        """,
        tmp_path,
    )


def test_who_starts_an_engine_leaves_it_the_cores(tmp_path):
    run(
        """
        import sys
        from fastft.serving import Engine
        from tests.serving.test_engine import SIZES
        from tests.serving.tiny import llama, prompt

        engine = Engine(llama(), adapter_dir=sys.argv[1], **SIZES)
        work()
        before = threads()
        with engine.start():
            engine.generate([prompt(3, 1)], max_tokens=2)
            become(before + 1)  # the engine's thread and its team have come, this thread's has gone
        """,
        tmp_path,
    )
