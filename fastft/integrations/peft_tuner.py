"""PEFT's tuners (`LoraModel`, `ShiraModel`, ...) under acceleration: they accelerate what is added later, and LoRA's routes
mixed batches."""

import functools
import weakref
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..modules.groups import drop_waiting
from .peft_bank import Bank
from .peft_layers import FastLinear, accelerate_layers
from .peft_mixed import Index, Routed, using
from .peft_sparse import accelerate_sparse_layers
from .peft_watch import tell_of_unseen_writes
from .swapping import Swapped, replaced, swap

# Not in the modules: a copy of a model lays its adapters out anew.
_banks: "weakref.WeakKeyDictionary[nn.Module, Bank]" = weakref.WeakKeyDictionary()


@dataclass
class TunerRecord:
    """How layers that are added later are to be accelerated."""

    strict: bool
    share: bool


class FastTuner(Swapped):
    """Mixed into the class of any PEFT tuner whose layers were accelerated."""

    def inject_adapter(self, *args, **kwargs):
        result = super().inject_adapter(*args, **kwargs)
        accelerate_layers(self.model, self._fastft.strict, self._fastft.share)
        accelerate_sparse_layers(self.model, self._fastft.strict)
        return result


class FastLoraModel(FastTuner):
    """Mixed into `LoraModel`."""

    def delete_adapter(self, *args, **kwargs):
        super().delete_adapter(*args, **kwargs)
        forget_banks(self)  # or the adapter would live on there until another one changes

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        """Around every forward, as PEFT calls it."""
        try:
            with self._named(*args, **kwargs):
                yield
        finally:
            if not torch.compiler.is_compiling():
                drop_waiting()  # whatever comes next with the same tensor is another forward

    @contextmanager
    def _named(self, *args, **kwargs):
        names, beams = kwargs.get("adapter_names"), kwargs.get("num_beams")
        beams = beams if isinstance(beams, int) else 1
        adapted = [] if names is None else _adapted(self)
        if (
            names is None
            or kwargs.get("alora_offsets") is not None
            or self._will_refuse(adapted, names, beams)
            or any(map(replaced, adapted))  # whoever replaced a forward gets the names as PEFT hands them over
        ):
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
            return
        with using(self._table(adapted, names, beams)):
            yield

    def _will_refuse(self, adapted, names, beams: int) -> bool:
        """Is this a call that PEFT refuses, in words of its own?"""
        if self.training or (beams > 1 and not isinstance(names, list | tuple)):
            return True
        unknown = set(names) - {"__base__"}
        for layer in adapted:
            if not unknown:  # as a rule after the first layer
                break
            if _kind(type(layer)) is _LORA:
                unknown -= layer.lora_A.keys() | layer.lora_embedding_A.keys()
        return bool(unknown)

    def _table(self, adapted, names, beams: int) -> dict[nn.Module, Index]:
        """Every adapted module's names. Makes those that PEFT computes read them."""
        for module in adapted:
            if not isinstance(module, Swapped):
                swap(module, Routed, None)
        follow_unseen_writes()  # again: this may be a copy that another process accelerated
        bank = _banks.setdefault(self, Bank())
        fast = [module for module in adapted if isinstance(module, FastLinear)]

        def prepare(named):
            return bank.prepare(fast, named)

        # Beam search repeats the samples, but not those of an encoder.
        index = Index((name for name in names for _ in range(beams)), prepare)
        table = dict.fromkeys(adapted, index)
        if beams > 1 and hasattr(self.model, "get_encoder"):
            encoder = self.model.get_encoder()
            if encoder is not None and encoder is not self.model:
                own = Index(names, prepare)
                table.update((module, own) for module in encoder.modules() if module in table)
        return table


def tuner_kinds() -> dict[type, type]:
    """PEFT's class -> what is mixed into it. Super-Tuning came with PEFT 0.21."""
    from peft.tuners.lora.model import LoraModel
    from peft.tuners.mixed.model import MixedModel
    from peft.tuners.shira.model import ShiraModel

    kinds: dict[type, type] = {LoraModel: FastLoraModel, MixedModel: FastTuner, ShiraModel: FastTuner}
    try:
        from peft.tuners.supertuning.model import SupertuningModel
    except ImportError:
        return kinds
    return {**kinds, SupertuningModel: FastTuner}


def _adapted(tuner) -> list[nn.Module]:
    """All modules of the tuner that read adapters' names.

    Not by `modules()`, which would visit every adapter of every layer: with 32 of them 7 ms a call of a model of 8 layers.
    """
    found, stack = {}, [tuner]
    while stack:
        module = stack.pop()
        children, kind = module._modules, _kind(type(module))
        if kind is not None:
            found[module] = None
        if kind is _LORA:
            base = children.get("base_layer")
            if base is not None and base._modules:
                stack.append(base)
        elif children:
            stack += [child for child in children.values() if child is not None]
    return list(found)


_LORA, _WRAPPER = "lora", "wrapper"


@functools.cache
def _kind(cls: type) -> str | None:
    """Which of the modules that read adapters' names these are. Kept by class: PEFT's have abstract bases, and asking them
    for every module of a model took a third of a millisecond a call."""
    from peft.tuners.lora.layer import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return _LORA if issubclass(cls, LoraLayer) else _WRAPPER if issubclass(cls, AuxiliaryTrainingWrapper) else None


def forget_banks(tuner) -> None:
    """Free what mixed batches laid out."""
    _banks.pop(tuner, None)


@functools.cache
def follow_unseen_writes() -> None:
    """PEFT writes to factors through ``.data``, which no version counts: tell those who have to know.

    Hot-swapping: of each write before it is made, by the function that sets a module's scale then, so that it makes no
    difference who imported the hot-swapping itself, and when; and once more when all are made, for what another thread did
    in between. Arrow: its first forward subtracts the general knowledge from the adapters that it routes to, and so does the
    next one after others were added; it asks at every forward whether there is something to do.
    """
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer
    from peft.utils import hotswap

    def telling(original):
        @functools.wraps(original)
        def told(*args, **kwargs):
            try:
                return original(*args, **kwargs)
            finally:
                tell_of_unseen_writes()

        return told

    for name in ("_update_scaling", "hotswap_adapter_from_state_dict"):
        setattr(hotswap, name, telling(getattr(hotswap, name)))

    plain = ArrowLoraLinearLayer.gen_know_sub
    subtracting = telling(plain)

    @functools.wraps(plain)
    def gen_know_sub(self, *args, **kwargs):
        idle = not self.use_gks or (self.gks_done and not self.gks_added_adapter_names)
        return (plain if idle else subtracting)(self, *args, **kwargs)

    ArrowLoraLinearLayer.gen_know_sub = gen_know_sub
