"""SpIEL written down a second time, on dense tensors in float64 and with Python's sets: what `test_spiel` compares with."""

import copy
import math

import torch
from torch.func import functional_call

from .sparse_net import NAMES, inputs, loss_of


class DenseSpIEL:
    """From the paper's text (arXiv:2401.16405, sections 3.2 to 3.4); `first`: masks of the entries that train first."""

    def __init__(self, net, first, method, lr, betas=(0.9, 0.999), eps=1e-6, decay=0.0):
        self.net, self.method, self.lr, self.betas, self.eps, self.decay = (
            copy.deepcopy(net).double(),
            method,
            lr,
            betas,
            eps,
            decay,
        )
        self.base = {name: self.net.get_submodule(name).weight.detach().clone() for name in NAMES}
        self.active = {name: mask.clone() for name, mask in first.items()}
        self.delta, self.mean, self.square, self.age = (
            {n: torch.zeros_like(w) for n, w in self.base.items()} for _ in range(4)
        )
        self.rows = {name: w.new_zeros(w.shape[0]) for name, w in self.base.items()}
        self.columns = {name: w.new_zeros(w.shape[1]) for name, w in self.base.items()}
        self.candidates, self.updates, self.replaced = {}, 0, []

    def gradients(self, x, share):
        weights = {n: (self.base[n] + self.delta[n]).requires_grad_() for n in NAMES}
        given = {f"{n}.weight": w for n, w in weights.items()}
        loss = loss_of(lambda x: functional_call(self.net, given, (x,)), x.double()) * share
        return dict(zip(NAMES, torch.autograd.grad(loss, list(weights.values())), strict=True))

    def update(self, micro=1):
        s, a = self.method.reselection_steps, self.method.selection_accumulation_steps
        collecting = self.method.selection == "accumulated" and self.updates % s < a
        total = dict.fromkeys(NAMES, 0)
        for part in range(micro):
            for name, gradient in self.gradients(inputs(self.updates, part), 1 / micro).items():
                if collecting and name not in self.candidates:
                    most = int(self.active[name].sum())
                    self.candidates[name] = set(gradient.abs().flatten().topk(most).indices.tolist())
                    self.sums = getattr(self, "sums", {}) | {name: (torch.zeros_like(gradient), torch.zeros_like(gradient))}
                total[name] = total[name] + gradient
        for name in NAMES:
            self.momentum(name, total[name]) if self.method.selection == "momentum" else self.adamw(name, total[name])
            if collecting:
                self.sums[name][0].add_(total[name])
                self.sums[name][1].add_(total[name] ** 2)
        self.updates += 1
        if self.updates % s == a % s and self.updates <= self.method.total_steps:
            self.choose()

    def adamw(self, name, gradient):
        on, (beta1, beta2) = self.active[name], self.betas
        gradient, age = gradient[on], self.age[name][on] + 1
        mean = beta1 * self.mean[name][on] + (1 - beta1) * gradient
        square = beta2 * self.square[name][on] + (1 - beta2) * gradient**2
        step = mean / (1 - beta1**age) / ((square / (1 - beta2**age)).sqrt() + self.eps)
        self.delta[name][on] = self.delta[name][on] * (1 - self.lr * self.decay) - self.lr * step
        self.mean[name][on], self.square[name][on], self.age[name][on] = mean, square, age

    def momentum(self, name, gradient):
        rows, columns = self.rows[name].clone(), self.columns[name].clone()
        for i, j in self.active[name].nonzero().tolist():
            bound = min(rows[i], columns[j]) + gradient[i, j] ** 2
            self.delta[name][i, j] *= 1 - self.lr * self.decay
            self.delta[name][i, j] -= self.lr * gradient[i, j] / math.sqrt(bound + self.eps)
            self.rows[name][i], self.columns[name][j] = max(self.rows[name][i], bound), max(self.columns[name][j], bound)

    def rate(self):
        t, whole, p = self.updates, self.method.total_steps, self.method.initial_reselection_rate
        if self.method.policy == "cosine":
            return p * (1 + math.cos(math.pi * t / whole)) / 2
        return 1.0 if t == self.method.selection_accumulation_steps else p * (1 - t / whole)

    def choose(self):
        count = 0
        for name in NAMES:
            on = set(self.active[name].flatten().nonzero().flatten().tolist())
            most, moved = int(self.rate() * len(on)), self.delta[name].abs().flatten()
            dropped = sorted(on, key=lambda e: (moved[e].item(), e))[:most]
            if self.method.selection == "momentum":
                score = (self.rows[name][:, None] * self.columns[name]).flatten()
                eligible = set(range(score.numel())) - on
            else:
                score, eligible = self.sums[name][0].abs().flatten(), self.candidates[name] - (on - set(dropped))
            best = sorted(eligible, key=lambda e: (-score[e].item(), e))[:most]
            grown, again = [e for e in best if e not in on], {e for e in best if e in on}
            gone = [e for e in dropped if e not in again][: len(grown)]
            for of in (self.delta, self.mean, self.square, self.age):
                of[name].view(-1)[gone] = 0
            self.active[name].view(-1)[gone] = False
            self.active[name].view(-1)[grown] = True
            if self.method.selection == "accumulated":
                self.seed(name, grown)
            count += len(grown)
        self.replaced.append(count)
        self.candidates = {}

    def seed(self, name, grown):
        seen, (beta1, beta2) = self.method.selection_accumulation_steps, self.betas
        sums, squares = (t.view(-1)[grown] for t in self.sums[name])
        self.mean[name].view(-1)[grown] = sums / seen * (1 - beta1**seen)
        self.square[name].view(-1)[grown] = squares / seen * (1 - beta2**seen)
        self.age[name].view(-1)[grown] = float(seen)
