"""Fine-tuning methods: one file each, over the protocol in `base`."""

from .base import AdapterFileError, Handle, Method, attach, handles, load
from .lora import LoRA

__all__ = ["AdapterFileError", "Handle", "LoRA", "Method", "attach", "handles", "load"]
