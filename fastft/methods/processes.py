"""What several processes that train one model have to agree on, where torch.distributed runs."""

import torch


def several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def rank() -> int:
    return torch.distributed.get_rank() if several() else 0


def _reachable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it on the GPU where processes can't send what is on the CPU (NCCL)."""
    sends = torch.distributed.get_backend_config()  # "cuda:nccl", "cpu:gloo,cuda:nccl"
    return tensor if f"{tensor.device.type}:" in sends or "cuda:" not in sends else tensor.cuda()


def from_first(*tensors: torch.Tensor) -> None:
    """Take over rank 0's values, in place."""
    for tensor in tensors if several() else ():
        there = _reachable(tensor)
        torch.distributed.broadcast(there, 0)
        if there is not tensor:
            tensor.copy_(there)


def mean(tensor: torch.Tensor) -> None:
    """The mean over all ranks, in place: what DistributedDataParallel makes of gradients."""
    if several():
        torch.distributed.all_reduce(tensor)
        tensor /= torch.distributed.get_world_size()
