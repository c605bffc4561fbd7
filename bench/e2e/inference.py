"""The LoRA layer without gradients, as in generating with an adapter that is not merged: forward alone, of few tokens.

    y = x Wt + bias + s x At Bt        x [T, K], W [N, K], A [R, K], B [N, R]

The floor is the frozen linear's forward. Operations of one call (a multiply-add counts two): floor 2 T K N; the adapter
adds 2 T R (K + N). Fewest bytes, with e bytes an element of x, W, y and ea of A, B: the floor reads x and W and writes y;
the adapter reads x once more, reads and writes y once more, and reads A and B once. Up to some 100 tokens a layer costs what
it takes to read W, and the adapter the calls around its few bytes: so on GPUs calls are eager ones, as a model makes them.

``via PEFT`` is the same through a layer of PEFT's, accelerated by `fastft.accelerate` (its peer is PEFT itself). ``DoRA``
has a factor for each row, magnitude / ||W + s B A||: 3 T N operations and 4 N bytes more, if norms are not computed anew.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

import fastft

from .. import peers, shapes
from ..ops import dora, lora
from ..ops.partial import forward
from ..runner import Case, check_close

TOKENS = (1, 4, 16, 128)
DEFAULT = {"cpu": ("square2048",), "cuda": ("llama3-8b/q_proj", "llama3-8b/down_proj")}


def plain(d: lora.Inputs):
    """What a careful user writes: two products, the second added to the base's in place."""

    def layer(x):
        y = F.linear(x, d.weight, d.bias)
        s = x.to(d.a.dtype) @ d.a.t()
        return y.addmm_(s.to(y.dtype), d.b.t().to(y.dtype), alpha=d.scale)

    return layer


def plain_dora(d: dora.Inputs):
    """The same, with the factors computed once."""
    wide = d.a.dtype
    norm = (d.weight.to(wide) + d.scale * d.b.detach() @ d.a.detach()).norm(dim=1)
    g = (d.magnitude.detach() / norm).to(d.x.dtype)

    def layer(x):
        y = F.linear(x, d.weight)
        s = x.to(wide) @ d.a.t()
        y = y.addmm_(s.to(y.dtype), d.b.t().to(y.dtype), alpha=d.scale).mul_(g)
        return y if d.bias is None else y.add_(d.bias)

    return layer


def accelerated(make_layer):
    def build(d):
        layer = make_layer(d)
        fastft.accelerate(torch.nn.Sequential(layer))
        return layer

    return build


@dataclass(frozen=True)
class Kind:
    """What is adapted how: inputs, the formula, ours (of PEFT's layer if it needs PEFT), and the peers."""

    make_inputs: Callable
    double: Callable
    formula: Callable
    ours: Callable
    plain: Callable
    peft: Callable
    needs_peft: bool = False

    def checker(self, d: lora.Inputs, factor: float = 2.0):
        golden, yardstick = forward(self.formula)(self.double(d))(), forward(self.formula)(d)()
        return lambda build: check_close(build(d)(), golden, yardstick, factor)


def _lora_inputs(linear, dtype, rank, device, seed):
    return lora.make_inputs(linear, dtype, rank, 0.0, device, seed)


LORA = Kind(_lora_inputs, lora.double, lora.plain, lora.ours, plain, peers.peft)
DORA = Kind(dora.make_inputs, dora.double, dora.plain, dora.ours, plain_dora, dora.peft)
KINDS = {
    "layer r={r} T={t}": LORA,
    "layer r={r} T={t} via PEFT": replace(LORA, ours=accelerated(peers.peft), needs_peft=True),
    "DoRA layer r={r} T={t}": DORA,
    "DoRA layer r={r} T={t} via PEFT": replace(DORA, ours=accelerated(dora.peft), needs_peft=True),
}


def work(linear: shapes.Linear, dtype: str, rank: int, kind: Kind) -> dict[str, int]:
    t, k, n = linear.tokens, linear.k, linear.n
    e, ea = (one.itemsize for one in lora.DTYPES[dtype])
    floor = (t * k + t * n + k * n) * e
    scaled = kind.formula is dora.plain
    return {
        "floor_flops": 2 * t * k * n,
        "floor_moved": floor,
        "flops": 2 * t * k * n + 2 * t * rank * (k + n) + 3 * t * n * scaled,
        "moved": floor + (t * k + 2 * t * n) * e + rank * (k + n) * ea + 4 * n * scaled,
    }


def cases(device: str, names=None, dtypes=None, dropouts=None, rank=shapes.RANK, peer_names=None):
    """Every case asked for; what is None takes this device's defaults.

    Raises:
        ValueError: an unknown shape, dtype or peer; a dropout, which is for training.
    """
    if dropouts is not None:
        raise ValueError("inference has no dropout: that is for training")
    wanted = lora.known("peer", ("plain", "peft") if peer_names is None else peer_names, ("plain", "peft"))
    missing = {"peft": why} if "peft" in wanted and (why := peers.peft_missing()) else {}
    kinds = {name: kind for name, kind in KINDS.items() if not (kind.needs_peft and peers.peft_missing())}
    for shape, linear in shapes.resolve(names or DEFAULT[device]).items():
        for dtype in lora.known("dtype", dtypes or lora.DEFAULT_DTYPES, lora.DTYPES):
            for name, kind in kinds.items():
                others = {n: forward(getattr(kind, n)) for n in wanted if n not in missing}
                for tokens in TOKENS:
                    one = replace(linear, tokens=tokens)
                    yield Case(
                        "inference",
                        name.format(r=rank, t=tokens),
                        shape,
                        str(one),
                        dtype,
                        inputs=lambda dev, seed, s=one, t=dtype, of=kind: of.make_inputs(s, t, rank, dev, seed),
                        tensors=lora.Inputs.tensors,
                        floor=forward(peers.frozen_linear),
                        arms={"fastft": forward(kind.ours)} | others,
                        checker=kind.checker,
                        skipped=missing,
                        **work(one, dtype, rank, kind),
                    )
