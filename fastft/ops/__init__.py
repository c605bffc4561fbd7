"""Ops: the maths, one file a family. Importing this package defines every ``fastft::`` op."""

from . import dora, lora, partial  # noqa: F401
