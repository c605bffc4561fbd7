"""Folding an adapter into a quantised model: its quantised linear layers become plain ones, on explicit request only."""

import torch

from ..modules.quantized import held_like, make_plain, quantization, undequantizable
from .targets import DTYPES, base_modules


def check_target(target, model) -> None:
    """Raises ValueError if `Handle.merge_and_unload` can't make that of the model's quantised layers."""
    if target is None:
        return
    if target != "dequantized" and target not in DTYPES:
        raise ValueError(f'target={target!r}; it must be "dequantized" or one of {DTYPES}')
    for name, module in model.named_modules():
        if quantization(module) is not None and (reason := undequantizable(module)) is not None:
            raise ValueError(f"the weight of {name!r} is quantised and can't be dequantised: {reason}")


def fold_dequantized(model, modules, adapter, target) -> None:
    """`Mergeable.fold` for `modules`, while every quantised linear layer of `model` becomes a plain one.

    W + delta is formed in float32 and rounded once, to `target` or else to the dtype of the model's other parameters: of
    those that no adapter touches too, since a checkpoint of a model that is quantised in part could not be loaded.
    """
    dtype = _dtype_of_the_rest(model) if target == "dequantized" else target
    layers = [module for module in model.modules() if quantization(module) is not None]
    adapted = set(modules)
    for module in layers:
        make_plain(module)
        if module in adapted:
            module.fold(adapter)
        for parameter in (module.weight, module.bias):
            if parameter is not None:
                parameter.data = parameter.data.to(dtype)
    for module in adapted.difference(layers):
        module.fold(adapter)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:  # transformers' records, which save_pretrained would write
        quantizer.remove_quantization_config(model)
        for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            if hasattr(model, flag):
                setattr(model, flag, False)


def _dtype_of_the_rest(model) -> torch.dtype:
    """The dtype of the first parameter that is neither quantised nor an adapter's, mostly the embeddings': in which the
    layers are called. Where there is none, the one that a quantised layer computes in."""
    modules = base_modules(model).values()
    layers = [module for module in modules if quantization(module) is not None]
    for module in modules:
        for parameter in module._parameters.values() if module not in layers else ():
            if parameter is not None and parameter.is_floating_point():
                return parameter.dtype
    return getattr(layers[0], "compute_dtype", None) or held_like(layers[0]).dtype
