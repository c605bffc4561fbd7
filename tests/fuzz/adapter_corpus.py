"""Adapter folders that somebody damaged: good ones of every kind, and what is done to their files."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import load, save, save_file

import fastft
from fastft.checkpoint.files import CONFIG, WEIGHTS
from tests.methods.models import llama
from tests.serving import kinds

# What JSON can hold and nobody expects.
LONG = "a number of 5000 digits"
DEEP = "[" * 100_000 + "]" * 100_000
NUMBERS = st.one_of(st.integers(-3, 3), st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**30]), st.floats())
TEXTS = st.one_of(
    st.text(max_size=8), st.sampled_from(["\ud800", "\0", "(", "(a+)+$", "all-linear", "x" * 5000, "../..", LONG])
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)


@dataclass(frozen=True)
class Folder:
    """The contents of an adapter's two files."""

    config: bytes
    weights: bytes

    def _repr_pretty_(self, printer, cycle):
        """How hypothesis shows it: what was changed is seldom in the values."""
        length = min(int.from_bytes(self.weights[:8], "little") + 8, 3000)
        printer.text(f"{self.config[:3000]} {self.weights[:length]} of {len(self.weights)} bytes")

    @staticmethod
    def of(path: Path) -> "Folder":
        return Folder((path / CONFIG).read_bytes(), (path / WEIGHTS).read_bytes())

    def header(self) -> dict:
        length = int.from_bytes(self.weights[:8], "little")
        return json.loads(self.weights[8 : 8 + length])

    def with_header(self, header) -> "Folder":
        length = int.from_bytes(self.weights[:8], "little")
        text = header if isinstance(header, bytes) else written(header)
        return Folder(self.config, len(text).to_bytes(8, "little") + text + self.weights[8 + length :])

    def write(self, path: Path) -> Path:
        path.mkdir(exist_ok=True)
        (path / CONFIG).write_bytes(self.config)
        (path / WEIGHTS).write_bytes(self.weights)
        return path


def written(value) -> bytes:
    """As JSON, with NaN and infinities as Python writes them, and `LONG` as a number that Python refuses to read."""
    return json.dumps(value).replace(f'"{LONG}"', "1" + "0" * 5000).encode()


@fastft.testing.use("reference")
def _lora(path, **options):
    kinds.write(path, fastft.LoRA(r=2, **options), dtype=torch.float32)


def _shira(path):
    name, (n, k) = "model.layers.1.mlp.up_proj", (24, 16)
    generator, key = torch.Generator().manual_seed(5), f"base_model.model.{name}"
    flat = torch.randperm(n * k, generator=generator)[: n + k]
    tensors = {f"{key}.shira_weight": torch.randn(n + k, generator=generator)}
    tensors[f"{key}.shira_indices"] = torch.stack([flat // k, flat % k]).int()
    path.mkdir()
    save_file(tensors, path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps({"peft_type": "SHIRA", "r": 1, "target_modules": [name]}))


def good_folders(root: Path) -> dict[str, Folder]:
    """An adapter of every kind for `models.llama()`, by its kind."""
    named = kinds.methods(llama())
    write = {
        "lora": lambda path: kinds.write(path, named["patterns"]),
        "dora": lambda path: _lora(path, use_dora=True, target_modules=["q_proj", "down_proj"]),
        "copies": lambda path: _lora(path, target_modules=["v_proj"], bias="lora_only", modules_to_save=["norm"]),
        "s2ft": lambda path: kinds.write(path, named["columns"]),
        "spiel": lambda path: kinds.write(path, named["spiel"]),
        "lift": kinds.write_lift,
        "mask": lambda path: kinds.write(path, named["mask"], absolute=True, dtype=torch.float32),
        "sft": kinds.write_sft,
        "shira": _shira,
    }
    found = {}
    for kind, make in write.items():
        make(root / kind)
        found[kind] = Folder.of(root / kind)
        shutil.rmtree(root / kind)
    return found


# ---- what is done to files; each is a strategy's function (draw, folder) -> folder


def damaged_bytes(draw, folder):
    data = bytearray(folder.weights if (of_weights := draw(st.booleans())) else folder.config)
    what = draw(st.sampled_from(["cut", "flip", "insert", "length", "append", "nothing left"]))
    at = draw(st.integers(0, min(len(data), 4000) - 1))
    if what == "cut":
        del data[at:]
    elif what == "flip":
        data[at] ^= draw(st.integers(1, 255))
    elif what == "insert":
        data[at:at] = draw(st.binary(min_size=1, max_size=9))
    elif what == "length":
        data[:8] = draw(st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1, len(data) - 8])).to_bytes(8, "little")
    elif what == "append":
        data += draw(st.binary(min_size=1, max_size=9))
    else:
        data = bytearray(draw(st.binary(max_size=9)))
    return Folder(folder.config, bytes(data)) if of_weights else Folder(bytes(data), folder.weights)


def changed_somewhere(draw, value):
    """A dictionary of which a drawn place, at any depth, holds something else, is gone, or is new."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 2))):
        place = value
        while True:
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            key = draw(st.sampled_from([*keys, None]))
            if key is None or not isinstance(place[key], dict | list) or not place[key] or draw(st.booleans()):
                break
            place = place[key]
        if key is None:
            new = draw(VALUES)
            place.append(new) if isinstance(place, list) else place.update({draw(TEXTS): new})
        elif draw(st.integers(0, 3)) == 0:
            del place[key]
        else:
            place[key] = draw(VALUES)
    return value


def strange_config(draw, folder):
    config = changed_somewhere(draw, json.loads(folder.config))
    return Folder(written(config), folder.weights)


def lying_header(draw, folder):
    header = folder.header()
    if draw(st.integers(0, 4)) == 0:
        key = draw(st.sampled_from(sorted(k for k in header if k != "__metadata__")))
        begin, end = header[key]["data_offsets"]
        shift = draw(st.sampled_from([-4, -1, 1, 4, end - begin, 2**40, -(2**63)]))
        header[key]["data_offsets"] = [begin + shift, end + shift]
        return folder.with_header(header)
    return folder.with_header(changed_somewhere(draw, header))


def strange_tensors(draw, folder):
    tensors = load(folder.weights)
    name = draw(st.sampled_from(sorted(tensors)))
    one = tensors[name]
    what = draw(st.sampled_from(["value", "dtype", "shape", "gone", "new", "order"]))
    if what == "value" and one.numel():
        numbers = [float("nan"), float("inf"), 3e38, -1e-40] if one.is_floating_point() else [-1, 2**31 - 1, 0, 77, 255]
        at = draw(st.integers(0, one.numel() - 1))
        number = draw(st.sampled_from([n for n in numbers if one.is_floating_point() or fits(n, one.dtype)]))
        one.view(-1)[at] = number
    elif what == "dtype":
        dtypes = [torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.int8]
        tensors[name] = one.to(draw(st.sampled_from(dtypes)))
    elif what == "shape":
        tensors[name] = draw(st.sampled_from([one[None], one.flatten(), one[:0], one[:1], torch.cat([one, one])])).clone()
    elif what == "gone":
        del tensors[name]
    elif what == "new":
        tensors[draw(st.sampled_from(["", "x", name + ".x", name.replace(".0.", ".7."), "__metadata__x"]))] = one.clone()
    else:
        tensors[name] = one.flip(0).contiguous()
    return Folder(folder.config, save(tensors, {"format": "pt"}))


def fits(number, dtype):
    return dtype == torch.bool or torch.iinfo(dtype).min <= number <= torch.iinfo(dtype).max


DAMAGES = (damaged_bytes, strange_config, lying_header, strange_tensors)


@st.composite
def damaged(draw, good: dict[str, Folder], kind: str | None = None):
    """(kind, folder) of which one or two things were changed."""
    kind = draw(st.sampled_from(sorted(good))) if kind is None else kind
    folder = good[kind]
    damage = draw(st.sampled_from(DAMAGES))
    return kind, damage(draw, folder)


# ---- folders that hold something else than two files


def no_such_link(path):
    path.symlink_to(path.parent / "nothing")


def a_loop(path):
    path.symlink_to(path)


def a_folder(path):
    path.mkdir()


def a_pipe(path):
    os.mkfifo(path)


def a_device(path):
    path.symlink_to("/dev/zero")


def a_terminal(path):
    path.symlink_to("/dev/tty")


def huge(path):
    with open(path, "wb") as file:
        file.write((8).to_bytes(8, "little") + b"{}      ")
        file.truncate(1 << 40)  # a hole, which takes no disk


def deep(path):
    text = DEEP.encode()
    path.write_bytes(text if path.name == CONFIG else len(text).to_bytes(8, "little") + text)


ELSE = (no_such_link, a_loop, a_folder, a_pipe, a_device, a_terminal, huge, deep)
