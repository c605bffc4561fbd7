"""Which threads have teams. PyTorch's CPU ops are shared among a team of OpenMP threads, and every thread that runs one gets
a team of its own. Where all teams of a process together have more threads than the machine has cores, GNU's OpenMP lets them
sleep between two ops instead of waiting awake, and waking costs every op of the process some 50 us: a decode step of a small
model took 24 ms instead of 18 because another thread had once copied an adapter.

Other OpenMP libraries (LLVM's, Intel's) don't do so; with them nothing here does anything.
"""

import ctypes
import functools

import torch

_PAUSE_HARD = 2  # omp_pause_hard: threads and memory are given back


@functools.cache
def _gnu_openmp():
    """GNU's OpenMP as PyTorch loaded it, or None."""
    try:
        process = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no library that is the process
        return None
    if hasattr(process, "__kmpc_fork_call"):  # LLVM's or Intel's, which also have GNU's names
        return None
    needed = ("GOMP_parallel", "omp_set_num_threads", "omp_pause_resource_all")
    return process if all(hasattr(process, name) for name in needed) else None


def work_alone() -> None:
    """From now on the calling thread runs PyTorch's ops by itself. Other threads keep their number of threads."""
    if library := _gnu_openmp():
        torch.get_num_threads()  # PyTorch sets the number when a thread first asks for it
        library.omp_set_num_threads(1)


def disband() -> None:
    """The calling thread's team ends, for another thread's to take its cores. Its next parallel op makes a new one."""
    if library := _gnu_openmp():
        library.omp_pause_resource_all(_PAUSE_HARD)
