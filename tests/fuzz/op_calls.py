"""How a drawn op is called and judged.

Exact ops have to give the reference's bits; of sums golden's rule holds, against the reference in float64.
"""

import torch
from hypothesis import strategies as st

import fastft
from fastft import _native
from fastft.ops import registry
from tests.golden import poisoned
from tests.ops import test_partial, test_sparse
from tests.ops.drawing import judge

F32 = torch.float32


def called(name, arguments, backend=None):
    """What the op returns and what it changes, as a list; the arguments stay what they are."""
    op, schema = registry.OPS[name], getattr(torch.ops.fastft, name).default._schema
    own = [copied(one) if apart(one) else one.clone() if torch.is_tensor(one) else one for one in arguments]
    changed = [t for t, info in zip(own, schema.arguments) if info.alias_info and t is not None]
    if backend is None:
        with poisoned():
            returned = op(*own)
    else:
        with fastft.testing.use(backend), fastft.testing.record():  # beside those of the library
            returned = op(*own)
    returned = () if returned is None else returned if isinstance(returned, tuple) else (returned,)
    for t in own:
        assert not apart(t) or test_sparse.untouched(t._base, t.shape[1]), f"{name} wrote beside a matrix"
    return [*returned, *changed]


def apart(one):
    """Is it a matrix whose rows lie apart, as `copied` makes them?"""
    return torch.is_tensor(one) and one.dim() == 2 and one.numel() > 0 and not one.is_contiguous()


def copied(matrix):
    """The same in a wider matrix of NaN."""
    return test_partial.wider(matrix)[1]


def matrix(data, rows, columns, dtype, factor=1.0):
    """A function of a generator that fills a matrix; drawn is whether its rows lie apart."""
    lies_apart = data.draw(st.booleans(), "rows apart")

    def fill(generator):
        values = (factor * torch.randn(rows, columns, generator=generator)).to(dtype)
        return copied(values) if lies_apart else values

    return fill


def plain(*size, dtype=F32, factor=1.0):
    return lambda generator: (factor * torch.randn(*size, generator=generator)).to(dtype)


def filled(arguments, generator):
    return [one(generator) if callable(one) else one for one in arguments]


def widened(one, change=lambda t: t):
    """Of floating-point tensors the float64 values, changed; of floats the changed number."""
    if torch.is_tensor(one):
        return change(one.double()) if one.is_floating_point() else one
    return one


def sums(name, longest, *arguments, fixed=(), beside=None):
    """Results that add up to `longest` terms. fixed: positions of floats that are no factor of the terms (dropout's p).

    beside: (position of a float32 matrix, that of the adapter which it multiplies). CPUs that multiply pairs of bfloat16
    round it to the adapter's dtype, as a composition in those dtypes does.
    """

    def rounded(own):
        at, adapter = beside or (None, None)
        if at is None or own[adapter].dtype is not torch.bfloat16 or _native.chosen_isa not in ("avx512_bf16", "amx"):
            return own
        return [one.bfloat16().float() if i == at else one for i, one in enumerate(own)]

    def terms(one, at):
        if isinstance(one, float) and at not in fixed:
            return abs(one)
        return widened(one, torch.abs)

    def draws(generator):
        own = filled(arguments, generator)
        wide = called(name, [widened(one) for one in own], "reference")
        same = called(name, rounded(own), "reference")
        most = called(name, [terms(one, at) for at, one in enumerate(own)], "reference")
        got = called(name, own)
        for one, other in zip(got, same, strict=True):
            assert one.is_floating_point() or torch.equal(one, other), f"{name}: an integer result differs"
        kept = [i for i, t in enumerate(got) if t.is_floating_point()]
        return tuple([found[i].contiguous() for i in kept] for found in (got, wide, same, most))

    judge(draws, longest, f"{name} {[getattr(one, 'shape', one) for one in filled(arguments, torch.Generator())]}")


def exactly(name, *arguments):
    """Results that are the reference's, bit by bit."""
    for seed in range(2):
        own = filled(arguments, torch.Generator().manual_seed(seed))
        for got, want in zip(called(name, own), called(name, own, "reference"), strict=True):
            assert got.dtype == want.dtype and got.shape == want.shape
            assert torch.equal(bits(got), bits(want)), f"{name} {[getattr(one, 'shape', one) for one in own]}"


def bits(t):
    t = t.contiguous()
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]) if t.is_floating_point() else t
