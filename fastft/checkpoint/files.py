"""Reading and writing an adapter folder. Only safetensors and JSON are read, and all of it is checked first."""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..listing import listed
from .atomic import locked, opened, switch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# As safetensors names them. Integers: counters among a saved module's buffers, indices.
_DTYPES = {
    **{"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64},
    **{"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool},
}
_READS = 3
_LONGEST_MESSAGE = 2000  # characters
_LARGEST_CONFIG, _LARGEST_HEADER = 64 << 20, 100_000_000  # bytes; the header's bound is safetensors' own
# A copy of a bias that PEFT also writes with bias="all" and modules_to_save; it reads neither of them.
_DUPLICATE = re.compile(r"\.(original_module|modules_to_save)\.(.*\.)?bias$")

_COMPARED = 1 << 24  # numbers of a base weight that are read at a time
_BASE = ".base_layer."


class Shapes(dict[str, tuple[int, ...]]):
    """The names and shapes of the tensors that a file must hold.

    Attributes:
        base: tensors of the base model that it may hold too, if they are equal, by name: PEFT writes those of an output
            head that has an adapter. They are compared, and not handed on.
    """

    def __init__(self, shapes=(), base: dict[str, torch.Tensor] | None = None):
        super().__init__(shapes)
        self.base = base or {}


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
    ordered = dict(sorted(config.items()))  # not the keys inside: of several patterns the first that matches counts
    contents = {
        WEIGHTS: save(tensors, {"format": "pt"}),
        CONFIG: (json.dumps(ordered, indent=2) + "\n").encode(),
    }
    switch(Path(directory), contents, marker=CONFIG)


def read_adapter(
    directory, expected: Callable[[dict[str, Any]], dict[str, tuple[int, ...]]], max_bytes: int | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder, on the CPU. Names, shapes and dtypes are checked before any of them is read.

    Args:
        expected: given the config, the exact names and shapes of the tensors that must be there; or `Shapes`.
        max_bytes: refuse larger files.

    Raises:
        FileNotFoundError: the folder or a file is missing. AdapterFileError: anything else that is wrong.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"no adapter folder {str(folder)!r}")
    try:
        with locked(folder, shared=True):
            return _read(folder, expected, max_bytes)
    except TimeoutError as late:
        raise AdapterFileError(
            f"{folder} is being written, it seems: {late}; load it when that process has finished, or end it"
        ) from late


def _read(folder: Path, expected, max_bytes: int | None) -> dict[str, torch.Tensor]:
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


def _read_weights(folder: Path, expected: dict[str, tuple[int, ...]], max_bytes: int | None) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS
    base = {key: own for key, own in getattr(expected, "base", {}).items() if key not in expected}
    # One opening for header and tensors: a writer may switch the file in between.
    with _opened_weights(folder) as file:
        size = os.fstat(file.fileno()).st_size
        if max_bytes is not None and size > max_bytes:
            raise AdapterFileError(f"{path} has {size:,} bytes; at most {max_bytes:,} are read")
        try:
            raw = _header(file, size)
            header = json.loads(raw)
            header.pop("__metadata__", None)
            start = 8 + len(raw)
            _check_places(header, size - start)
            _check_header(path, header, expected, {key: tuple(own.shape) for key, own in base.items()})
            # Only what is wanted: what else a file may hold can be of any size.
            tensors = {key: _tensor(file, start, header[key]) for key in sorted(expected, key=lambda k: _begin(header[k]))}
            other = [key for key in base if key in header and not _equal(file, start, header[key], base[key])]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, AdapterFileError):
                raise
            raise AdapterFileError(
                f"{path} is damaged ({size} bytes), its header is no list of its tensors: {error}; write it again"
            ) from error
    _refuse(path, "not finite", [key for key, tensor in tensors.items() if not _finite(tensor)])
    _refuse(path, "of a base model with other values", other, "; load the adapter on the model that it was trained on")
    return tensors


def _opened_weights(folder: Path):
    try:
        return _opened(folder, WEIGHTS)
    except FileNotFoundError as error:
        pickles = [p.name for p in folder.glob("adapter_model.*") if p.suffix in (".bin", ".pt", ".pth")]
        if not pickles:
            raise
        raise FileNotFoundError(
            f"{folder}: no {WEIGHTS}; {pickles[0]} is a pickle, which can run code when it is opened, and is not read: "
            "convert it with PEFT (load it there, then save_pretrained)"
        ) from error


def _begin(one: dict[str, Any]) -> int:
    return one["data_offsets"][0]


def _tensor(file, start: int, one: dict[str, Any]) -> torch.Tensor:
    return _numbers(file, start + _begin(one), _DTYPES[one["dtype"]], math.prod(one["shape"])).view(one["shape"])


def _numbers(file, at: int, dtype: torch.dtype, count: int) -> torch.Tensor:
    buffer = bytearray(count * dtype.itemsize)
    file.seek(at)
    if file.readinto(buffer) != len(buffer):
        raise ValueError("the file ends before its tensors do")
    return torch.frombuffer(buffer, dtype=dtype) if count else torch.empty(0, dtype=dtype)


def _equal(file, start: int, one: dict[str, Any], own: torch.Tensor) -> bool:
    """Whether a tensor of the file is the base model's, as far as the narrower of their dtypes tells."""
    dtype, at = _DTYPES[one["dtype"]], start + _begin(one)
    narrow = dtype if dtype.itemsize < own.dtype.itemsize else own.dtype
    for part in own.reshape(-1).split(_COMPARED):
        given = _numbers(file, at, dtype, part.numel())
        at += part.numel() * dtype.itemsize
        if not torch.equal(given.to(part.device, narrow), part.to(narrow)):
            return False
    return True


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


def _check_places(header: dict[str, Any], room: int) -> None:
    """Raises ValueError unless the tensors lie one after the other and fill the file: then it is as large as they are."""
    end = 0
    for begin, after in sorted((one["data_offsets"] for one in header.values()), key=tuple):
        if type(begin) is not int or type(after) is not int or begin != end or after < begin:
            raise ValueError(f"a tensor from {begin} to {after}, after one that ends at {end}")
        end = after
    if end != room:
        raise ValueError(f"tensors of {end} bytes in {room}")


def _check_header(path: Path, header: dict[str, Any], expected: dict[str, tuple[int, ...]], base: dict) -> None:
    found = {key: one for key, one in header.items() if key in expected or not _DUPLICATE.search(key)}
    shapes = {key: tuple(one["shape"]) for key, one in found.items()}
    _refuse(path, "missing", [key for key in expected if key not in shapes])
    extra = [key for key in shapes if key not in expected and key not in base]
    advice = "; save with save_pretrained(..., save_embedding_layers=False)" if any(_BASE in key for key in extra) else ""
    _refuse(path, "not expected by this model and config", extra, advice)
    wanted = {**expected, **{key: shape for key, shape in base.items() if key in shapes}}
    wrong = [f"{key} {list(shapes[key])} (want {list(want)})" for key, want in wanted.items() if shapes[key] != want]
    _refuse(path, "of the wrong shape", wrong)
    _refuse(
        path, "of an unsupported dtype", [f"{k} ({one['dtype']})" for k, one in found.items() if one["dtype"] not in _DTYPES]
    )
    for key, one in found.items():
        begin, end = one["data_offsets"]
        if end - begin != math.prod(shapes[key]) * _DTYPES[one["dtype"]].itemsize:
            raise ValueError(f"{key} has {end - begin} bytes")


def _refuse(path: Path, what: str, offenders: list[str], advice: str = "") -> None:
    if offenders:
        raise AdapterFileError(f"{path}: {len(offenders)} tensors are {what}: {listed(offenders, 5)}{advice}")
