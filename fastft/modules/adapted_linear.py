"""What a module becomes while adapters are attached to it.

`attach` swaps the class of each touched module in place, so the module's identity, name, hooks and parameters stay:
whoever holds it (the model, FSDP, a tied weight, a hook) keeps holding the same object. The swapped class adds

* ``lora_A``, ``lora_B``, ``lora_bias``, ``lora_magnitude``: ParameterDicts by adapter name, what an adapter trains of the
  low-rank term (linear layers only);
* ``slice_delta``, ``slice_units``: by adapter name, what an adapter trains of the weight itself, see `slices`;
* ``sparse``: the same for single entries of the weight, see `sparse`;
* ``modules_to_save``: by adapter name, full copies of the module's own tensors that an adapter trains;
* one store of pristine values while deltas stand in the tensors, see `merging`.

Everything lives on the module, so ``deepcopy``, ``.to()`` and ``state_dict`` need no help from outside.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..ops.lora_inference import few_tokens, lora_inference
from .adapter import Adapter
from .class_swap import give_class
from .merging import Mergeable, pristine
from .norms import RowNorms, factor, keep_wide
from .packed import unshare
from .parts import TrainsParts
from .projection import Projection, infer, project
from .quantized import quantization, sizes
from .slices import Sliced
from .sparse import Sparse

# class (by module and name, so that transformers is not imported) -> is its weight stored [K, N] (fan_in_fan_out)?
LINEAR_CLASSES = {
    ("torch.nn.modules.linear", "Linear"): False,
    ("transformers.pytorch_utils", "Conv1D"): True,
    ("transformers.models.falcon.modeling_falcon", "FalconLinear"): False,  # rounds before it adds the bias, no more
}


@dataclass(frozen=True)
class LoRASettings:
    """What one module's forward needs besides its factors: the factor `scale` of B A and the dropout probability."""

    scale: float
    dropout: float


_OPTIONS = frozenset(("modules_to_save", "lora_bias"))  # that few adapters have

# What `adapt` gives a module besides another class.
_STATE = ("_adapters", "_merged", "_store", "_settings", "_parts", "_written", "_norms", "_groups")


def is_linear(module: nn.Module) -> bool:
    """Is this a linear layer that computes with its weight as it stands? Quantised ones are none, see `quantized`."""
    cls = getattr(type(module), "plain", type(module))  # of adapted and of routed layers
    return (cls.__module__, cls.__qualname__) in LINEAR_CLASSES and quantization(module) is None


def features(module: nn.Module) -> tuple[int, int]:
    """(out N, in K) of a linear layer, quantised or not."""
    if quantization(module) is not None:
        return sizes(module)
    n, k = module.weight.shape
    return (k, n) if is_transposed(module) else (n, k)


def is_transposed(module: nn.Module) -> bool:
    """Is the weight of this linear layer stored [K, N]? (How a quantised layer stores its own does not matter.)"""
    cls = getattr(type(module), "plain", type(module))  # of adapted and of routed layers
    return quantization(module) is None and LINEAR_CLASSES[cls.__module__, cls.__qualname__]


def adapt(module: nn.Module, adapter: Adapter) -> None:
    """Swap the class of `module` (if no adapter did so before) and register `adapter`."""
    if not isinstance(module, Adapted):
        module.__class__ = adapted_class(type(module), quantization(module) is not None)
        module._adapters = {}
        module._merged = []
        module._store = None
        module._settings = {}  # of the adapters that have a low-rank delta here, by name
        module._parts = {}  # of the adapters whose delta is a part of the weight, by name
        module._written = {}  # the version of each slice's delta that was written into the weight
        module._norms = RowNorms()
        module._groups = {}  # the AdapterGroup of each adapter that has one here, by name
    module._adapters[adapter.name] = adapter


def adapters_state(module: nn.Module) -> dict[str, Any]:
    """The attributes that `adapt` gave a module."""
    return {name: module.__dict__[name] for name in _STATE}


@functools.cache
def adapted_class(cls: type, quantized: bool) -> type:
    """quantized: is the weight? The class alone does not tell (torchao's quantised layers are of class nn.Linear)."""
    from .adapted_quantized import AdaptedQuantized

    fan_in_fan_out = None if quantized else LINEAR_CLASSES.get((cls.__module__, cls.__qualname__))
    mixin = AdaptedQuantized if quantized else Adapted if fan_in_fan_out is None else AdaptedLinear
    own = {"plain": cls, "quantized": quantized, "fan_in_fan_out": bool(fan_in_fan_out)}
    return type(f"Adapted{cls.__name__}", (mixin, cls), own)


def _empty(plain: type, quantized: bool) -> nn.Module:
    cls = adapted_class(plain, quantized)
    return cls.__new__(cls)


class Adapted(Mergeable):
    """Mixed into the class of any module of which adapters train some own tensors in full."""

    plain: type
    quantized: bool
    holders = ("modules_to_save",)

    def __reduce_ex__(self, protocol):
        # Pickle finds classes by name, and these are made at run time. A plain class may have a say in its state (nn.LSTM).
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # objects have one since Python 3.11
        return _empty, (self.plain, self.quantized), state

    def add_copies(self, adapter: Adapter, tensors: dict[str, torch.Tensor]) -> None:
        """Own tensors by name (parameters, persistent buffers) that `adapter` replaces by trained copies."""
        copies = nn.Module()
        for name, value in tensors.items():
            if name in self._parameters:
                copies.register_parameter(name, nn.Parameter(value, requires_grad=value.is_floating_point()))
            else:
                copies.register_buffer(name, value)
        self._hold("modules_to_save", nn.ModuleDict, adapter, copies)

    def _hold(self, holder: str, kind: type, adapter: Adapter, value) -> None:
        if not hasattr(self, holder):
            setattr(self, holder, kind())
        getattr(self, holder)[adapter.name] = value

    def adapter_tensors(self, adapter: Adapter):
        """Yields (holder, name within the adapter's part or "", tensor) of everything `adapter` holds here."""
        for holder in self.holders:
            held = getattr(self, holder, {})
            if adapter.name not in held:
                continue
            value = held[adapter.name]
            if isinstance(value, torch.Tensor):
                yield holder, "", value
            else:
                for name, tensor in (*value.named_parameters(), *value.named_buffers()):
                    yield holder, name, tensor

    def copies_of(self, adapter: Adapter):
        """Yields (name, tensor) of the own tensors that `adapter` replaces by trained copies."""
        return ((own, t) for holder, own, t in self.adapter_tensors(adapter) if holder == "modules_to_save")

    def check_class(self) -> None:
        """Raises RuntimeError where something else has changed the module's class since, so that `remove` can't."""
        if type(self) is not adapted_class(self.plain, self.quantized):
            raise RuntimeError(
                f"the module is a {type(self).__name__}: something changed the class of this {self.plain.__name__} after "
                "adapters were attached, and would be lost. Undo that first (a parametrization, weight_norm among them: "
                "torch.nn.utils.parametrize.remove_parametrizations), then detach"
            )

    def remove(self, adapter: Adapter) -> None:
        """Take `adapter` away; with the last one the module is again what it was before. Raises as `check_class`, before
        anything is changed."""
        self.check_class()
        self.set_merged(adapter, False)
        for holder in self.holders:
            held = getattr(self, holder, {})
            if adapter.name in held:
                del held[adapter.name]
                if not len(held):
                    delattr(self, holder)
        for record in (self._settings, self._parts, self._written):
            record.pop(adapter.name, None)
        if adapter.name in self._groups:
            self._groups.pop(adapter.name).release()
        del self._adapters[adapter.name]
        if not self._adapters:
            for name in _STATE:
                delattr(self, name)
            give_class(self, self.plain)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars and any(group.packed is not None for group in self._groups.values()):
            unshare(destination, [prefix + "weight", prefix + "bias"])

    def code_obstacle(self) -> str | None:
        """Why nothing can be written into the weight, where it is quantised."""
        return None

    # ---- forward

    def _copies(self, adapters) -> dict[str, torch.Tensor]:
        """The own tensors that these adapters replace."""
        held = self._modules.get("modules_to_save")  # getattr would be slow where there are none
        copies: dict[str, torch.Tensor] = {}
        for adapter in adapters if held is not None else ():
            if adapter.name in held:
                own = held[adapter.name]
                copies.update(own._parameters)
                copies.update(own._buffers)
                copies.update(own.__dict__.get("_former_parameters", ()))  # of DataParallel's replicas
        return copies

    def _plain_forward(self, replaced, *args, **kwargs):
        """The original class's forward, with some own tensors replaced (without touching self: threads, compile)."""
        if not replaced:
            return self.plain.forward(self, *args, **kwargs)
        twin = object.__new__(type(self) if self.quantized else self.plain)
        twin.__dict__.update(self.__dict__)
        for kind in ("_parameters", "_buffers"):
            own = getattr(self, kind)
            twin.__dict__[kind] = {name: replaced.get(name, value) for name, value in own.items()}
        if "_is_replica" in self.__dict__:  # DataParallel's, in which parameters are attributes
            twin.__dict__.update({name: value for name, value in replaced.items() if name in self.__dict__})
        return self.plain.forward(twin, *args, **kwargs)

    def forward(self, *args, **kwargs):
        return self._plain_forward(self._copies([a for a in self._adapters.values() if a.on()]), *args, **kwargs)


class AdaptedLinear(Sparse, Sliced, TrainsParts, Adapted):
    """Mixed into `nn.Linear` and transformers' Conv1D. Every active adapter turns the layer's W and bias into

        W + scale · B A and bias + scale · lora_bias;    with DoRA g ∘ (W + scale · B A), g = magnitude / ‖W₀ + scale · B A‖;
        or W + delta on rows, columns or single entries of W

    one after the other in the order of attaching, W₀ being the weight without adapters. (Dropout acts on what A reads.)
    """

    fan_in_fan_out: bool
    holders = ("lora_A", "lora_B", "lora_bias", "lora_magnitude", *Sliced.slice_holders, "sparse", "modules_to_save")

    def add_lora(
        self,
        adapter: Adapter,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        settings: LoRASettings,
        lora_bias: torch.Tensor | None = None,
        lora_magnitude: torch.Tensor | None = None,
    ) -> None:
        """lora_A [R, K], lora_B [N, R]: both of the weight's dtype or both float32; lora_bias and lora_magnitude [N]."""
        parts = {"lora_A": lora_A, "lora_B": lora_B, "lora_bias": lora_bias, "lora_magnitude": lora_magnitude}
        for holder, value in parts.items():
            if value is not None:
                self._hold(holder, nn.ParameterDict, adapter, nn.Parameter(value))
        self._settings[adapter.name] = settings

    def _part(self, holder: str, name: str) -> torch.Tensor | None:
        held = self._modules.get(holder)
        return held[name] if held is not None and name in held else None

    def _apply(self, fn, *args, **kwargs):
        self._norms.forget()
        held = self._modules.get("lora_magnitude", {})
        magnitudes = {name: magnitude.data for name, magnitude in held.items()}
        super()._apply(fn, *args, **kwargs)
        for name, before in magnitudes.items():
            keep_wide(held[name], before, self.weight)
        return self

    # ---- merging

    def edited(self, name):
        return ("weight",) if self._part("lora_bias", name) is None else ("weight", "bias")

    def merge_obstacle(self, name):
        if self._part("lora_bias", name) is not None and self.bias is None:
            return "there is no bias that its lora_bias could be added to"
        return None

    def _add_delta(self, totals, name):
        weight = totals["weight"]
        a, b = (holder[name].to(weight.dtype) for holder in (self.lora_A, self.lora_B))
        scale, magnitude = self._settings[name].scale, self._part("lora_magnitude", name)
        target = weight.t() if self.fan_in_fan_out else weight
        target.addmm_(b, a, alpha=scale)
        if magnitude is not None:
            norm = self._norms(pristine(self, "weight"), self.lora_A[name], self.lora_B[name], scale, self.fan_in_fan_out)
            target.mul_(factor(magnitude, norm)[:, None])
        if (lora_bias := self._part("lora_bias", name)) is not None:
            totals["bias"].add_(lora_bias.to(weight.dtype), alpha=scale)

    # ---- forward

    def forward(self, input):
        if self._parts:
            return self._parts_forward(input)
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and (y := self._infer(input)) is not None:
            return y
        on = [adapter for adapter in self._adapters.values() if adapter.on()]
        replaced = self._copies(on)
        names = [adapter.name for adapter in on if adapter.name in self._settings]
        if not names and not self._merged:
            return self._plain_forward(replaced, input)
        copied = replaced.get("weight")
        if self._merged:
            passed = self._passed()
            if not passed and self._stand(names, replaced):
                names = [name for name in names if name not in self._merged]
            else:
                replaced = {**self._stored(), **passed, **replaced}
            if not names:
                return self._plain_forward(replaced, input)
        weight, bias = replaced.get("weight", self.weight), replaced.get("bias", self.bias)
        return self._project(input, weight, bias, [self._projection(name, copied) for name in names])

    def _infer(self, input) -> torch.Tensor | None:
        """The output without a gradient in the commonest case, one plain adapter, by the shortest way; None otherwise."""
        own = self.__dict__
        if own["_merged"] or len(own["_adapters"]) != 1:
            return None
        ((name, adapter),) = own["_adapters"].items()
        modules, settings = own["_modules"], own["_settings"].get(name)
        if settings is None or not adapter.on() or (own["training"] and settings.dropout):
            return None
        if not _OPTIONS.isdisjoint(modules) or not self._may_run_alone(name, input):
            return None
        get = own["_parameters"].get
        weight, a, b = get("weight"), modules["lora_A"]._parameters.get(name), modules["lora_B"]._parameters.get(name)
        scale, magnitudes, g = settings.scale, modules.get("lora_magnitude"), None
        if magnitudes is not None:
            g = own["_norms"].kept_factor(weight, a, b, scale, magnitudes._parameters.get(name))
            if g is None:  # the general way keeps it
                return None
        weight = weight.t() if self.fan_in_fan_out and weight is not None else weight
        return lora_inference(input, weight, get("bias"), a, b, scale, g)

    def _may_run_alone(self, name, input) -> bool:
        """Without gradients: does this member of a group gain nothing by it?"""
        group = self._groups.get(name)
        packed = group is not None and group.packed is not None and group.packed.is_one_gemm(input.device)
        return group is None or (few_tokens(input) and not packed)

    def _stand(self, names, replaced) -> bool:
        """Can this forward use the tensors into which adapters are merged? `names` are the adapters that it needs."""
        if any(own in replaced for own in self._stored()) or not all(name in names for name in self._merged):
            return False  # the merged tensors are replaced, or something in them is disabled now
        # DoRA multiplies what stands before it, so nothing may come in between.
        return "lora_magnitude" not in self._modules or set(names[: len(self._merged)]) == set(self._merged)

    def _projection(self, name: str, copied: torch.Tensor | None) -> Projection:
        """copied: what an adapter trains in place of the weight."""
        settings, a, b = self._settings[name], self.lora_A[name], self.lora_B[name]
        dropout = settings.dropout if self.training else 0.0
        magnitude, norm = self._part("lora_magnitude", name), None
        if magnitude is not None:
            base = pristine(self, "weight") if copied is None else copied
            norm = self._norms(base, a, b, settings.scale, self.fan_in_fan_out)
        return Projection(name, a, b, settings.scale, dropout, self._part("lora_bias", name), magnitude, norm)

    def _project(self, input, weight, bias, projections):
        """The output with all these adapters on the given base tensors (weight as it is stored)."""
        weight = weight.t() if self.fan_in_fan_out else weight
        if len(projections) == 1 and not torch.compiler.is_compiling():  # a graph can't find what another call left
            (one,) = projections
            group, y = self._groups.get(one.name), None
            if self._may_run_alone(one.name, input):
                y = infer(input, weight, bias, one, self._norms)
            if y is None and group is not None:
                y = group.project(self, input, weight, bias, one)
            if y is not None:
                return y
        return project(input, weight, bias, projections)
