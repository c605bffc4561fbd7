"""Choosing a weight's entries: by rank-reduced size as LIFT does, and by size.

    LIFT mask    the k = f (K + N) largest |U S Vᵀ|, f = 128, vs the same from torch.linalg.svd and torch.topk, which make
                 the matrix of all scores; on a weight whose singular values are i^-1
    largest      the 5 % largest |W|, vs torch.topk of all |W|
    histogram    what the choice begins with: how many of |W| are in each bin, vs torch.bincount

Every arm gives the entries' positions in ascending order. An exact SVD of a 4096 x 4096 weight takes 8 s on two threads,
so 40 rounds of a "LIFT mask" take 10 minutes. `--rounds 8` tells a factor of 20 as well, but its rows are marked quick.

Operations of a call (a multiply-add counts two): a thin SVD of [N, K], K the shorter side, 14 N K² + 8 K³ (Golub and Van
Loan's count), its scores 2 N K f; low_rank 4 N K for each of its columns and 2 N K for W Q, its scores twice. Fewest bytes:
the weight once a step and once for W Q; twice for `largest`, once for a histogram; of the floors also their copies.
"""

from dataclasses import dataclass

import torch

from fastft.methods import low_rank
from fastft.methods.entry_selection import largest, magnitude, product
from fastft.ops import selection

from .. import shapes
from ..runner import Case, WrongResult
from . import lora

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FILTER, SHARE = 128, 0.05
LEAST = 0.97  # of an exact SVD's mask that LIFT's must hold
TARGETS = {"LIFT mask": 1 / 20, "largest": 1.0, "histogram": 1.0}
# Where no shape is asked for: (LIFT mask, largest, histogram).
DEFAULT = {
    "cpu": (("square4096",), shapes.DEFAULT["cpu"], shapes.DEFAULT["cpu"]),
    "cuda": (("llama3-8b/q_proj",), shapes.DEFAULT["cuda"], ("llama3-8b/down_proj",)),
}


@dataclass(frozen=True)
class Inputs:
    """A weight [N, K], how many of its entries to choose, the rank f; for LIFT also the exact U S [N, f] and V [K, f]."""

    weight: torch.Tensor
    k: int
    rank: int
    factors: tuple[torch.Tensor, torch.Tensor] | None = None

    def tensors(self):
        return [self.weight]


def rank_of(linear: shapes.Linear) -> int:
    return min(FILTER, min(linear.n, linear.k) // 8)


def make_inputs(linear: shapes.Linear, dtype: str, device, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(linear.n, linear.k, generator=generator).to(device, DTYPES[dtype])
    return Inputs(weight, int(SHARE * weight.numel()), rank_of(linear))


def make_decaying(linear: shapes.Linear, dtype: str, device, seed: int) -> Inputs:
    """Singular values i^-1 between random orthonormal bases."""
    generator, most, rank = torch.Generator().manual_seed(seed), min(linear.n, linear.k), rank_of(linear)
    u, v = (torch.linalg.qr(torch.randn(size, most, generator=generator).to(device)).Q for size in (linear.n, linear.k))
    u = u / torch.arange(1, most + 1, device=device)
    return Inputs((u @ v.t()).to(DTYPES[dtype]), rank * (linear.n + linear.k), rank, (u[:, :rank], v[:, :rank]))


def choosing(blocks):
    """Builder of an arm of ours: `blocks` gives the scores of the inputs."""

    def build(d: Inputs):
        return lambda: {"index": largest(blocks(d), d.k, d.weight.shape, d.weight.device)[0].flat()}

    return build


def reduced(d: Inputs):
    us, v = low_rank.low_rank(d.weight, d.rank)
    return product((us, v.t()))


def top(scores):
    """Builder of an arm: PyTorch's choice from the matrix of all scores."""

    def build(d: Inputs):
        return lambda: {"index": scores(d).abs().flatten().topk(d.k, sorted=False).indices.sort().values}

    return build


def exact(d: Inputs):
    u, s, v = torch.linalg.svd(d.weight.float(), full_matrices=False)
    return (u[:, : d.rank] * s[: d.rank]) @ v[: d.rank]


def histogram(d: Inputs):
    def run():
        counts = torch.zeros(selection.BINS, dtype=torch.int64, device=d.weight.device)
        for block in magnitude(d.weight)():
            selection.count_bins_(counts, block)
        return {"counts": counts}

    return run


def bincount(d: Inputs):
    bins = lambda: (selection.keys(d.weight) >> selection.SHIFT).flatten()  # noqa: E731
    return lambda: {"counts": torch.bincount(bins(), minlength=selection.BINS)}


def lift_checker(d: Inputs):
    """The gate: k entries, of which at least `LEAST` are among the largest of what the inputs say is the reduced weight."""
    us, v = d.factors
    wanted = _mask(d, (us @ v.t()).abs().flatten().topk(d.k).indices)

    def check(build):
        index = _positions(d, build)
        if (share := wanted[index].float().mean().item()) < LEAST:
            raise WrongResult(f"index: {share:.4f} of the exact mask's entries, {LEAST} are wanted")

    return check


def largest_checker(d: Inputs):
    """The gate: the entries that a stable sort of all puts first."""
    order = d.weight.float().abs().flatten().sort(descending=True, stable=True).indices[: d.k]
    wanted = _mask(d, order)

    def check(build):
        index = _positions(d, build)
        if missed := int((~wanted[index]).sum()):
            raise WrongResult(f"index: {missed} of {d.k} are not among the largest")

    return check


def _mask(d, index):
    mask = torch.zeros(d.weight.numel(), dtype=torch.bool, device=d.weight.device)
    mask[index] = True
    return mask


def _positions(d, build):
    index = build(d)()["index"]
    if len(index) != d.k or not (index.diff() > 0).all():
        raise WrongResult(f"index: not {d.k} different positions in ascending order")
    return index


def histogram_checker(d: Inputs):
    """The gate: the same counts."""
    wanted = bincount(d)()["counts"]

    def check(build):
        if not torch.equal(build(d)()["counts"], wanted):
            raise WrongResult("counts: not those of torch.bincount")

    return check


def work(linear: shapes.Linear, dtype: str) -> dict[str, dict[str, int]]:
    """Floating-point operations and fewest bytes of each sort of case, of the arm and of its floor (module docstring)."""
    size, e, f = linear.n * linear.k, DTYPES[dtype].itemsize, rank_of(linear)
    long, short = max(linear.n, linear.k), min(linear.n, linear.k)
    held = min(low_rank.STEPS * max(16, -(-f // 2)), short)
    return {
        "LIFT mask": {
            "flops": 6 * size * held + 4 * size * f,
            "moved": (low_rank.STEPS + 1) * size * e,
            "floor_flops": 14 * long * short**2 + 8 * short**3 + 2 * size * f,
            "floor_moved": size * (e + 3 * 4),
        },
        "largest": {"flops": 0, "moved": 2 * size * e, "floor_flops": 0, "floor_moved": 3 * size * e},
        "histogram": {"flops": 0, "moved": size * e, "floor_flops": 0, "floor_moved": size * (e + 2 * 4)},
    }


# Sort of case -> (its name, inputs, floor, arm of ours, checker).
SORTS = {
    "LIFT mask": (
        f"LIFT mask f={FILTER} vs exact SVD",
        make_decaying,
        top(exact),
        choosing(reduced),
        lift_checker,
    ),
    "largest": (
        f"{100 * SHARE:g} % largest vs torch.topk",
        make_inputs,
        top(lambda d: d.weight),
        choosing(lambda d: magnitude(d.weight)),
        largest_checker,
    ),
    "histogram": ("histogram vs torch.bincount", make_inputs, bincount, histogram, histogram_checker),
}


def cases(device: str, names=None, dtypes=None, dropouts=None, rank=shapes.RANK, peer_names=None):
    """Every case asked for; what is None takes this device's defaults.

    Raises:
        ValueError: an unknown shape, dtype or peer; a dropout or rank, which a choice doesn't have.
    """
    if dropouts is not None or rank != shapes.RANK:
        raise ValueError("selection has no dropout and no rank to be chosen")
    lora.known("peer", peer_names or [], {})
    dtypes = lora.known("dtype", dtypes or DTYPES, DTYPES)
    for i, (sort, (name, inputs, floor, ours, checker)) in enumerate(SORTS.items()):
        arms = {"fastft": ours} | {f"fastft:{b}": lora.on_backend(b, ours) for b in lora.several_backends(device)}
        for shape, linear in shapes.resolve(names or DEFAULT[device][i]).items():
            for dtype in dtypes:
                yield Case(
                    "selection",
                    name,
                    shape,
                    f"{linear.k}x{linear.n}",
                    dtype,
                    inputs=lambda dev, seed, s=linear, t=dtype, make=inputs: make(s, t, dev, seed),
                    tensors=Inputs.tensors,
                    floor=floor,
                    arms=arms,
                    checker=checker,
                    target=TARGETS[sort],
                    uncounted="" if sort == "LIFT mask" else "it compares and counts, and no floating-point number is made",
                    **work(linear, dtype)[sort],
                )
