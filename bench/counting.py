"""What one call of an arm does besides taking time: what it saves for backward, its memory, how much it launches."""

import os
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, supported_activities
from torch.utils._python_dispatch import TorchDispatchMode

COUNTED = "fastft.bench: the call that counts"


def saved_bytes(run: Callable, free) -> int:
    """Bytes of the distinct storages that one call saves for backward, without those of the tensors in `free`."""
    known = {t.untyped_storage().data_ptr() for t in free}
    saved: dict[int, torch.UntypedStorage] = {}  # holding the storages keeps their addresses distinct

    def pack(tensor):
        for dense in _dense(tensor):
            storage = dense.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in saved.values())


def _dense(tensor) -> list[torch.Tensor]:
    """The tensors that have storages: a sparse one's indices and values, or itself."""
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    return [tensor]


def peak_bytes(run: Callable, device: torch.device) -> int | None:
    """By how much the memory that PyTorch's allocator has handed out rises within one call, from where it is lowest.

    So a step's gradients count, which it frees at its beginning and makes again. What libraries and kernels allocate
    themselves (BLAS' packed panels, a kernel's scratch) is not seen, on any device. None where a GPU's is not told.
    """
    with _silence(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()  # the profiler doesn't see what it didn't see allocated being freed: gradients of the call before
        with record_function(COUNTED):
            run()
    events = sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    begin = max(event.start_ns() for event in events if event.name() == COUNTED)
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    held = lowest = most = 0
    for event in events:
        if event.name() == "[memory]" and event.device_type() == kind and event.start_ns() >= begin:
            held += event.nbytes()
            lowest = min(lowest, held)
            most = max(most, held - lowest)
    return most if device.type == "cpu" else most or None


@contextmanager
def _silence():
    """Without what the profiler's C++ writes to the terminal: that it starts and stops, and what it can't see."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class _Ops(TorchDispatchMode):
    """Counts what reaches PyTorch's dispatcher, without what that calls in turn."""

    def __init__(self):
        super().__init__()
        self.count = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Code that is compiled runs compiled while this counts: by default it would run eagerly, then and ever after."""
        return True

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += 1
        return op(*args, **(kwargs or {}))


def launches(run: Callable, device: torch.device) -> int | None:
    """How much one call launches: on a GPU kernels, copies and fills; on a CPU ops, views too, forward and backward.

    An op that calls others (a composite, or one of ours on the reference) counts once, and code that torch.compile made runs
    in few. None where the profiler sees nothing of the GPU.
    """
    if device.type == "cpu":
        with _Ops() as ops:
            run()
        return ops.count
    if ProfilerActivity.CUDA not in supported_activities():
        return None
    torch.cuda.synchronize(device)
    with _silence(), profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize(device)
    return sum(event.device_type == DeviceType.CUDA for event in found.events()) or None
