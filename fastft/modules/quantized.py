"""Linear layers whose weight is quantised: which they are, and their weight as numbers.

The base layer's own forward and backward stay in charge of such a weight; adapters only add to its output. Libraries are
known by the names of their classes, so that none is imported here:

* bitsandbytes' Linear4bit (NF4, FP4) and Linear8bitLt, and subclasses of them;
* torchao: an nn.Linear whose weight is one of its tensor subclasses;
* GPTQ and its kin (gptqmodel, auto_gptq, optimum): classes named …QuantLinear, which hold a `qweight`, and subclasses.
"""

import copy
import functools
import sys

import torch
from torch import nn

_BITSANDBYTES = {"Linear4bit": "4-bit", "Linear8bitLt": "8-bit"}


def quantization(module: nn.Module) -> str | None:
    """How the weight of this linear layer is quantised, in words, or None if it is not (or not a linear layer)."""
    for known, kind in _kinds(type(module)):
        if known == "class":
            return kind
        if known == "codes" and isinstance(getattr(module, "qweight", None), torch.Tensor):
            return kind
        if known == "weight" and _library(type(weight := module._parameters.get("weight"))) == "torchao":
            return f"torchao {type(weight).__name__}"
    return None


@functools.cache  # of a layer it is asked many times when an adapter is loaded: 50 us each without this
def _kinds(cls: type) -> tuple[tuple[str, str | None], ...]:
    """What a class says: that it is a quantised layer, or where to look."""
    kinds: list[tuple[str, str | None]] = []
    for base in cls.__mro__:
        if _library(base) == "bitsandbytes" and base.__name__ in _BITSANDBYTES:
            kinds.append(("class", f"bitsandbytes {_BITSANDBYTES[base.__name__]}"))
        if base.__name__.endswith("QuantLinear"):
            kinds.append(("codes", f"{_library(base)} {base.__name__}"))
        if base is nn.Linear:
            kinds.append(("weight", None))
    return tuple(kinds)


def _library(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def sizes(module: nn.Module) -> tuple[int, int]:
    """(out N, in K) of a quantised layer; its weight has whatever shape its codes have."""
    if hasattr(module, "out_features"):
        return module.out_features, module.in_features
    return module.outfeatures, module.infeatures  # auto_gptq


def held_like(module: nn.Module) -> torch.Tensor:
    """A tensor of the layer's device, and of the floating-point dtype that its weight stands for."""
    weight = module._parameters.get("weight")
    if quantization(module) is None:
        return module.weight
    if weight is None:
        weight = module.qweight
    return torch.empty(0, dtype=weight.dtype if weight.is_floating_point() else torch.float32, device=weight.device)


def undequantizable(module: nn.Module) -> str | None:
    """Why `dequantized` can't be had of a quantised layer, or None."""
    kind = quantization(module)
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (by an offloading hook?)"
    if kind.startswith("torchao"):
        return None if hasattr(module.weight, "dequantize") else f"{kind} has no dequantize()"
    if not kind.startswith("bitsandbytes"):
        return None if hasattr(module, "dequantize_weight") else f"{kind} has no dequantize_weight()"
    if kind.endswith("4-bit") and getattr(module.weight, "quant_state", None) is None:
        return "it has not been quantised yet; move the model to its device first"
    return None


@torch.no_grad()
def dequantized(module: nn.Module) -> torch.Tensor:
    """The weight [N, K] that the codes stand for, in float32."""
    kind = quantization(module)
    if kind.startswith("torchao"):
        try:
            return module.weight.dequantize(torch.float32)
        except TypeError:  # not all of its classes take a dtype
            return module.weight.dequantize().float()
    if not kind.startswith("bitsandbytes"):
        return module.dequantize_weight().float().t()  # GPTQ and its kin pack along K, and unpack to [K, N]
    weight = module.weight
    if kind.endswith("8-bit"):
        scales = module.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.float() if scales is None else weight.data.float() * (scales.float() / 127)[:, None]
    if repacked(module):
        module.state_dict()  # brings back the layout that has a dequantisation
    state = copy.copy(weight.quant_state)
    state.dtype = torch.float32
    return sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, state).reshape(sizes(module))


def repacked(module: nn.Module) -> bool:
    """Has bitsandbytes rearranged this weight for inference? (Some CPUs, in evaluation.) It has no backward then."""
    return bool(getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False))


@torch.no_grad()
def make_plain(module: nn.Module) -> None:
    """Turn a quantised layer, adapted or not, into a plain one in place: weight and bias in float32.

    nn.Linear, or transformers' Conv1D where bitsandbytes replaced one. Hooks and what adapters hold here stay.
    """
    from .adapted_linear import Adapted, adapted_class, adapters_state

    weight, (n, k) = dequantized(module), sizes(module)
    source = getattr(module, "source_cls", nn.Linear)  # transformers notes there what bitsandbytes' layer replaced
    conv1d = source.__name__ == "Conv1D"
    bias = getattr(module, "bias", None)
    with torch.device("meta"):
        plain = source(n, k) if conv1d else nn.Linear(k, n, bias=bias is not None)
    plain.weight = nn.Parameter(weight.t().contiguous() if conv1d else weight.contiguous(), requires_grad=False)
    if bias is not None:
        plain.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        plain.bias.data = plain.bias.data.float()
    kept = {name: value for name, value in module.__dict__.items() if name == "training" or "_hooks" in name}
    kept["_load_state_dict_pre_hooks"] = plain._load_state_dict_pre_hooks  # the quantisation's own
    adapted = isinstance(module, Adapted)
    if adapted:
        kept.update(adapters_state(module))
        plain._modules.update((name, part) for name, part in module._modules.items() if name in module.holders)
    module.__dict__.clear()
    module.__dict__.update(plain.__dict__, **kept)
    module.__class__ = adapted_class(type(plain), False) if adapted else type(plain)
