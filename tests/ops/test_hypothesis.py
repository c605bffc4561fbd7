"""Drawn shapes, strides, dtypes, ranks and options of the public functions, on the C++ kernels, against float64.

Few examples, the same each time, unless FUZZ_SECONDS says how long to draw new ones of each kind (`tests/lengths.py`).
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fastft import _native
from fastft.ops.entries import Entries
from fastft.ops.lora_linear import SharedInput, lora_linear, lora_update
from fastft.ops.partial_linear import Part, delta_linear, delta_update, partial_linear
from tests.lengths import drawn
from tests.ops.drawing import check, gradients, layout, on
from tests.ops.layers import BF16, F16, F32

pytestmark = pytest.mark.skipif(_native.cpu_library()[0] is None, reason=str(_native.cpu_library()[1]))

ISAS = st.sampled_from(_native.supported_isas())
DTYPES = st.sampled_from([(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)])
# Sizes around vectors, tiles and tasks, and none.
SIZES = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 96, 127, 129, 200]))
RANKS = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 33, 64, 70]))
LEADS = st.one_of(st.lists(st.integers(0, 6), max_size=3), SIZES.map(lambda t: [t]))
OPTIONS = st.fixed_dictionaries({name: st.booleans() for name in ("bias", "lora_bias", "dora", "base", "A")})
SLICES = st.sampled_from(["rows", "columns"])
PARTS = st.sampled_from(["rows", "columns", "entries", "all", "nothing"])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Waiting for a second one takes longer than these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- LoRA and DoRA


def explicit(x, w, bias, a, b, lora_bias, magnitude, norm, scale):
    """As PEFT composes it, in the inputs' dtypes."""
    y = F.linear(x, w)
    term = F.linear(F.linear(x.to(a.dtype), a), b) * scale
    if lora_bias is not None:
        term = term + scale * lora_bias
    if magnitude is None:
        y = y if bias is None else y + bias
        return (y + term).to(x.dtype)
    y = (magnitude / norm).to(x.dtype) * (y + term.to(x.dtype))
    return y if bias is None else y + bias


@drawn(25)
@given(st.data(), ISAS, DTYPES, LEADS, SIZES, st.lists(st.tuples(SIZES, RANKS), min_size=1, max_size=3))
def test_adapters_on_one_input(data, isa, dtypes, lead, k, sizes):
    """`SharedInput.project` of one to three adapters in any order, and `lora_linear` of one."""
    act, wide = dtypes
    layouts = [layout(data, *lead, k, dtype=act, trains=data.draw(st.booleans(), "x trains"))]
    scales = []
    for n, r in sizes:
        chosen = data.draw(OPTIONS, "options")
        scales.append(data.draw(st.sampled_from([1.0, 0.5, -3.7, 0.0]), "scale"))
        layouts += [
            layout(data, n, k, dtype=act, trains=chosen["base"]),
            layout(data, n, dtype=act, trains=chosen["base"]) if chosen["bias"] else None,
            layout(data, r, k, dtype=wide, trains=chosen["A"]),
            layout(data, n, r, dtype=wide),
            layout(data, n, dtype=wide) if chosen["lora_bias"] and not chosen["dora"] else None,
            layout(data, n, dtype=F32) if chosen["dora"] else None,  # of the magnitude, and of the norm
            layout(data, n, dtype=F32, trains=False) if chosen["dora"] else None,
        ]
    order = data.draw(st.permutations(range(len(sizes))), "order")

    def derived(x, *own):
        own = list(own)
        for i, scale in enumerate(scales):
            w, _, a, b, _, magnitude, _ = own[7 * i : 7 * i + 7]
            if magnitude is not None:
                norm = (w.double() + scale * b.double() @ a.double()).norm(dim=1).to(F32).detach() + 0.1
                own[7 * i + 5] = (norm * (1 + 0.1 * magnitude.detach())).requires_grad_()
                own[7 * i + 6] = norm
        return x, *own

    def ours(x, *own):
        parts = [own[i : i + 7] for i in range(0, len(own), 7)]
        more = [{"lora_bias": p[4], "magnitude": p[5], "weight_norm": p[6]} for p in parts]
        if len(parts) == 1:
            return [lora_linear(x, *parts[0][:4], scales[0], **more[0])]
        shared, ys = SharedInput(x, [part[2] for part in parts]), {}
        for i in order:
            w, bias, _, b, *_ = parts[i]
            ys[i] = shared.project(i, w, bias, b, scales[i], **more[i])
        return [ys[i] for i in range(len(parts))]

    def plain(x, *own, scales):
        return [explicit(x, *own[7 * i : 7 * i + 7], scale) for i, scale in enumerate(scales)]

    with on(isa):
        outputs = [layout(data, *lead, n, dtype=act, trains=False) for n, _ in sizes]
        check(ours, plain, layouts, outputs, scales, derived)


@drawn(25)
@given(st.data(), ISAS, DTYPES, LEADS, SIZES, SIZES, RANKS)
def test_update_of_any_base(data, isa, dtypes, lead, k, n, r):
    act, wide = dtypes
    output = layout(data, *lead, n, dtype=act, trains=False)
    layouts = [
        layout(data, *lead, n, dtype=act),
        layout(data, *lead, k, dtype=act),
        layout(data, r, k, dtype=wide),
        layout(data, n, r, dtype=wide),
    ]

    def plain(y, x, a, b, scales):
        return [(y + F.linear(F.linear(x.to(a.dtype), a), b) * scales[0]).to(y.dtype)]

    with on(isa):
        check(lambda *t: [lora_update(*t, 0.5)], plain, layouts, [output], (0.5,))


# ---- partial linears


def part_of(data, kind, n, k, transposed=False):
    """A drawn part: none, some or all of what there is."""
    size = {"rows": n, "columns": k, "entries": n * k}.get(kind)
    if size is None:
        return Part(kind)
    count = data.draw(st.one_of(st.sampled_from([0, size]), st.integers(0, size)), "count")
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99), "chosen")))
    if kind == "entries":
        return Part(kind, Entries.of_flat(chosen[:count], (k, n) if transposed else (n, k)))
    return Part.of(kind, chosen[:count], size)


@drawn(25)
@given(st.data(), ISAS, st.sampled_from([F32, BF16, F16]), LEADS, SIZES, SIZES, PARTS, st.booleans())
def test_parts_of_a_weight(data, isa, dtype, lead, n, k, kind, transposed):
    """y and dx have the frozen layer's bits, and the gradient is the part of the whole one."""
    part = part_of(data, kind, n, k, transposed)
    layouts = [
        layout(data, *lead, k, dtype=dtype),
        layout(data, *((k, n) if transposed else (n, k)), dtype=dtype, trains=False),
        layout(data, n, dtype=dtype) if data.draw(st.booleans(), "bias") else None,
        layout(data, *part.shape(torch.empty((k, n) if transposed else (n, k)), transposed), dtype=F32),
    ]
    output, count = layout(data, *lead, n, dtype=dtype, trains=False), math.prod(lead)

    def ours(x, w, bias, trained):
        return [partial_linear(x, w, bias, part, trained, fan_in_fan_out=transposed)]

    def plain(x, w, bias, trained, scales):
        """A weight in whose part a zero stands that gets the gradient; as a 16-bit GEMM, which rounds its results."""
        return [F.linear(x, planted(w, part, transposed, trained), bias)]

    with on(isa):
        check(ours, plain, layouts, [output])
        x, w, bias, trained = (one if one is None else one.fill(torch.Generator().manual_seed(0)) for one in layouts)
        dy, logical = output.fill(torch.Generator().manual_seed(1)), w.t() if transposed else w
        y, dx, *_ = gradients(ours, [x, w, bias, trained], [dy])
        rows, dys = x.detach().reshape(count, k).contiguous(), dy.reshape(count, n).contiguous()
        assert torch.equal(y.reshape(count, n), F.linear(rows, logical, bias))
        assert torch.equal(dx.reshape(count, k), dys @ logical)


def planted(w, part, transposed, trained):
    """W [N, K], through which `trained` gets the gradient of its part, and which doesn't depend on its values."""
    trained = (trained - trained.detach()).to(w.dtype)
    if part.kind == "all":
        w = w + trained
    elif part.kind == "entries":
        w = w.flatten().index_add(0, part.index.flat(), trained).view(w.shape)
    elif part.kind != "nothing":
        w = w.index_add(part.dim(transposed), part.index, trained)
    return w.t() if transposed else w


@drawn(25)
@given(st.data(), ISAS, st.sampled_from([F32, BF16, F16]), LEADS, SIZES, SIZES, SLICES, st.booleans())
def test_a_delta_beside_a_weight(data, isa, dtype, lead, n, k, kind, transposed):
    part, stored = part_of(data, kind, n, k), (k, n) if transposed else (n, k)
    layouts = [
        layout(data, *lead, k, dtype=dtype),
        layout(data, *stored, dtype=dtype, trains=False),
        layout(data, n, dtype=dtype) if data.draw(st.booleans(), "bias") else None,
        layout(data, *part.shape(torch.empty(stored), transposed), dtype=data.draw(st.sampled_from([F32, dtype]), "delta")),
    ]
    update = data.draw(st.booleans(), "update")

    def ours(x, w, bias, delta):
        if update:
            y = F.linear(x, w.t() if transposed else w, bias)
            return [delta_update(y, x, part, delta, fan_in_fan_out=transposed)]
        return [delta_linear(x, w, bias, part, delta, fan_in_fan_out=transposed)]

    def plain(x, w, bias, delta, scales):
        """Two products, added."""
        beside = torch.zeros_like(w).index_copy(part.dim(transposed), part.index.long(), delta.to(x.dtype))
        if transposed:
            w, beside = w.t(), beside.t()
        return [F.linear(x, w, bias) + F.linear(x, beside)]

    with on(isa):
        check(ours, plain, layouts, [layout(data, *lead, n, dtype=dtype, trains=False)])
