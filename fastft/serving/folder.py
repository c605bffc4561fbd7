"""The one folder that adapters are read from. Their names are keys, never paths."""

import os
import re
from contextlib import suppress
from pathlib import Path

from ..checkpoint.atomic import COMMIT, current
from ..checkpoint.files import CONFIG
from .requests import AdaptersUnavailable, UnknownAdapter

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)


class AdapterFolder:
    """Folders of adapters under one root; symbolic links count where what they name lies under it too.

    Args:
        root: the folder; None has no adapters.

    Raises:
        FileNotFoundError: `root` is not a folder.
    """

    def __init__(self, root):
        self._given = None if root is None else os.path.abspath(root)
        if root is not None and not self.root.is_dir():
            raise FileNotFoundError(f"no adapter folder {str(root)!r}")

    @property
    def root(self) -> Path | None:
        """Where it is now: an operator may put a link in its place, or lead a link elsewhere, to switch to a new release."""
        return None if self._given is None else Path(os.path.realpath(self._given))

    def path(self, name: str) -> Path:
        """Where an adapter lies. Raises UnknownAdapter, also for what is no name and for what lies elsewhere;
        AdaptersUnavailable."""
        found = self._find(name)
        if found is None:
            raise UnknownAdapter(f"no adapter {name[:80]!r}")
        return found

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def names(self) -> list[str]:
        """All adapters, sorted. Raises AdaptersUnavailable."""
        return sorted(name for name in self._entries() if self._find(name) is not None)

    def _entries(self) -> list[str]:
        if self._given is None:
            return []
        try:
            return os.listdir(self._given)
        except OSError as error:  # renamed, or unmounted
            raise AdaptersUnavailable(f"the adapter folder {self._given!r} can't be read: {error.strerror}") from error

    def _find(self, name: str) -> Path | None:
        if self._given is None or not NAME.fullmatch(name):
            return None
        for _ in range(3):  # a writer may be switching its files just now
            root = self.root
            with suppress(OSError):
                folder = Path(os.path.realpath(root / name, strict=True))
                # Its files are checked too: a link among them could hand out what lies outside.
                inside = [folder, *(Path(os.path.realpath(entry)) for entry in _files(folder))]
                if not all(path.is_relative_to(root) for path in inside):
                    return None
                if current(folder, CONFIG).is_file():
                    return folder
        self._entries()
        return None


def _files(folder: Path):
    """What is in a folder, and in the one inside it from which a writer moves files into place."""
    for entry in os.scandir(folder):
        yield entry
        if entry.name == COMMIT:
            yield from os.scandir(entry)
