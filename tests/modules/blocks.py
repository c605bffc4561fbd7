"""An attention's projections, grouped and beside a twin that is not."""

import copy

import torch
from torch import nn

import fastft
from fastft.modules import groups
from tests.methods.models import randomize

K = 24


class Block(nn.Module):
    """q, k and v as an attention has them; `call` says how its forward calls them."""

    def __init__(self, call=None):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(K, n) for n in (16, 8, 12))
        self.call = call or (lambda m, x: (m.q_proj(x), m.k_proj(x), m.v_proj(x)))

    def forward(self, x):
        return torch.cat(self.call(self, x), -1)


def pair(call=None, **options):
    """One block grouped, its twin not."""
    torch.manual_seed(0)
    block = Block(call)
    twin = copy.deepcopy(block)
    options = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], **options}
    torch.manual_seed(1)
    handle = fastft.attach(block, fastft.LoRA(**options))
    torch.manual_seed(1)
    apart = fastft.attach(twin, fastft.LoRA(**options, group_projections=False))
    randomize(handle)
    randomize(apart)
    return block, handle, twin, apart


def some_x(*lead):
    return torch.randn(*(lead or (5, 3)), K, generator=torch.Generator().manual_seed(1)).requires_grad_()


def run(block, handle, x, forward=None, seed=0):
    """Output and all gradients."""
    x = x.detach().clone().requires_grad_()
    for parameter in handle.parameters():
        parameter.grad = None
    torch.manual_seed(seed)
    y = (block if forward is None else forward)(x * 1)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in handle.parameters())]


def assert_equal(got, want, **tolerance):
    assert len(got) == len(want)
    for g, w in zip(got, want):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w, **(tolerance or {"rtol": 1e-5, "atol": 1e-5}))


def shrinks(function):
    with fastft.testing.record() as calls:
        function()
    return sum(call.op == "lora_shrink" for call in calls)


def nothing_waits():
    return getattr(groups._slot, "round", None) is None


ORDERS = {
    "q, k, v": lambda m, x: (m.q_proj(x), m.k_proj(x), m.v_proj(x)),
    "v, q, k": lambda m, x: (m.v_proj(x), m.q_proj(x), m.k_proj(x)),
}
