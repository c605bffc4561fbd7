"""SpIEL as published (Ansell et al. 2024, arXiv:2401.16405, sections 3.1 to 3.3), in PyTorch's own operations.

Each forward forms W + scatter(delta) anew, autograd all of dW, of which the entries' gradient is picked. Every period the
largest of a dense gradient become candidates, their gradients are summed over some updates, and then the entries that have
moved least make room for the candidates whose sum is largest; their moments begin with what was summed.
"""

import torch
import torch.nn.functional as F
from torch import nn

FIRST_RATE, RATE = 1.0, 0.2  # of the entries are replaced: by the first choice, by later ones


class Site:
    """A linear of which entries train. flat: int64 [E], their positions; delta: float32 [E], a parameter."""

    def __init__(self, linear, flat):
        self.linear, self.flat = linear, flat
        self.delta = nn.Parameter(torch.zeros(len(flat), device=flat.device))
        self.watched, self.live, self.candidates = False, None, None

    def forward(self, x):
        weight = live(self.linear.weight, self.flat, self.delta)
        if self.watched and weight.requires_grad:
            weight.retain_grad()
            self.live = weight
        return F.linear(x, weight, self.linear.bias)

    def see(self):
        """Take the dense gradient of an update in."""
        gradient = self.live.grad.flatten().float()
        self.live = None
        if self.candidates is None:
            self.candidates = gradient.abs().topk(len(self.flat)).indices
            self.sums, self.squares = (torch.zeros(len(self.candidates), device=gradient.device) for _ in range(2))
        seen = gradient[self.candidates]
        self.sums += seen
        self.squares += seen**2

    @torch.no_grad()
    def choose(self, rate: float, updates: int, optimizer) -> int:
        """Exchange at most that part of the entries; how many. updates: that were seen."""
        order, most = self.delta.abs().argsort(), int(rate * len(self.flat))
        dropped = order[:most]
        open_to = ~torch.isin(self.candidates, self.flat[order[most:]])  # one that is dropped may come again, and stays
        found, sums, squares = (t[open_to] for t in (self.candidates, self.sums, self.squares))
        best = sums.abs().topk(min(most, len(found))).indices
        grown = best[~torch.isin(found[best], self.flat)]
        gone = dropped[~torch.isin(self.flat[dropped], found[best])][: len(grown)]
        self.flat[gone] = found[grown]
        self.delta[gone] = 0
        state, (beta1, beta2) = optimizer.state[self.delta], optimizer.param_groups[0]["betas"]
        state["exp_avg"][gone] = sums[grown] / updates * (1 - beta1**updates)
        state["exp_avg_sq"][gone] = squares[grown] / updates * (1 - beta2**updates)
        self.candidates = None
        return len(grown)


def live(weight, flat, delta):
    """W + scatter(delta) [N, K], which delta's gradient goes through."""
    return weight.flatten().index_add(0, flat, delta.to(weight.dtype)).view_as(weight)


class Schedule:
    """When dense gradients are looked at, and when entries are exchanged: every `period` updates, after `summed` of them."""

    def __init__(self, sites: list[Site], period: int, summed: int, updates: int = 0):
        self.sites, self.period, self.summed, self.updates, self.changed = sites, period, summed, updates, 0
        self.optimizer: torch.optim.Optimizer | None = None
        self._watch()

    def _watch(self):
        for site in self.sites:
            site.watched = self.updates % self.period < self.summed

    def after_update(self):
        if self.updates % self.period < self.summed:
            for site in self.sites:
                site.see()
        self.updates += 1
        if self.updates % self.period == self.summed:
            rate = FIRST_RATE if self.updates == self.summed else RATE
            self.changed += sum(site.choose(rate, self.summed, self.optimizer) for site in self.sites)
        self._watch()
