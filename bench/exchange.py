"""Exchanging one adapter for another in a model's weights: S²FT's slices, and LoRAs with as many trained numbers.

A call of an arm makes one exchange, and calls go to and fro. PEFT has no exchange: its arm, the yardstick, merges a LoRA at
one call and takes it out at the next, which are the same work (B A is formed, W += s B A, W -= s B A).
"""

import copy
import itertools
from dataclasses import dataclass

import torch
from torch import nn

import fastft
from fastft.ops.partial_linear import Part

from . import shapes
from .e2e import step
from .runner import WrongResult, check_close

TARGET_MODULES = ["down_proj"]


@dataclass(frozen=True)
class Inputs:
    """A pristine model, and of its down projections by name two slices with deltas, and two LoRAs a [R, K], b [N, R]."""

    model: nn.Module
    ratio: float
    parts: list[dict[str, Part]]
    deltas: list[dict[str, torch.Tensor]]
    a: list[dict[str, torch.Tensor]]
    b: list[dict[str, torch.Tensor]]
    rank: int
    scale: float = 2.0

    def names(self) -> list[str]:
        return list(self.a[0])

    def weights(self, adapter: tuple[str, int], dtype=None) -> dict[str, torch.Tensor]:
        """The weights with adapter ("slice", i) or ("lora", i) or none, ("base", 0), in them; formed in `dtype`."""
        kind, i = adapter
        found = {}
        for name in self.names():
            weight = self.model.get_submodule(name).weight.detach()
            found[name] = wide = weight.to(dtype or weight.dtype, copy=True)
            if kind == "slice" and name in self.parts[i]:
                part = self.parts[i][name]
                wide.index_add_(part.dim(), part.index, self.deltas[i][name].to(wide.dtype))
            elif kind == "lora":
                wide.addmm_(self.b[i][name].to(wide.dtype), self.a[i][name].to(wide.dtype), alpha=self.scale)
        return found


def method(ratio: float, i: int) -> fastft.S2FT:
    return fastft.S2FT(down_ratio=ratio, seed=i)


def make_inputs(shape: shapes.Model, dtype: torch.dtype, ratio: float, device, seed: int) -> Inputs:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = step.make_model(shape, dtype, device)
        parts = []
        for i in range(2):
            handle = fastft.attach(copy.deepcopy(model), method(ratio, i))
            parts.append({name: module.part_of(handle.name) for name, module in handle.targets.items()})
        n, k, layers = shape.hidden, shape.intermediate, shape.layers
        rank = max(1, round(sum(len(part.index) for part in parts[0].values()) * n / layers / (k + n)))
        names = [name for name in step.linear_names(model) if name.endswith(tuple(TARGET_MODULES))]
        a = [{name: torch.randn(rank, k, device=device) * k**-0.5 for name in names} for _ in range(2)]
        b = [{name: torch.randn(n, rank, device=device) * 0.02 * (k / rank) ** 0.5 for name in names} for _ in range(2)]
        deltas = [{name: 0.02 * torch.randn(n, len(p.index), device=device) for name, p in one.items()} for one in parts]
    return Inputs(model, ratio, parts, deltas, a, b, rank)


def _arm(model, d: Inputs, calls, adapters):
    """A run that makes one of the calls in turn; `adapters` are what stands in the weights after each."""
    weights, turns = {name: model.get_submodule(name).weight for name in d.names()}, itertools.cycle(calls)

    def run():
        next(turns)()
        return weights

    run.adapters = adapters
    return run


@torch.no_grad()
def ours(d: Inputs):
    """Two S²FT adapters, exchanged by `handle.switch()`."""
    model = copy.deepcopy(d.model)
    attached = [fastft.attach(model, method(d.ratio, i), adapter_name=f"s{i}") for i in range(2)]
    for handle, deltas in zip(attached, d.deltas):
        for name, module in handle.targets.items():
            module.slice_delta[handle.name].copy_(deltas[name])
            module.refresh()
    attached[0].switch()
    return _arm(model, d, [attached[1].switch, attached[0].switch], [("slice", 1), ("slice", 0)])


@torch.no_grad()
def lora(d: Inputs):
    """Two LoRAs of ours: the one is taken out (bits restored), the other merged."""
    model = copy.deepcopy(d.model)
    options = {"r": d.rank, "lora_alpha": d.scale * d.rank, "target_modules": TARGET_MODULES}
    attached = [fastft.attach(model, fastft.LoRA(**options), adapter_name=f"l{i}") for i in range(2)]
    for i, handle in enumerate(attached):
        for name, module in handle.targets.items():
            module.lora_A[handle.name].copy_(d.a[i][name])
            module.lora_B[handle.name].copy_(d.b[i][name])
    attached[0].merge()

    def exchange(old, new):
        attached[old].unmerge()
        attached[new].merge()

    return _arm(model, d, [lambda: exchange(0, 1), lambda: exchange(1, 0)], [("lora", 1), ("lora", 0)])


@torch.no_grad()
def peft(d: Inputs):
    """PEFT's merge of one LoRA, in place."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=d.rank, lora_alpha=d.scale * d.rank, target_modules=TARGET_MODULES)
    wrapped = get_peft_model(copy.deepcopy(d.model), config)
    model = wrapped.get_base_model()
    for name in d.names():
        layer = model.get_submodule(name)
        layer.lora_A["default"].weight.copy_(d.a[0][name])
        layer.lora_B["default"].weight.copy_(d.b[0][name])
    return _arm(model, d, [wrapped.merge_adapter, wrapped.unmerge_adapter], [("lora", 0), ("base", 0)])


def work(shape: shapes.Model, ratio: float, itemsize: int) -> dict[str, int]:
    """Operations and fewest bytes of an exchange of slices, and of PEFT's merge.

    The old slice's pristine values are read and written into the weight; the new one's are read from it and kept, its delta
    is read, their sum written. PEFT reads and writes the weights and reads A and B.
    """
    k, n, units = shape.intermediate, shape.hidden, max(1, round(ratio * shape.intermediate))
    numbers, rank = shape.layers * units * n, max(1, round(units * n / (k + n)))
    return {
        "flops": numbers,
        "moved": numbers * (5 * itemsize + 4),
        "floor_flops": shape.layers * 2 * k * n * (rank + 1),
        "floor_moved": shape.layers * (2 * k * n * itemsize + rank * (k + n) * 4),
    }


def checker(d: Inputs, factor: float = 2.0):
    """The gate: after each of the first two calls the weights are those with the adapter that the arm says."""

    def check(build):
        run = build(d)
        for adapter in run.adapters:
            found = {name: weight.detach() for name, weight in run().items()}
            try:
                check_close(found, d.weights(adapter, torch.float64), d.weights(adapter), factor)
            except WrongResult as error:
                raise WrongResult(f"with {adapter[0]} {adapter[1]} in it, {error}") from None

    return check
