"""What several processes that train one model have to agree on, where torch.distributed runs."""

import torch


def several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def rank() -> int:
    return torch.distributed.get_rank() if several() else 0


def from_first(*tensors: torch.Tensor) -> bool:
    """Take over rank 0's values, in place. False where there is one process."""
    if not several():
        return False
    for tensor in tensors:
        torch.distributed.broadcast(tensor, 0)
    return True


def mean(tensor: torch.Tensor) -> None:
    """The mean over all ranks, in place: what DistributedDataParallel makes of gradients."""
    if several():
        torch.distributed.all_reduce(tensor)
        tensor /= torch.distributed.get_world_size()
