"""Fine-tuning methods: one file each, over the protocol in `base`."""

from .base import AdapterFileError, Handle, Method, attach, handles, load
from .fusing import fuse
from .lift import LIFT
from .lora import LoRA
from .s2ft import S2FT
from .sparse import SparseMask
from .sparse_foreign import SftFile, ShiraFile
from .spiel import SpIEL

__all__ = ["LIFT", "S2FT", "AdapterFileError", "Handle", "LoRA", "Method", "SftFile", "ShiraFile", "SpIEL", "SparseMask"]
__all__ += ["attach", "fuse", "handles", "load"]
