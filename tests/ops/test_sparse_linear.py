"""Gradients of chosen entries by every engine, and linears whose delta of entries stands beside the weight."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fastft
from fastft.ops import sparse_linear as module
from fastft.ops.entries import Entries
from fastft.ops.sparse_linear import Sampling, Ways, engine, entries_gradient, sparse_linear, sparse_update
from tests.golden import devices

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


def entries(shape, share=0.3, seed=0, rows=slice(None), columns=slice(None), device="cpu"):
    mask = torch.zeros(shape, dtype=torch.bool)
    part = mask[rows, columns]
    part[torch.rand(part.shape, generator=torch.Generator().manual_seed(seed)) < share] = True
    return Entries.of_mask(mask.to(device))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("kind", ["sampled", "compacted", "blocks"])
@pytest.mark.parametrize("count", [1, 255, 256, 257, 512])
def test_gradients_by_every_engine(kind, count, device, monkeypatch):
    monkeypatch.setattr(module, "engine", lambda *args: kind)
    monkeypatch.setattr(module, "_HELD", 0)
    for dtype in (F32, BF16):
        clustered = {"share": 0.5, "rows": slice(0, None, 3), "columns": slice(5, 20)}
        for chosen in (entries((count, 37), device=device), entries((count, 37), device=device, **clustered)):
            left, right = (
                torch.randn(19, n, generator=torch.Generator().manual_seed(n)).to(device, dtype) for n in chosen.shape
            )
            got = entries_gradient(left, right, chosen, F32)
            assert Sampling.of(chosen).engine == kind and got.dtype == F32
            want = (left.double().t() @ right.double())[chosen.mask()]
            torch.testing.assert_close(
                got.double(), want, rtol=1e-4 if dtype == F32 else 2e-2, atol=1e-4 if dtype == F32 else 0.1
            )


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nothing_chosen_and_no_tokens(dtype, device, monkeypatch):
    for kind in ("sampled", "compacted", "blocks"):
        monkeypatch.setattr(module, "engine", lambda *args, kind=kind: kind)
        none, some = entries((30, 20), 0.0, device=device), entries((30, 20), device=device)
        for tokens, chosen in ((4, none), (0, some)):
            left, right = (torch.ones(tokens, n, dtype=dtype, device=device) for n in chosen.shape)
            got = entries_gradient(left, right, chosen, F32)
            assert got.shape == (len(chosen),) and got.dtype == F32 and not got.any()


def test_few_entries_of_float32_on_a_gpu_are_left_to_the_kernel(monkeypatch):
    """By what is known of the choice, as if its tensors were on one."""
    monkeypatch.setattr(module, "engine", lambda *args: "blocks")
    chosen = entries((300, 200), 0.02)
    assert not Sampling.of(chosen).sparse
    few = Sampling(**vars(Sampling.of(chosen)) | {"sparse": True})
    for dtype, ops in ((F32, {"sampled_product_"}), (BF16, {"gather_entries"})):
        left, right = (torch.randn(7, n, generator=torch.Generator().manual_seed(n)).to(dtype) for n in chosen.shape)
        with fastft.testing.record() as calls:
            got = entries_gradient(left, right, chosen, F32, few)
        assert {call.op for call in calls} == ops
        want = (left.float().t() @ right.float())[chosen.mask()]
        torch.testing.assert_close(got, want, rtol=2e-2, atol=0.1)


def test_engines():
    assert engine("cpu", (1000, 1000), 10_000, 1000, 1000) == "sampled"
    assert engine("cpu", (1000, 1000), 400_000, 1000, 1000) == "blocks"
    assert engine("cpu", (1000, 1000), 20_000, 100, 300) == "compacted"
    assert engine("cuda", (4000, 4000), 20_000, 4000, 4000) == "sampled"
    assert engine("cuda", (4000, 4000), 100_000, 4000, 4000) == "blocks"
    assert engine("cuda", (1000, 1000), 20_000, 100, 300) == "compacted"
    assert engine("cpu", (0, 5), 0, 0, 0) in ("sampled", "blocks", "compacted")


def test_the_first_product_of_a_process_is_whole():
    """Workers that were never asked how many threads there are once left rows out."""
    code = (
        "import torch\nfrom fastft.ops.entries import Entries\nfrom fastft.ops.sparse import sampled_product_\n"
        "torch.manual_seed(0)\ne = Entries.of_mask(torch.ones(64, 10, dtype=torch.bool))\n"
        "l, r, out = torch.randn(6, 64), torch.randn(6, 10), torch.full((640,), 1e9)\n"
        "sampled_product_(out, l, r, e.starts, e.columns, False)\n"
        "torch.testing.assert_close(out, (l.t() @ r).flatten())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.filterwarnings("ignore::fastft.testing.FallbackWarning")  # float64 is the reference's
@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(transposed):
    torch.manual_seed(0)
    shape = (7, 5) if transposed else (5, 7)
    chosen, weight = entries(shape), torch.randn(shape, dtype=F64)
    x, y = torch.randn(2, 3, 7, dtype=F64, requires_grad=True), torch.randn(2, 3, 5, dtype=F64, requires_grad=True)
    bias = torch.randn(5, dtype=F64, requires_grad=True)
    delta = torch.randn(len(chosen), dtype=F64, requires_grad=True)
    options = {"fan_in_fan_out": transposed}
    assert torch.autograd.gradcheck(lambda x, b, d: sparse_linear(x, weight, b, chosen, d, **options), (x, bias, delta))
    assert torch.autograd.gradcheck(lambda y, x, d: sparse_update(y, x, chosen, d, **options), (y, x, delta))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("transposed", [False, True])
def test_forward_is_that_of_the_sum(dtype, transposed, device):
    torch.manual_seed(0)
    shape = (40, 24) if transposed else (24, 40)
    chosen, weight = entries(shape, 0.1, device=device), torch.randn(shape).to(device, dtype)
    x, bias = torch.randn(2, 9, 40).to(device, dtype), torch.randn(24).to(device, dtype)
    delta = torch.randn(len(chosen)).to(device).requires_grad_()
    full = weight.double().flatten().index_add(0, chosen.flat(), delta.detach().double()).view(shape)
    want = F.linear(x.double(), full.t() if transposed else full, bias.double())
    seen, before = [], weight.clone()
    y = sparse_linear(x, weight, bias, chosen, delta, fan_in_fan_out=transposed, observer=lambda *a: seen.append(a))
    with torch.no_grad():
        quiet = sparse_linear(x, weight, bias, chosen, delta, fan_in_fan_out=transposed)
    for got in (y, quiet):
        assert got.dtype == dtype
        torch.testing.assert_close(
            got.double(), want, rtol=1e-4 if dtype == F32 else 3e-2, atol=1e-4 if dtype == F32 else 0.2
        )
    dy = torch.randn_like(y)
    y.backward(dy)
    ((left, right),) = seen
    gradient = left.double().t() @ right.double()
    assert gradient.shape == shape and torch.equal(weight, before)
    torch.testing.assert_close(delta.grad.double(), gradient[chosen.mask()], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("transposed", [False, True])
def test_observers_see_a_backward_that_has_a_graph(transposed):
    torch.manual_seed(0)
    chosen, seen = entries((8, 8), 0.1), []
    weight, x, delta = torch.randn(8, 8), torch.randn(5, 8), torch.randn(len(chosen), requires_grad=True)
    y = sparse_linear(x, weight, None, chosen, delta, fan_in_fan_out=transposed, observer=lambda *a: seen.append(a))
    dy = torch.randn_like(y)
    y.backward(dy, create_graph=True)
    ((left, right),) = seen
    assert torch.equal(left, x if transposed else dy) and torch.equal(right, dy if transposed else x)
    assert not left.requires_grad and not right.requires_grad


def test_under_autocast_as_f_linear():
    torch.manual_seed(0)
    chosen, weight, x = entries((24, 40), 0.1), torch.randn(24, 40), torch.randn(5, 40)
    delta = torch.zeros(len(chosen), requires_grad=True)
    with torch.autocast("cpu", BF16):
        y, want = sparse_linear(x, weight, None, chosen, delta), F.linear(x, weight)
    assert y.dtype == BF16 and torch.equal(y, want)
    y.sum().backward()
    assert delta.grad.dtype == F32 and delta.grad.any()


def test_wrong_arguments():
    chosen, weight, x = entries((24, 40), 0.1), torch.randn(24, 40), torch.randn(5, 40)
    delta = torch.zeros(len(chosen))
    with pytest.raises(ValueError, match="in-features"):
        sparse_linear(x[:, 1:], weight, None, chosen, delta)
    with pytest.raises(ValueError, match="have a delta"):
        sparse_linear(x, weight, None, chosen, delta[1:])
    with pytest.raises(ValueError, match="not those of a weight"):
        sparse_linear(x, weight, None, entries((40, 24), 0.1), delta)
    with pytest.raises(TypeError, match="delta is"):
        sparse_linear(x, weight, None, chosen, delta.bfloat16())
    with pytest.raises(ValueError, match="does not fit"):
        sparse_update(torch.zeros(4, 24), x, chosen, delta)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_second_derivatives(fan_in_fan_out):
    draw = lambda *size: torch.randn(*size, dtype=F64, requires_grad=True)  # noqa: E731
    shape = (7, 5) if fan_in_fan_out else (5, 7)
    chosen, x, y, w, bias = entries(shape), draw(3, 7), draw(3, 5), draw(*shape), draw(5)
    delta, kind = draw(len(chosen)), {"fan_in_fan_out": fan_in_fan_out}
    cases = [
        (lambda x, w, bias, delta: sparse_linear(x, w, bias, chosen, delta, **kind), [x, w, bias, delta]),
        (lambda x, delta: sparse_linear(x, w.detach(), None, chosen, delta, **kind), [x, delta]),
        (lambda w, delta: sparse_linear(x.detach(), w, None, chosen, delta, **kind), [w, delta]),
        (lambda x: sparse_linear(x, w.detach(), None, chosen, delta.detach(), **kind), [x]),
        (lambda y, x, delta: sparse_update(y, x, chosen, delta, **kind), [y, x, delta]),
    ]
    with fastft.testing.use("reference"):
        assert all(torch.autograd.gradgradcheck(f, tensors) for f, tensors in cases)
    f = lambda x: sparse_linear(x, w.detach(), None, chosen, delta.detach(), **kind)  # noqa: E731
    with fastft.testing.use("reference"):
        jacobians = [torch.autograd.functional.jacobian(f, x.detach(), vectorize=v) for v in (False, True)]
    torch.testing.assert_close(*jacobians)


@pytest.mark.parametrize("transposed", [False, True])
def test_ways_made_in_inference_mode_are_differentiated_twice(transposed):
    chosen, x, weight = entries((24, 24)), torch.randn(5, 24), torch.randn(24, 24)
    with torch.inference_mode():
        ways = Ways.of(chosen, transposed)
    delta = torch.zeros(len(chosen), requires_grad=True)
    y = sparse_linear(x, weight, None, chosen, delta, fan_in_fan_out=transposed, ways=ways)
    (first,) = torch.autograd.grad(y.square().sum(), delta, create_graph=True)
    assert torch.autograd.grad(first.sum(), delta)[0].any()
