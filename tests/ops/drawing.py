"""What the drawn tests share: tensors with drawn strides, and the comparison with float64 that few numbers bear."""

import math
from contextlib import contextmanager
from typing import NamedTuple

import torch
from hypothesis import strategies as st

import fastft
from tests.golden import assert_close, ran

STRIDES = st.sampled_from(["contiguous", "transposed", "sliced", "offset", "expanded"])
FEWEST, MOST = 24, 64  # random draws of the values of an example


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
    if not all(outputs):
        return gradients(f, tensors, dys)
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
    """golden's rule for outputs and gradients, on many random values in these layouts: of a few numbers, and of the equal
    rows of an expanded tensor, it is luck which composition errs more, and so is the order of sums. (With fewer than 16
    draws the magnitude's gradient failed now and then, though over 200 of them it errs half as much as the composition's.)

    plain(*tensors, scales): the composition; on absolute values it sums what the terms can be.
    """
    pooled = []
    dims, out_dims = [one and one.dims for one in layouts], [one.dims for one in outputs]
    for seed in range(MOST):
        generator = torch.Generator().manual_seed(seed)
        tensors = derived(*(one if one is None else one.fill(generator) for one in layouts))
        dys = [one.fill(generator) for one in outputs]
        exact = [t if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
        absolute = [t if t is None else t.detach().abs().requires_grad_(t.requires_grad) for t in exact]

        def composed(*t):
            return plain(*t, scales=scales)

        def terms(*t):
            return plain(*t, scales=[abs(s) for s in scales])

        draws = (
            gradients(ours, tensors, dys),
            gradients(composed, exact, [dy.double() for dy in dys]),
            in_another_order(composed, tensors, dys, dims, out_dims, seed),
            gradients(terms, absolute, [dy.double().abs() for dy in dys]),
        )
        for got, want, other, _ in zip(*draws, strict=True):
            assert got.dtype == other.dtype and got.shape == want.shape
        pooled.append(draws)
        if seed >= FEWEST - 1 and all(not t.numel() or t.numel() * (seed + 1) >= 512 for t in draws[0]):
            break
    for i in range(len(pooled[0][0])):
        together = (torch.cat([draws[kind][i].flatten() for draws in pooled]) for kind in range(4))
        assert_close(*together, f"result {i} of {layouts}")
