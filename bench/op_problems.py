"""Arguments of every op that has configurations, as the `when` of one of them means: for `op_times` and `fastft tune`.

Sizes are those of a Llama-3-8B projection, which is what the configurations are for; tests take small ones.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastft.kernels import _config
from fastft.methods.entry_selection import random_entries
from fastft.ops import dora, grouped, lora, partial, registry, selection, sparse  # noqa: F401  (they fill the registry)

from . import shapes
from .ops.grouped import Adapters

FULL = shapes.LINEARS["llama3-8b/q_proj"]
BY_WIDTH = {"16": torch.bfloat16, "32": torch.float32}
SHARE, DENSITY, DROPOUT, SECTOR = 0.03, 0.01, 0.05, 32
ADAPTERS, PIECES, SEED = 4, 3, 5
SCALE = 0.25  # what is added must show in bfloat16, and stay finite however often it is added
HYPER = 1e-3, 0.9, 0.99, 1e-8, 0.1


@dataclass(frozen=True)
class Problem:
    """What one entry of a family's table is for; `make` gives arguments of (device, seed)."""

    family: str
    op: str
    when: dict
    make: Callable[[torch.device, int], tuple]

    def __str__(self):
        return " ".join([self.op, *(f"{key}={value}" for key, value in self.when.items())])


def problems(family: str, linear: shapes.Linear = FULL) -> list[Problem]:
    """One of each entry of a family's default table, which every device's table has too."""
    found = []
    for op, listed in _config.table("default", family).items():
        for entry in listed:
            when = entry["when"]

            def make(device, seed, op=op, when=when):
                return _MAKERS[family](op, when, linear, _Draw(device, seed))

            found.append(Problem(family, op, when, make))
    return found


class _Draw:
    def __init__(self, device, seed: int):
        self.device, self.generator = torch.device(device), torch.Generator().manual_seed(seed)

    def __call__(self, *size, dtype=torch.float32, scale=1.0):
        return torch.randn(size, generator=self.generator).mul_(scale).to(self.device, dtype)

    def choice(self, count: int, size: int):
        """int32, ascending."""
        return torch.randperm(size, generator=self.generator)[:count].sort().values.to(self.device, torch.int32)

    def entries(self, shape, count: int):
        return random_entries(shape, count, self.generator).to(self.device)


def _adapted(op, when, linear, draw):
    """LoRA's and DoRA's. With G groups there is dropout, without which all groups are one."""
    act, adapter = (BY_WIDTH[bits] for bits in (when["dtypes"].split("/") * 2)[:2])
    t, k, n = linear.tokens, linear.k, linear.n
    if op == "dora_grad_y":
        return draw(t, n, dtype=act), draw(t, n, dtype=act), draw(n)
    x, y = draw(t, k, dtype=act), draw(t, n, dtype=act)
    groups = when.get("G", 1)
    ranks, p = [when["R"]] * groups, DROPOUT if groups > 1 else 0.0
    a, b = draw(sum(ranks), k, dtype=adapter, scale=k**-0.5), draw(n, sum(ranks), dtype=adapter)
    s = draw(t, sum(ranks))
    if op == "dora_expand_":
        return y, s, b, draw(n), draw(n, dtype=act), SCALE
    seed = torch.randint(2**62, (groups,), generator=draw.generator).to(draw.device) if p else None
    made = {
        "lora_shrink": (x, a, ranks, p, seed),
        "lora_expand_": (y, s, b, SCALE),
        "lora_grad_sb": (y, s, b, SCALE),
    }
    if op in made:
        return made[op]
    mask = lora.lora_shrink(x, a, ranks, p, seed)[1]
    return (s, x, a, ranks, mask, p) if op == "lora_grad_a" else (x, s, a * k**0.5 * SCALE, ranks, mask, p)


def _grouped(op, when, linear, draw):
    """q, k and v of a few adapters, as many tokens of each."""
    act, adapter = (BY_WIDTH[bits] for bits in when["dtypes"].split("/"))
    k, widths = linear.k, [linear.n, *[max(1, linear.n // 4)] * (PIECES - 1)]
    t = min(when.get("M", linear.tokens), linear.tokens)
    rank = shapes.RANK
    a = [[draw(rank, k, dtype=adapter, scale=k**-0.5) for _ in widths] for _ in range(ADAPTERS)]
    b = [[draw(n, rank, dtype=adapter, scale=0.1) for n in widths] for _ in range(ADAPTERS)]
    site = Adapters.of(a, b)
    bounds = [t * e // ADAPTERS for e in range(ADAPTERS + 1)]
    segments = [[e, bounds[e], bounds[e + 1]] for e in range(ADAPTERS)]
    segments = torch.tensor(segments, dtype=torch.int32, device=draw.device)
    routing = site.pieces, segments, torch.arange(t, dtype=torch.int32, device=draw.device)
    x, y, s = draw(t, k, dtype=act), draw(t, sum(widths), dtype=act), draw(t, site.width)
    return {
        "grouped_shrink": (x, site.store, site.offsets, *routing, 1, site.width),
        "grouped_expand_": (y, x, s, site.store, site.offsets, site.columns, *routing, None, 1),
        "grouped_outer_": (torch.zeros_like(site.store), x, y, s, site.offsets, *routing, None, 1),
    }[op]


def _partial(op, when, linear, draw):
    act, (t, k, n) = BY_WIDTH[when["dtype"]], (linear.tokens, linear.k, linear.n)
    if op in ("gather_columns", "scatter_add_columns_"):
        index = draw.choice(max(1, round(SHARE * k)), k)
        x = draw(t, k, dtype=act)
        return (x, index) if op == "gather_columns" else (x, index, draw(t, len(index), dtype=act))
    dim, weight = int(when["dim"]), draw(n, k, dtype=act)
    index = draw.choice(max(1, round(SHARE * weight.shape[dim])), weight.shape[dim])
    base = weight.index_select(dim, index.long())
    delta, grad, mean, square = (draw(*base.shape, scale=0.1) for _ in range(4))
    if op == "write_slice_":
        return weight, index, dim, base, delta
    return weight, index, dim, base, delta, grad, mean, square.abs(), *HYPER, 7


def _selection(op, when, linear, draw):
    scores = draw(linear.n, linear.k, dtype=BY_WIDTH[when["dtype"]]).abs()
    bin = _bin(scores)
    if op == "count_bins_":
        return torch.zeros(selection.BINS, dtype=torch.int64, device=draw.device), scores
    if op == "count_at_least":
        return scores, bin
    counts = selection.count_at_least(scores, bin)
    offsets = counts.cumsum(0) - counts
    columns, keys = (torch.zeros(int(counts.sum()), dtype=torch.int32, device=draw.device) for _ in range(2))
    return columns, keys, scores, offsets, bin


def _bin(scores) -> int:
    """A bin that the largest 5 % of scores are in, or above."""
    bins = (selection.keys(scores) >> selection.SHIFT).flatten().sort().values
    return int(bins[int(0.95 * len(bins))])


def entries_of(work: int, rows: int, columns: int) -> int:
    """How many make that much `_sampled.work_per_million`; at least one."""
    return max(1, round(work * rows * columns / 1e6 - 2.5 * (rows + columns)))


def _sparse(op, when, linear, draw):
    act, (t, k, n) = BY_WIDTH[when.get("dtype", "16")], (linear.tokens, linear.k, linear.n)
    count = max(1, round(DENSITY * n * k))
    if "work" in when:
        count = entries_of(when["work"], n, k)
    chosen = draw.entries((n, k), count)
    index, floats = (chosen.starts, chosen.columns), lambda: draw(len(chosen), scale=0.1)
    if op == "match_entries":
        other = draw.entries((n, k), count)
        return *index, other.starts, other.columns
    if op == "sampled_product_":
        return floats(), draw(t, n, dtype=act), draw(t, k, dtype=act), *index, False
    if op == "add_sparse_product_":
        return draw(t, n, dtype=act), draw(t, k, dtype=act), *index, floats()
    weight = draw(n, k, dtype=act)
    if op == "gather_entries":
        return weight, *index
    base = sparse.gather_entries(weight, *index)
    if op == "write_entries_":
        return weight, *index, base, floats()
    if op == "sparse_adamw_":
        return weight, *index, base, floats(), floats(), floats(), floats().abs(), None, None, *HYPER, 7, SEED
    return weight, *index, base, floats(), floats(), draw(n).abs(), draw(k).abs(), HYPER[0], *HYPER[3:]


_MAKERS = {
    "lora": _adapted,
    "dora": _adapted,
    "grouped": _grouped,
    "partial": _partial,
    "selection": _selection,
    "sparse": _sparse,
}


def mutated(op: str) -> list[int]:
    """Positions of the arguments that an op changes in place."""
    schema = registry.OPS[op].schema
    arguments = schema[schema.index("(") + 1 : schema.rindex(") ->")].split(", ")
    return [i for i, argument in enumerate(arguments) if "!)" in argument]


def moved(op: str, args, outcome) -> int:
    """Fewest bytes of a call: every tensor once, what is changed in place twice, results once (`op_runs.outcome`).

    Of what is read at an index, the sectors of 32 bytes that hold something chosen.
    """
    changed = [i for i in mutated(op) if args[i] is not None]
    total = sum(result.nbytes for result in outcome[: len(outcome) - len(changed)])
    for i, arg in enumerate(args):
        if isinstance(arg, torch.Tensor):
            size = _touched(op, args) if i == 0 and op in _INDEXED else arg.nbytes
            total += size * (2 if i in changed else 1)
    return total


_INDEXED = {
    "gather_columns",
    "scatter_add_columns_",
    "write_slice_",
    "slice_adamw_",
    "gather_entries",
    "write_entries_",
    "sparse_adamw_",
    "sparse_sm3_",
}


def _touched(op: str, args) -> int:
    matrix, index = args[0], args[1].long()
    rows, columns = matrix.shape
    size = matrix.element_size()
    if op in ("write_slice_", "slice_adamw_") and args[2] == 0:
        return len(index) * columns * size
    if op.endswith(("columns", "columns_", "slice_", "slice_adamw_")):
        return rows * len((index * size // SECTOR).unique()) * SECTOR
    starts, columns_of = args[1], args[2].long()
    row = torch.repeat_interleave(torch.arange(rows, device=starts.device), starts.diff())
    return len(((row * columns + columns_of) * size // SECTOR).unique()) * SECTOR
