"""Reading and writing an adapter folder. Only safetensors and JSON are read, and all of it is checked first."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .atomic import locked, read, switch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPES += (torch.int64, torch.int32, torch.uint8, torch.bool)  # counters among a saved module's buffers
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
    with locked(folder, shared=True):
        for _ in range(_READS):  # where there are no locks, a writer may switch the files while we read
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
    path = folder / WEIGHTS
    try:
        data = read(folder, WEIGHTS)
    except FileNotFoundError as error:
        pickles = [p.name for p in folder.glob("adapter_model.*") if p.suffix in (".bin", ".pt", ".pth")]
        if not pickles:
            raise
        raise FileNotFoundError(
            f"{folder}: no {WEIGHTS}; {pickles[0]} is a pickle, which can run code when it is opened, and is not read: "
            "convert it with PEFT (load it there, then save_pretrained)"
        ) from error
    # From memory: safe_open opens the file twice, and a writer may switch it in between.
    try:
        tensors = {key: tensor for key, tensor in load(data).items() if not _DUPLICATE.search(key)}
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch lacks
        raise AdapterFileError(f"{path} is damaged ({len(data)} bytes): {error!r}") from error
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    _refuse(path, "missing", [key for key in expected if key not in shapes])
    _refuse(path, "not expected by this model and config", [key for key in shapes if key not in expected])
    wrong = [f"{key} {list(shapes[key])} (want {list(want)})" for key, want in expected.items() if shapes[key] != want]
    _refuse(path, "of the wrong shape", wrong)
    kinds = [f"{key} ({tensor.dtype})" for key, tensor in tensors.items() if tensor.dtype not in _DTYPES]
    _refuse(path, "of an unsupported dtype", kinds)
    _refuse(path, "not finite", [key for key, tensor in tensors.items() if not tensor.isfinite().all()])
    return tensors


def _refuse(path: Path, what: str, offenders: list[str]) -> None:
    if offenders:
        more = f" and {len(offenders) - 5} more" if len(offenders) > 5 else ""
        raise AdapterFileError(f"{path}: {len(offenders)} tensors are {what}: {', '.join(offenders[:5])}{more}")
