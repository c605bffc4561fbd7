"""PEFT models on our kernels: one call, and everything else stays PEFT's.

model = fastft.accelerate(get_peft_model(base, LoraConfig(...)))
print(fastft.report(model))     # which path each layer takes, and why
fastft.restore(model)
"""

from __future__ import annotations

from torch import nn

from .peft_eligible import linear_classes
from .peft_layers import REPLACED, FallbackError, FastLinear, accelerate_layers
from .peft_report import report
from .peft_sparse import FastSparse, accelerate_sparse_layers, sparse_kinds
from .peft_tuner import FastTuner, TunerRecord, follow_unseen_writes, forget_banks, tuner_kinds
from .swapping import Swapped, replaced, swap, unswap

__all__ = ["FallbackError", "accelerate", "report", "restore"]


def accelerate(peft_model: nn.Module, *, strict: bool = False, group_projections: bool = True, check=None) -> nn.Module:
    """Run the LoRA, SHiRA and Super-Tuning layers of a PEFT model on fastft's ops, in place.

    Parameters, names, state dict, files, adapters' switching, merging, disabling and hot-swapping stay as they are: only the
    class of each such linear changes (to a subclass of the same name), and that of the tuner, so that adapters which are
    added later are accelerated too and batches with `adapter_names` are safe to run from several threads. A quantised base
    layer (bitsandbytes' NF4 and int8, torchao's, GPTQ's) computes itself, and our ops add to it. What can't be accelerated
    runs PEFT's own forward; `fastft.report` says what and why. Calling it again is fine.

    Args:
        peft_model: PeftModel, PeftMixedModel, or a module with injected adapters (after adding some, accelerate that again).
        strict: a layer that would run PEFT's own forward raises instead. Layers of other classes (embeddings, convolutions)
            and forwards without adapters (disabled, merged) don't. A forward that was replaced on a layer raises at once.
        group_projections: layers that read one input (q, k and v; gate and up) share the read of it and its dX, though each
            computes in its own call. Switch it off if backward runs through them one by one.
        check: a batch, as a dict of the model's arguments with labels or as a function of the model that returns the loss.
            Loss and gradients are computed on it by PEFT and by fastft, without dropout, and compared (`peft_check`).

    Returns:
        `peft_model` itself.

    Raises:
        ValueError: there is no such layer of PEFT in it, or PEFT computes nothing finite on the batch to check.
        FallbackError: with `strict`, mostly at a call.
        CheckError: the comparison failed; the model is restored. (After any other error it is what it was before.)
    """
    try:
        from peft.tuners.lora.layer import LoraLayer
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        message = "fastft.accelerate takes models of PEFT, which is not installed: pip install 'fastft[peft]'"
        raise ImportError(f"{message} (fastft.attach works without)") from None

    layers = (LoraLayer, *sparse_kinds())
    if not any(isinstance(module, layers) for module in peft_model.modules()):
        raise ValueError(
            "there is no LoRA layer of PEFT in this model, nor one of SHiRA or Super-Tuning; accelerate it after "
            "get_peft_model or load_adapter"
        )
    if check is None:
        return _accelerate(peft_model, strict, group_projections)
    from .peft_check import CheckError, compare

    before = {module: (type(module).mixin, module._fastft) for module in peft_model.modules() if isinstance(module, Swapped)}
    restore(peft_model)
    try:
        compare(peft_model, check, lambda: _accelerate(peft_model, strict, group_projections))
    except BaseException as error:
        restore(peft_model)
        if not isinstance(error, CheckError):  # a batch that is no good says nothing about what ran before
            for module, (mixin, record) in before.items():
                swap(module, mixin, record)
        raise
    return peft_model


def _accelerate(model, strict, share):
    if strict:
        _refuse_replaced(model)
    follow_unseen_writes()
    accelerate_layers(model, strict, share)
    accelerate_sparse_layers(model, strict)
    kinds = tuner_kinds()
    for module in model.modules():
        if type(module) in kinds:
            swap(module, kinds[type(module)], TunerRecord(strict, share))
        elif isinstance(module, FastTuner):
            module._fastft.strict, module._fastft.share = strict, share
    return model


def _refuse_replaced(model):
    """At once, since a layer that is not reached can't raise at a call."""
    kinds = *linear_classes(), *sparse_kinds()
    for name, module in model.named_modules():
        ours = type(module) in kinds or isinstance(module, (FastLinear, FastSparse))
        if ours and replaced(module):
            raise FallbackError(f"{name}: {REPLACED}; strict=True forbids that")


def restore(peft_model: nn.Module) -> nn.Module:
    """Undo `accelerate`: the classes and entries of every module are those from before. Returns the model.

    Raises:
        RuntimeError: a layer's class was changed once more since, as `fully_shard` does with the modules it is called on.
    """
    for module in peft_model.modules():
        if isinstance(module, Swapped):
            forget_banks(module)
            unswap(module)
    return peft_model
