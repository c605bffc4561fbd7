"""Switch several files of a folder together, so that a killed writer leaves the old ones or the new ones.

The files are written to a hidden folder inside the folder and flushed to disk; renaming it to ``.fastft-commit`` is the
point from which the new ones count. Then each file is renamed into place. Readers look for a file in the commit
folder first, so between any two of these steps they see one complete version; the next writer finishes what a killed
one left. Other programs know nothing of that and write over the files in place: so the commit folder records what it
replaces, and counts no longer once something else lies there. Swapping whole folders instead would lose what others write
into the folder meanwhile (a trainer's optimizer state, other ranks' files) and needs a system call that not every
filesystem has.
"""

import errno
import json
import os
import shutil
import stat
import time
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no locks on folders; concurrent writers to one folder are not protected there
    fcntl = None

_DRAFT = ".fastft-draft-"
COMMIT = ".fastft-commit"
_RECORD, _LONGEST_RECORD = ".fastft-replaces", 1 << 16  # in a commit; bytes
_WAIT_SECONDS, _POLL_SECONDS = 5.0, 0.02


def current(folder: Path, name: str) -> Path:
    """Where the current version of a file lies, also after a writer was killed."""
    pending = folder / COMMIT / name
    return pending if pending.exists() and not _stale(folder) else folder / name


def opened(folder: Path, name: str):
    """The current version of a file, open for reading; it stays what it is if a writer comes.

    Raises:
        OSError: also for what is no regular file, and where files of a killed writer lie beside another program's.
    """
    strange, ours = _since(folder)
    if strange and ours:
        what = f"{', '.join(strange)} was written by another program, and {', '.join(ours)} by a save that was killed"
        raise OSError(errno.EINVAL, f"{what}, so that they don't belong together; save the adapter again", str(folder))
    try:
        return _open(current(folder, name))
    except FileNotFoundError:  # a writer moved it since we looked, or it isn't there
        return _open(current(folder, name))


def _open(path: Path):
    # Without O_NONBLOCK the opening of a pipe would wait for somebody who writes into it, for ever.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def _stale(folder: Path) -> bool:
    """Whether another program has written files since the commit was made, and none of the commit's lies in their place."""
    strange, ours = _since(folder)
    return bool(strange and not ours)


def _since(folder: Path) -> tuple[list[str], list[str]]:
    """Which of the files that a commit replaces are another program's, written since, and which are in place already.

    Both are empty where nothing is left to be moved and where it isn't known: without a record, as earlier versions of
    fastft left commits, or if the folder was copied and its files have other times now.
    """
    while record := _recorded(folder):
        # What is pending first: moved in between it is still found in place.
        pending = {name: _stamp(folder / COMMIT / name) for name in record}
        placed = {name: _stamp(folder / name) for name in record}
        waiting = [name for name, stamp in pending.items() if stamp is not None]
        strange = [name for name, stamp in placed.items() if stamp is not None and stamp not in record[name]]
        if not waiting or any(pending[name] != record[name][1] for name in waiting):
            break
        if not strange or _recorded(folder) == record:  # or it is another writer's commit by now
            return strange, [name for name, stamp in placed.items() if stamp == record[name][1]]
    return [], []


def _recorded(folder: Path) -> dict[str, list]:
    """Of every file of a commit the stamps of what it replaces and of itself. Nothing if there is no legible record."""
    try:
        with _open(folder / COMMIT / _RECORD) as file:
            record = json.loads(file.read(_LONGEST_RECORD))
        return {os.path.basename(name): [old, new] for name, (old, new) in record.items()}  # nothing elsewhere is looked at
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _stamp(path: Path) -> list[int] | None:
    """By which a file is known again: size and time, which moving it doesn't change. None: it isn't there."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # of a name that can't be one
        return None
    return [found.st_size, found.st_mtime_ns]


def switch(folder: Path, contents: dict[str, bytes], marker: str) -> None:
    """Replace files of `folder` (made if missing) together. Other files are left alone; modes follow the umask.

    `marker` is the file without which other programs don't take the folder for complete. If its contents change, it
    is removed first and put into place last: a program that doesn't know `current` and comes after a kill in between
    finds no marker rather than a mixture of versions.
    """
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _flush(folder.parent)
    with locked(folder):
        for left in folder.glob(_DRAFT + "*"):  # nobody else is writing one: we hold the lock
            shutil.rmtree(left)
        if _stale(folder):
            shutil.rmtree((folder / COMMIT).rename(folder / f"{_DRAFT}stale"))  # at once: a part of it would count again
        _finish(folder, marker)
        draft = folder / f"{_DRAFT}{os.getpid()}"
        draft.mkdir()
        try:
            for name, data in contents.items():
                _write(draft / name, data)
            record = {name: [_stamp(folder / name), _stamp(draft / name)] for name in contents}
            _write(draft / _RECORD, json.dumps(record).encode())
            _flush(draft)
            os.rename(draft, folder / COMMIT)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        _flush(folder)
        _finish(folder, marker)


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _finish(folder: Path, marker: str) -> None:
    """Move the files of a commit into place. Can be killed anywhere and repeated."""
    commit = folder / COMMIT
    if not commit.is_dir():
        return
    pending = [path.name for path in commit.iterdir() if path.name != _RECORD]
    pending.sort(key=lambda name: name == marker)
    if marker in pending[1:] and not _same(commit / marker, folder / marker):
        (folder / marker).unlink(missing_ok=True)
    for name in pending:
        os.replace(commit / name, folder / name)
    (commit / _RECORD).unlink(missing_ok=True)
    commit.rmdir()
    _flush(folder)


def _same(new: Path, old: Path) -> bool:
    return old.is_file() and new.read_bytes() == old.read_bytes()


@contextmanager
def locked(folder: Path, shared: bool = False, at_once: bool = False):
    """Writers of a folder take turns; readers (`shared`) wait for the writer, not for each other, and not for ever: whoever
    can open a folder can hold its lock.

    Raises:
        TimeoutError: a reader has waited for `_WAIT_SECONDS`, or somebody has the lock that was wanted `at_once`.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    seconds = 0.0 if at_once else _WAIT_SECONDS
    try:
        if not (shared or at_once):
            with suppress(OSError):  # filesystems without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        elif not _lock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, seconds):
            raise TimeoutError(f"another process has held the lock on {folder} for {seconds:g} s")
        yield
    finally:
        os.close(handle)


def _lock(handle: int, kind: int, seconds: float) -> bool:
    """Whether the lock was got within so many seconds, or none is needed."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        except OSError:  # filesystems without locks
            return True
        else:
            return True


def _flush(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
