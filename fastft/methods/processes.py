"""What several processes that train one model have to agree on, where torch.distributed runs."""

import gc
import warnings

import torch

# What is wrapped around a model, by module (so that nothing is imported), and has looked at its parameters by then.
_WRAPPERS = {
    "torch.nn.parallel.distributed",
    "torch.nn.parallel.data_parallel",
    "torch.distributed.fsdp.fully_sharded_data_parallel",
    "deepspeed.runtime.engine",
}


def check_unwrapped(model: torch.nn.Module) -> None:
    """Parameters that come after a model was wrapped would train in each process by itself.

    Raises:
        ValueError: the model is such a wrapper. One that is around the model is warned of: another may come later.
    """
    if _is_wrapper(type(model)):
        raise ValueError(
            f"the model is wrapped in {type(model).__name__} already, which would not see the adapter's parameters: attach "
            "to the model itself first, then wrap it, then make the optimizer"
        )
    around = _wrapper_around(model) if several() else None
    if around is not None:
        warnings.warn(
            f"a {type(around).__name__} is around this model already and does not see the adapter's parameters, which each "
            "process would train by itself: attach first, then wrap the model, then make the optimizer",
            stacklevel=4,
        )


def _is_wrapper(kind: type) -> bool:
    return any(parent.__module__ in _WRAPPERS for parent in kind.__mro__)


def _wrapper_around(model: torch.nn.Module):
    """A module doesn't know who holds it, so all that there is is looked at: a tenth of a second."""
    modules = (there for there in gc.get_objects() if issubclass(type(there), torch.nn.Module))
    wrappers = (there for there in modules if _is_wrapper(type(there)))
    return next((there for there in wrappers if any(module is model for module in there.modules())), None)


def check_whole_state(optimizer: torch.optim.Optimizer) -> None:
    """Raises RuntimeError where a process has the state of some parameters only: it has to move along with entries."""
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        raise RuntimeError(
            "ZeroRedundancyOptimizer divides the optimizer's state among processes, and entries that are chosen anew take "
            "theirs along: train with handle.optimizer()"
        )


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
