"""What optimizers share that write what they train into the weights in the same pass."""

from typing import Any

import torch
from torch.optim.adamw import adamw


class InPlaceOptimizer(torch.optim.Optimizer):
    """Over the deltas of parts that adapters train in place, and over any other parameters beside them.

    A delta that stands alone in its weight is updated together with it. One that does not (it is unmerged, its base is
    quantised, another adapter's is there too) is updated by itself, and what stands in the weight is then written anew.
    """

    writes_parts = True  # the handle need not write after a step
    shared_state = ()  # names of a part's state that is not by entry
    copied = ("_parts",)  # attributes that copies and pickles have, too

    def __init__(self, params, parts: dict[torch.nn.Parameter, tuple[Any, str]], defaults: dict[str, Any]):
        super().__init__(params, defaults)
        self._parts = dict(parts)

    def __getstate__(self):  # PyTorch's names what it keeps, and leaves all else out
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in self.copied}}

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
                    raise RuntimeError(f"{type(self).__name__} takes no sparse gradients")
                module, name = self._parts.get(parameter, (None, None))
                if module is None:
                    others.append(parameter)
                    continue
                if name not in getattr(module, "_parts", ()):
                    raise RuntimeError(
                        f"adapter {name!r} is no longer on the model (detach, merge_and_unload), but this optimizer still "
                        "holds gradients of it; make a new optimizer"
                    )
                site = module.update_site(name)
                if not self._update(parameter, group, module, site):
                    others.append(parameter)
                if site is None:
                    if name in module.standing():
                        stale[id(module)] = module
                else:
                    torch.autograd.graph.increment_version((module.weight, parameter))
                    module.note_written([name])
            if others:
                self._update_others(others, group)
        for module in stale.values():
            module.refresh()
        return loss

    def _update(self, delta, group, module, site) -> bool:
        """Update one delta, and where it stands; without a site the delta alone, or return False to leave it to
        `_update_others`."""
        raise NotImplementedError

    def _update_others(self, parameters, group) -> None:
        """Parameters that are no parts of weights."""
        raise NotImplementedError

    def _state(self, parameter):
        """The state of AdamW, under the names of `torch.optim.AdamW`."""
        state = self.state[parameter]
        if not state:
            state["step"] = step_zero()
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        return state

    def load_state_dict(self, state_dict):
        """Raises ValueError: the state is of an optimizer with options that this one has not."""
        options = {name for group in state_dict["param_groups"] for name in ("amsgrad", "maximize") if group.get(name)}
        if options:
            raise ValueError(
                f"the state is of an optimizer with {', '.join(sorted(options))}, which {type(self).__name__} has not: "
                "go on with that optimizer over handle.parameters(), or begin with a new state"
            )
        super().load_state_dict(state_dict)
        for state in self.state.values():  # of a checkpoint read onto a GPU, or of a fused optimizer: asking would wait
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].cpu()

    def _adamw(self, parameters, group) -> None:
        """PyTorch's, which counts the step itself; in float32 for float16, where eps would be 0 (as its fused one)."""
        states = [self._state(p) for p in parameters]
        beta1, beta2 = group["betas"]
        means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        held = [*parameters, *means, *squares]
        wide = [t.float() if t.dtype == torch.float16 else t for t in held]
        count = len(parameters)
        adamw(
            wide[:count],
            [p.grad.to(t.dtype) for p, t in zip(parameters, wide)],
            wide[count : 2 * count],
            wide[2 * count :],
            [],
            [state["step"] for state in states],
            foreach=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for t, computed in zip(held, wide):
            if computed is not t:
                t.copy_(computed)


def step_zero() -> torch.Tensor:
    """On the CPU, where reading it waits for nothing, and in float32, whatever PyTorch's defaults are."""
    return torch.tensor(0.0, dtype=torch.float32, device="cpu")


def checked(lr, eps, weight_decay, betas=(0, 0)) -> dict[str, Any]:
    """The options as an optimizer's defaults.

    Raises:
        ValueError: one is out of range.
    """
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name} is {value}; it must be >= 0")
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise ValueError(f"betas is {betas}; it must lie in [0, 1)")
    return {"lr": lr, "eps": eps, "weight_decay": weight_decay, "betas": tuple(betas)}
