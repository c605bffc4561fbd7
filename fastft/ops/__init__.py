"""Ops: the maths, one file a family. Importing this package defines every ``fastft::`` op."""

from . import dora, grouped, lora, partial, selection, sparse  # noqa: F401
