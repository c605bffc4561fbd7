"""The folder of a `fastft train` run: what it holds, whether a run may write there, what --resume continues."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint.atomic import current, locked
from ..checkpoint.files import WEIGHTS
from . import launch
from .config import TrainConfig, make_config
from .errors import UserError

DIGESTS = "data.sha256"  # of the data files, as sha256sum writes them; of the rows made of them, as comments to it
ROWS = ("training rows", "held-out rows")
WRITTEN = ("summary.json", "loss.png", "selection.png", DIGESTS, "config.yaml")  # besides adapter/ and checkpoint-N/
UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError)  # of torch and safetensors
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Options that may differ between a run and its continuation.
RESUMABLE = {"epochs", "max_steps", "log_steps", "eval_steps", "save_steps", "keep_checkpoints", "device"}


def resume_options(config: str | None, options: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """What `--resume` continues: OUT/config.yaml where no --config is given, so that `--resume --out OUT` is enough.

    Raises:
        UserError: nothing to continue, or an option that decides the numbers differs from the run's.
    """
    out = options.get("out") or (make_config(options, config).out if config else None)
    if out is None:
        raise UserError("--resume needs --out, or --config with the key out")
    saved = Path(out).expanduser() / "config.yaml"
    check_out(saved.parent, resume=True, overwrite=False)
    if not saved.is_file():
        raise UserError(f"--resume: {out} has no config.yaml, so it is no run's folder")
    if config is None:
        config = str(saved)
    old = dataclasses.asdict(make_config({}, str(saved)))
    new = dataclasses.asdict(make_config(options, config))
    if new["dtype"] == "auto":  # here it might be another than where the run began
        new["dtype"] = old["dtype"]
        options = {**options, "dtype": old["dtype"]}
    changed = [f"{k} was {old[k]!r}, is {new[k]!r}" for k in old if old[k] != new[k] and k not in RESUMABLE | {"out"}]
    if changed:
        raise UserError(f"--resume: the run in {out} had other options: {'; '.join(changed)}")
    return config, options


def check_data(now: list[str], out: Path) -> None:
    """Raises UserError if data or rows of the run in `out` are others by now. `now`: some of the lines that `DIGESTS` would
    have."""
    if not (out / DIGESTS).is_file():  # a run of an earlier version
        return
    before = (out / DIGESTS).read_text(encoding="utf-8").splitlines()
    known = [line.partition("  ")[2] for line in before]  # an earlier version kept none of rows
    names = [name for line in now if line not in before and (name := line.partition("  ")[2]) in known]
    if rows := [name for name in names if name in ROWS]:
        raise UserError(
            f"--resume: the {' and the '.join(rows)} have other tokens than when the run in {out} began, though the data is "
            "the same: the model's tokenizer or chat template was changed, or the template prints the date; start a new run "
            "(for the date, with a template that prints none)"
        )
    if names:
        raise UserError(f"--resume: {' and '.join(names)} changed since the run in {out} began; start a new run")


def check_out(out: Path, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise UserError("--resume continues a run and --overwrite replaces it; give one of them")
    if out.exists() and not out.is_dir():
        raise UserError(f"out {out} is a file")
    if resume:
        from ..integrations.transformers import last_checkpoint

        if last_checkpoint(out) is None:
            raise UserError(f"--resume: {out} has no complete checkpoint; start without --resume (or with --overwrite)")
        return
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"out {out} is not empty; use --resume to continue its run, --overwrite to replace it, or another folder"
        )
    if any(True for _ in _of_a_run(out)) and not _is_run(out):
        raise UserError(f"out {out} holds files named like a run's but no run's config.yaml, so --overwrite leaves it alone")


def check_sources(config: TrainConfig, out: Path) -> None:
    """Raises UserError if the new run would read what is removed of the earlier run in `out`: stopped before its first
    checkpoint, it would leave nothing of either."""
    removed = {path.resolve() for path in (*_of_a_run(out), out / "adapter")}
    for name in ("model", "adapter", "data", "eval_data"):
        if (given := getattr(config, name)) is not None:
            source = Path(given).expanduser().resolve()
            if not removed.isdisjoint((source, *source.parents)):
                raise UserError(f"{name} {given} belongs to the run in {out}, which --overwrite removes; give another --out")


@contextmanager
def owned(out: Path, resume: bool, overwrite: bool) -> Iterator[None]:
    """The folder, made if it is missing, is inside this run's alone: rank 0 holds its lock, which ends with the process.

    Raises:
        UserError: another run has it, or has been there since `check_out`.
    """
    if launch.rank() != 0:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(out, at_once=True))
        except TimeoutError:
            raise UserError(f"out {out}: another run is writing there; wait for it, or give another folder") from None
        check_out(out, resume, overwrite)
        yield


def after_stop(out: Path) -> str:
    """How to go on with a run that was stopped while it trained."""
    from ..integrations.transformers import last_checkpoint

    if (checkpoint := last_checkpoint(out)) is None:
        return "stopped before the first checkpoint (--save-steps makes more of them); --overwrite starts the run again"
    return f"stopped; fastft train --resume --out {shlex.quote(str(out))} continues from {checkpoint.name}"


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def finished(out: Path, steps: int) -> dict[str, Any] | None:
    """The summary of the whole run. None: it was stopped before it had its result. What lies there then is none, or, if
    the run was made longer, that of its earlier end."""
    if not (out / "summary.json").is_file() or not current(out / "adapter", WEIGHTS).is_file():
        return None
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return summary if summary["steps"] == steps else None


def damaged(checkpoint: Path, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0] or repr(error)
    return UserError(f"--resume: {checkpoint} is damaged ({reason}); remove that folder to continue from an earlier one")


def _of_a_run(out: Path) -> Iterator[Path]:
    """What a run writes, as far as it is there. Last is what shows that it is a run's."""
    yield from _checkpoints(out)
    files = [out / "adapter" / name for name in ("adapter_config.json", WEIGHTS)] + [out / name for name in WRITTEN]
    yield from (path for path in files if path.is_file())


def _checkpoints(out: Path) -> Iterator[Path]:
    yield from (path for path in out.glob("checkpoint-*") if path.name[11:].isdigit() and path.is_dir())


def rotate(out: Path, step: int, keep: int) -> None:
    """Remove all but the last checkpoints up to that of `step`, which is complete. Trainer would go by their times, and take
    a user's checkpoint-100-good for one."""
    until = sorted((path for path in _checkpoints(out) if checkpoint_step(path) <= step), key=checkpoint_step)
    for path in until[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def _is_run(out: Path) -> bool:
    try:
        make_config({}, str(out / "config.yaml"))
    except UserError:
        return False
    return True


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Failed writes inside name the folder: the system names no file when a disk is full, and torch and safetensors have
    errors of their own.

    Raises:
        UserError: a write failed.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        reason = error
    except RuntimeError as error:  # torch's writer drops the system's reason
        if "inline_container" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
    except OSError as error:
        if error.filename is not None or error.errno not in FULL:
            raise
        reason = error.strerror
    else:
        return
    raise UserError(f"out {folder}: cannot be written: {reason}; make room there, or give another --out")


def write(path: Path, text: str) -> None:
    """Killed at any time, the file is what it was or what it becomes."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def clear(out: Path) -> None:
    """Remove an earlier run; files that are not a run's stay."""
    for path in list(_of_a_run(out)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
