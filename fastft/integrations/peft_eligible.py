"""What of a PEFT layer our ops can compute: the reasons why not. Asked at every call, so each check is a few lookups."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import nn

from ..modules.class_swap import is_bound
from ..modules.sharding import is_sharded
from ..ops.lora_linear import transformed

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
PLAIN = frozenset((torch.Tensor, nn.Parameter))
_AUTOCAST = frozenset(("cpu", "cuda"))  # where autocast needs not be asked for


class Kinds(NamedTuple):
    """PEFT's and transformers' classes that decide about paths."""

    conv1d: type
    dora: type
    dora_layer: type
    as_plain: tuple[type, ...]  # variants whose forward is plain LoRA's


_kinds: Kinds | None = None


def kinds_of_peft() -> Kinds:
    global _kinds
    if _kinds is None:  # (no functools.cache, which torch.compile warns of)
        from peft.tuners.lora import dora, variants
        from transformers.pytorch_utils import Conv1D

        same = tuple(v for v in (getattr(variants, "MiCALinearVariant", None),) if v is not None)
        _kinds = Kinds(Conv1D, variants.DoraLinearVariant, dora.DoraLinearLayer, same)
    return _kinds


# PEFT's classes of LoRA linears on quantised weights, by its module: there is no such layer before that is imported.
_QUANTIZED = {
    "bnb": ("Linear4bit", "Linear8bitLt"),
    "gptq": ("GPTQLoraLinear",),
    "torchao": ("TorchaoLoraLinear",),
}


def linear_classes() -> tuple[type, ...]:
    """The classes of PEFT's layers that are accelerated."""
    from peft.tuners.lora.layer import Linear

    modules = {name: sys.modules.get(f"peft.tuners.lora.{name}") for name in _QUANTIZED}
    found = (getattr(modules[name], cls, None) for name, classes in _QUANTIZED.items() for cls in classes)
    return Linear, *(cls for cls in found if cls is not None)


class Input(NamedTuple):
    """What the paths depend on of a layer's input."""

    features: int
    device: torch.device | None
    dtype: torch.dtype | None  # that its products are computed in: autocast's, if it is on
    autocast: bool
    reason: str | None  # why our ops can't take it
    gathers: bool = False  # is the question one of a forward to come, for which fully_shard gathers what it divided?

    @staticmethod
    def of(x) -> Input:
        if reason := unfit(x):
            return Input(0, None, None, False, reason)
        device, dtype = x.device, x.dtype
        autocast = autocasting(device.type)
        return Input(x.shape[-1], device, torch.get_autocast_dtype(device.type) if autocast else dtype, autocast, None)


def autocasting(kind: str) -> bool:
    """Is autocast on for this type of device?"""
    return (kind in _AUTOCAST or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


def unfit(x) -> str | None:
    """Why our ops can't take x, whatever the layer."""
    if type(x) not in PLAIN:
        return f"the input is a {type(x).__name__}"
    if x.dtype not in DTYPES:
        return f"the input is {dtype_name(x.dtype)}"
    if x.layout is not torch.strided or x.is_nested or not x.dim():
        return "the input is sparse, nested or a scalar"
    if torch.compiler.is_compiling():
        return "torch.export, whose graphs run without fastft" if torch.compiler.is_exporting() else None
    return watched()


def watched() -> str | None:
    """What follows or changes all calls, so that each has to be made as it stands."""
    if transformed():
        return "inside a torch.func transform or forward-mode differentiation"
    return traced_or_hooked()


def traced_or_hooked() -> str | None:
    """The part of it that modules see."""
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    if nn.modules.module._has_any_global_hook():
        return "hooks for all modules are registered"
    return None


def bare(module, kind) -> bool:
    """Is calling this module nothing but the forward of `kind`?"""
    if type(module) is not kind:
        return False
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or ("forward" in own and not is_bound(own["forward"], kind.forward, module))  # (accelerate leaves that behind)
    )


def is_plain(t, given: Input) -> bool:
    """Is this parameter a plain tensor in a forward on that input?"""
    return type(t) in PLAIN or (given.gathers and is_sharded(t))


def unfit_factors(a, b, bias, given: Input) -> str | None:
    if not (is_plain(a, given) and is_plain(b, given) and (bias is None or is_plain(bias, given))):
        return f"lora_A is a {type(a).__name__}, lora_B a {type(b).__name__}"
    if not a.device == b.device == given.device or a.is_meta:
        return f"the input is on {given.device}, lora_A on {a.device}, lora_B on {b.device}"
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != given.features:  # (ZeRO-3 leaves empty vectors of partitioned ones)
        return f"lora_A is {list(a.shape)}, lora_B {list(b.shape)}, the input [..., {given.features}]"
    if a.dtype not in DTYPES or b.dtype not in DTYPES:
        return f"lora_A is {dtype_name(a.dtype)}, lora_B {dtype_name(b.dtype)}"
    return None


def base_obstacle(base, given: Input) -> str | None:
    """Why the base layer has to compute itself, or None."""
    if bare(base, nn.Linear) or bare(base, kinds_of_peft().conv1d):
        return unfit_weight(base, given)
    if type(base) in (nn.Linear, kinds_of_peft().conv1d):
        return "the base layer is hooked, or its forward replaced"
    kind = type(base)
    other = f"{kind.__module__}.{kind.__name__}" if kind.__name__ in ("Linear", "Conv1D") else kind.__name__
    return f"the base layer is a {other}"  # (PEFT's tuners call theirs Linear too)


def unfit_weight(base, given: Input) -> str | None:
    weight, bias = base.weight, base.bias
    if not (is_plain(weight, given) and (bias is None or is_plain(bias, given))):
        return f"the base weight is a {type(weight).__name__}"
    if weight.dim() != 2 or weight.device != given.device or weight.layout is not torch.strided:
        return f"the base weight is {list(weight.shape)} on {weight.device}"
    if weight.dtype != given.dtype and not (given.autocast and weight.dtype in DTYPES):
        return f"the base weight is {dtype_name(weight.dtype)}, the input {dtype_name(given.dtype)}"
    return None


def dtype_name(dtype) -> str:
    return str(dtype).removeprefix("torch.")
