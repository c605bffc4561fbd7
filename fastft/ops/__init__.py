"""Ops: the maths, one file a family. Importing this package defines every ``fastft::`` op."""

from . import lora  # noqa: F401
