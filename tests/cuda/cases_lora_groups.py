"""Run by `test_host_low_rank.py` in a process with AddressSanitizer: groups of adapters on the backend `cuda_host`."""

import os

import pytest
import torch

from fastft.ops import lora
from tests.cuda import host
from tests.cuda.cases_lora import every_op
from tests.ops import test_lora as matrix
from tests.ops import test_lora_groups as groups

host.register()
backend = host.backend
globals().update({name: test for name, test in vars(groups).items() if name.startswith("test_")})

# T, K, ranks. A rank tile holds four slots of up to 16 ranks: four groups in one, one group in two tiles, a tile with the
# end of one group and the start of the next, an empty group first, last and alone; parts of K and of T.
groups.GROUPS += [
    (40, 136, (16, 16, 16, 16)),
    (33, 130, (100, 4)),
    (9, 40, (0, 40, 40, 0)),
    (5, 24, (0,)),
    (3, 1160, (5, 2)),
    (300, 24, (8, 33)),
]


def test_more_groups_than_one_launch_takes(backend):
    """70 groups are two launches: masks, sums and gradients are those of each group alone."""
    ranks = [1, 2, 0, 1, 3] * 14
    v = matrix.inputs((6, 20, 8, sum(ranks)), matrix.F32, matrix.F32, backend)
    v["seed"] = torch.arange(70) - 35
    got = every_op(v, 0.5, ranks)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in v.items()}
    mask = matrix.mask_of(v, 0.5)
    assert torch.equal(got[1], mask)
    ds, da, dx = got[3].double(), got[5], got[6]
    want = wide["x"].clone()
    lora._grad_x_reference(want, ds, wide["a"], ranks, mask, 0.5)
    for g, w in (
        (got[0], lora._shrink_reference(wide["x"], wide["a"], ranks, 0.5, v["seed"])[0]),
        (da, lora._grad_a_reference(ds, wide["x"], wide["a"], ranks, mask, 0.5)),
        (dx, want),
    ):
        torch.testing.assert_close(g, w.float(), rtol=1e-5, atol=1e-3)  # sums of terms up to 1000


def test_no_groups(backend):
    x, a, none = torch.randn(5, 24), torch.empty(0, 24), torch.empty(0, dtype=torch.int64)
    for p, seed, shape in ((0.0, None, (0,)), (0.5, none, (0, 5, 3))):
        s, mask = lora.lora_shrink(x, a, [], p, seed)
        assert s.shape == (5, 0) and mask.shape == shape
        assert lora.lora_grad_a(s, x, a, [], mask, p).shape == (0, 24)
        dx = x.clone()
        lora.lora_grad_x_(dx, s, a, [], mask, p)
        assert torch.equal(dx, x)


@pytest.mark.parametrize("ranks", [[3, 16, 0, 1], [40, 50, 10]])
def test_no_bit_depends_on_the_order_of_threads_and_blocks(backend, ranks, monkeypatch):
    v = matrix.inputs((100, 257, 63, sum(ranks)), matrix.BF16, matrix.F32, backend)
    v["seed"] = torch.arange(len(ranks))
    results = []
    for seed in range(3):
        monkeypatch.setitem(os.environ, "FASTFT_HOSTCUDA_SEED", str(seed))
        results.append(every_op(v, 0.3, ranks))
    for other in results[1:]:
        assert all(torch.equal(g, w) for g, w in zip(other, results[0], strict=True))


def test_without_dropout_ranks_change_no_bit(backend):
    v = matrix.inputs((40, 136, 24, 40), matrix.BF16, matrix.BF16, backend)
    one, three = every_op(v, 0.0, [40]), every_op(v, 0.0, [7, 0, 33])
    assert all(torch.equal(g, w) for g, w in zip(three, one, strict=True))


def test_a_group_does_not_see_another_ones_nan(backend):
    """Neither through a rank of the same tile nor through an element that it drops itself."""
    v = matrix.inputs((40, 136, 24, 24), matrix.F32, matrix.F32, backend)
    v["seed"], ranks = torch.tensor([1, 2]), [10, 14]
    v["a"][3] = float("nan")
    s, mask = lora.lora_shrink(v["x"], v["a"], ranks, 0.5, v["seed"])
    assert s[:, 3].isnan().all() and s[:, :3].isfinite().all() and s[:, 4:].isfinite().all()
    keep = lora.unpack_mask(mask[0], 136)
    dx = v["x"].clone()
    lora.lora_grad_x_(dx, v["s"], v["a"], ranks, mask, 0.5)
    assert dx[keep].isnan().all() and dx[~keep].isfinite().all()
    x = v["x"].masked_fill(~keep, float("nan"))
    da = lora.lora_grad_a(v["s"], x, v["a"], ranks, mask, 0.5)
    assert da[:10].isfinite().all() and da[10:].isnan().any()
