"""AdamW that writes what it trains into the weight in the same pass (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

from typing import Any

import torch

from ..ops.partial import slice_adamw_
from .in_place import InPlaceOptimizer, checked


class SliceAdamW(InPlaceOptimizer):
    """AdamW over the slices that adapters train in place, and over any other parameters beside them.

    For a slice, moments, float32 delta and the slice of the weight are updated in one pass. Decoupled weight decay acts on
    the delta, so it pulls towards the pretrained weight, not towards 0. Other parameters are PyTorch's AdamW's.

    State and its names (``step``, ``exp_avg``, ``exp_avg_sq``) are those of `torch.optim.AdamW`, so either resumes from the
    other's ``state_dict``.

    Args:
        params: parameters or groups, as for every optimizer.
        slices: parameter -> (the adapted module that holds it, the adapter's name), for those that are slices.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`; no decay by default.

    Raises:
        ValueError: lr, betas, eps or weight_decay out of range.
    """

    def __init__(self, params, slices: dict[torch.nn.Parameter, tuple[Any, str]], lr=1e-3, betas=(0.9, 0.999), eps=1e-8,
                 weight_decay=0.0):  # fmt: skip
        super().__init__(params, slices, checked(lr, eps, weight_decay, betas))

    def _update(self, delta, group, module, site):
        if site is None:
            return False
        state = self._state(delta)
        state["step"] += 1
        moments = state["exp_avg"], state["exp_avg_sq"]
        rest = map(float, (group["lr"], *group["betas"], group["eps"], group["weight_decay"]))
        slice_adamw_(*site, delta.detach(), delta.grad.contiguous(), *moments, *rest, int(state["step"]))
        return True

    def _update_others(self, parameters, group):
        self._adamw(parameters, group)
