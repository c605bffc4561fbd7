"""A linear layer with DoRA, forward and backward (dX, dA, dB, dm), over its floor: the bare frozen linear's forward and dX.

Beyond LoRA's operations and bytes (`ops/lora.py`): the row norm needs W Aᵀ, 2·N·K·R operations in one read of W; the output
before the magnitude is written once more, and read in backward with dY, where g ∘ dY is written.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import fastft

from .. import peers, shapes
from ..runner import Case, check_close
from . import lora

ADDS = 0.03  # to LoRA's target


@dataclass(frozen=True)
class Inputs(lora.Inputs):
    """Besides LoRA's: magnitude [N], a parameter of the adapters' dtype."""

    magnitude: torch.nn.Parameter | None = None

    def trained(self):
        return {**super().trained(), "dm": self.magnitude}


def make_inputs(linear: shapes.Linear, dtype: str, rank: int, device, seed: int) -> Inputs:
    base = lora.make_inputs(linear, dtype, rank, 0.0, device, seed)
    # Off the row norm, or g = 1 and the layer is a LoRA.
    norm = base.weight.float().norm(dim=1) * (1 + 0.2 * torch.rand(linear.n, device=device))
    return Inputs(**vars(base), magnitude=torch.nn.Parameter(norm.to(base.a.dtype)))


def ours(d: Inputs):
    rank = d.a.shape[0]
    base = peers.frozen_linear(d)
    layer = fastft.LoRALinear.from_linear(base, r=rank, lora_alpha=d.scale * rank, use_dora=True)
    layer.lora_A, layer.lora_B, layer.lora_magnitude = d.a, d.b, d.magnitude
    return layer.train()


def peft(d: Inputs):
    """PEFT's DoRA layer, holding the inputs' adapters."""
    layer = peers.peft(d, use_dora=True)
    layer.lora_magnitude_vector["default"].weight = d.magnitude
    return layer


def plain(d: Inputs):
    """The formula as PyTorch operations in the case's dtypes."""

    def layer(x):
        wide = d.a.dtype
        with torch.no_grad():
            norm = (d.weight.to(wide) + d.scale * d.b @ d.a).norm(dim=1)
        update = F.linear(F.linear(x.to(wide), d.a), d.b) * d.scale
        y = d.magnitude / norm * (F.linear(x, d.weight) + update)
        return (y if d.bias is None else y + d.bias).to(x.dtype)

    return layer


def double(d: Inputs) -> Inputs:
    wide = lora.double(d)
    return replace(wide, magnitude=d.magnitude.detach().double().requires_grad_())


def checker(d: Inputs, factor: float = 2.0):
    """The gate: each arm equals the float64 formula."""
    golden, yardstick = lora.adapted(plain)(double(d))(), lora.adapted(plain)(d)()
    return lambda build: check_close(build(d)(), golden, yardstick, factor)


def work(linear: shapes.Linear, dtype: str, rank: int) -> dict[str, int]:
    base = lora.work(linear, dtype, rank, 0.0)
    t, k, n = linear.tokens, linear.k, linear.n
    e = lora.DTYPES[dtype][0].itemsize
    base["flops"] += 2 * n * k * rank + 4 * t * n
    base["moved"] += (n * k + 4 * t * n) * e + 3 * 4 * n
    return base


def compiled(d: Inputs):
    return torch.compile(plain(d))


PEERS = {
    "peft": (peft, peers.peft_missing),
    "addmm": (peers.addmm_dora, lambda: None),
    "compile": (compiled, lambda: None),
}
DEFAULT_PEERS = ("peft", "addmm")


def cases(device: str, names=None, dtypes=None, dropouts=None, rank=shapes.RANK, peer_names=None):
    """Every case asked for; what is None takes this device's defaults. Without dropout, where ours and PEFT's differ.

    Raises:
        ValueError: an unknown shape, dtype or peer.
    """
    if dropouts not in (None, [0.0]):
        raise ValueError("dora is measured without dropout: ours and PEFT's differ there by definition")
    wanted = lora.known("peer", DEFAULT_PEERS if peer_names is None else peer_names, PEERS)
    missing = {n: why for n in wanted if (why := PEERS[n][1]())}
    arms = {"fastft": lora.adapted(ours)}
    arms |= {f"fastft:{b}": lora.on_backend(b, arms["fastft"]) for b in lora.several_backends(device)}
    arms |= {n: lora.adapted(PEERS[n][0]) for n in wanted if n not in missing}
    for shape, linear in shapes.resolve(names or shapes.DEFAULT[device]).items():
        for dtype in lora.known("dtype", dtypes or lora.DEFAULT_DTYPES, lora.DTYPES):
            target = lora.TARGETS.get((shape, dtype)) if rank == shapes.RANK else None
            yield Case(
                "dora",
                f"DoRA layer r={rank}",
                shape,
                str(linear),
                dtype,
                inputs=lambda dev, seed, s=linear, t=dtype: make_inputs(s, t, rank, dev, seed),
                tensors=Inputs.tensors,
                floor=lora.floor,
                arms=arms,
                checker=checker,
                skipped=missing,
                target=target + ADDS if target else None,
                **work(linear, dtype, rank),
            )
