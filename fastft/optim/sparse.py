"""Optimizers of single entries of weights, which update and write them in one pass; the formulas are in `ops.sparse`."""

import functools
import math
from typing import Any

import torch

from ..ops.sparse import sm3_update, sparse_adamw_, sparse_sm3_
from .in_place import InPlaceOptimizer, checked, step_zero

_MOMENTS = (torch.float32, torch.bfloat16)


class SparseAdamW(InPlaceOptimizer):
    """AdamW over the entries that adapters train in place (SpIEL, LIFT), and over any other parameters beside them.

    Decoupled weight decay acts on the delta, so it pulls towards the pretrained weight. With `ages` every entry counts its
    own updates for the bias correction, since entries come and go (SpIEL, Ansell et al. 2024, arXiv:2401.16405); else all
    count the optimizer's steps.

    State: ``step``, ``exp_avg`` [E], ``exp_avg_sq`` [E] as in `torch.optim.AdamW`, and ``age`` int32 [E] with `ages`.

    Args:
        params: parameters or groups, as for every optimizer.
        entries: parameter -> (the adapted module that holds it, the adapter's name), for those that are entries.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`; no decay by default.
        ages: whether entries have ages.
        moment_dtype: torch.float32, or torch.bfloat16, rounded stochastically (4 bytes less an entry).

    Raises:
        ValueError: lr, betas, eps or weight_decay out of range, another `moment_dtype`.
    """

    copied = (*InPlaceOptimizer.copied, "ages", "moment_dtype")

    def __init__(self, params, entries: dict[torch.nn.Parameter, tuple[Any, str]], lr=1e-3, betas=(0.9, 0.999), eps=1e-6,
                 weight_decay=0.0, ages=True, moment_dtype=torch.float32):  # fmt: skip
        if moment_dtype not in _MOMENTS:
            raise ValueError(f"moment_dtype is {moment_dtype}; it must be torch.float32 or torch.bfloat16")
        super().__init__(params, entries, checked(lr, eps, weight_decay, betas))
        self.ages, self.moment_dtype = ages, moment_dtype

    def _entries_state(self, delta):
        state = self.state[delta]
        if not state:
            state["step"] = step_zero()
            kind = self.moment_dtype if delta.dtype == torch.float32 else delta.dtype
            state["exp_avg"] = torch.zeros_like(delta, dtype=kind)
            state["exp_avg_sq"] = torch.zeros_like(delta, dtype=kind)
            if self.ages:
                state["age"] = torch.zeros_like(delta, dtype=torch.int32)
        return state

    def _update(self, delta, group, module, site):
        state, (beta1, beta2) = self._entries_state(delta), group["betas"]
        state["step"] += 1
        age = state.get("age")
        # What is made under a mode (FakeTensorMode) is of no use outside of it, and the other way round.
        made = corrections.__wrapped__ if torch._C._len_torch_dispatch_stack() else corrections
        table = None if age is None else made(beta1, beta2, delta.device)
        step = int(state["step"])
        sparse_adamw_(
            *(site or _nowhere(delta)), delta.detach(), delta.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"],
            age, table, float(group["lr"]), float(beta1), float(beta2), float(group["eps"]), float(group["weight_decay"]),
            step, step,
        )  # fmt: skip
        return True

    def _update_others(self, parameters, group):
        self._adamw(parameters, group)

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():  # PyTorch has cast all of it to the parameter's dtype
            if parameter in self._parts:
                moments = self.moment_dtype if parameter.dtype == torch.float32 else parameter.dtype
                kinds = {"exp_avg": moments, "exp_avg_sq": moments, "age": torch.int32}
                state.update((name, state[name].to(kind)) for name, kind in kinds.items() if name in state)


class SparseSM3(InPlaceOptimizer):
    """SM3-II (Anil et al. 2019, arXiv:1901.11150) over the entries that adapters train in place: second moments cost a
    number a row and one a column of the weight instead of one an entry, and say where growth pays (SpIEL-MA,
    arXiv:2401.16405).

    No first moment. Decoupled weight decay acts on the delta. State: ``row_max`` [A], ``column_max`` [B]. Other parameters
    get the same with a second moment of their own (AdaGrad, which SM3 with a cover of single elements is).

    Args and errors as `SparseAdamW`, without betas and moments.
    """

    shared_state = ("row_max", "column_max")

    def __init__(self, params, entries: dict[torch.nn.Parameter, tuple[Any, str]], lr=1e-3, eps=1e-8, weight_decay=0.0):
        super().__init__(params, entries, checked(lr, eps, weight_decay))

    def _update(self, delta, group, module, site):
        state = self.state[delta]
        entries = module.sparse[self._parts[delta][1]].entries
        if not state:
            state["row_max"] = delta.new_zeros(entries.shape[0])
            state["column_max"] = delta.new_zeros(entries.shape[1])
        accumulators = state["row_max"], state["column_max"]
        options = float(group["lr"]), float(group["eps"]), float(group["weight_decay"])
        grad = delta.grad.contiguous()
        if site is not None:
            sparse_sm3_(*site, delta.detach(), grad, *accumulators, *options)
        else:  # the op needs a weight to write to
            sm3_update(delta, grad, entries.rows(), entries.columns.long(), *accumulators, *options)
        return True

    def _update_others(self, parameters, group):
        lr = float(group["lr"])
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["sum"] = torch.zeros_like(parameter)
            state["sum"].addcmul_(parameter.grad, parameter.grad)
            parameter.mul_(1 - lr * group["weight_decay"])
            root = (state["sum"].to(torch.promote_types(parameter.dtype, torch.float32)) + group["eps"]).rsqrt_()
            parameter.add_(root.mul_(parameter.grad), alpha=-lr)  # (in float16 eps would be 0)


def _nowhere(delta):
    """A site for a delta that stands in no weight: a row of scratch memory."""
    count = len(delta)
    starts = torch.arange(2, device=delta.device) * count  # (sending numbers to a GPU would wait for it)
    columns = torch.arange(count, dtype=torch.int32, device=delta.device)
    return delta.new_empty(1, count), starts, columns, torch.zeros_like(delta)


@functools.lru_cache(maxsize=8)
def corrections(beta1: float, beta2: float, device: torch.device) -> torch.Tensor:
    """float32 [n, 2]: AdamW's bias corrections 1 / (1 - β₁ᵗ) and 1 / √(1 - β₂ᵗ) of the ages t = 0 … n - 1 (0 is none's).

    So many that later ones are 1 in float32; at most 2²⁰.
    """
    largest = max(beta1, beta2)
    count = 2 if largest == 0 else min(1 << 20, 2 + math.ceil(26 * math.log(2) / -math.log(largest)))
    age = torch.arange(count, dtype=torch.float64)
    age[0] = 1
    table = torch.stack([1 / (1 - beta1**age), (1 - beta2**age).rsqrt()], 1)
    return table.to(device, torch.float32)


def migrate(optimizer, parameter, found: torch.Tensor, **seeds) -> None:
    """Let the state of every optimizer follow entries that were chosen anew: all that is held by entry moves along.

    Args:
        found: int64 [E], which entry of before each of the new ones is, or -1.
        seeds: by name of a state, what new entries start with, [E] (only those count) instead of 0.

    Raises:
        RuntimeError: the state is held in 8-bit codes, which can't move.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return
    old, shared = found >= 0, getattr(optimizer, "shared_state", ())
    if codes := [name for name, value in state.items() if getattr(value, "dtype", None) in (torch.uint8, torch.int8)]:
        raise RuntimeError(
            f"{type(optimizer).__name__} holds {', '.join(codes)} in 8-bit codes with scales of blocks, which can't follow "
            "entries that are chosen anew: train with handle.optimizer(), whose moments can be bfloat16 "
            "(moment_dtype=torch.bfloat16), or with a 32-bit optimizer"
        )
    for name, value in state.items():
        if name not in shared and isinstance(value, torch.Tensor) and value.shape == found.shape and value.dim():
            start = seeds.get(name)
            new = torch.zeros_like(value) if start is None else start.to(value.dtype)
            state[name] = torch.where(old, value[found.clamp(min=0)], new)
