"""Layers of whose weight a slice trains: ours, what a user would write, and the inputs that both hold."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import fastft
from fastft.modules.adapted_linear import adapt
from fastft.modules.adapter import Adapter
from fastft.modules.slices import SliceSettings
from fastft.ops.partial_linear import Part, partial_linear
from fastft.optim.slice_adamw import SliceAdamW

from . import peers, shapes
from .ops import lora

RATIO = 0.03
LR, BETAS, EPS = 1e-4, (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Inputs(lora.Inputs):
    """Besides LoRA's: the part, and its delta, a parameter. a and b are those of a LoRA with as many numbers."""

    part: Part | None = None
    delta: nn.Parameter | None = None

    def trained(self):
        return {"dslice": self.delta}

    @property
    def dim(self) -> int:
        return self.part.dim()

    def slice_of(self, weight):
        return weight.index_select(self.dim, self.part.index)


def cut(part: Part, weight):
    """The part of a weight that trains."""
    if part.kind == "entries":
        return weight[part.index.rows(), part.index.columns.long()]
    return weight.index_select(part.dim(), part.index)


def mask(part: Part, weight):
    """1 where a weight's part is, 0 elsewhere, in the weight's dtype."""
    if part.kind == "entries":
        return part.index.mask().to(weight.dtype)
    return torch.zeros_like(weight, requires_grad=False).index_fill_(part.dim(), part.index.long(), 1)


def slice_size(linear: shapes.Linear, kind: str) -> int:
    return max(1, round(RATIO * (linear.k if kind == "columns" else linear.n)))


def equal_rank(linear: shapes.Linear, kind: str) -> int:
    """Of the LoRA with as many trained numbers."""
    other = linear.n if kind == "columns" else linear.k
    return max(1, round(slice_size(linear, kind) * other / (linear.k + linear.n)))


def make_inputs(linear: shapes.Linear, kind: str, dtype: str, device, seed: int) -> Inputs:
    base = lora.make_inputs(linear, dtype, equal_rank(linear, kind), 0.0, device, seed)
    generator = torch.Generator().manual_seed(seed)
    size = linear.k if kind == "columns" else linear.n
    part = Part.of(kind, torch.randperm(size, generator=generator)[: slice_size(linear, kind)], size, device)
    delta = torch.randn(part.shape(base.weight), generator=generator).mul_(linear.k**-0.5)
    return Inputs(**vars(base), part=part, delta=nn.Parameter(delta.to(device, base.a.dtype)))


class PlainSlice(torch.autograd.Function):
    """A trained slice of a live weight in 20 lines of PyTorch: columns (dim 1) keep x's features, rows (dim 0) x itself.

    slice: the float32 parameter whose values stand in the weight, here for its gradient alone; index: int64.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, slice, index, dim):
        ctx.save_for_backward(x.index_select(1, index) if dim else x, weight, index)
        ctx.dim, ctx.dtype = dim, slice.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        kept, weight, index = ctx.saved_tensors
        gradient = (dy if ctx.dim else dy.index_select(1, index)).t() @ kept
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, None, None, gradient.to(ctx.dtype), None, None


class PermutedSlice(torch.autograd.Function):
    """The same as if a permutation had put the slice first: what it keeps and multiplies lies together."""

    @staticmethod
    def forward(ctx, x, weight, bias, slice, dim):
        ctx.save_for_backward(x[:, : slice.shape[1]].clone() if dim else x, weight)
        ctx.dim, ctx.size, ctx.dtype = dim, slice.shape[dim], slice.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        kept, weight = ctx.saved_tensors
        gradient = (dy if ctx.dim else dy[:, : ctx.size]).t() @ kept
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, None, None, gradient.to(ctx.dtype), None


def ours(d: Inputs):
    return lambda x: partial_linear(x, d.weight, d.bias, d.part, d.delta)


def plain(d: Inputs):
    index = d.part.index.long()
    return lambda x: PlainSlice.apply(x, d.weight, d.bias, d.delta, index, d.dim)


def permuted(d: Inputs):
    """Of another slice of that size: the first columns or rows. What its gradient is called, the gate knows."""

    def run():
        y = PermutedSlice.apply(d.x, d.weight, d.bias, d.delta, d.dim)
        dx, gradient = torch.autograd.grad(y, (d.x, d.delta), d.dy)
        return {"y": y.detach(), "dx": dx, "dfirst": gradient}

    return run


def full(d: Inputs):
    """`nn.Linear` with a trained weight."""
    layer = peers.frozen_linear(d).requires_grad_(True)

    def run():
        y = layer(d.x)
        dx, gradient = torch.autograd.grad(y, (d.x, layer.weight), d.dy)
        return {"y": y.detach(), "dx": dx, "dw": gradient}

    return run


def sliced(d: Inputs):
    """The layer as `fastft.attach` makes it, on a weight of its own if it is to change."""
    layer, adapter = peers.frozen_linear(d), Adapter("slice")
    adapt(layer, adapter)
    layer.add_slice(adapter, d.delta.detach().clone(), d.part.index.clone(), SliceSettings(d.part.kind))
    return layer, adapter


def unmerged(d: Inputs):
    layer, adapter = sliced(d)
    layer.set_merged(adapter, False)  # d.weight has its bits again
    return layer


def low_rank(d: Inputs):
    rank = d.a.shape[0]
    layer = fastft.LoRALinear.from_linear(peers.frozen_linear(d), r=rank, lora_alpha=d.scale * rank)
    layer.lora_A, layer.lora_B = d.a, d.b
    return layer


def slice_adamw(d: Inputs):
    layer, _ = sliced(d)
    parameter = layer.slice_delta["slice"]
    optimizer = SliceAdamW([parameter], {parameter: (layer, "slice")}, lr=LR, betas=BETAS, eps=EPS)
    return layer.weight.detach(), parameter, optimizer.step


def adamw_and_copy(d: Inputs, betas=BETAS, **options):
    """What a user writes: PyTorch's AdamW over the slice's values, then copied into the weight."""
    parameter = nn.Parameter(d.slice_of(d.weight).to(d.delta.dtype) + d.delta.detach())
    index = d.part.index.long()
    options = options or {"fused": True, "capturable": d.weight.is_cuda}
    optimizer = torch.optim.AdamW([parameter], lr=LR, betas=betas, eps=EPS, weight_decay=0.0, **options)

    def update():
        optimizer.step()
        d.weight.index_copy_(d.dim, index, parameter.detach().to(d.weight.dtype))

    return d.weight, parameter, update
