"""`lora_add_` against the formula in float64; `lora_inference`: `lora_linear`'s numbers, and when it is not for it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastft
from fastft import _native
from fastft.ops import lora, lora_inference, registry
from fastft.ops.lora_linear import lora_linear
from tests.golden import assert_close, plain_product, run_on
from tests.ops.test_lora import DTYPES, F32, LARGE, SHAPES, double, inputs

BF16 = torch.bfloat16
# Around 32 tokens, where kernels change, blocks of 256 features and channels, and ranks of more than one strip.
FEW = [(1, 300, 520, 16), (4, 4500, 33, 8), (31, 257, 700, 40), (32, 512, 256, 300), (33, 256, 512, 5), (2, 96, 1030, 1)]
LIBRARIES = [f"cpu_{isa}" for isa in _native.supported_isas()]
SCALE = 0.02  # so that float16 holds products of outliers
infer = lora_inference.lora_inference


@pytest.mark.sanitize
@pytest.mark.parametrize("backend", [*LIBRARIES, "reference"])
def test_add(backend):
    with run_on(backend) as device:
        for shape in SHAPES + LARGE + FEW:
            for act, adapter in DTYPES:
                v = inputs(shape, act, adapter, device)
                got = v["y"].clone()
                lora.lora_add_(got, v["x"], v["a"], v["b"], SCALE)
                want, terms = (d["y"] + SCALE * (d["x"] @ d["a"].t()) @ d["b"].t() for d in double(v))
                s = plain_product(v["x"].to(adapter), v["a"].t())
                plain = (v["y"] + plain_product(s.to(adapter), v["b"].t()) * SCALE).to(act)
                assert_close(got, want, plain, terms, f"Y {shape} {act} {adapter}")


@pytest.mark.sanitize
@pytest.mark.parametrize("library", LIBRARIES)
def test_add_is_shrink_and_expand(library):
    """To the bit, on any number of threads, with leading dimensions, and into columns of a wider matrix."""
    before = torch.get_num_threads()
    try:
        for shape in (*FEW, (12, 2048, 2048, 16)):
            for act, adapter in DTYPES[:3]:
                v = inputs(shape, act, adapter, "cpu")
                want = v["y"].clone()
                wider = torch.full((shape[0], shape[2] + 9), float("nan"), dtype=act)
                with run_on(library):
                    s, _ = lora.lora_shrink(v["x"], v["a"], [shape[3]], 0.0, None)
                    lora.lora_expand_(want, s, v["b"], 0.7)
                    for threads in (1, 2, 5):
                        torch.set_num_threads(threads)
                        got = v["y"].clone()
                        lora.lora_add_(got.view(1, shape[0], 1, -1), v["x"].view(1, shape[0], 1, -1), v["a"], v["b"], 0.7)
                        assert torch.equal(got, want), (shape, act, adapter, threads)
                    own = wider[:, : shape[2]].copy_(v["y"])
                    lora.lora_add_(own, v["x"], v["a"], v["b"], 0.7)
                assert torch.equal(own, want) and wider[:, shape[2] :].isnan().all()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("library", LIBRARIES)
def test_add_refuses_what_does_not_fit_and_writes_nothing(library):
    v = inputs((5, 16, 24, 4), F32, F32, "cpu")
    x, a, b, y = (v[name] for name in ("x", "a", "b", "y"))
    wrong = [(x[:4], a, b), (x, a[:3], b), (x, a[:, :8].contiguous(), b), (x, a, b[:, :3].contiguous()), (x, a, b[:20])]
    wrong += [(x.bfloat16(), a, b), (x, a.bfloat16(), b.bfloat16()), (x, a, b.bfloat16()), (x, a.t().contiguous().t(), b)]
    wrong += [(x, a, b.t().contiguous().t()), (x[0], a, b), (x.double(), a.double(), b.double())]
    for arguments in wrong:
        got = y.clone()
        with run_on(library), pytest.raises(RuntimeError):
            lora.lora_add_(got, *arguments, 0.7)
        assert torch.equal(got, y)


def layer(act=F32, adapter=F32, tokens=(3, 5), n=24, k=16, r=4):
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    x, weight, bias = draw(*tokens, k).to(act), draw(n, k).to(act), draw(n).to(act)
    return x, torch.nn.Parameter(weight, requires_grad=False), bias, draw(r, k).to(adapter), draw(n, r).to(adapter), 0.5


@pytest.fixture
def native():
    if reason := lora.lora_add_.missing("cpu", "cpu"):
        pytest.skip(reason)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [(1,), (2, 3), (40,)], ids=str)
def test_numbers(native, dtypes, tokens):
    given = layer(*dtypes, tokens)
    want = lora_linear(*given)
    with torch.no_grad():
        got = infer(*given)
        stepped = infer(given[0].repeat_interleave(2, -1)[..., ::2], *given[1:])  # not contiguous
        columns = infer(given[0], given[1].t().contiguous().t(), *given[2:])  # Conv1D's
    assert torch.equal(got, want) and torch.equal(stepped, want)
    torch.testing.assert_close(columns, want)
    with torch.inference_mode():
        assert torch.equal(infer(*given), want)


@torch.no_grad()
def test_no_gradient_is_lost(native):
    given = layer()
    with torch.enable_grad():
        assert infer(*given) is None
    assert infer(*given) is not None and not infer(*given).requires_grad


class Doubled(torch.Tensor):
    """A subclass: what calls on it do is its own business."""


@torch.no_grad()
def test_not_for_it(native):
    x, weight, bias, a, b, scale = given = layer()
    for wrong in (
        (x[0, 0], *given[1:]),
        (x.as_subclass(Doubled), *given[1:]),
        (x, weight, bias, a.as_subclass(Doubled), b, scale),
        (x, weight, bias, a[:, :9], b, scale),
        (x, weight, bias, a, b[:, :3], scale),
        (x, weight, bias, a, b[:9], scale),
        (x[..., :9], *given[1:]),
        (x.bfloat16(), *given[1:]),
        (x, weight, bias, a.bfloat16(), b.bfloat16(), scale),
        (x, weight, bias, a, b.bfloat16(), scale),
        (x.to("meta"), weight.to("meta"), None, a.to("meta"), b.to("meta"), scale),
        (x, weight, bias, None, b, scale),
        layer(torch.float64, torch.float64),
    ):
        assert infer(*wrong) is None
    with torch.autocast("cpu", dtype=BF16):
        assert infer(*given) is None
    with torch.autograd.forward_ad.dual_level():
        assert infer(*given) is None
    with torch.profiler.profile():
        assert infer(*given) is None
    with FlopCounterMode(display=False):
        assert infer(*given) is None
    seen = []
    torch.func.vmap(lambda x: seen.append(infer(x, *given[1:])) or x)(x)
    assert seen == [None]


@torch.no_grad()
def test_backends_and_records(native):
    given = layer()
    want = infer(*given)
    with fastft.testing.record() as calls:
        assert torch.equal(infer(*given), want)
    assert [(call.op, call.backend) for call in calls] == [("lora_add_", "cpu")]
    with fastft.testing.use("reference"):
        torch.testing.assert_close(infer(*given), want)
    if "triton" in fastft.testing.available("cpu"):
        with fastft.testing.use("triton"):
            assert infer(*given) is None  # there is no such kernel: two that there are
    for isa in _native.supported_isas():
        with _native.forced_isa(isa):
            torch.testing.assert_close(infer(*given), want)
    assert len({key[1] for key in lora_inference._ready}) >= len(_native.supported_isas())


def test_layers_ask_it(native):
    """What `LoRALinear` runs with and without a gradient."""
    plain = fastft.LoRALinear(16, 24, r=4)
    torch.nn.init.normal_(plain.lora_B)
    x = torch.randn(3, 16)
    with fastft.testing.record() as calls:
        want = plain(x)
    assert [call.op for call in calls] == ["lora_shrink", "lora_expand_"]
    for prepare in (lambda: None, plain.eval, plain.train):
        prepare()
        with torch.no_grad(), fastft.testing.record() as calls:
            assert torch.equal(plain(x), want)
        assert [call.op for call in calls] == ["lora_add_"]
    assert registry.conditions() is not None


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}], ids=str)
def test_layers_with_options(native, options):
    own = fastft.LoRALinear(16, 24, r=4, **options)
    torch.nn.init.normal_(own.lora_B)
    x = torch.randn(30, 16)
    torch.manual_seed(0)
    want = own(x).detach()
    torch.manual_seed(0)
    with torch.no_grad():
        torch.testing.assert_close(own(x), want)
        own.eval()
        plain = own(x)
        own.merge()
        torch.testing.assert_close(own(x), plain, rtol=1e-4, atol=1e-5)
        own.unmerge()
        assert torch.equal(own(x), plain)
