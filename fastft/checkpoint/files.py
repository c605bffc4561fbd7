"""Reading and writing an adapter folder. Only safetensors and JSON are read, and all of it is checked first."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .atomic import current, read, switch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_DTYPES = {"F64", "F32", "F16", "BF16"}
_INTEGERS = {"I64", "I32", "I16", "I8", "U8", "BOOL"}  # counters among a saved module's buffers
_READS = 3
# A copy of a bias that PEFT also writes with bias="all" and modules_to_save; it reads neither of them.
_DUPLICATE = re.compile(r"\.(original_module|modules_to_save)\.(.*\.)?bias$")

Shapes = dict[str, tuple[int, ...]]


class AdapterFileError(ValueError):
    """An adapter's files are damaged, incomplete, or don't fit the model."""


def write_adapter(directory, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write both files so that a reader finds the old pair or the new one, even if this process is killed."""
    tensors = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
    contents = {
        WEIGHTS: save(tensors, {"format": "pt"}),
        CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }
    switch(Path(directory), contents, marker=CONFIG)


def read_adapter(directory, expected: Callable[[dict[str, Any]], Shapes]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder, on the CPU.

    Args:
        expected: given the config, the exact names and shapes of the tensors that must be there.

    Raises:
        FileNotFoundError: the folder or a file is missing. AdapterFileError: anything else that is wrong.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"no adapter folder {str(folder)!r}")
    for _ in range(_READS):  # a writer may switch the files while we read
        raw = read(folder, CONFIG)
        try:
            tensors, error = _read_weights(folder, expected(_parse(folder, raw))), None
        except (FileNotFoundError, AdapterFileError) as caught:
            error = caught
        if read(folder, CONFIG) == raw and not isinstance(error, FileNotFoundError):
            break
    if error:
        raise error
    return tensors


def _parse(folder: Path, raw: bytes) -> dict[str, Any]:
    try:
        config = json.loads(raw)
    except ValueError as error:
        raise AdapterFileError(f"{folder / CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterFileError(f"{folder / CONFIG} holds a {type(config).__name__}, not an object")
    return config


def _read_weights(folder: Path, expected: Shapes) -> dict[str, torch.Tensor]:
    path = current(folder, WEIGHTS)
    if not path.is_file():
        pickles = [p.name for p in folder.glob("adapter_model.*") if p.suffix in (".bin", ".pt", ".pth")]
        hint = (
            f"; {pickles[0]} is a pickle, which can run code when it is opened, and is not read: convert it with PEFT "
            "(load it there, then save_pretrained)"
            if pickles
            else ""
        )
        raise FileNotFoundError(f"{folder}: no {WEIGHTS}{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if not _DUPLICATE.search(key)]  # noqa: SIM118 (not a dict)
            slices = {key: file.get_slice(key) for key in keys}
            _check(path, {k: (tuple(s.get_shape()), s.get_dtype()) for k, s in slices.items()}, expected)
            tensors = {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise AdapterFileError(f"{path} is damaged ({path.stat().st_size} bytes): {error}") from error
    _refuse(
        path,
        "not finite",
        [k for k, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()],
    )
    return tensors


def _check(path: Path, found: dict[str, tuple[tuple[int, ...], str]], expected: Shapes) -> None:
    _refuse(path, "missing", [key for key in expected if key not in found])
    _refuse(path, "not expected by this model and config", [key for key in found if key not in expected])
    wrong = [f"{key} {list(found[key][0])} (want {list(s)})" for key, s in expected.items() if found[key][0] != s]
    _refuse(path, "of the wrong shape", wrong)
    kinds = [f"{key} ({dtype})" for key, (_, dtype) in found.items() if dtype not in _DTYPES | _INTEGERS]
    _refuse(path, "of an unsupported dtype", kinds)


def _refuse(path: Path, what: str, offenders: list[str]) -> None:
    if offenders:
        more = f" and {len(offenders) - 5} more" if len(offenders) > 5 else ""
        raise AdapterFileError(f"{path}: {len(offenders)} tensors are {what}: {', '.join(offenders[:5])}{more}")
