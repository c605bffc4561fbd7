"""What the drawn tests share: tensors with drawn strides, and the comparison with float64 that few numbers bear."""

import math
from contextlib import contextmanager
from typing import NamedTuple

import torch
from hypothesis import strategies as st

import fastft
from tests.golden import assert_close, ran_on_cpu

STRIDES = st.sampled_from(["contiguous", "transposed", "sliced", "offset", "expanded"])
FEWEST, MOST = 24, 64  # random draws of the values of an example


@contextmanager
def on(isa):
    with fastft.testing.cpu_isa(isa), fastft.testing.use("cpu"), ran_on_cpu(isa):
        yield


def laid_out(t, strides):
    """The values of t with other strides (of "expanded" other values too: the last row's in all of them)."""
    if t.dim() < 2 or strides == "contiguous":
        return t
    if strides == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if strides == "expanded":
        return t[..., -1:, :].expand(t.shape)
    # torch's own bfloat16 product on AMX multiplies what follows a row by zero (torch 2.13: F.linear of 31 x 31 gives NaN).
    read = strides == "offset" and t.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), 0.0 if read else float("nan"), dtype=t.dtype)
    view = wide[..., 3::2] if strides == "sliced" else wide[..., 1 : 1 + t.shape[-1]]
    return view[..., : t.shape[-1]].copy_(t)


class Layout(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: str
    trains: bool

    def fill(self, generator):
        values = torch.randn(self.shape, generator=generator).to(self.dtype)
        return laid_out(values, self.strides).requires_grad_(self.trains)


def layout(data, *shape, dtype, trains=True):
    strides = data.draw(STRIDES, "strides") if len(shape) > 1 and math.prod(shape) else "contiguous"
    return Layout(shape, dtype, strides, trains)


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
    rows of an expanded tensor, it is luck which composition errs more. (With four draws a magnitude's gradient failed now
    and then, though over 200 of them it errs half as much as the composition's.)

    So is the order of a float32 sum. Adding n terms one by one walks sqrt(n / 12) ulps of the partial sums, and four
    standard deviations of that are less than sqrt(n) ulps of the terms' absolute values, where golden allows 2: the floor of
    sums of more than four terms is that. (PyTorch's GEMM and GEMV differ by so much; strides decide which it takes.)

    plain(*tensors, scales): the composition; on absolute values it sums what the terms can be.
    """
    sizes = [(*one.shape, math.prod(one.shape[:-1])) for one in (*layouts, *outputs) if one]

    def draws(generator):
        tensors = derived(*(one if one is None else one.fill(generator) for one in layouts))
        dys = [one.fill(generator) for one in outputs]

        def values(change):
            return [t if t is None else change(t.detach().contiguous()).requires_grad_(t.requires_grad) for t in tensors]

        def composed(*t):
            return plain(*t, scales=scales)

        def terms(*t):
            return plain(*t, scales=[abs(s) for s in scales])

        return (
            gradients(ours, tensors, dys),
            gradients(composed, values(torch.Tensor.double), [dy.double() for dy in dys]),
            gradients(composed, values(torch.Tensor.clone), [dy.contiguous() for dy in dys]),
            gradients(terms, values(lambda t: t.double().abs()), [dy.double().abs() for dy in dys]),
        )

    judge(draws, max(n for own in sizes for n in own), str(layouts))


def judge(draws, longest, what):
    """golden's rule for what `draws` gives of a generator: lists (ours, float64's, plain PyTorch's, of absolute values).

    longest: the most terms that one number is the sum of. Why many are drawn, and what `longest` allows: `check`.
    """
    pooled = []
    for seed in range(MOST):
        drawn = draws(torch.Generator().manual_seed(seed))
        for got, want, other, _ in zip(*drawn, strict=True):
            assert got.dtype == other.dtype and got.shape == want.shape
        pooled.append(drawn)
        if seed >= FEWEST - 1 and all(not t.numel() or t.numel() * (seed + 1) >= 512 for t in drawn[0]):
            break
    for i in range(len(pooled[0][0])):
        got, want, other, magnitude = (torch.cat([drawn[kind][i].flatten() for drawn in pooled]) for kind in range(4))
        assert_close(got, want, other, magnitude * max(1.0, math.sqrt(longest) / 2), f"result {i} of {what}")
