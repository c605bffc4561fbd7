"""Projections of one input, an attention's q, k and v or an MLP's gate and up, share the read of it and its dX.

The model calls them one after the other, so sharing is lazy. The member that is called first with some x opens a round:
a `SharedInput` of x and every member's A. It takes its own part and leaves the rest in this thread's slot, where the
others find theirs if they are called with the same tensor in the same circumstances (`_circumstances`). Each member
computes in its own call: hooks, replaced weights and the order of calls stay as they are. Who finds nothing in the slot
opens a round, so what a wrong guess of `grouping` costs is memory and a little time, never a wrong result. The slot has
place for one round, so that at most one is kept by mistake.

A round that another one replaces before all members have taken their part was such a guess (or a failure in the middle):
its group dissolves, and each member runs alone from then on. Not at once if a forward may be run again by gradient
checkpointing: the second run must share what the first one did, or it would save other tensors and draw other dropout
masks. Then the group dissolves with the next step of an optimizer, when no forward is waiting any more.

Two things are not seen. An A that is changed between the calls of a round. And where one region of reentrant checkpointing
ends: where single members are regions, or a wrong guess is called twice with one tensor, the dropout masks of the second
run differ from those of the first. And one thing differs: what shares a node of autograd's is one graph, so members of which
each runs a backward of its own need ``retain_graph=True`` in all but the last, or no group.
"""

import threading
import weakref
from abc import ABC, abstractmethod

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..ops.lora_linear import SharedInput, transformed
from ..ops.registry import Scope

_slot = threading.local()  # .round: weak reference to the round that waits in this thread; .thread: a `_Thread`
_steps = 0  # of any optimizer, without those that are made within a backward


def _count_step(optimizer, args, kwargs) -> None:
    global _steps
    _steps += torch._C._current_graph_task_id() == -1


register_optimizer_step_post_hook(_count_step)


class _Round:
    """One x, and the parts of it that members have not taken yet."""

    def __init__(self, group, x, circumstances, factors, p):
        self.group, self.x, self.circumstances = group, weakref.ref(x), circumstances
        self.shared = SharedInput(x, factors, p)
        self.factors, self.left = factors, set(range(len(factors)))
        self.columns = None  # of x Wᵀ + bias by member, where the weights are packed
        self.columns_have_bias = False

    def has_part(self, group, i, x, circumstances, factor) -> bool:
        return (
            self.group is group
            and i in self.left
            and self.x() is x
            and self.circumstances == circumstances
            and self.factors[i] is factor
        )


class _Thread:
    """Lives as long as the thread whose slot it is in."""


def _take() -> _Round | None:
    """The round that waits in this thread. Nothing waits any more."""
    reference, _slot.round = getattr(_slot, "round", None), None
    waiting = None if reference is None else reference()
    if waiting is not None:
        waiting.group._waiting.pop(_slot.thread, None)
    return waiting


def _leave(waiting) -> None:
    """Let a round wait in this thread.

    Its group owns it: after a failure in the middle it holds x and all that autograd saved for x until the thread's next
    round, but not for longer than the model lives.
    """
    if not hasattr(_slot, "thread"):
        _slot.thread = _Thread()
    waiting.group._waiting[_slot.thread] = waiting
    _slot.round = weakref.ref(waiting)


def drop_waiting() -> None:
    """A forward ended: who did not follow in it will not any more."""
    waiting = _take()
    if waiting is not None:
        waiting.group._dissolve(waiting)


class ProjectionGroup(ABC):
    """What the members share; a subclass knows where their factors are.

    Args:
        names, members: the adapted linear layers, of equal in-features, in any order.
    """

    def __init__(self, names, members):
        self.names, self.members = tuple(names), list(members)
        self.reason: str | None = None  # why it dissolved
        self._waiting: weakref.WeakKeyDictionary[_Thread, _Round] = weakref.WeakKeyDictionary()
        self._checkpointed = -1  # optimizer steps before the last round that checkpointing may run again

    def _place(self, member) -> int | None:
        """None: of DataParallel's replicas."""
        return next((i for i, own in enumerate(self.members) if own is member), None)

    @abstractmethod
    def _factors(self, x, i, projection) -> list[torch.Tensor] | None:
        """Every member's A, or None if they can't share x now; member i adds this `Projection`."""

    def _base(self, opened, i, weight, bias, projection) -> torch.Tensor | None:
        """The member's x Wᵀ + bias, if it is known already."""
        return None

    def note(self, place: int) -> str:
        """What a report says of a member."""
        if self.reason is not None:
            return f"alone: {self.reason}"
        return f"shares its input with {', '.join(name for i, name in enumerate(self.names) if i != place)}"

    def __getstate__(self):  # no forward runs in a copy
        return {name: value for name, value in self.__dict__.items() if name != "_waiting"}

    def __setstate__(self, state):
        self.__dict__.update(state, _waiting=weakref.WeakKeyDictionary())

    def project(self, member, x, weight, bias, projection):
        """`member`'s output on x with this `Projection` on its base tensors, or None if the member is to run alone."""

        def compute(opened, i):
            base = self._base(opened, i, weight, bias, projection)
            options = {"base": base, **projection.options()}
            return opened.shared.project(i, weight, bias, projection.lora_B, projection.scale, **options)

        return self._in_round(member, x, projection, compute)

    def add(self, member, x, y, projection):
        """`member`'s output y on x with what this `Projection` adds to it, or None if the member is to run alone."""

        def compute(opened, i):
            return opened.shared.update(i, y, projection.lora_B, projection.scale, lora_bias=projection.lora_bias)

        return self._in_round(member, x, projection, compute)

    def _in_round(self, member, x, projection, compute):
        p = projection.dropout
        i = self._place(member)
        circumstances = None if i is None or not self._running() else _circumstances(x, p)
        if circumstances is None:
            return None
        # Out of the slot until the part is computed, so that an exception in between leaves nothing there.
        waiting = _take()
        if waiting is not None and not waiting.has_part(self, i, x, circumstances, projection.lora_A):
            waiting.group._dissolve(waiting)
            waiting = None
        if waiting is None:
            waiting = self._open_round(x, i, circumstances, projection) if self._running() else None
            if waiting is None:
                return None
        waiting.left.discard(i)
        y = compute(waiting, i)
        if waiting.left:
            _leave(waiting)
        return y

    def _running(self) -> bool:
        return self.reason is None or self._checkpointed == _steps

    def _open_round(self, x, i, circumstances, projection):
        factors, p = self._factors(x, i, projection), projection.dropout
        if factors is None:
            return None
        if _may_run_again(circumstances, p):
            self._checkpointed = _steps
        return _Round(self, x, circumstances, factors, p)

    def _dissolve(self, left_over) -> None:
        if self.reason is None:
            missing = ", ".join(self.names[i] for i in sorted(left_over.left))
            taken = ", ".join(name for i, name in enumerate(self.names) if i not in left_over.left)
            self.reason = f"{missing} did not follow {taken} with the same input"


def _circumstances(x, p):
    """What must be equal for a part of a round to be what the member would have computed. None: x can't be shared."""
    if transformed() or type(x) not in (torch.Tensor, torch.nn.Parameter) or x.dim() == 0 or x.is_inference():
        return None  # (inference tensors don't count their changes)
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return (
        x._version,
        torch.is_grad_enabled(),
        torch.get_autocast_dtype(kind) if autocast else None,
        p,
        Scope().forced,
        # Each region of non-reentrant checkpointing has hooks of its own: what one saves, another can't recompute.
        torch._C._autograd._top_saved_tensors_default_hooks(False),
    )


def _may_run_again(circumstances, p) -> bool:
    """Might this forward be recomputed so that it matters what was shared? Reentrant checkpointing runs it without
    gradients, and then only the dropout masks have to be the same."""
    _, grad, *_, hooks = circumstances
    return hooks is not None or (not grad and p > 0)
