"""What every op's tests share: the backends that can run here, and the one tolerance."""

from contextlib import contextmanager

import pytest
import torch

import fastft
from fastft import _native
from fastft.ops import registry

FROBENIUS, MAXIMUM = 1.5, 2.0  # allowed error, as a multiple of the plain PyTorch composition's


def backends(*extending):
    """Every backend x device that could run in this process, named; those that can't are skipped with their reason.

    Of the CPU's libraries that extend another, those of `extending` alone: the tests of other ops would run the same again.
    """
    isas = (isa for isa in _native.ISAS if isa not in _native.EXTENDS or isa in extending)
    names = ["reference", *(f"cpu_{isa}" for isa in isas), "triton"]
    if torch.cuda.is_available():
        names += ["reference_on_gpu", "cuda_on_gpu", "triton_on_gpu"]
    return names


def devices():
    """Where tests run that leave the backend to the registry."""
    gpu = [pytest.param("cuda", id="on_gpu")] if torch.cuda.is_available() else []
    return [pytest.param("cpu", id="on_cpu"), *gpu]


@contextmanager
def run_on(name):
    """Force the named backend; yields the device its tensors live on, and checks that it ran."""
    kind, _, place = name.partition("_")
    device = "cuda" if place == "on_gpu" else "cpu"
    if kind == "cpu":
        if place not in _native.supported_isas():
            pytest.skip(f"this CPU does not run {place}")
        with (
            fastft.testing.cpu_isa(place),
            fastft.testing.use("cpu"),
            ran_on_cpu(place),
        ):
            yield device
    else:
        reason = next(iter(registry.OPS.values())).missing(kind, device)
        if reason and kind == "triton":
            pytest.skip(reason)
        how = f"tests on {torch.cuda.get_device_name()}" if device == "cuda" else "tests in the interpreter"
        with fastft.testing.use(kind), ran(kind, how):
            yield device


def ran_on_cpu(isa):
    """Check that every launch inside was of that instruction set's library or of what it extends; note what it proves."""
    return ran("cpu", {f"fastft_cpu_{name}": f"tests on {name}" for name in _native.with_extended(isa)})


@contextmanager
def ran(backend, how):
    """Check that every launch inside was the wanted one, and note `how` that proves it; of each library, if it is a dict."""
    with fastft.testing.record() as calls:
        yield
    assert all(c.backend == backend and (isinstance(how, str) or c.config in how) for c in calls), calls
    for call in calls:
        if backend != "reference":
            prove(call.op, backend, how if isinstance(how, str) else how[call.config])


PENDING: list[tuple[str, str, str]] = []  # what the running test proves, if it passes (tests/conftest.py)


def prove(op, backend, how):
    PENDING.append((op, backend, how))


@contextmanager
def poisoned():
    """Fresh allocations hold NaN inside, so that an element which a kernel never writes shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def ulp(value, dtype):
    """Distance of `value` (float64) to the next number of `dtype`."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(value.abs().clamp(min=info.tiny))[1] - 1
    return torch.ldexp(torch.full_like(value, info.eps), exponent)


def plain_product(left, right, at=...):
    """(left @ right)[at] as PyTorch computes it; below float64 with that order of summation, of eight, that errs most.

    Which order a kernel sums in is its own choice, and the largest error of one order is luck: with 65 terms one was seen to
    err 2.6 times as another, so a single one is no measure. On the CPU wherever the operands are: its products are running
    sums, which any kernel may form, and a GPU's library has orders of its own (its largest error of eight, seen with 65
    terms, was 0.3 of that of the running sum from the first term to the last).
    """
    if left.dtype == torch.float64 or not left.shape[0] * right.shape[1] or (at is not ... and not len(at[0])):
        return (left @ right)[at]
    device, left, right = left.device, left.cpu(), right.cpu()
    generator = torch.Generator().manual_seed(3)
    orders = [torch.randperm(left.shape[1], generator=generator) for _ in range(8)]
    at = tuple(i.cpu() for i in at) if at is not ... else at
    products = torch.stack([(left[:, order] @ right[order])[at] for order in orders])
    error = (products.double() - (left.double() @ right.double())[at]).abs()
    return products[error.flatten(1).amax(1).argmax()].to(device)


def cut_off_product(left, right, at=...):
    """(left @ right)[at] of 16-bit operands as a GPU's tensor cores sum up a long axis, in PyTorch's products as well.

    16 terms at a time, exactly, of which what float32 does not hold is cut off instead of rounded (Fasi, Higham, Mikaitis
    and Pranesh 2021, doi:10.7717/peerj-cs.330). That errs to one side: with 1100 terms three times as much as running sums
    that round, by this model and as seen on an H200 (0.095 and 0.085 here, 0.074 and 0.085 there, bfloat16 and float16).
    """
    left, right = left.double(), right.double()
    total = left.new_zeros(left.shape[0], right.shape[1])
    for some, terms in zip(left.split(16, 1), right.split(16), strict=True):
        total = ((total + some @ terms).view(torch.int64) & -(1 << 29)).view(torch.float64)
    return total[at].float()


def assert_close(got, want, plain, magnitude, what):
    """`got` errs against `want` (float64) no more than 1.5x (Frobenius) and 2x (maximum) what `plain` does, or an ulp.

    The ulp is the element's in its dtype or, where larger, two float32 ulps of `magnitude`, the sum of the absolute values
    of the terms that the element adds up: float32 addition errs in proportion to that, not to a result that cancelled. Two,
    because a scaled sum rounds at least three times by half an ulp (terms, scale, final sum), and `plain` scales elsewhere;
    below that two orders of summation differ by luck (measured: 4.2x between PyTorch's own on a [5, 16, 24, 4] layer).
    """
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    got, plain, dtype = got.double(), plain.double(), got.dtype
    if want.numel() == 0:
        return
    assert got.isfinite().all(), f"{what}: {(~got.isfinite()).sum()} elements not finite"
    error, allowed = (got - want).abs(), (plain - want).abs()
    one_ulp = torch.maximum(ulp(want, dtype), 2 * ulp(magnitude, torch.float32))
    assert error.norm() <= max(FROBENIUS * allowed.norm(), one_ulp.norm()), (
        f"{what}: relative error {error.norm() / want.norm():.3g}, plain PyTorch {allowed.norm() / want.norm():.3g}"
    )
    assert (error <= torch.maximum(one_ulp, MAXIMUM * allowed.max())).all(), (
        f"{what}: maximum error {error.max():.3g}, plain PyTorch {allowed.max():.3g}"
    )
