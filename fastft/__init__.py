"""fastft: fused kernels for fine-tuning and serving language models under a thin PyTorch module layer."""

__version__ = "0.1.0"

# Public names and where they live; loaded on first use, so that `import fastft` stays light.
_PUBLIC = {
    "LoRALinear": "fastft.modules.lora",
    "LoRA": "fastft.methods.lora",
    "S2FT": "fastft.methods.s2ft",
    "SpIEL": "fastft.methods.spiel",
    "LIFT": "fastft.methods.lift",
    "SparseMask": "fastft.methods.sparse",
    "SparseDeltaLinear": "fastft.modules.sparse_delta_linear",
    "SliceAdamW": "fastft.optim.slice_adamw",
    "SparseAdamW": "fastft.optim.sparse",
    "SparseSM3": "fastft.optim.sparse",
    "attach": "fastft.methods.base",
    "load": "fastft.methods.base",
    "fuse": "fastft.methods.fusing",
    "accelerate": "fastft.integrations.peft",
    "restore": "fastft.integrations.peft",
    "report": "fastft.integrations.peft_report",
    "testing": None,
    "ops": None,
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastft' has no attribute {name!r}; public names: {', '.join(_PUBLIC)}")
    import importlib

    where = _PUBLIC[name]
    value = importlib.import_module(f"fastft.{name}") if where is None else getattr(importlib.import_module(where), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_PUBLIC})
