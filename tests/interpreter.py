"""Triton's interpreter in half of its time and less: what it does anew in each call or for each value, done once.

Around every call, also of a kernel's own helpers, it lists the members of triton.language to replace its builtins, also
where a call around has replaced them, and builds the table of NumPy's dtypes for each of many conversions. Each value's
shape is checked and wrapped. Sums of integers are formed once more in 64 bits, for an assertion that only its debug mode
makes. What it computes stays as it is.
"""

import dataclasses
import inspect

import triton.language as tl
from triton.runtime import interpreter

_patch_lang = getattr(interpreter, "_patch_lang", None)
_get_np_dtype = getattr(interpreter, "_get_np_dtype", None)
_builtins: dict[object, list[tuple[str, object]]] = {}
_np_dtypes: dict[str, object] = {}
_languages: dict[object, list] = {}


def _patch_builtin(package, builder, scope):
    if package not in _builtins:
        _builtins[package] = [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
    for name, member in _builtins[package]:
        if getattr(package, name) is member:  # else the call around this one has replaced it
            interpreter._patch_attr(package, name, member, builder, scope)


def _patch_lang_once(function):
    if function not in _languages:
        _languages[function] = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    languages = _languages[function]
    if languages and all(language.static_print is print for language in languages):  # what `_patch_lang` makes of it
        return interpreter._LangPatchScope()
    return _patch_lang(function)


def _known_np_dtype(dtype):
    scalar = dtype.scalar  # a block's elements'
    if scalar.name not in _np_dtypes:
        _np_dtypes[scalar.name] = _get_np_dtype(scalar)
    return _np_dtypes[scalar.name]


_block_types: dict[tuple, dict] = {}
_init_block_type = tl.block_type.__init__


def _known_block_type(self, element_ty, shape):
    key = element_ty.name, *[size.value if isinstance(size, tl.constexpr) else size for size in shape]
    if key not in _block_types:
        _init_block_type(self, element_ty, shape)
        self.of_tensors = tl.constexpr(self.numel), tl.core.tuple([tl.constexpr(size) for size in self.shape])
        _block_types[key] = vars(self)
    self.__dict__ = _block_types[key]


_of_scalars = tl.constexpr(1), tl.core.tuple([])


def _init_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = type.of_tensors if type.is_block() else _of_scalars


def hasten():
    """Nothing, where a newer Triton has no such functions."""
    options = getattr(interpreter.interpreter_builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    tl.block_type.__init__ = _known_block_type
    tl.tensor.__init__ = _init_tensor
    if all(hasattr(interpreter, name) for name in ("_patch_builtin", "_patch_attr", "_patch_lang", "_LangPatchScope")):
        interpreter._patch_builtin = _patch_builtin
        interpreter._patch_lang = _patch_lang_once
    if _get_np_dtype is not None:
        interpreter._get_np_dtype = _known_np_dtype
