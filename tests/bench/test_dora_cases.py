"""The DoRA cases: ours and the peers pass the gate, wrong ones don't."""

import pytest
import torch

from fastft.bench import peers, shapes
from fastft.bench.ops import dora, lora
from fastft.bench.runner import WrongResult

TINY = shapes.LINEARS["tiny"]


def tiny(dtype="fp32"):
    return dora.make_inputs(TINY, dtype, shapes.RANK, torch.device("cpu"), 0)


@pytest.mark.parametrize("dtype", lora.DEFAULT_DTYPES)
def test_ours_and_the_peers_pass_the_gate(dtype):
    check = dora.checker(tiny(dtype))
    check(lora.adapted(dora.ours))
    check(lora.adapted(peers.addmm_dora))
    if peers.peft_missing() is None:
        check(lora.adapted(dora.peft))


def test_the_gate_stops_a_lora_and_a_norm_that_gets_a_gradient():
    check = dora.checker(tiny())
    with pytest.raises(WrongResult, match="y: relative error"):
        check(lora.adapted(lambda d: lambda x: lora.plain(d)(x) + 0.0 * d.magnitude))

    def differentiated(d):
        def layer(x):
            g = d.magnitude / (d.weight + d.scale * d.b @ d.a).norm(dim=1)
            return g * lora.plain(d)(x)

        return layer

    with pytest.raises(WrongResult, match="d[ab]: relative error"):
        check(lora.adapted(differentiated))


def test_targets_are_loras_plus_three_points():
    targets = {case.dtype: case.target for case in dora.cases("cpu", ["square2048"], peer_names=[])}
    assert targets == {dtype: lora.TARGETS["square2048", dtype] + 0.03 for dtype in lora.DEFAULT_DTYPES}
    with pytest.raises(ValueError, match="without dropout"):
        list(dora.cases("cpu", dropouts=[0.1]))
