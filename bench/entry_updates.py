"""AdamW of single entries of several matrices: ours, and LIFT's published algorithm, which passes over dense tensors."""

from dataclasses import dataclass, replace

import torch
from torch import nn

import fastft
from fastft.methods.entry_selection import random_entries
from fastft.ops.entries import Entries
from fastft.ops.sparse import gather_entries, write_entries_

from . import entries as layers
from . import shapes
from .ops import lora
from .runner import WrongResult, check_close

MATRICES = 6  # of 4096 x 4096: 100 million weights
STATE_BYTES = 24  # an entry: delta, gradient, two moments, pristine value (float32), column
LR, BETAS, EPS = 1e-3, (0.9, 0.95), 1e-6  # the paper's
STEP = 10  # updates that were before, so that the moments matter
SECTOR = 32


@dataclass(frozen=True)
class Inputs:
    """Pretrained weights [N, K], their entries, and of each entry its delta, gradient and moments, float32.

    One choice of entries and one set of values serve all matrices.
    """

    weights: list[torch.Tensor]
    entries: Entries
    delta: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    size: int  # bytes that an update has to move

    def tensors(self):
        values = [self.delta, self.grad, self.exp_avg, self.exp_avg_sq, self.entries.starts, self.entries.columns]
        return [*self.weights, *values]


def make_inputs(linear: shapes.Linear, density: float, dtype: str, device, seed: int) -> Inputs:
    generator, (kind, wide) = torch.Generator().manual_seed(seed), lora.DTYPES[dtype]
    count = layers.count_of(linear, density)
    entries = random_entries((linear.n, linear.k), count, generator).to(device)

    def normal(*size, std=1.0, dtype=wide):
        return torch.randn(size, generator=generator).mul_(std).to(device, dtype)

    return Inputs(
        [normal(linear.n, linear.k, std=linear.k**-0.5, dtype=kind) for _ in range(MATRICES)],
        entries,
        delta=normal(count, std=0.1 * linear.k**-0.5),
        grad=normal(count),
        exp_avg=normal(count, std=0.1),
        exp_avg_sq=normal(count).square_(),
        size=moved(linear, density, dtype),
    )


def moved(linear: shapes.Linear, density: float, dtype: str) -> int:
    """Fewest bytes of an update of all matrices."""
    return MATRICES * moved_of(linear.n * linear.k, layers.count_of(linear, density), lora.DTYPES[dtype][0].itemsize)


def moved_of(size: int, count: int, itemsize: int) -> int:
    """Fewest bytes of an update of `count` random ones of `size` numbers: an entry's column, pristine value and gradient are
    read, delta and moments read and written; so are the sectors of the weight that hold entries."""
    sectors = size * itemsize / SECTOR * (1 - (1 - count / size) ** (SECTOR // itemsize))
    return round(count * (4 + itemsize + 4 + 8 + 8 + 8) + 2 * SECTOR * sectors)


def live(d: Inputs, index: int) -> torch.Tensor:
    """A copy of a weight with round(base + delta) at its entries."""
    weight, at = d.weights[index].clone(), (d.entries.starts, d.entries.columns)
    write_entries_(weight, *at, gather_entries(weight, *at), d.delta)
    return weight


def ours(d: Inputs):
    """The optimizer of an attached model."""
    n, k = d.weights[0].shape
    model = nn.ModuleDict({f"w{i}": nn.Linear(k, n, bias=False, device="meta") for i in range(len(d.weights))})
    for layer, weight in zip(model.values(), d.weights):
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    handle = fastft.attach(model, fastft.SparseMask(indices=dict.fromkeys(model.keys(), d.entries.flat().cpu())))
    optimizer = handle.optimizer(lr=LR, betas=BETAS, eps=EPS)
    for parameter in handle.parameters():
        with torch.no_grad():
            parameter.copy_(d.delta)
        parameter.grad = d.grad.clone()
        moments = {"exp_avg": d.exp_avg.clone(), "exp_avg_sq": d.exp_avg_sq.clone()}
        optimizer.state[parameter] = {"step": torch.tensor(float(STEP)), **moments}
    handle.refresh()
    weights = [layer.weight.detach() for layer in model.values()]

    def run():
        optimizer.step()
        return {"w": weights}

    run.facts = lambda: layers.state_facts(handle, optimizer, STATE_BYTES)
    return run


def published(d: Inputs):
    """LIFT's: masks are dense and on the CPU, moments compact and of the gradient's dtype; the update is put back into the
    dense gradient, and all of that is added to the weight.

    A later call takes for its gradient what the one before left there.
    """
    kind, mask = d.weights[0].dtype, d.entries.mask()
    host, sites, step = mask.cpu(), [], STEP
    for i in range(len(d.weights)):
        gradient = torch.ones_like(d.weights[i])
        gradient[mask] = d.grad.to(kind)
        sites.append((live(d, i), gradient, host, d.exp_avg.to(kind, copy=True), d.exp_avg_sq.to(kind, copy=True)))

    def run():
        nonlocal step
        step += 1
        for weight, gradient, host, mean, square in sites:
            mask = host.to(weight.device)
            g = gradient[mask]
            mean.mul_(BETAS[0]).add_(g, alpha=1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            update = mean / square.sqrt().div_((1 - BETAS[1] ** step) ** 0.5).add_(EPS)
            gradient.zero_()
            gradient[mask] = update
            weight.add_(gradient, alpha=-LR / (1 - BETAS[0] ** step))
        return {"w": [weight for weight, *_ in sites]}

    return run


def copies(d: Inputs):
    """Copies half as many bytes as an update has to move: those are read and written."""
    source = torch.ones(d.size // 2, dtype=torch.uint8, device=d.delta.device)
    target = torch.empty_like(source)
    return lambda: {"copy": target.copy_(source)}


def checker(d: Inputs, factor: float = 2.0):
    """The gate: an update moves the entries of each weight as float64's does, and nothing else."""
    mask = d.entries.mask()
    before = [live(d, i) for i in range(len(d.weights))]
    wide = {name: getattr(d, name).double() for name in ("delta", "grad", "exp_avg", "exp_avg_sq")}
    golden = _moved(d, replace(d, **wide), before, lambda value: value)
    yardstick = _moved(d, d, before, lambda value: value.to(before[0].dtype))

    def check(build):
        for weight, old, want, plain in zip(build(d)()["w"], before, golden, yardstick):
            if not torch.equal(weight[~mask], old[~mask]):
                raise WrongResult("w: what is no entry has changed")
            step = weight[mask].double() - old[mask].double()
            check_close({"w": step}, {"w": want}, {"w": plain}, factor)

    return check


def _moved(d, values, before, rounded):
    """By how much the entries of each weight change, in row-major order, float64."""
    mask, at = d.entries.mask(), STEP + 1
    mean = BETAS[0] * values.exp_avg + (1 - BETAS[0]) * values.grad
    square = BETAS[1] * values.exp_avg_sq + (1 - BETAS[1]) * values.grad**2
    step = LR / (1 - BETAS[0] ** at) * mean / (square.sqrt() / (1 - BETAS[1] ** at) ** 0.5 + EPS)
    delta = values.delta - step
    return [rounded(w[mask].to(delta.dtype) + delta).double() - old[mask].double() for w, old in zip(d.weights, before)]
