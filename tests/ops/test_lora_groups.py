"""The LoRA family: adapters that share one x, and rows that lie apart (columns of a wider matrix), on every backend."""

import pytest
import torch

import fastft
from fastft.ops import lora
from tests.golden import assert_close, plain_product, poisoned, ulp
from tests.ops.test_lora import BF16, DTYPES, F32, backend, double, inputs, keep_factor, mask_of  # noqa: F401 (fixture)

# T, K, ranks: groups without a rank, ranks on both sides of a tile; empty sizes.
GROUPS = [
    (5, 16, (4, 0, 3)),
    (33, 100, (3, 17, 1)),
    (17, 65, (16, 65)),
    (1, 1, (1, 1)),
    (9, 24, (0, 8, 0)),
    (7, 16, (0, 0)),
    (0, 16, (4, 2)),
    (7, 0, (4, 2)),
]
LARGE = [(600, 320, (8, 8, 8)), (65, 1536, (33, 8)), (40, 257, (64, 1, 70, 2, 5))]


def each(device):
    kernels = fastft.ops.registry._forced.get() in ("cpu", "cuda") or device == "cuda"
    for t, k, ranks in GROUPS + LARGE if kernels else GROUPS:
        for act, adapter in DTYPES:
            v = inputs((t, k, 24, sum(ranks)), act, adapter, device, seed=1)
            v["seed"] = torch.arange(len(ranks), device=device) * 0x123456789ABC + 5
            yield (t, k, list(ranks)), act, adapter, v


def alone(v, mask, ranks, p):
    """What each group would get alone: its inputs, [its rank], its mask."""
    start = 0
    for g, rank in enumerate(ranks):
        one = slice(start, start + rank)
        own = {"x": v["x"], "a": v["a"][one], "s": v["s"][:, one], "seed": v["seed"][g : g + 1]}
        yield own, [rank], mask[g : g + 1] if p else mask
        start += rank


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_shrink_is_that_of_each_adapter_alone(backend, p):  # noqa: F811
    for (t, k, ranks), act, adapter, v in each(backend):
        want_mask = mask_of(v, p)
        with poisoned():
            s, mask = lora.lora_shrink(v["x"], v["a"], ranks, p, v["seed"] if p else None)
        assert torch.equal(mask, want_mask), "a group's mask is that of its own seed"
        assert s.shape == (t, sum(ranks))
        for got, (one, rank, own) in zip(s.split(ranks, 1), alone(v, mask, ranks, p), strict=True):
            seed = one["seed"] if p else None
            want, terms = (lora._shrink_reference(d["x"], d["a"], rank, p, seed)[0] for d in double(one))
            kept = (v["x"] * keep_factor(own, (t, k), p)).to(act).to(adapter)
            assert_close(got, want, plain_product(kept, one["a"].t()), terms, f"S {t, k, ranks} {act} {adapter}")


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_grad_a_is_that_of_each_adapter_alone(backend, p):  # noqa: F811
    for (t, k, ranks), act, adapter, v in each(backend):
        mask = mask_of(v, p)
        with poisoned():
            da = lora.lora_grad_a(v["s"], v["x"], v["a"], ranks, mask, p)
        assert da.dtype == adapter and da.shape == v["a"].shape
        for got, (one, rank, own) in zip(da.split(ranks), alone(v, mask, ranks, p), strict=True):
            want, terms = (lora._grad_a_reference(d["s"], d["x"], d["a"], rank, own, p) for d in double(one))
            kept = (v["x"] * keep_factor(own, (t, k), p)).to(act).to(adapter)
            plain = plain_product(one["s"].to(adapter).t(), kept)
            assert_close(got, want, plain, terms, f"dA {t, k, ranks} {act} {adapter}")


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_grad_x_adds_all_groups_and_rounds_once(backend, p):  # noqa: F811
    for (t, k, ranks), act, adapter, v in each(backend):
        mask, got = mask_of(v, p), v["x"].clone()
        lora.lora_grad_x_(got, v["s"], v["a"], ranks, mask, p)
        factors = [keep_factor(mask[g : g + 1], (t, k), p) if p else 1.0 for g in range(len(ranks))]

        def total(d, product, ranks=ranks, factors=factors):
            parts = zip(d["s"].split(ranks, 1), d["a"].split(ranks), factors)
            return sum((product(s, a) * factor for s, a, factor in parts), d["x"])

        want, terms = (total(d, torch.matmul) for d in double(v))
        rounded = {name: part.to(adapter) for name, part in v.items()}
        plain = total({**rounded, "x": v["x"].to(adapter)}, plain_product).to(act)
        what = f"dX {t, k, ranks} {act} {adapter}"
        assert_close(got, want, plain, terms, what)
        if act != adapter:  # float32 factors: half a 16-bit ulp of one rounding, and few float32 ulps of the terms
            allowed = 0.5 * ulp(want, act) + 16 * ulp(terms, F32)
            assert ((got.double() - want).abs() <= allowed).all(), f"{what}: rounded more than once"
        if p:
            nobody = ~torch.stack([f != 0 for f in factors]).any(0)
            assert torch.equal(got[nobody], v["x"][nobody]), "what every group drops is untouched"


def test_what_every_group_drops_keeps_the_sign_of_its_zero(backend):  # noqa: F811
    v = inputs((5, 16, 24, 4), F32, F32, backend)
    dx = torch.full((5, 16), -0.0, device=backend)
    nothing_kept = torch.zeros(2, 5, 2, dtype=torch.uint8, device=backend)
    lora.lora_grad_x_(dx, v["s"], v["a"], [3, 1], nothing_kept, 0.5)
    assert torch.signbit(dx).all() and (dx == 0).all()


def test_a_group_is_bitwise_repeatable(backend):  # noqa: F811
    v = inputs((100, 257, 24, 24), BF16, F32, backend)
    v["seed"] = torch.tensor([1, 2, 3], device=backend)
    ranks, mask = [16, 0, 8], mask_of(v, 0.3)

    def once():
        dx = v["x"].clone()
        lora.lora_grad_x_(dx, v["s"], v["a"], ranks, mask, 0.3)
        s, drawn = lora.lora_shrink(v["x"], v["a"], ranks, 0.3, v["seed"])
        return s, drawn, lora.lora_grad_a(v["s"], v["x"], v["a"], ranks, mask, 0.3), dx

    assert all(torch.equal(g, w) for g, w in zip(once(), once(), strict=True))


def in_columns(t, before, after):
    """(a wider matrix of NaN, the view of it that holds t)."""
    wide = t.new_full((t.shape[0], before + t.shape[1] + after), float("nan"))
    view = wide[:, before : before + t.shape[1]]
    return wide, view.copy_(t)


@pytest.mark.sanitize
@pytest.mark.parametrize("before,after", [(0, 7), (8, 8), (3, 0)])
def test_columns_of_a_wider_matrix(backend, before, after):  # noqa: F811
    """Rows of y and s that lie apart, at aligned and unaligned addresses: the same bits, and the neighbours' untouched."""
    for t, n, r in ((5, 24, 4), (63, 129, 3), (40, 64, 16), (0, 8, 4), (1, 1, 1), (7, 0, 4), (7, 8, 0)):
        for act, adapter in DTYPES:
            v = inputs((t, 16, n, r), act, adapter, backend)
            want = v["y"].clone()
            lora.lora_expand_(want, v["s"], v["b"], 0.7)
            (wide, y), (_, s) = in_columns(v["y"], before, after), in_columns(v["s"], before, after)
            lora.lora_expand_(y, s, v["b"], 0.7)
            what = f"{(t, n, r)} {act} {adapter}"
            assert torch.equal(y, want), f"Y {what}"
            assert wide[:, :before].isnan().all() and wide[:, before + n :].isnan().all(), f"beside Y {what}"
            with poisoned():
                got = lora.lora_grad_sb(v["y"], s, v["b"], 0.7)
            for g, w in zip(got, lora.lora_grad_sb(v["y"], v["s"], v["b"], 0.7), strict=True):
                assert g.is_contiguous() and torch.equal(g, w), f"dS, dB {what}"
