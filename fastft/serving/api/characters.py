"""Where characters begin and end among tokens, of which some are parts of one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")  # a byte, in sentencepiece's vocabularies
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
# GPT-2's letters for bytes, in which byte-level vocabularies are written.
_LETTERS = {chr(byte): byte for byte in _VISIBLE} | {chr(256 + at): byte for at, byte in enumerate(_HIDDEN)}


def bytes_of(tokenizer: Any, decode: Callable[[list[int]], str], token: int) -> bytes:
    """What a token adds to a text: its decoded form alone does not tell half a character from U+FFFD itself."""
    text, name = decode([token]), tokenizer.convert_ids_to_tokens(token)
    if not text or not name:
        return b""
    if isinstance(name, bytes):
        return name
    if byte := _FALLBACK.fullmatch(name):
        return bytes.fromhex(byte[1])
    if _LETTERS.keys() >= set(name):
        data = bytes(map(_LETTERS.__getitem__, name))
        if data.decode(errors="replace") == text:
            return data
    return text.encode()


def continues(data: bytes) -> bool:
    """Whether it begins inside a character."""
    return data[:1] != b"" and data[0] & 0xC0 == 0x80


def unfinished(pieces: Sequence[bytes]) -> tuple[int, bool]:
    """How many tokens at the end hold a character that is not complete, and whether they hold nothing else."""
    size = _unfinished_bytes(b"".join(pieces[-8:]))
    count = 0
    while size > 0:
        count += 1
        size -= len(pieces[-count])
    return count, size == 0


def _unfinished_bytes(data: bytes) -> int:
    for size in range(1, min(3, len(data)) + 1):
        if not continues(data[-size:]):
            try:
                data[-size:].decode()
            except UnicodeDecodeError as error:
                return size if error.reason == "unexpected end of data" else 0
            return 0
    return 0
