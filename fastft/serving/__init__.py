"""Serving one base model with many adapters in one batch."""

# Public names and where they live; loaded on first use: the engine needs transformers, what packs adapters does not.
_PUBLIC = {
    "Engine": "engine",
    "Request": "requests",
    "Completion": "requests",
    "UnknownAdapter": "requests",
    "QueueFull": "requests",
    "EngineStopped": "requests",
    "UnsupportedLibrary": "contract",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastft.serving' has no attribute {name!r}; public names: {', '.join(_PUBLIC)}")
    import importlib

    value = getattr(importlib.import_module(f"fastft.serving.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value
