"""Routed models of the tests: a small block, one adapter on it, and which rows have it."""

import torch
from torch import nn

import fastft
from fastft.serving.packing import Packer
from fastft.serving.sites import install
from tests.serving.pool import pool

PAGE = 4096


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 6), nn.Linear(8, 4), nn.Linear(8, 4)
        self.o_proj = nn.Linear(6, 8)


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(4))


def route(target, slots, rows=None):
    """Set a BatchRoute: the slot of each row, -1 for none."""
    order = sorted((slot, row) for row, slot in enumerate(slots) if slot >= 0)
    named = [slot for slot, _ in order]
    segments = [[slot, named.index(slot), named.index(slot) + named.count(slot)] for slot in sorted(set(named))]
    segments.insert(len(segments) // 2, [0, 0, 0])
    tensors = torch.tensor(segments, dtype=torch.int32), torch.tensor([row for _, row in order], dtype=torch.int32)
    target.set(*(tensors if named else (None, None)), bool(named), len(slots) if rows is None else rows)


def both(routed, slots):
    route(routed.tokens, slots)
    route(routed.heads, slots)


def one_adapter(model, folder, method):
    """`model` routed, with one random adapter in slot 0; returns the routing."""
    with torch.enable_grad():
        handle = fastft.attach(model, method)
        for i, parameter in enumerate(handle.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)).to(parameter) * 0.1
        handle.save(folder)
    handle.detach()
    routed = install(model)
    adapter = Packer(model, routed.sites, dtype=torch.float32, page_bytes=PAGE).pack(folder)
    routed.bind(pool(routed.sites, [adapter], torch.float32, PAGE))
    return routed


def same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
