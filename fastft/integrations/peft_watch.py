"""Are the LoRA factors of a PEFT model still what the copies of `peft_bank` were made of?

Asked before each mixed batch of every adapter that it names, in every layer: of 3,600 tensors for 32 adapters in 8 decoder
layers, which no cache holds any more. So builtins compare whole lists of them, at a microsecond a tensor half of what a loop
takes. Most of it is waiting for memory: the same comparison in C++, which asked for it ahead, took as long.

Versions tell of most writes. Of those that no version counts we hear of optimizers' steps (the fused ones of PyTorch, which
transformers takes by default, and bitsandbytes'), of PEFT's hot-swapping and of what Arrow's routers subtract from adapters:
after each, everything counts as changed.
"""

from itertools import repeat
from operator import attrgetter, is_, itemgetter

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_version, _place, _get, _modules = attrgetter("_version"), torch.Tensor.data_ptr, dict.get, attrgetter("_modules")
_dropping = itemgetter("training", "p")  # of a dropout's dictionary

_unseen_writes = 0  # as often as tensors may have been written to behind their versions


def tell_of_unseen_writes(*_) -> None:
    global _unseen_writes
    _unseen_writes += 1


register_optimizer_step_post_hook(tell_of_unseen_writes)


class Layers:
    """Layers, and where PEFT keeps their adapters: dictionaries from an adapter's name."""

    def __init__(self, layers):
        self.layers = list(layers)
        self._modules = [layer._modules for layer in self.layers]
        self._a, self._b = [m["lora_A"] for m in self._modules], [m["lora_B"] for m in self._modules]
        self.a, self.b = [m._modules for m in self._a], [m._modules for m in self._b]
        self.scaling = [layer.scaling for layer in self.layers]
        self.dropout = [m["lora_dropout"]._modules for m in self._modules]

    def are(self, layers) -> bool:
        """Are these the same, their adapters in the same place?"""
        return (
            self.layers == layers
            and all(map(is_, map(_get, self._modules, repeat("lora_A")), self._a))
            and all(map(is_, map(_get, self._modules, repeat("lora_B")), self._b))
            and all(map(is_, map(_modules, self._a), self.a))
            and all(map(is_, map(_modules, self._b), self.b))
            and all(map(is_, (layer.__dict__["scaling"] for layer in layers), self.scaling))
        )


class Factors:
    """One adapter's A and B in all layers as they are now; of a layer without it, nothing."""

    def __init__(self, layers: Layers, name: str):
        self._name, self._in, self._unseen_writes = name, layers, _unseen_writes  # first: writes may come meanwhile
        self._a, self._b = _Side(layers.a, name), _Side(layers.b, name)
        self._scales = list(map(_get, layers.scaling, repeat(name)))
        dropouts = enumerate(map(_get, layers.dropout, repeat(name)))
        # Each has a switch of its own: what `add_adapter` makes is on in a model that was put to evaluation before.
        self._dropouts = {i: module.__dict__ for i, module in dropouts if type(module) is nn.Dropout}
        self._dropping = list(map(_dropping, self._dropouts.values()))

    def unchanged(self) -> bool:
        """Are modules, parameters (identity, version, address), scales and the switches of dropout still the same?"""
        layers, name = self._in, self._name
        return (
            self._unseen_writes == _unseen_writes
            and self._a.unchanged(layers.a, name)
            and self._b.unchanged(layers.b, name)
            and list(map(_get, layers.scaling, repeat(name))) == self._scales
            and list(map(_dropping, self._dropouts.values())) == self._dropping
        )

    def changed_in(self, before: "Factors") -> set[int]:
        """The positions of the layers in which this is not what it was `before`."""
        if self._unseen_writes != before._unseen_writes:
            return set(range(len(self._scales)))
        scales = zip(self._scales, before._scales, strict=True)
        rescaled = {i for i, (now, then) in enumerate(scales) if now is not then and now != then}
        now, then = (dict(zip(own._dropouts, own._dropping, strict=True)) for own in (self, before))
        switched = {i for i in now | then if now.get(i) != then.get(i)}
        return rescaled | switched | self._a.changed_in(before._a) | self._b.changed_in(before._b)


class _Side:
    """All layers' A, or all B."""

    def __init__(self, lists, name):
        self.modules = list(map(_get, lists, repeat(name)))
        there = [i for i, module in enumerate(self.modules) if module is not None]
        self.parameters = [self.modules[i]._parameters for i in there]
        weights = [own.get("weight") for own in self.parameters]
        # A weight that is no parameter of its module, as in DataParallel's replicas, can't be watched: it always changed.
        self.unknown = {i for i, weight in zip(there, weights, strict=True) if weight is None}
        self.at = [i for i in there if i not in self.unknown]
        self.weights = [weight for weight in weights if weight is not None]
        # Inference tensors count no versions; they are not laid out, so that it is enough to know when others replace them.
        self.counting = [weight for weight in self.weights if not weight.is_inference()]
        self.versions, self.places = list(map(_version, self.counting)), list(map(_place, self.counting))

    def unchanged(self, lists, name) -> bool:
        return (
            not self.unknown
            and all(map(is_, map(_get, lists, repeat(name)), self.modules))
            and all(map(is_, map(_get, self.parameters, repeat("weight")), self.weights))
            and list(map(_version, self.counting)) == self.versions
            and list(map(_place, self.counting)) == self.places
        )

    def changed_in(self, before: "_Side") -> set[int]:
        now, then = self._by_layer(), before._by_layer()
        return {i for i, own in enumerate(now) if own != then[i]} | self.unknown | before.unknown

    def _by_layer(self) -> list[list]:
        found = [[id(module)] for module in self.modules]
        facts = zip(self.versions, self.places, strict=True)
        for i, weight in zip(self.at, self.weights, strict=True):
            found[i] += id(weight), *(() if weight.is_inference() else next(facts))
        return found
