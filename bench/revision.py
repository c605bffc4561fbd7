"""fastft of another revision, measured in the same rounds as this tree's: what has become faster or slower since.

The revision's files lie in .cache/bench, with native code built there, or this tree's where that is of the same sources.
A second process (`revision_process`) imports that fastft and this tree's bench, and takes a sample whenever it is asked to.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path

import torch

from fastft import _native

from . import graphs, results
from .runner import Case, Measurement

CACHE = results.ROOT / ".cache" / "bench"
# What the libraries of a device are built from.
NATIVE = {"cpu": ("csrc", "CMakeLists.txt", ":!csrc/cuda"), "cuda": ("csrc", "CMakeLists.txt")}


class RevisionError(RuntimeError):
    """A revision can't be measured."""


def commit_of(revision: str) -> str:
    """The commit's hash.

    Raises:
        RevisionError: this is no checkout, or there is no such revision.
    """
    if not results.in_checkout():
        raise RevisionError(f"--base needs a git checkout of fastft, and {results.ROOT} is none")
    found = _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", check=False)
    if found.returncode:
        raise RevisionError(f"--base: no revision {revision!r} in {results.ROOT} (see git log)")
    return found.stdout.strip()


def checkout(commit: str, device: str) -> Path:
    """The folder with the commit's files and, where this machine can build it, its native code.

    Raises:
        RevisionError: it doesn't build; the message says where the build's output is.
    """
    folder = CACHE / f"{commit[:12]}-{device}-torch{torch.__version__}"  # which native code is built against
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as made:
        tree = Path(made) / "tree"
        archive = Path(made) / "tree.tar"
        _git("archive", "--format=tar", "-o", str(archive), commit)
        with tarfile.open(archive) as tar:
            tar.extractall(tree, filter="tar")
        # The cases are this tree's; only what they measure is the revision's.
        bench = tree / "fastft" / "bench"
        bench.unlink(missing_ok=True)
        bench.symlink_to(results.ROOT / "bench")
        if _same_native(commit, device):
            _copy_native(tree)
        else:
            _build_native(tree, device, CACHE / f"{commit[:12]}.log")
        tree.rename(folder)  # a build that was stopped leaves nothing
    return folder


def _git(*args, check=True):
    return subprocess.run(["git", "-C", results.ROOT, *args], capture_output=True, text=True, check=check)


def _same_native(commit: str, device: str) -> bool:
    """Whether this tree's libraries are of the commit's sources: unchanged, and not of an edit since taken back."""
    if _native.LIB.resolve() != results.ROOT / "fastft" / "lib" or results._native_is_old():
        return False
    changed = _git("diff", "--quiet", commit, "--", *NATIVE[device], check=False).returncode
    return not changed and not _git("ls-files", "--others", "--exclude-standard", "--", *NATIVE[device]).stdout


def _copy_native(tree: Path) -> None:
    (tree / "fastft" / "lib").mkdir(exist_ok=True)
    for library in _native.LIB.glob("*.so"):
        shutil.copy2(library, tree / "fastft" / "lib")
    for module in Path(_native.__file__).parent.glob("_runtime.*.so"):
        shutil.copy2(module, tree / "fastft")


def _build_native(tree: Path, device: str, log: Path) -> None:
    print(f"building the native code of {log.stem}, which takes minutes once; output in {log}", flush=True)
    env = os.environ | {"FASTFT_HOSTCUDA": "0", "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"}
    env["FASTFT_ISAS"] = ";".join(_native.with_extended(_native.chosen_isa))  # what is loaded here
    if device == "cpu":
        env["FASTFT_CUDA"] = "0"
    with open(log, "w") as output:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=tree, env=env, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RevisionError(f"--base: the native code of {log.stem} doesn't build, see {log}")
    shutil.rmtree(tree / "build", ignore_errors=True)


class Base:
    """Another revision's fastft and floor, as arms of the cases that are measured here.

    Args:
        revision: what git calls it.
        settings: how `run.listed` lists the cases; seed, threads: as here.

    Raises:
        RevisionError: it can't be had, or can't list these cases.
    """

    def __init__(self, revision: str, settings: dict, seed: int, threads: int):
        commit = commit_of(revision)
        self.label = commit[:9]
        self.ours, self.floor = f"fastft@{self.label}", f"floor@{self.label}"
        folder = checkout(commit, settings["device"])
        self._pipe, theirs = Pipe()
        env = {name: value for name, value in os.environ.items() if name != "FASTFT_LIB"} | {"PYTHONPATH": str(folder)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastft.bench.revision_process", str(theirs.fileno())],
            cwd=folder,
            env=env,
            pass_fds=[theirs.fileno()],
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for this process, which then closes the pipe
        )
        theirs.close()
        try:
            self._ask("start", str(folder), settings, seed, threads)
        except RevisionError:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        self._pipe.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, *question):
        try:
            self._pipe.send(question)
            answer, problem = self._pipe.recv()
        except (EOFError, OSError):
            raise RevisionError(f"the process of {self.label} has ended, exit status {self._process.wait()}") from None
        if problem:
            raise RevisionError(f"{self.label}: {problem}")
        return answer

    def offer(self, case: Case) -> dict[str, Measurement]:
        """Name -> what is known of the revision's floor and fastft before they are timed; skipped if it can't run them."""
        try:
            floor, ours = self._ask("offer", case.key())
        except RevisionError as error:
            return {self.ours: Measurement(self.ours, "skipped", str(error)[:300])}
        floor.implementation, ours.implementation = self.floor, self.ours
        return {self.floor: floor, self.ours: ours} if ours.status == "ok" else {self.ours: ours}

    def samplers(self, group: graphs.Group, found: dict[str, Measurement]) -> dict[str, Callable[[int], float]]:
        """Name -> what times a number of calls there, in the rounds of `group`; empty where ours is not in it."""
        if "fastft" not in group.runs or found[self.ours].status != "ok":
            return {}
        graph = group.notes["fastft"] == "CUDA graph"
        try:
            self._ask("settle", graph)
        except RevisionError as error:
            found[self.ours] = Measurement(self.ours, "skipped", str(error)[:300])
            del found[self.floor]
            return {}
        for name in (self.floor, self.ours):
            found[name].note = group.notes["fastft"]
        return {
            self.floor: lambda calls: self._ask("sample", "floor", calls),
            self.ours: lambda calls: self._ask("sample", "fastft", calls),
        }
