"""The adapter table under ThreadSanitizer: csrc/runtime/stress, whose threads share plain memory that only the table guards.

A few seconds of it belong to the tests; ``make test-tsan`` runs it for a minute, with several seeds.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

RUNTIME = Path(__file__).parents[2] / "csrc" / "runtime"
COMPILER = os.environ.get("CXX", "c++")

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no compiler {COMPILER}")


@pytest.fixture(scope="module")
def stress(tmp_path_factory):
    """The program's path, compiled with ThreadSanitizer."""
    sources = [path for path in RUNTIME.glob("*.cpp") if path.name in ("pages.cpp", "host_tier.cpp")]
    sources += [*RUNTIME.glob("adapter_*.cpp"), RUNTIME / "stress" / "stress.cpp"]
    program = tmp_path_factory.mktemp("tsan") / "stress"
    command = [COMPILER, "-std=c++20", "-O1", "-g1", "-fsanitize=thread", "-Wall", "-Wextra", "-Werror", "-pthread"]
    done = subprocess.run([*command, *map(str, sources), "-o", str(program)], capture_output=True, text=True)
    if "cannot find" in done.stderr and "tsan" in done.stderr:
        pytest.skip("this compiler has no ThreadSanitizer")
    assert done.returncode == 0, done.stderr
    return program


def run(program, *arguments):
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300)


def check_clean(program, seconds, seed):
    done = run(program, seconds, seed)
    assert done.returncode == 0 and "all right" in done.stdout and "WARNING" not in done.stderr, done.stderr[-4000:]


def test_what_is_used_after_its_release_is_found(stress):
    done = run(stress, 20, 0, "use-after-release")
    assert done.returncode != 0 and "ThreadSanitizer: data race" in done.stderr, done.stderr[-2000:]


def test_the_table_is_free_of_races(stress):
    check_clean(stress, 3, 1)


@pytest.mark.tsan
@pytest.mark.parametrize("seed", range(2, 8))
def test_the_table_is_free_of_races_for_long(stress, seed):
    check_clean(stress, 10, seed)
