"""The base of an attached model as a second model on the same memory: the reference of preference losses."""

import copy

import torch


def without_adapters(model: torch.nn.Module, handles) -> torch.nn.Module:
    """A second model on the parameters and buffers of `model`, in evaluation mode, without adapters.

    handles: gives the handles of a model by name.
    """
    for handle in handles(model).values():
        handle._whole("leave out")
        if handle.merged:
            raise ValueError(
                f"adapter {handle.name!r} stands in the weights, which a reference model would share; "
                + ("copy the model before attaching" if handle.method.trains_merged else "unmerge it first")
            )
    tensors = [*model.parameters(), *model.buffers()]
    trains = [t.requires_grad for t in tensors]
    twin = copy.deepcopy(model, {id(t): t for t in tensors})
    for handle in handles(twin).values():
        for group in handle._groups:
            group.packed = None  # the buffer is the other model's, and stays
        handle.detach()
    for t, flag in zip(tensors, trains):  # detaching gave the base the flags from before attaching
        t.requires_grad_(flag)
    return twin.eval()
