"""A small model with linears of both orientations, and how methods of single entries train it."""

import pytest
import torch
from torch import nn

import fastft

Conv1D = pytest.importorskip("transformers").pytorch_utils.Conv1D

NAMES = ("a", "b", "c")
# Kinds of methods, by the name under which tests ask for them. SpIEL collects in updates 1, 2, 5, 6, … and chooses after 2,
# 6, …; LIFT chooses after 2, 4, ….
KINDS = ("mask", "accumulated", "momentum", "lift")


class Net(nn.Module):
    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c = nn.Linear(12, 20), nn.Linear(20, 16, bias=False), Conv1D(10, 16)
        nn.init.normal_(self.c.weight, std=0.3)
        nn.init.normal_(self.c.bias, std=0.3)
        self.to(dtype)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def inputs(step, micro=0, rows=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 * step + micro)
    return torch.randn(rows, 12, generator=generator).to(dtype)


def loss_of(net, x):
    return ((net(x) - torch.linspace(-1, 1, 10, dtype=x.dtype)) ** 2).mean()


def random_mask(shape, seed=0, share=0.2):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def masks(net, seed=0, share=0.2):
    return {name: random_mask(net.get_submodule(name).weight.shape, seed + i, share) for i, name in enumerate(NAMES)}


def method(kind, net, **options):
    if kind == "mask":
        return fastft.SparseMask(mask=masks(net, **options))
    if kind == "lift":
        return fastft.LIFT(**{"rank_budget": 1, "filter_rank": 2, "update_interval": 2, "target_modules": NAMES, **options})
    schedule = {"reselection_steps": 4, "selection_accumulation_steps": 2, "total_steps": 20, "target_modules": NAMES}
    return fastft.SpIEL(**{"density": 0.15, "selection": kind, "initial_reselection_rate": 0.4, **schedule, **options})


def attached(kind, dtype=torch.float32, name="default", net=None, **options):
    net = Net(dtype) if net is None else net
    return net, fastft.attach(net, method(kind, net, **options), name)


def train(net, handle, steps, optimizer=None, start=0, micro=1, lr=0.05, **options):
    """`steps` updates from number `start` on, of `micro` batches each."""
    optimizer = optimizer or handle.optimizer(lr=lr, **options)
    for step in range(start, start + steps):
        for part in range(micro):
            (loss_of(net, inputs(step, part, dtype=net.a.weight.dtype)) / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.step()
    return optimizer


def held(handle):
    return {name: module.sparse[handle.name] for name, module in handle.targets.items()}


def chosen(handle):
    """Masks of what trains now."""
    return {name: one.entries.mask() for name, one in held(handle).items()}


def dense(entries, values):
    out = torch.zeros(entries.shape, dtype=values.dtype)
    out[entries.rows(), entries.columns.long()] = values.detach()
    return out


def deltas(handle):
    """Dense sums of all that differs from the pretrained weights."""
    return {name: sum(dense(*part) for part in one.deltas()) for name, one in held(handle).items()}


def bits(net):
    """Everything that training changes, to be compared bit by bit."""
    return {name: tensor.detach().clone() for name, tensor in (*net.named_parameters(), *net.named_buffers())}


def assert_same_bits(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name


def outputs(net):
    with torch.no_grad():
        return net(inputs(99, dtype=net.a.weight.dtype))
