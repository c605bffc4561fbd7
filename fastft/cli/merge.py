"""`fastft merge`: base + adapter -> a plain transformers checkpoint."""

from __future__ import annotations

import fnmatch
import os
import shutil
import tempfile
from pathlib import Path

from .errors import UserError
from .folder import writing
from .loading import check_adapter, load, load_adapter

DTYPES = ("auto", "float32", "bfloat16", "float16")
# What a transformers checkpoint consists of; a folder with anything else is not ours to replace.
CHECKPOINT = ("config.json", "generation_config.json", "model*.safetensors*", "tokenizer*", "special_tokens_map.json")
CHECKPOINT += ("added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template*", "additional_chat_templates")


def run(model: str, adapter: str, out: str, dtype: str = "auto", overwrite: bool = False) -> None:
    """Write the merged model and the base's tokenizer into `out`, all or nothing.

    The folder is written beside `out` and renamed: killed at any time, `out` is absent or complete. An empty folder stays (a
    mount, the working directory): files are moved into it, without the last of which it is no checkpoint.

    Raises:
        UserError: a missing or damaged model or adapter, or `out` in the way.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    target = Path(out).expanduser().resolve()  # "." has no parent, nor could it be renamed
    empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not empty and not overwrite:
        raise UserError(f"out {out} exists; use --overwrite to replace it, or another folder")
    for option, path in (("model", model), ("adapter", adapter)):
        source = Path(path).expanduser()
        if source.exists() and target in (source.resolve(), *source.resolve().parents):
            raise UserError(f"out {out} is or contains the {option} {path}; choose another folder")
    if target.exists() and not empty:
        _check_replaceable(target)
    check_adapter(adapter)

    import torch

    tokenizer = load("AutoTokenizer", model)
    base = load("AutoModelForCausalLM", model, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    handle = load_adapter(base, adapter)
    try:
        merged = handle.merge_and_unload()
    except (ValueError, RuntimeError) as error:
        raise UserError(f"adapter {adapter}: {error}") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    parent, prefix = target if empty else target.parent, f".{target.name}."
    with writing(target), tempfile.TemporaryDirectory(dir=parent, prefix=prefix) as folder:
        new = Path(folder) / "new"
        new.mkdir()
        merged.save_pretrained(new)
        tokenizer.save_pretrained(new)
        for file in filter(Path.is_file, new.rglob("*")):  # further chat templates lie in a folder
            file.chmod(new.stat().st_mode & 0o666)  # safetensors' own mode is 0600; the folder's follows the umask
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        if empty:
            _fill(new, target)
        else:
            _replace(new, target, Path(folder) / "old")
    print(f"{out}: plain {type(merged).__name__} checkpoint, {merged.dtype}")


def _check_replaceable(target: Path) -> None:
    if not (target / "config.json").is_file():
        raise UserError(f"out {target} is no checkpoint, so --overwrite leaves it alone")
    others = [p.name for p in target.iterdir() if not any(fnmatch.fnmatch(p.name, known) for known in CHECKPOINT)]
    if others:
        shown = ", ".join(sorted(others)[:5])
        raise UserError(f"out {target} holds more than a checkpoint ({shown}), so --overwrite leaves it alone")
    if target.is_mount():
        raise UserError(f"out {target} is a mount, which can't be renamed; empty it first, or give a folder inside it")


def _fill(new: Path, target: Path) -> None:
    """Move the contents of `new` into the empty folder `target`, config.json last."""
    for path in sorted(new.iterdir(), key=lambda path: path.name == "config.json"):
        path.rename(target / path.name)


def _replace(new: Path, target: Path, aside: Path) -> None:
    """Rename `new` to `target`; what stood there moves to `aside` (renaming onto a filled folder is an error)."""
    if target.exists():
        target.rename(aside)
    new.rename(target)
    shutil.rmtree(aside, ignore_errors=True)
