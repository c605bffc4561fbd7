"""Load models and tokenizers for the commands, with messages a user can act on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import UserError


def check_model(model: str) -> str:
    """`model` as transformers takes it. Hub ids (owner/name) are left to transformers.

    Raises:
        UserError: a local folder that is missing or no checkpoint.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model {model}: no config.json in this folder, so it is no transformers checkpoint")
        return str(path)
    if path.exists():
        raise UserError(f"model {model} is a file; give the checkpoint's folder")
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or model.endswith("/"):
        raise UserError(f"model {model}: no such folder")
    return model


def load(auto_class: str, model: str, **options: Any) -> Any:
    """`transformers.<auto_class>.from_pretrained(model, **options)`.

    Raises:
        UserError: the checkpoint is missing or unreadable.
    """
    import transformers

    path = check_model(model)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of reading local files; downloads keep theirs
    from_pretrained: Callable = getattr(transformers, auto_class).from_pretrained
    try:
        return from_pretrained(path, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model {model}: {auto_class} cannot load it: {str(error).strip() or repr(error)}") from error
