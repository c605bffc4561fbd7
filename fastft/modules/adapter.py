"""An attached adapter as its modules see it: which forwards use it."""

import threading
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# A plain threading.local because torch.compile guards on its attributes, which it can't on a ContextVar.
_disabled = threading.local()


@dataclass(eq=False)
class Adapter:
    """One attached adapter, shared by the handle and all its modules."""

    name: str
    active: bool = True

    def on(self) -> bool:
        """Does the running forward use this adapter?

        A forward that runs inside a backward is the recomputation of a checkpointed one; it follows `active` alone,
        since the forward it repeats was most likely not run under `disabled` (and on CUDA it runs in another thread).
        """
        disabled = getattr(_disabled, "adapters", ())
        if not disabled or not self.active:
            return self.active
        recomputing = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        return recomputing or self not in disabled

    @contextmanager
    def disabled(self):
        """This thread's forwards run without the adapter inside the block. No module is touched."""
        before = getattr(_disabled, "adapters", ())
        _disabled.adapters = (*before, self)
        try:
            yield
        finally:
            _disabled.adapters = before
