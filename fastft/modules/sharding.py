"""Parameters that torch's fully_shard divides among processes.

In a forward they are whole: the wrapped layer's pre-forward hook gathers plain Parameters, and adapters work as always.
Between forwards each is a DTensor, of which this process has a part; `reshard` sees to it.
"""

import sys

import torch


def is_sharded(t: torch.Tensor) -> bool:
    """Is t a DTensor?"""
    module = sys.modules.get("torch.distributed.tensor")  # whoever has one has imported it
    return module is not None and isinstance(t, module.DTensor)


def shares(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of `value`, which every process has whole, divided as `like` is (nothing is communicated)."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def reshard(model: torch.nn.Module) -> None:
    """Let the model's modules hold their DTensors again, as its ``state_dict`` does; nothing is communicated.

    After a forward without a backward a root (or whatever is wrapped with ``reshard_after_forward=False``) still holds what
    it gathered: in the dtype of the forward, and thrown away by the next backward with all that was written into it.
    """
    if not weights_come_and_go():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def weights_come_and_go() -> bool:
    """Was fully_shard called in this process?

    What it gathers for a forward is the same Parameter each time, with the version it had and often the address, whatever
    was loaded into the shards in between: no change of a weight can be seen any more.
    """
    module = sys.modules.get("torch.distributed.fsdp._fully_shard._fully_shard")
    return bool(getattr(module, "cls_to_fsdp_cls", None))
