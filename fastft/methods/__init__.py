"""Fine-tuning methods: one file each, over the protocol in `base`."""

from .base import AdapterFileError, Handle, Method, attach, handles, load
from .fusing import fuse
from .lora import LoRA
from .s2ft import S2FT

__all__ = ["S2FT", "AdapterFileError", "Handle", "LoRA", "Method", "attach", "fuse", "handles", "load"]
