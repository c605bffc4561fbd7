"""Adapter folders: adapter_config.json + adapter_model.safetensors, as PEFT writes and reads them."""

from .files import AdapterFileError, read_adapter, write_adapter

__all__ = ["AdapterFileError", "read_adapter", "write_adapter"]
