"""Switch several files of a folder together, so that a killed writer leaves the old ones or the new ones.

The files are written to a hidden folder inside the folder and flushed to disk; renaming it to ``.fastft-commit`` is the
point from which the new ones count. Then each file is renamed into place. Readers look for a file in the commit
folder first, so between any two of these steps they see one complete version; the next writer finishes what a killed
one left. Swapping whole folders instead would lose what others write into the folder meanwhile (a trainer's
optimizer state, other ranks' files) and needs a system call that not every filesystem has.
"""

import errno
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
_WAIT_SECONDS, _POLL_SECONDS = 5.0, 0.02


def current(folder: Path, name: str) -> Path:
    """Where the current version of a file lies, also after a writer was killed."""
    pending = folder / COMMIT / name
    return pending if pending.exists() else folder / name


def opened(folder: Path, name: str):
    """The current version of a file, open for reading; it stays what it is if a writer comes.

    Raises:
        OSError: also for what is no regular file.
    """
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
        _finish(folder, marker)
        for stale in folder.glob(_DRAFT + "*"):  # nobody else is writing one: we hold the lock
            shutil.rmtree(stale)
        draft = folder / f"{_DRAFT}{os.getpid()}"
        draft.mkdir()
        try:
            for name, data in contents.items():
                with open(draft / name, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            _flush(draft)
            os.rename(draft, folder / COMMIT)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        _flush(folder)
        _finish(folder, marker)


def _finish(folder: Path, marker: str) -> None:
    """Move the files of a commit into place. Can be killed anywhere and repeated."""
    commit = folder / COMMIT
    if not commit.is_dir():
        return
    pending = sorted((path.name for path in commit.iterdir()), key=lambda name: name == marker)
    if marker in pending[1:] and not _same(commit / marker, folder / marker):
        (folder / marker).unlink(missing_ok=True)
    for name in pending:
        os.replace(commit / name, folder / name)
    commit.rmdir()
    _flush(folder)


def _same(new: Path, old: Path) -> bool:
    return old.is_file() and new.read_bytes() == old.read_bytes()


@contextmanager
def locked(folder: Path, shared: bool = False):
    """Writers of a folder take turns; readers (`shared`) wait for the writer, not for each other, and not for ever: whoever
    can open a folder can hold its lock.

    Raises:
        TimeoutError: a reader has waited for `_WAIT_SECONDS`.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # filesystems without locks
            if not shared:
                fcntl.flock(handle, fcntl.LOCK_EX)
        if shared and not _share(handle):
            raise TimeoutError(f"another process has held the lock on {folder} for {_WAIT_SECONDS:g} s")
        yield
    finally:
        os.close(handle)


def _share(handle: int) -> bool:
    """Whether a reader's lock was got, or none is needed."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
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
