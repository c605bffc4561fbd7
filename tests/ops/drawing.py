"""What the drawn tests share: tensors with drawn strides, and the comparison with float64 that few numbers bear."""

import math
from contextlib import contextmanager
from typing import NamedTuple

import torch
from hypothesis import strategies as st

import fastft
from tests.golden import assert_close, ran

STRIDES = st.sampled_from(["contiguous", "transposed", "sliced", "offset", "expanded"])
ORDERS = 4


@contextmanager
def on(isa):
    with fastft.testing.cpu_isa(isa), fastft.testing.use("cpu"), ran("cpu", f"tests on {isa}", f"fastft_cpu_{isa}"):
        yield


def laid_out(t, strides):
    """The values of t with other strides (of "expanded" other values too: the last row's in all of them)."""
    if t.dim() < 2 or strides == "contiguous":
        return t
    if strides == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if strides == "expanded":
        return t[..., -1:, :].expand(t.shape)
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), float("nan"), dtype=t.dtype)
    view = wide[..., 3::2] if strides == "sliced" else wide[..., 1 : 1 + t.shape[-1]]
    return view[..., : t.shape[-1]].copy_(t)


class Layout(NamedTuple):
    """A tensor without its values. dims: names of its last dimension or two; what is before them is one dimension, "t"."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: str
    trains: bool
    dims: tuple[str, ...]

    def fill(self, generator):
        values = torch.randn(self.shape, generator=generator).to(self.dtype)
        return laid_out(values, self.strides).requires_grad_(self.trains)


def layout(data, *shape, dtype, trains=True, dims=()):
    strides = data.draw(STRIDES, "strides") if len(shape) > 1 and math.prod(shape) else "contiguous"
    return Layout(shape, dtype, strides, trains, dims)


def rows(t, dims):
    """t with all that is before its named dimensions as one."""
    if dims[0] != "t":
        return t
    return t.reshape(math.prod(t.shape[: 1 - len(dims)]), *t.shape[1 - len(dims) :])


def in_another_order(f, tensors, dys, dims, outputs, seed):
    """`gradients` of f with every sum in another order: a permutation of each named dimension, undone in the results."""
    generator, orders = torch.Generator().manual_seed(seed), {}

    def move(t, own, back=False):
        t = rows(t, own)
        for d, name in enumerate(own):
            if name not in orders:
                orders[name] = torch.randperm(t.shape[d], generator=generator)
            t = t.index_select(d, orders[name].argsort() if back else orders[name])
        return t

    moved = [t if t is None else move(t.detach(), own).requires_grad_(t.requires_grad) for t, own in zip(tensors, dims)]
    found = gradients(f, moved, [move(dy, own) for dy, own in zip(dys, outputs)])
    trained = [own for t, own in zip(tensors, dims) if t is not None and t.requires_grad]
    return [move(t, own, back=True) for t, own in zip(found, [*outputs, *trained])]


def gradients(f, tensors, dys):
    """Outputs of f and gradients of the tensors that require one."""
    tensors = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors]
    ys = f(*tensors)
    trained = [t for t in tensors if t is not None and t.requires_grad]
    live = [(y, dy) for y, dy in zip(ys, dys) if y.requires_grad]
    found = []
    if live:
        outputs, theirs = zip(*live)
        found = torch.autograd.grad(outputs, trained, theirs, allow_unused=True)
    return [*(y.detach() for y in ys), *(torch.zeros_like(t) if g is None else g for g, t in zip(found, trained))]


def check(ours, plain, layouts, outputs, scales=(1.0,), derived=lambda *tensors: tensors):
    """golden's rule for outputs and gradients, on as many random values in these layouts as it takes to compare 128 numbers
    of each: of a few numbers, which composition errs more is luck. So is the order of sums, of which plain PyTorch has those
    of `ORDERS` in which it errs most, as in golden.plain_product.

    plain(*tensors, scales): the composition; on absolute values it sums what the terms can be.
    """
    pooled = []
    dims, out_dims = [one and one.dims for one in layouts], [one.dims for one in outputs]
    for seed in range(16):
        generator = torch.Generator().manual_seed(seed)
        tensors = derived(*(one if one is None else one.fill(generator) for one in layouts))
        dys = [one.fill(generator) for one in outputs]
        exact = [t if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
        absolute = [t if t is None else t.detach().abs().requires_grad_(t.requires_grad) for t in exact]
        got = gradients(ours, tensors, dys)
        want = gradients(lambda *t: plain(*t, scales=scales), exact, [dy.double() for dy in dys])
        terms = gradients(lambda *t: plain(*t, scales=[abs(s) for s in scales]), absolute, [dy.double().abs() for dy in dys])
        others = [
            in_another_order(lambda *t: plain(*t, scales=scales), tensors, dys, dims, out_dims, order)
            for order in range(ORDERS if all(out_dims) else 0)
        ] or [gradients(lambda *t: plain(*t, scales=scales), tensors, dys)]
        draws = []
        for i, (g, w, m) in enumerate(zip(got, want, terms, strict=True)):
            candidates = [other[i].reshape(w.shape) for other in others]
            worst = max(candidates, key=lambda p: (p.double() - w).abs().max().item()) if w.numel() else candidates[0]
            assert g.dtype == worst.dtype and g.shape == w.shape
            draws.append([part.flatten() for part in (g, w, worst, m)])
        pooled.append(draws)
        if seed >= 3 and all(not t.numel() or t.numel() * (seed + 1) >= 128 for t in got):
            break
    for i, parts in enumerate(zip(*pooled)):
        assert_close(*(torch.cat(part) for part in zip(*parts)), f"result {i} of {layouts}")
