"""Another class for a module that others hold already, and may hold the forward of."""

from types import MethodType

from torch import nn

# Where accelerate's hooks keep the forward that they wrapped, and where that is left when they are removed.
_KEPT = ("_old_forward", "forward")


def give_class(module: nn.Module, cls: type) -> None:
    """The class, and its forward in place of the old class's to those that hold that bound to the module."""
    before, module.__class__ = type(module).forward, cls
    for key in _KEPT:
        if is_bound(module.__dict__.get(key), before, module):
            module.__dict__[key] = MethodType(cls.forward, module)


def is_bound(method, function, module: nn.Module) -> bool:
    """Is it this function as a method of this module?"""
    return type(method) is MethodType and method.__func__ is function and method.__self__ is module
