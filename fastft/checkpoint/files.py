"""Reading and writing an adapter folder. Only safetensors and JSON are read, and all of it is checked first."""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .atomic import locked, opened, switch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# As safetensors names them, and the bytes of one element. Integers: counters among a saved module's buffers, indices.
_DTYPES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
_READS = 3
_LONGEST_MESSAGE = 2000  # characters
_LARGEST_CONFIG, _LARGEST_HEADER = 64 << 20, 100_000_000  # bytes; the header's bound is safetensors' own
# A copy of a bias that PEFT also writes with bias="all" and modules_to_save; it reads neither of them.
_DUPLICATE = re.compile(r"\.(original_module|modules_to_save)\.(.*\.)?bias$")

Shapes = dict[str, tuple[int, ...]]


class AdapterFileError(ValueError):
    """An adapter's files are damaged, incomplete, or don't fit the model. What it quotes of them is cut and printable."""

    def __init__(self, message: str):
        if len(message) > _LONGEST_MESSAGE:
            half = _LONGEST_MESSAGE // 2
            message = f"{message[:half]} … {message[-half:]}"
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))


def write_adapter(directory, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write both files so that a reader finds the old pair or the new one, even if this process is killed."""
    tensors = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
    contents = {
        WEIGHTS: save(tensors, {"format": "pt"}),
        CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }
    switch(Path(directory), contents, marker=CONFIG)


def read_adapter(
    directory, expected: Callable[[dict[str, Any]], Shapes], max_bytes: int | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder, on the CPU. Names, shapes and dtypes are checked before any of them is read.

    Args:
        expected: given the config, the exact names and shapes of the tensors that must be there.
        max_bytes: refuse larger files.

    Raises:
        FileNotFoundError: the folder or a file is missing. AdapterFileError: anything else that is wrong.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"no adapter folder {str(folder)!r}")
    with locked(folder, shared=True):
        for _ in range(_READS):  # where there are no locks, a writer may switch the files while we read
            raw = _read_config(folder)
            try:
                tensors, error = _read_weights(folder, expected(_parse(folder, raw)), max_bytes), None
            except (FileNotFoundError, AdapterFileError) as caught:
                error = caught
            if _read_config(folder) == raw and not isinstance(error, FileNotFoundError):
                break
    if error:
        raise error
    return tensors


def _opened(folder: Path, name: str):
    try:
        return opened(folder, name)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise AdapterFileError(f"{folder / name} can't be read: {error.strerror}") from error


def _read_config(folder: Path) -> bytes:
    with _opened(folder, CONFIG) as file:
        raw = file.read(_LARGEST_CONFIG + 1)
    if len(raw) > _LARGEST_CONFIG:
        raise AdapterFileError(f"{folder / CONFIG} has more than {_LARGEST_CONFIG:,} bytes")
    return raw


def _parse(folder: Path, raw: bytes) -> dict[str, Any]:
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{folder / CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterFileError(f"{folder / CONFIG} holds a {type(config).__name__}, not an object")
    return config


def _read_weights(folder: Path, expected: Shapes, max_bytes: int | None) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS
    try:
        file = _opened(folder, WEIGHTS)
    except FileNotFoundError as error:
        pickles = [p.name for p in folder.glob("adapter_model.*") if p.suffix in (".bin", ".pt", ".pth")]
        if not pickles:
            raise
        raise FileNotFoundError(
            f"{folder}: no {WEIGHTS}; {pickles[0]} is a pickle, which can run code when it is opened, and is not read: "
            "convert it with PEFT (load it there, then save_pretrained)"
        ) from error
    with file:
        size = os.fstat(file.fileno()).st_size
        if max_bytes is not None and size > max_bytes:
            raise AdapterFileError(f"{path} has {size:,} bytes; at most {max_bytes:,} are read")
        try:
            _check_header(path, json.loads(_header(file, size)), expected)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, AdapterFileError):
                raise
            raise AdapterFileError(f"{path} is damaged ({size} bytes): its header is no list of tensors") from error
        # From memory: safe_open opens the file once more, and a writer may switch it in between.
        file.seek(0)
        data = file.read()
    try:
        tensors = {key: tensor for key, tensor in load(data).items() if not _DUPLICATE.search(key)}
    except SafetensorError as error:
        raise AdapterFileError(f"{path} is damaged ({size} bytes): {error!r}") from error
    _refuse(path, "not finite", [key for key, tensor in tensors.items() if not _finite(tensor)])
    return tensors


def _finite(tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(
        math.isfinite(end) for end in torch.stack(tensor.aminmax()).tolist()
    )  # NaN is both; a tenth of isfinite's time


def _header(file, size: int) -> bytes:
    """The JSON at the start of a safetensors file. Raises ValueError if there is none."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(size - 8, _LARGEST_HEADER):
        raise ValueError(f"a header of {length} bytes")
    return file.read(length)


def _check_header(path: Path, header: dict[str, Any], expected: Shapes) -> None:
    found = {key: one for key, one in header.items() if key != "__metadata__" and not _DUPLICATE.search(key)}
    shapes = {key: tuple(one["shape"]) for key, one in found.items()}
    _refuse(path, "missing", [key for key in expected if key not in shapes])
    _refuse(path, "not expected by this model and config", [key for key in shapes if key not in expected])
    wrong = [f"{key} {list(shapes[key])} (want {list(want)})" for key, want in expected.items() if shapes[key] != want]
    _refuse(path, "of the wrong shape", wrong)
    _refuse(
        path, "of an unsupported dtype", [f"{k} ({one['dtype']})" for k, one in found.items() if one["dtype"] not in _DTYPES]
    )
    for key, one in found.items():
        begin, end = one["data_offsets"]
        if end - begin != math.prod(shapes[key]) * _DTYPES[one["dtype"]]:
            raise ValueError(f"{key} has {end - begin} bytes")


def _refuse(path: Path, what: str, offenders: list[str]) -> None:
    if offenders:
        more = f" and {len(offenders) - 5} more" if len(offenders) > 5 else ""
        raise AdapterFileError(f"{path}: {len(offenders)} tensors are {what}: {', '.join(offenders[:5])}{more}")
