"""Serving many adapters at once: one forward of a small Llama whose rows name their own adapters, over the base model alone.

    decode     32 rows of one token, D adapters on all linears but the head        prefill    4 rows of 256 tokens
    via PEFT   the same through an accelerated PEFT model, by `adapter_names=`
    mixed      8 rows of LoRA, 8 of S²FT, 8 of SpIEL, each adapter its own, and 8 of the base
    ragged     31 adapters of rank 8 and one of 128, over as large a sum of ranks in equal parts
    base only  a batch of the base while 32 adapters lie in memory

The floor is the same transformers model without adapters; in "ragged" it is ours with the even ranks. Adapters are written
as folders and read by what each arm's users would read them with. Attention sees one token a row, no cache: what adapters
cost beside a longer context is less.
"""

from dataclasses import dataclass, replace

import torch

from .. import peers, served, shapes
from ..ops import lora
from ..runner import Case, check_close
from . import step

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPE, ROWS = "llama-8l", 32
TARGETS = {
    "fp32": {1: 1.08, 4: 1.10, 8: 1.14, 32: 1.28},
    "bf16": {1: 1.10, 4: 1.12, 8: 1.18, 32: 1.35},
}
PEFT_ALLOWANCE = 0.10  # of an accelerated PEFT model, on top
KINDS = ("lora", "s2ft", "spiel")


@dataclass(frozen=True)
class Batch:
    """What a case serves: the adapters there are, the adapter of each row, tokens a row; what ours is compared with."""

    name: str
    adapters: dict[str, tuple]
    rows: tuple[str, ...]
    tokens: int = 1
    targets: dict[str, float] | None = None
    peers: tuple[str, ...] = ("peft", "bmm")
    even: dict[str, tuple] | None = None  # the floor's adapters, where it has any


def loras(ranks) -> dict[str, tuple]:
    return {f"lora-{i}": ("lora", rank) for i, rank in enumerate(ranks)}


def batches(rank: int) -> list[Batch]:
    found = []
    for count in TARGETS["fp32"]:
        adapters = loras([rank] * count)
        rows = tuple(name for name in adapters for _ in range(ROWS // count))
        targets = {dtype: table[count] for dtype, table in TARGETS.items()} if rank == shapes.RANK else None
        found.append(Batch(f"decode r={rank} D={count}", adapters, rows, targets=targets))
    kinds = {f"{kind}-{i}": (kind, rank) if kind == "lora" else (kind,) for kind in KINDS for i in range(8)}
    found.append(Batch("decode mixed", kinds, (*kinds, *[""] * 8), targets=dict.fromkeys(DTYPES, 1.35), peers=()))
    four = loras([rank] * 4)
    found.append(Batch(f"prefill r={rank} D=4", four, tuple(four), 256, dict.fromkeys(DTYPES, 1.12)))
    ragged, even = loras([8] * 31 + [128]), loras([12] * 24 + [11] * 8)
    goal = dict.fromkeys(DTYPES, 1.15)
    found.append(Batch("decode ragged vs even ranks", ragged, tuple(ragged), targets=goal, peers=(), even=even))
    idle = loras([rank] * ROWS)
    found.append(Batch("decode base only", idle, ("",) * ROWS, targets=dict.fromkeys(DTYPES, 1.02), peers=()))
    return found


@dataclass(frozen=True, eq=False)
class Inputs:
    """The case's batch, and the floor's where it has adapters of its own."""

    own: served.Inputs
    even: served.Inputs | None = None


def make_inputs(shape: shapes.Model, dtype: str, batch: Batch, device, seed: int) -> Inputs:
    own = served.make_inputs(shape, DTYPES[dtype], batch.adapters, batch.rows, batch.tokens, device, seed)
    if batch.even is None:
        return Inputs(own)
    even = served.make_inputs(shape, DTYPES[dtype], batch.even, tuple(batch.even), batch.tokens, device, seed)
    return Inputs(own, replace(even, model=own.model, ids=own.ids))


def floor(d: Inputs):
    return served.base(d.own) if d.even is None else served.ours(d.even)


def arm(build):
    return lambda d: build(d.own)


def checker(d: Inputs, factor: float = 2.0):
    """The gate: the logits equal those of dense deltas in float64, with at most twice the error of the model's dtype."""
    golden, yardstick = served.plain(d.own, torch.float64)(), served.plain(d.own)()
    return lambda build: check_close(build(d)(), golden, yardstick, factor)


def work(shape: shapes.Model, batch: Batch, dtype: str) -> dict[str, int]:
    """Operations and fewest bytes of the linears (`step.forward_work`), and of the adapters that rows name."""
    e, tokens = DTYPES[dtype].itemsize, len(batch.rows) * batch.tokens
    flops, moved = step.forward_work(shape, tokens, e)
    own = _added(shape, batch.adapters, batch.rows, batch.tokens, e)
    even = _added(shape, batch.even or {}, tuple(batch.even or ()), batch.tokens, e)
    return {
        "flops": flops + own[0],
        "moved": moved + own[1],
        "floor_flops": flops + even[0],
        "floor_moved": moved + even[1],
    }


def _added(shape: shapes.Model, adapters, rows, tokens: int, e: int) -> tuple[int, int]:
    """(operations, fewest bytes): each named adapter is read once (entries with columns of two bytes), and what it adds to
    is once more read and written."""
    weights = shape.layers * sum(k * sum(outs) for k, outs in shape.groups())
    features = shape.layers * sum(k * len(outs) + sum(outs) for k, outs in shape.groups())
    written = shape.layers * sum(sum(outs) for _, outs in shape.groups())
    sliced = shape.layers * sum(served.S2FT_RATIOS.values()) * shape.intermediate * shape.hidden
    entries = served.SPIEL_DENSITY * (weights + 2 * shape.hidden * shape.vocab)
    flops = moved = 0.0
    for name in rows:
        if not name:
            continue
        kind, *rank = adapters[name]
        numbers, out = {
            "lora": (sum(rank) * features, written),
            "s2ft": (sliced, shape.layers * (shape.intermediate + shape.hidden)),
            "spiel": (entries, written),
        }[kind]
        flops += 2 * tokens * numbers
        moved += numbers * (e + 2 * (kind == "spiel")) / rows.count(name) + 2 * tokens * out * e
    return round(flops), round(moved)


def cases(device: str, names=None, dtypes=None, dropouts=None, rank=shapes.RANK, peer_names=None):
    """Every case asked for; what is None takes the defaults.

    Raises:
        ValueError: an unknown shape, dtype or peer; a dropout, since nothing trains here.
    """
    if dropouts is not None:
        raise ValueError("serve has no dropout: nothing trains")
    lora.known("shape", names or (), shapes.MODELS)
    lora.known("dtype", dtypes or (), DTYPES)
    lora.known("peer", peer_names or (), served.PEERS)
    if reason := step.transformers_missing():
        raise ValueError(reason)
    for name in names or (SHAPE,):
        for dtype in dtypes or DTYPES:
            for batch in batches(rank):
                yield _case(device, name, dtype, batch, _peers(batch, peer_names), {"fastft": arm(served.ours)})
                if batch.peers and batch.tokens == 1:
                    goals = {t: goal + PEFT_ALLOWANCE for t, goal in (batch.targets or {}).items()}
                    through = replace(batch, name=f"{batch.name} via PEFT", targets=goals)
                    missing = peers.peft_missing()
                    arms = {} if missing else {"fastft": arm(served.accelerated_peft)}
                    yield _case(device, name, dtype, through, (), arms, {"fastft": missing} if missing else {})


def _peers(batch, wanted):
    return [peer for peer in batch.peers if wanted is None or peer in wanted]


def _case(device, name, dtype, batch, wanted, arms, skipped=None):
    shape, skipped = shapes.MODELS[name], dict(skipped or {})
    for peer in wanted:
        build, why = served.PEERS[peer]
        reason = why() or (served.bmm_missing(batch.rows) if peer == "bmm" else None)
        if reason:
            skipped[peer] = reason
        else:
            arms[peer] = arm(build)
    return Case(
        "serve",
        batch.name,
        name,
        f"{shape.layers} layers, {len(batch.rows)}x{batch.tokens} tokens",
        dtype,
        inputs=lambda dev, seed: make_inputs(shape, dtype, batch, dev, seed),
        tensors=lambda d: [*d.own.model.parameters(), d.own.ids],
        floor=floor,
        arms=arms,
        checker=checker,
        skipped=skipped,
        target=(batch.targets or {}).get(dtype) if name == SHAPE else None,
        **work(shape, batch, dtype),
    )
