"""The LoRA layer without gradients, as in generating with an adapter that is not merged: forward alone, of few tokens.

    y = x Wt + bias + s x At Bt        x [T, K], W [N, K], A [R, K], B [N, R]

The floor is the frozen linear's forward. Operations of one call (a multiply-add counts two): floor 2 T K N; the adapter
adds 2 T R (K + N). Fewest bytes, with e bytes an element of x, W, y and ea of A, B: the floor reads x and W and writes y;
the adapter reads x once more, reads and writes y once more, and reads A and B once. Up to some 100 tokens a layer costs what
it takes to read W, and the adapter the calls around its few bytes: that is measured, on weights that no cache holds.

``via PEFT`` is the same through a layer of PEFT's, accelerated by `fastft.accelerate` (and its peer PEFT itself).
"""

from dataclasses import replace

import torch
from torch.nn import functional as F

import fastft

from .. import libraries, peers, shapes
from ..runner import Case, check_close
from . import lora

TOKENS = (1, 4, 16, 128)
DEFAULT = {"cpu": ("square2048", "square4096"), "cuda": ("llama3-8b/q_proj", "llama3-8b/down_proj")}


def forward(make_layer):
    """Builder of an arm from a function Inputs -> layer: forward without a gradient."""

    def build(d: lora.Inputs):
        layer = make_layer(d)
        if isinstance(layer, torch.nn.Module):
            layer.eval()

        @torch.no_grad()
        def run():
            return {"y": layer(d.x)}

        return run

    return build


def plain(d: lora.Inputs):
    """What a careful user writes: two products, the second added to the base's in place."""

    def layer(x):
        y = F.linear(x, d.weight, d.bias)
        s = x.to(d.a.dtype) @ d.a.t()
        return y.addmm_(s.to(y.dtype), d.b.t().to(y.dtype), alpha=d.scale)

    return layer


def accelerated(d: lora.Inputs):
    layer = peers.peft(d)
    fastft.accelerate(torch.nn.Sequential(layer))
    return layer


def checker(d: lora.Inputs, factor: float = 2.0):
    golden, yardstick = forward(lora.plain)(lora.double(d))(), forward(lora.plain)(d)()
    return lambda build: check_close(build(d)(), golden, yardstick, factor)


def work(linear: shapes.Linear, dtype: str, rank: int) -> dict[str, int]:
    t, k, n = linear.tokens, linear.k, linear.n
    e, ea = (one.itemsize for one in lora.DTYPES[dtype])
    floor = (t * k + t * n + k * n) * e
    return {
        "floor_flops": 2 * t * k * n,
        "floor_moved": floor,
        "flops": 2 * t * k * n + 2 * t * rank * (k + n),
        "moved": floor + (t * k + 2 * t * n) * e + rank * (k + n) * ea,
    }


PEERS = {"plain": (plain, lambda: None), "peft": (peers.peft, peers.peft_missing)}


def cases(device: str, names=None, dtypes=None, dropouts=None, rank=shapes.RANK, peer_names=None):
    """Every case asked for; what is None takes this device's defaults.

    Raises:
        ValueError: an unknown shape, dtype or peer; a dropout, which is for training.
    """
    if dropouts is not None:
        raise ValueError("inference has no dropout: that is for training")
    wanted = lora.known("peer", PEERS if peer_names is None else peer_names, PEERS)
    missing = libraries.absent(wanted, device) | {n: why for n in wanted if (why := PEERS[n][1]())}
    others = {n: forward(PEERS[n][0]) for n in wanted if n not in missing}
    ours = {"": lora.ours} | ({} if peers.peft_missing() else {" via PEFT": accelerated})
    for shape, linear in shapes.resolve(names or DEFAULT[device]).items():
        for dtype in lora.known("dtype", dtypes or lora.DEFAULT_DTYPES, lora.DTYPES):
            for tokens in TOKENS:
                one = replace(linear, tokens=tokens)
                for how, layer in ours.items():
                    yield Case(
                        "inference",
                        f"layer r={rank} T={tokens}{how}",
                        shape,
                        str(one),
                        dtype,
                        inputs=lambda dev, seed, s=one, t=dtype: lora.make_inputs(s, t, rank, 0.0, dev, seed),
                        tensors=lora.Inputs.tensors,
                        floor=forward(peers.frozen_linear),
                        arms={"fastft": forward(layer)} | others,
                        checker=checker,
                        skipped=missing,
                        **work(one, dtype, rank),
                    )
