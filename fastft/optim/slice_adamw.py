"""AdamW that writes what it trains into the weight in the same pass (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

from typing import Any

import torch
from torch.optim.adamw import adamw

from ..ops.partial import slice_adamw_


class SliceAdamW(torch.optim.Optimizer):
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

    writes_slices = True  # the handle need not write after a step

    def __init__(self, params, slices: dict[torch.nn.Parameter, tuple[Any, str]], lr=1e-3, betas=(0.9, 0.999), eps=1e-8,
                 weight_decay=0.0):  # fmt: skip
        ranges = {"lr": lr >= 0, "eps": eps >= 0, "weight_decay": weight_decay >= 0}
        ranges["betas"] = len(betas) == 2 and all(0 <= b < 1 for b in betas)
        for name, fits in ranges.items():
            if not fits:
                raise ValueError(f"{name} is {locals()[name]}; it must {'lie in [0, 1)' if name == 'betas' else 'be >= 0'}")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self._slices = dict(slices)

    @torch.no_grad()
    def step(self, closure=None):
        """One update. A parameter without a gradient is left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stale = {}
        for group in self.param_groups:
            others = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise RuntimeError("SliceAdamW takes no sparse gradients")
                module, name = self._slices.get(parameter, (None, None))
                site = None if module is None else module.update_site(name)
                state = self._state(parameter)
                if site is None:
                    others.append(parameter)
                    if module is not None and name in module.standing():
                        stale[id(module)] = module
                else:
                    _update_slice(parameter, state, group, module, name, site)
            _update_others(others, self.state, group)
        for module in stale.values():
            module.refresh()
        return loss

    def _state(self, parameter):
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        return state


def _update_slice(delta, state, group, module, name, site):
    state["step"] += 1
    moments = state["exp_avg"], state["exp_avg_sq"]
    rest = group["lr"], *group["betas"], group["eps"], group["weight_decay"], int(state["step"])
    slice_adamw_(*site, delta.detach(), delta.grad.contiguous(), *moments, *map(float, rest[:-1]), rest[-1])
    torch.autograd.graph.increment_version((module.weight, delta))
    module.note_written([name])


def _update_others(parameters, states, group):
    if not parameters:
        return
    found = [states[p] for p in parameters]  # PyTorch's function counts the step itself
    beta1, beta2 = group["betas"]
    adamw(
        parameters,
        [p.grad for p in parameters],
        [state["exp_avg"] for state in found],
        [state["exp_avg_sq"] for state in found],
        [],
        [state["step"] for state in found],
        foreach=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
