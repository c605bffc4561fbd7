"""Modules whose class is swapped in place, so that whoever holds them (a model, an optimizer, FSDP, a hook) keeps them.

The swapped class has the name of the plain one (PEFT and transformers look at names), is a subclass of it, and adds one
entry to the instance, ``_fastft``. Copies and pickles keep the class.
"""

import functools

from torch import nn

from ..modules.class_swap import give_class, is_bound

RECORD = "_fastft"


class Swapped:
    """Mixed in front of the plain class. `plain`: that class."""

    plain: type

    def __reduce_ex__(self, protocol):
        # Pickle finds classes by name, and these are made at run time.
        return _empty, (type(self).mixin, self.plain), self.__dict__


@functools.cache
def swapped_class(mixin: type, plain: type) -> type:
    own = {"plain": plain, "mixin": mixin, "__module__": mixin.__module__, "__doc__": plain.__doc__}
    return type(plain.__name__, (mixin, plain), own)


def _empty(mixin: type, plain: type) -> nn.Module:
    cls = swapped_class(mixin, plain)
    return cls.__new__(cls)


def swap(module: nn.Module, mixin: type, record) -> None:
    """Put `mixin` in front of the module's class and `record` into its ``_fastft``."""
    module.__dict__[RECORD] = record  # first: another thread may be about to call it
    give_class(module, swapped_class(mixin, type(module)))


def unswap(module: nn.Module) -> None:
    """The class and the entries from before.

    Raises:
        RuntimeError: somebody swapped the class once more (`fully_shard` does).
    """
    cls = type(module)
    if "plain" not in cls.__dict__:
        raise RuntimeError(
            f"the class of this {cls.plain.__name__} was changed to {cls.__name__} after it was accelerated; undo that first"
        )
    give_class(module, cls.plain)
    del module.__dict__[RECORD]


def replaced(module: nn.Module) -> bool:
    """Does a call of the module not reach its class's forward, as far as can be seen? X-LoRA puts one of its own on the
    instance; accelerate's hooks do too, but call the module's in it."""
    own = module.__dict__
    if "forward" not in own:
        return False
    return not is_bound(own.get("_old_forward") if "_hf_hook" in own else own["forward"], type(module).forward, module)
