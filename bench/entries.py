"""Layers of whose weight single entries train: ours, PEFT's, what a user would write, and the inputs that all hold."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import fastft
from fastft.methods.entry_selection import random_entries
from fastft.modules.merging import PART
from fastft.ops.entries import Entries
from fastft.ops.sparse import gather_entries, write_entries_

from . import peers, published_spiel, shapes
from .ops import lora
from .runner import Fact


@dataclass(frozen=True)
class Inputs(lora.Inputs):
    """Besides LoRA's: the entries, and their delta, a parameter. `weight` is pretrained; arms write into copies of it.

    a and b are those of a LoRA with as many numbers.
    """

    entries: Entries | None = None
    delta: nn.Parameter | None = None

    def trained(self):
        return {"ddelta": self.delta}

    def everything(self):
        """The tensors that each arm gets for free."""
        return [*self.tensors(), self.a, self.b, self.entries.starts, self.entries.columns]


def count_of(linear: shapes.Linear, density: float) -> int:
    return max(1, round(density * linear.k * linear.n))


def equal_rank(linear: shapes.Linear, density: float) -> int:
    """Of the LoRA with as many trained numbers."""
    return max(1, round(count_of(linear, density) / (linear.k + linear.n)))


def make_inputs(linear: shapes.Linear, density: float, dtype: str, device, seed: int) -> Inputs:
    """Random inputs, at random entries a delta as large as the weight."""
    base = lora.make_inputs(linear, dtype, equal_rank(linear, density), 0.0, device, seed)
    generator = torch.Generator().manual_seed(seed)
    entries = random_entries((linear.n, linear.k), count_of(linear, density), generator).to(device)
    delta = torch.randn(len(entries), generator=generator).mul_(linear.k**-0.5)
    return Inputs(**vars(base), entries=entries, delta=nn.Parameter(delta.to(device, base.a.dtype)))


def written(d: Inputs) -> Inputs:
    """The same with round(base + delta) at the entries of a copy of the weight."""
    weight, base = d.weight.clone(), gather_entries(d.weight, d.entries.starts, d.entries.columns)
    write_entries_(weight, d.entries.starts, d.entries.columns, base, d.delta.detach())
    return replace(d, weight=weight)


def attached(d: Inputs):
    """(layer, handle) as `fastft.attach` makes them, which write into the inputs' weight."""
    model = nn.ModuleDict({"linear": peers.frozen_linear(d)})
    handle = fastft.attach(model, fastft.SparseMask(indices={"linear": d.entries.flat().cpu()}))
    with torch.no_grad():
        handle.targets["linear"].sparse[handle.name].delta.copy_(d.delta)
    handle.refresh()
    return model["linear"], handle


def training(make):
    """Builder of an arm: forward, dX and the gradient of the entries; `make` gives (layer, its trained parameter)."""

    def build(d: Inputs):
        layer, delta = make(d)

        def run():
            y = layer(d.x)
            dx, gradient = torch.autograd.grad(y, (d.x, delta), d.dy)
            return {"y": y.detach(), "dx": dx, "ddelta": gradient}

        run.parameters = lambda: [delta, *(layer.parameters() if isinstance(layer, nn.Module) else layer.tensors)]
        return run

    return build


def ours(d: Inputs):
    layer, handle = attached(replace(d, weight=d.weight.clone()))
    return layer.train(), layer.sparse[handle.name].delta


class PlainEntries(torch.autograd.Function):
    """Trained entries of a live weight in 20 lines of PyTorch: all of dW, of which they are picked.

    delta: float32 parameter, here for its gradient alone; flat: int64, the entries' positions (picking by them takes half of
    the time that it takes by rows and columns).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, delta, flat):
        ctx.save_for_backward(x, weight, flat)
        ctx.dtype = delta.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight, flat = ctx.saved_tensors
        gradient = (dy.t() @ x).flatten().index_select(0, flat).to(ctx.dtype)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, None, None, gradient, None


def plain(d: Inputs):
    live, flat = written(d), d.entries.flat()

    def layer(x):
        return PlainEntries.apply(x, live.weight, d.bias, d.delta, flat)

    layer.tensors = [live.weight, flat]
    return layer, d.delta


def published(d: Inputs):
    """SpIEL's formula in PyTorch's own operations (`published_spiel`)."""
    flat = d.entries.flat()

    def layer(x):
        return F.linear(x, published_spiel.live(d.weight, flat, d.delta), d.bias)

    layer.tensors = [d.weight, flat]
    return layer, d.delta


def shira(d: Inputs):
    """PEFT's SHiRA: clones the weight and adds the entries in each forward, forms all of dW in each backward."""
    from peft import ShiraConfig, inject_adapter_in_model

    config = ShiraConfig(r=1, target_modules=["linear"])
    layer = inject_adapter_in_model(config, nn.ModuleDict({"linear": peers.frozen_linear(d)}))["linear"]
    fill_shira(layer, d.entries, d.delta)
    return layer.train(), d.delta


def fill_shira(layer, entries: Entries, delta: nn.Parameter) -> None:
    """Let a SHiRA layer train these entries: its own number of them is a LoRA's."""
    layer.shira_weight["default"] = delta
    layer.shira_indices["default"] = torch.stack([entries.rows(), entries.columns.long()]).int()


def beside(d: Inputs):
    """Forward with the delta beside the weight as it was."""
    layer, handle = attached(d)
    handle.unmerge()  # d.weight has its bits again: a copy that only one arm reads would come from colder caches
    return layer


class CsrDelta(nn.Module):
    """The same by PyTorch's product of a CSR matrix, in float32: it has none of 16-bit matrices on CPUs."""

    def __init__(self, d: Inputs):
        super().__init__()
        self.base, (n, k) = peers.frozen_linear(d), d.weight.shape
        self.delta = torch.sparse_csr_tensor(d.entries.starts, d.entries.columns.long(), d.delta.detach(), (n, k))

    def forward(self, x):
        return self.base(x) + (self.delta @ x.t().to(self.delta.dtype)).t().to(x.dtype)


def state_facts(handle, optimizer, target=None) -> list[Fact]:
    """What an adapter of ours holds between two steps beyond the pretrained model, a trained entry; indices included.

    "entry_bytes": of tensors with a number for each entry (delta, gradient, moments, age, pristine value, column);
    "state_bytes" also of what there is a row (where it starts, 8 bytes).
    """
    parameters = list(handle.parameters())
    held = [p.grad for p in parameters if p.grad is not None]
    for module in handle.targets.values():
        sparse = module.sparse[handle.name]
        held += [*sparse.parameters(), *sparse.buffers(), module._buffers[PART]]
    held += [value for p in parameters for value in optimizer.state[p].values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held if t.dim()}
    starts = [module.sparse[handle.name].starts for module in handle.targets.values()]
    count = sum(p.numel() for p in parameters)
    total = sum(storages.values()) / count
    by_entry = total - sum(t.untyped_storage().nbytes() for t in starts) / count
    met = None if target is None else by_entry <= target
    return [
        Fact("entry_bytes", by_entry, "B/entry", target=target, met=met),
        Fact("state_bytes", total, "B/entry"),
    ]
