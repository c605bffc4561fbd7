"""Triton's interpreter in two thirds of its time: what it does anew in each call of a device function, done once.

Around every call, also of a kernel's own helpers, it lists the members of triton.language (a third of the time) to replace
its builtins, and builds the table of NumPy's dtypes for each of many conversions. What it computes stays as it is.
"""

import inspect

import triton.language as tl
from triton.runtime import interpreter

_get_np_dtype = getattr(interpreter, "_get_np_dtype", None)
_builtins: dict[object, list[tuple[str, object]]] = {}
_np_dtypes: dict[str, object] = {}


def _patch_builtin(package, builder, scope):
    if package not in _builtins:
        _builtins[package] = [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
    for name, member in _builtins[package]:
        if getattr(package, name) is member:  # else the call around this one has replaced it
            interpreter._patch_attr(package, name, member, builder, scope)


def _known_np_dtype(dtype):
    scalar = dtype.scalar  # a block's elements'
    if scalar.name not in _np_dtypes:
        _np_dtypes[scalar.name] = _get_np_dtype(scalar)
    return _np_dtypes[scalar.name]


def hasten():
    """Nothing, where a newer Triton has no such functions."""
    if hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_patch_attr"):
        interpreter._patch_builtin = _patch_builtin
    if _get_np_dtype is not None:
        interpreter._get_np_dtype = _known_np_dtype
