"""Saving: a killed writer never leaves a broken folder, and other files in it are left alone."""

import os
import shutil
import stat
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save

from fastft.checkpoint import atomic
from fastft.checkpoint.files import CONFIG, WEIGHTS, AdapterFileError, read_adapter, write_adapter
from fastft.serving.folder import AdapterFolder


def test_mode_follows_the_umask(tmp_path):
    for mask in (0o022, 0o077, 0o002):
        before = os.umask(mask)
        try:
            write_adapter(tmp_path / str(mask), {}, {"x": torch.ones(2)})
        finally:
            os.umask(before)
        for name in (CONFIG, WEIGHTS):
            assert stat.S_IMODE((tmp_path / str(mask) / name).stat().st_mode) == 0o666 & ~mask


def test_other_files_survive_and_rubbish_is_swept(tmp_path):
    (tmp_path / "optimizer.pt").write_text("state")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "rng.pth").write_text("rng")
    (tmp_path / ".fastft-draft-1").mkdir()
    (tmp_path / ".fastft-draft-1" / WEIGHTS).write_text("half")
    for value in (1, 2):
        write_adapter(tmp_path, {"r": value}, {"x": torch.full((2,), value)})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([CONFIG, WEIGHTS, "optimizer.pt", "deep"])
    assert (tmp_path / "optimizer.pt").read_text() == "state" and (tmp_path / "deep" / "rng.pth").read_text() == "rng"


def test_a_full_disk_leaves_the_old_adapter(tmp_path, monkeypatch):
    write_adapter(tmp_path, {"r": 1}, {"x": torch.ones(2)})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_adapter(tmp_path, {"r": 2}, {"x": torch.zeros(2)})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_all_is_on_disk_before_it_counts(tmp_path, monkeypatch):
    flushed, fsync, rename, replace = set(), os.fsync, os.rename, os.replace

    def noted(handle):
        fsync(handle)
        flushed.add(os.fstat(handle).st_ino)

    def on_disk(*paths):
        return {path.stat().st_ino for path in paths} <= flushed

    def committed(draft, commit):
        assert on_disk(draft, *draft.iterdir())
        rename(draft, commit)
        flushed.discard(tmp_path.stat().st_ino)

    def moved(*paths):
        assert on_disk(tmp_path), "or the old file could be gone and the commit not there yet"
        replace(*paths)

    for name, function in (("fsync", noted), ("rename", committed), ("replace", moved)):
        monkeypatch.setattr(atomic.os, name, function)
    for value in (1.0, 2.0):
        write_adapter(tmp_path, {"r": value}, {"x": torch.full((2,), value)})
    assert len(flushed) > 2


def consistent(folder):
    """The version in the folder; fails if config and weights are of different ones."""
    found = {}

    def expected(config):
        found.update(config)
        return {"x": (config["version"] % 7 + 1, 50)}

    tensors = read_adapter(folder, expected)
    assert (tensors["x"] == found["version"]).all()
    return found["version"]


WRITER = """
    import json, os, random, signal, sys, time, torch
    from fastft.checkpoint import atomic
    from fastft.checkpoint.files import write_adapter

    folder, mode, *kills = sys.argv[1:]

    def write(name, version):
        values = torch.full((version % 7 + 1, 50), float(version))
        write_adapter(os.path.join(folder, name), {"version": version}, {"x": values})

    def kill_at_call(number):
        count = 0
        def counted(function):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return call
        for name in ("open", "close", "fsync", "rename", "replace"):
            setattr(atomic.os, name, counted(getattr(os, name)))
        for name in ("mkdir", "rmdir", "unlink"):
            setattr(atomic.Path, name, counted(getattr(atomic.Path, name)))

    def write_on(name):
        for version in range(1, 10**9):
            write(name, version)

    if mode == "on":
        write("", 1)
        print("ready", flush=True)
        write_on("")
    for number in range(1, 1000):  # children of one process, since importing torch takes longest
        started = time.monotonic()
        write(str(number), 1)
        span = time.monotonic() - started
        begun, begin = os.pipe()
        child = os.fork()
        if not child:
            if mode == "calls":
                kill_at_call(number)
                write(str(number), 2)
                os._exit(0)
            os.write(begin, b"x")
            write_on(str(number))
        if mode == "times":
            os.read(begun, 1)  # a busy machine may take longer to start it than it writes
            time.sleep(random.Random(number).uniform(0, 5 * span))
            os.kill(child, signal.SIGKILL)
        os.close(begun), os.close(begin)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status) or mode == "times" and number == 20:
            break
    print(number)
"""


def writer(folder, mode):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(folder), mode],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("mode", ["calls", "times"])
def test_killed_at_any_point_the_folder_loads(tmp_path, mode):
    """Before each of a save's system calls; and at 20 random times."""
    count = int(writer(tmp_path, mode).communicate()[0])
    assert count >= 20
    versions = []
    for number in range(1, count + 1):
        folder = tmp_path / str(number)
        versions.append(consistent(folder))
        write_adapter(folder, {"version": 3}, {"x": torch.full((4, 50), 3.0)})  # and can be written again
        assert consistent(folder) == 3
        assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS}
    if mode == "calls":  # there is one point from which the new version counts
        assert versions == sorted(versions) and set(versions) == {1, 2}
    else:
        assert len(set(versions)) > 1


@contextmanager
def stopped_before_move(number, monkeypatch):
    """A context that a writer leaves, as if it were killed, before it moves the file of this number into place."""
    moves, replace = iter(range(number + 1)), os.replace

    def counted(*paths):
        if next(moves) == number:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(atomic.os, "replace", counted)
        yield


@pytest.fixture
def killed(tmp_path, monkeypatch):
    """A folder with version 1 whose writer of version 2 is killed before it moves the file of this number into place."""

    def kill(number):
        write_adapter(tmp_path, {"version": 1}, {"x": torch.full((2, 50), 1.0)})
        with stopped_before_move(number, monkeypatch):
            write_adapter(tmp_path, {"version": 2}, {"x": torch.full((3, 50), 2.0)})
        assert consistent(tmp_path) == 2
        return tmp_path

    return kill


def others(folder, *names):
    """Another program, which knows only the files themselves, writes version 4."""
    contents = {CONFIG: b'{"version": 4}', WEIGHTS: save({"x": torch.full((5, 50), 4.0)})}
    for name in names:
        (folder / name).write_bytes(contents[name])


@pytest.mark.parametrize("moved", [0, 1])
def test_what_another_program_saved_after_a_kill_counts(killed, moved):
    folder = killed(moved)
    others(folder, WEIGHTS, CONFIG)
    assert consistent(folder) == 4 and folder.name in AdapterFolder(folder.parent)
    write_adapter(folder, {"version": 3}, {"x": torch.full((4, 50), 3.0)})
    assert consistent(folder) == 3 and {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS}


@pytest.mark.parametrize("moved", [0, 1])
@pytest.mark.parametrize("marker", ["a", "b"])
def test_other_programs_find_no_marker_beside_a_mixture(tmp_path, monkeypatch, marker, moved):
    atomic.switch(tmp_path, {"a": b"1", "b": b"1"}, marker)
    with stopped_before_move(moved, monkeypatch):
        atomic.switch(tmp_path, {"a": b"2", "b": b"2"}, marker)
    assert {path.name for path in tmp_path.glob("?")} == {"a", "b"} - {marker}
    assert all(atomic.current(tmp_path, name).read_bytes() == b"2" for name in "ab")


def test_a_save_does_not_bring_back_what_another_program_has_replaced(killed, monkeypatch):
    folder = killed(0)
    others(folder, WEIGHTS, CONFIG)

    def write(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "_write", write)
    with pytest.raises(OSError, match="No space"):
        write_adapter(folder, {"version": 3}, {"x": torch.full((4, 50), 3.0)})
    assert consistent(folder) == 4


def test_files_of_two_programs_are_not_mixed(killed):
    folder = killed(1)  # the weights are in place
    others(folder, CONFIG)
    with pytest.raises(AdapterFileError, match=f"{CONFIG} was written by another program, and {WEIGHTS} by a save that was"):
        consistent(folder)
    write_adapter(folder, {"version": 3}, {"x": torch.full((4, 50), 3.0)})
    assert consistent(folder) == 3


@pytest.mark.parametrize("how", ["copied", "earlier", "damaged"])
@pytest.mark.parametrize("moved", [0, 1])
def test_commits_whose_record_says_nothing(killed, tmp_path_factory, moved, how):
    """Of a folder that was copied without its files' times; of one that an earlier version left."""
    folder = killed(moved)
    record = folder / atomic.COMMIT / atomic._RECORD
    if how == "copied":
        time.sleep(0.02)
        folder = shutil.copytree(folder, tmp_path_factory.mktemp("copy") / "x", copy_function=shutil.copyfile)
    elif how == "earlier":
        record.unlink()
    else:
        record.write_text('{"x": ' * 9999)
    assert consistent(folder) == 2
    write_adapter(folder, {"version": 3}, {"x": torch.full((4, 50), 3.0)})
    assert consistent(folder) == 3 and {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS}


def test_reading_while_another_process_writes(tmp_path):
    process = writer(tmp_path, "on")
    assert process.stdout.readline() == "ready\n"
    seen, reads, deadline = set(), 0, time.monotonic() + 120
    while len(seen) < 5 or reads < 40:
        seen.add(consistent(tmp_path))
        reads += 1
        assert time.monotonic() < deadline
    process.kill()
    process.wait()


def test_writers_take_turns(tmp_path):
    def write(version):
        for _ in range(10):
            write_adapter(tmp_path, {"version": version}, {"x": torch.full((version % 7 + 1, 50), float(version))})

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(write, (1, 2, 3)))  # raises what a writer raised
    assert consistent(tmp_path) in (1, 2, 3)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS}


def test_readers_do_not_wait_for_ever(tmp_path, monkeypatch):
    """Anybody who can open the folder can hold its lock; others' adapters are read by the same thread."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(atomic, "_WAIT_SECONDS", 0.1)
    write_adapter(tmp_path / "held", {"version": 6}, {"x": torch.full((7, 50), 6.0)})
    handle = os.open(tmp_path / "held", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(AdapterFileError, match=r"held is being written, it seems: another process has held the lock"):
            consistent(tmp_path / "held")
    finally:
        os.close(handle)
    assert consistent(tmp_path / "held") == 6


def test_readers_wait_for_a_writer(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    write_adapter(tmp_path, {"version": 6}, {"x": torch.full((7, 50), 6.0)})
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    threading.Timer(0.2, os.close, (handle,)).start()
    assert consistent(tmp_path) == 6
