"""What a module becomes while adapters are attached to it.

`attach` swaps the class of each touched module in place, so the module's identity, name, hooks and parameters stay:
whoever holds it (the model, FSDP, a tied weight, a hook) keeps holding the same object. The swapped class adds

* ``lora_A``, ``lora_B``: ParameterDicts by adapter name, the low-rank factors (linear layers only);
* ``modules_to_save``: by adapter name, full copies of the module's own tensors that an adapter trains;
* one store of pristine values: while deltas are merged into ``weight``, the buffer ``_pristine_weight`` keeps the
  bits from before. The weight is always recomputed as round(pristine + sum of merged deltas in float32), so any order
  of merging and detaching is exact, and ``state_dict`` shows the pristine base.

Everything lives on the module, so ``deepcopy``, ``.to()`` and ``state_dict`` need no help from outside.
"""

import functools
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from ..ops.lora_linear import SharedInput
from .packed import unshare

# class (by module and name, so that transformers is not imported) -> is its weight stored [K, N] (fan_in_fan_out)?
LINEAR_CLASSES = {
    ("torch.nn.modules.linear", "Linear"): False,
    ("transformers.pytorch_utils", "Conv1D"): True,
}

# A plain threading.local because torch.compile guards on its attributes, which it can't on a ContextVar.
_disabled = threading.local()


@dataclass(eq=False)
class Adapter:
    """One attached adapter, shared by the handle and all its modules."""

    name: str
    active: bool = True

    def on(self) -> bool:
        """Does the running forward use this adapter?

        A forward that runs inside a backward is the recomputation of a checkpointed one; it follows `active` alone,
        since the forward it repeats was most likely not run under `disabled` (and on CUDA it runs in another thread).
        """
        disabled = getattr(_disabled, "adapters", ())
        if not disabled or not self.active:
            return self.active
        recomputing = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        return recomputing or self not in disabled

    @contextmanager
    def disabled(self):
        """This thread's forwards run without the adapter inside the block. No module is touched."""
        before = getattr(_disabled, "adapters", ())
        _disabled.adapters = (*before, self)
        try:
            yield
        finally:
            _disabled.adapters = before


@dataclass(frozen=True)
class LoRASettings:
    """What one module's forward needs besides its factors: the factor `scale` of B A and the dropout probability."""

    scale: float
    dropout: float


class Projection(NamedTuple):
    """What one adapter adds to a forward of one module; tensors and numbers as in `ops.lora_linear.lora_linear`."""

    name: str
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scale: float
    dropout: float  # of this forward: 0 in evaluation
    lora_bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    weight_norm: torch.Tensor | None = None

    def options(self) -> dict[str, torch.Tensor | None]:
        """The keyword arguments of `SharedInput.project`."""
        return {"lora_bias": self.lora_bias, "magnitude": self.magnitude, "weight_norm": self.weight_norm}


def is_linear(module: nn.Module) -> bool:
    cls = module.plain if isinstance(module, Adapted) else type(module)
    return (cls.__module__, cls.__qualname__) in LINEAR_CLASSES


def features(module: nn.Module) -> tuple[int, int]:
    """(out N, in K) of a linear layer."""
    n, k = module.weight.shape
    cls = module.plain if isinstance(module, Adapted) else type(module)
    return (k, n) if LINEAR_CLASSES[cls.__module__, cls.__qualname__] else (n, k)


def adapt(module: nn.Module, adapter: Adapter) -> None:
    """Swap the class of `module` (if no adapter did so before) and register `adapter`."""
    if not isinstance(module, Adapted):
        module.__class__ = _adapted_class(type(module))
        module._adapters = {}
        module._merged = []
        module._settings = {}  # of the adapters that have a weight delta here, by name
        module._groups = {}  # the ProjectionGroup of each adapter that has one here, by name
    module._adapters[adapter.name] = adapter


@functools.cache
def _adapted_class(cls: type) -> type:
    fan_in_fan_out = LINEAR_CLASSES.get((cls.__module__, cls.__qualname__))
    mixin = Adapted if fan_in_fan_out is None else AdaptedLinear
    return type(f"Adapted{cls.__name__}", (mixin, cls), {"plain": cls, "fan_in_fan_out": bool(fan_in_fan_out)})


def _empty(plain: type) -> nn.Module:
    cls = _adapted_class(plain)
    return cls.__new__(cls)


class Adapted(nn.Module):
    """Mixed into the class of any module of which adapters train some own tensors in full."""

    plain: type
    holders = ("modules_to_save",)

    def __reduce_ex__(self, protocol):
        # Pickle finds classes by name, and these are made at run time.
        return _empty, (self.plain,), self.__dict__

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

    def remove(self, adapter: Adapter) -> None:
        """Take `adapter` away; with the last one the module is again what it was before."""
        self.set_merged(adapter, False)
        for holder in self.holders:
            held = getattr(self, holder, {})
            if adapter.name in held:
                del held[adapter.name]
                if not len(held):
                    delattr(self, holder)
        self._settings.pop(adapter.name, None)
        if adapter.name in self._groups:
            self._groups.pop(adapter.name).release()
        del self._adapters[adapter.name]
        if not self._adapters:
            del self._adapters, self._merged, self._settings, self._groups
            self.__class__ = self.plain

    # ---- the store of pristine values

    def _add_delta(self, weight: torch.Tensor, name: str) -> None:
        """Add adapter `name`'s delta to `weight`, in place, in weight's layout and (float32 or float64) dtype.

        All that a further kind of delta has to say: storing, merging and restoring are here.
        """
        raise NotImplementedError(f"{type(self).__name__} has no weight delta to merge")

    def set_merged(self, adapter: Adapter, merged: bool) -> None:
        """Put the adapter's delta into ``weight``, or take it out. The pristine bits come back with the last one."""
        if merged == (adapter.name in self._merged):
            return
        if not merged:
            self._merged.remove(adapter.name)
        else:
            if not self._merged:
                self.register_buffer("_pristine_weight", self.weight.detach().clone(), persistent=False)
            self._merged.append(adapter.name)
        if merged or self._merged:
            self.refresh()
        else:
            with torch.no_grad():
                self.weight.copy_(self._pristine_weight)
            del self._pristine_weight

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute ``weight`` after merged adapters changed."""
        if not self._merged:
            return
        total = self._pristine_weight.to(torch.promote_types(self.weight.dtype, torch.float32), copy=True)
        for name in self._adapters:  # in the order of attaching, whatever the order of merging
            if name in self._merged:
                self._add_delta(total, name)
        self.weight.copy_(total)

    @torch.no_grad()
    def fold(self, adapter: Adapter) -> None:
        """Make the adapter's delta and copies part of the pristine base for good. The adapter is spent afterwards."""
        if adapter.name in self._settings:
            others = [name for name in self._merged if name != adapter.name]
            for name in others:
                self.set_merged(self._adapters[name], False)
            self.set_merged(adapter, True)
            self._merged.clear()
            del self._pristine_weight
            for name in others:
                self.set_merged(self._adapters[name], True)
        copies = self._copies([adapter])
        for name, value in copies.items():
            getattr(self, name).copy_(value)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars and any(group.packed is not None for group in self._groups.values()):
            unshare(destination, [prefix + "weight", prefix + "bias"])
        if self._merged:
            destination[prefix + "weight"] = self._pristine_weight

    def _load_from_state_dict(self, *args, **kwargs):
        if not self._merged:
            return super()._load_from_state_dict(*args, **kwargs)
        with torch.no_grad():
            self.weight.copy_(self._pristine_weight)
            super()._load_from_state_dict(*args, **kwargs)
            self._pristine_weight.copy_(self.weight)

        def merge_again(module, incompatible_keys):  # the factors are children and load after this method
            hook.remove()
            module.refresh()

        hook = self.register_load_state_dict_post_hook(merge_again)

    # ---- forward

    def _copies(self, adapters) -> dict[str, torch.Tensor]:
        """The own tensors that these adapters replace."""
        held = self._modules.get("modules_to_save")  # getattr would be slow where there are none
        copies: dict[str, torch.Tensor] = {}
        for adapter in adapters if held is not None else ():
            if adapter.name in held:
                copies.update(held[adapter.name]._parameters)
                copies.update(held[adapter.name]._buffers)
        return copies

    def _plain_forward(self, replaced, *args, **kwargs):
        """The original class's forward, with some own tensors replaced (without touching self: threads, compile)."""
        if not replaced:
            return self.plain.forward(self, *args, **kwargs)
        twin = object.__new__(self.plain)
        twin.__dict__.update(self.__dict__)
        for kind in ("_parameters", "_buffers"):
            own = getattr(self, kind)
            twin.__dict__[kind] = {name: replaced.get(name, value) for name, value in own.items()}
        return self.plain.forward(twin, *args, **kwargs)

    def forward(self, *args, **kwargs):
        return self._plain_forward(self._copies([a for a in self._adapters.values() if a.on()]), *args, **kwargs)


class AdaptedLinear(Adapted):
    """Mixed into `nn.Linear` and transformers' Conv1D: y = x Wᵀ + bias + Σ scale · drop(x) Aᵀ Bᵀ over active adapters."""

    fan_in_fan_out: bool
    holders = ("lora_A", "lora_B", "modules_to_save")

    def add_lora(self, adapter: Adapter, lora_A: torch.Tensor, lora_B: torch.Tensor, settings: LoRASettings) -> None:
        """lora_A [R, K], lora_B [N, R]; both of the weight's dtype or both float32."""
        self._hold("lora_A", nn.ParameterDict, adapter, nn.Parameter(lora_A))
        self._hold("lora_B", nn.ParameterDict, adapter, nn.Parameter(lora_B))
        self._settings[adapter.name] = settings

    def _add_delta(self, weight, name):
        a, b = (holder[name].to(weight.dtype) for holder in (self.lora_A, self.lora_B))
        target = weight.t() if self.fan_in_fan_out else weight
        target.addmm_(b, a, alpha=self._settings[name].scale)

    def forward(self, input):
        on = [adapter for adapter in self._adapters.values() if adapter.on()]
        replaced = self._copies(on)
        names = [adapter.name for adapter in on if adapter.name in self._settings]
        if self._merged and "weight" not in replaced:
            if all(name in names for name in self._merged):
                names = [name for name in names if name not in self._merged]
            else:  # something that is merged is disabled now
                replaced["weight"] = self._pristine_weight
        if not names:
            return self._plain_forward(replaced, input)
        weight, bias = replaced.get("weight", self.weight), replaced.get("bias", self.bias)
        return self._project(input, weight, bias, [self._projection(name) for name in names])

    def _projection(self, name: str) -> Projection:
        settings = self._settings[name]
        dropout = settings.dropout if self.training else 0.0
        return Projection(name, self.lora_A[name], self.lora_B[name], settings.scale, dropout)

    def _project(self, input, weight, bias, projections):
        """The output with all these adapters on the given base tensors (weight as it is stored)."""
        weight = weight.t() if self.fan_in_fan_out else weight
        if len(projections) == 1 and not torch.compiler.is_compiling():  # a graph can't find what another call left
            group = self._groups.get(projections[0].name)
            y = None if group is None else group.project(self, input, weight, bias, projections[0])
            if y is not None:
                return y
        y = None
        for projection, (shared, i) in zip(projections, _share(input, projections)):
            if y is None:
                y = shared.project(i, weight, bias, projection.lora_B, projection.scale, **projection.options())
            else:
                y = shared.update(i, y, projection.lora_B, projection.scale)
        return y


def _share(input, projections):
    """(SharedInput, index in it) for every projection: those of equal dropout and dtype share one read of the input."""
    alike: dict[tuple, list[Projection]] = {}
    for projection in projections:
        alike.setdefault((projection.dropout, projection.lora_A.dtype), []).append(projection)
    places = {}
    for (dropout, _), group in alike.items():
        shared = SharedInput(input, [projection.lora_A for projection in group], dropout)
        places.update({projection.name: (shared, i) for i, projection in enumerate(group)})
    return [places[projection.name] for projection in projections]
