"""The four sites of a decoder layer (q/k/v, o, gate/up, down, each one GEMM) whose rows name their own LoRA adapters.

    decode     few rows, D adapters, equally many rows of each         prefill    thousands of rows

The floor is the four frozen GEMMs. Operations of a call with T rows: the floor 2 T Σ K N, the adapters 2 T R Σ (K + n),
n each projection's own out-features. Fewest bytes: the floor reads W and x and writes y; each distinct adapter is read once,
and y once more read and written.

Peers: `bmm`, stacked weights and two batched products, which needs equally many rows of every adapter, sorted; `loop`,
a pair of products for each adapter and output, on slices of x and y; `padded`, our ops with every adapter zero-padded to
rank 64, as in slots of a server that holds all at its largest rank; on GPUs `vllm`, its LoRA kernels (`libraries`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastft.ops.grouped import LOW_RANK, grouped_add_, grouped_expand_, grouped_shrink, in_one_call, scale_bits

from .. import libraries, shapes
from ..runner import Case, check_close
from . import lora

DTYPES = {name: lora.DTYPES[name] for name in ("fp32", "bf16", "bf16+fp32")}
PADDED = 64
SCALE = 2.0
# device -> model -> (rows of a decode step, numbers of adapters, tokens and adapters of a prefill)
DEFAULT = {
    "cpu": {"llama-8l": (32, (1, 4, 8, 32), (1024, 4))},
    "cuda": {"llama3-8b": (16, (1, 4, 16), (4096, 4))},
}
TARGETS = {  # of a GPU's bfloat16 layer, over the GEMMs alone
    ("llama3-8b", "decode", 1): 1.08,
    ("llama3-8b", "decode", 16): 1.14,
    ("llama3-8b", "prefill", 4): 1.05,
}


@dataclass(frozen=True)
class Adapters:
    """A site's adapters: per adapter and output A [R, K] and B [N, R], and the same laid out for the ops."""

    a: list[list[torch.Tensor]]
    b: list[list[torch.Tensor]]
    store: torch.Tensor
    offsets: torch.Tensor
    columns: torch.Tensor
    pieces: torch.Tensor
    width: int

    @staticmethod
    def of(a, b) -> "Adapters":
        device, k = a[0][0].device, a[0][0].shape[1]
        parts, offsets, pieces, at, width = [], [], [], 0, 0
        for own_a, own_b in zip(a, b):
            rows, y_first, s_first = [], 0, 0
            for one_a, one_b in zip(own_a, own_b):
                (n, rank), table = one_b.shape, len(offsets)
                for matrix in (one_a, one_b.t()):
                    offsets += range(at, at + matrix.numel(), matrix.shape[1])
                    parts.append(matrix.reshape(-1))
                    at += matrix.numel()
                rows.append([LOW_RANK, rank, table, table + rank, 0, k, y_first, n, s_first, scale_bits(SCALE)])
                y_first, s_first = y_first + n, s_first + rank
            pieces.append(rows)
            width = max(width, s_first)
        tables = [torch.tensor(numbers, dtype=torch.int64, device=device) for numbers in (offsets, pieces)]
        return Adapters(
            a, b, torch.cat(parts), tables[0], torch.zeros(0, dtype=torch.int16, device=device), tables[1], width
        )


@dataclass(frozen=True)
class Inputs:
    """x [T, K] and the frozen weight [ΣN, K] of each site, the sites' adapters, and the routing; rows sorted by adapter."""

    x: list[torch.Tensor]
    weights: list[torch.Tensor]
    outputs: list[list[int]]
    adapters: list[Adapters]
    segments: torch.Tensor
    assignments: torch.Tensor

    def tensors(self):
        made = [*self.x, *self.weights, self.segments, self.assignments]
        for site in self.adapters:
            made += [m for side in (site.a, site.b) for own in side for m in own]
            made += [site.store, site.offsets, site.pieces]
        return made


def make_inputs(model: shapes.Model, dtype: str, count: int, tokens: int, rank: int, device, seed: int) -> Inputs:
    act, kind = DTYPES[dtype]
    generator = torch.Generator().manual_seed(seed)

    def draw(*size, std, to=act):
        return (torch.randn(*size, generator=generator) * std).to(device, to)

    x, weights, outputs, adapters = [], [], [], []
    for k, widths in model.groups():
        x.append(draw(tokens, k, std=1.0))
        weights.append(draw(sum(widths), k, std=k**-0.5))
        a = [[draw(rank, k, std=k**-0.5, to=kind) for _ in widths] for _ in range(count)]
        b = [[draw(n, rank, std=0.3 / (SCALE * rank**0.5), to=kind) for n in widths] for _ in range(count)]
        outputs.append(widths)
        adapters.append(Adapters.of(a, b))
    bounds = [tokens * e // count for e in range(count + 1)]
    segments = torch.tensor([[e, bounds[e], bounds[e + 1]] for e in range(count)], dtype=torch.int32, device=device)
    return Inputs(x, weights, outputs, adapters, segments, torch.arange(tokens, dtype=torch.int32, device=device))


def each_site(update):
    """Builder of an arm: the GEMM of every site, then update(y, x, site, inputs)."""

    def build(d: Inputs):
        def run():
            with torch.no_grad():
                found = {}
                for i, (x, weight) in enumerate(zip(d.x, d.weights)):
                    found[f"y{i}"] = y = F.linear(x, weight)
                    update(y, x, i, d)
                return found

        return run

    return build


def frozen(y, x, i, d):
    pass


def ours(y, x, i, d):
    """As served: in one call where there is one for both."""
    site, plan = d.adapters[i], (d.segments, d.assignments)
    if in_one_call(x.device):
        grouped_add_(y, x, site.store, site.offsets, site.columns, site.pieces, *plan, None, 1, site.width)
        return
    s = grouped_shrink(x, site.store, site.offsets, site.pieces, *plan, 1, site.width)
    grouped_expand_(y, x, s, site.store, site.offsets, site.columns, site.pieces, *plan, None, 1)


def padded(d: Inputs):
    """Ours with zeros up to rank 64."""

    def pad(m, dim):
        missing = PADDED - m.shape[dim]
        return F.pad(m, (0, 0, 0, missing) if dim == 0 else (0, missing))

    wide = []
    for site in d.adapters:
        a, b = ([[pad(m, dim) for m in own] for own in side] for side, dim in ((site.a, 0), (site.b, 1)))
        wide.append(Adapters.of(a, b))
    return each_site(ours)(Inputs(d.x, d.weights, d.outputs, wide, d.segments, d.assignments))


def each_adapter(site: Adapters, tokens: int):
    """(rows of x and y, A's, B's) of one adapter after the other; its rows lie together."""
    count = len(site.a)
    for e, (own_a, own_b) in enumerate(zip(site.a, site.b)):
        yield slice(tokens * e // count, tokens * (e + 1) // count), own_a, own_b


def loop(y, x, i, d):
    """One adapter after the other."""
    for rows, own_a, own_b in each_adapter(d.adapters[i], len(x)):
        inputs, last = x[rows], 0
        for a, b in zip(own_a, own_b):
            s, part = inputs.to(a.dtype) @ a.t(), y[rows, last : last + len(b)]
            if b.dtype == y.dtype:
                part.addmm_(s, b.t(), alpha=SCALE)
            else:
                part += (SCALE * (s @ b.t())).to(y.dtype)
            last += len(b)


def plain(y, x, i, d):
    """The formula, each product rounded by itself: what the other arms' errors are measured by."""
    for rows, own_a, own_b in each_adapter(d.adapters[i], len(x)):
        update = [SCALE * (x[rows].to(a.dtype) @ a.t() @ b.t()) for a, b in zip(own_a, own_b)]
        y[rows] += torch.cat(update, 1).to(y.dtype)


def bmm(d: Inputs):
    stacks = []
    for site in d.adapters:
        a = torch.stack([torch.cat(own).t() for own in site.a])  # [D, K, ΣR]
        b = [torch.stack([SCALE * own[j].t() for own in site.b]) for j in range(len(site.b[0]))]  # [D, R, N] an output
        stacks.append((a.contiguous(), [one.contiguous() for one in b]))

    def update(y, x, i, d):
        a, b = stacks[i]
        count, first, rank = len(a), 0, b[0].shape[1]
        s = torch.bmm(x.view(count, -1, x.shape[1]).to(a.dtype), a)
        rows = y.view(count, -1, y.shape[1])
        for j, one in enumerate(b):
            part = rows[:, :, first : first + one.shape[2]]
            if one.dtype == y.dtype:
                part.baddbmm_(s[:, :, j * rank : (j + 1) * rank], one)
            else:
                part += torch.bmm(s[:, :, j * rank : (j + 1) * rank], one).to(y.dtype)
            first += one.shape[2]

    return each_site(update)(d)


def checker(d: Inputs, factor: float = 2.0):
    """The gate: every y equals float64's, with an error of at most twice that of the plain formula."""
    yardstick, golden = each_site(plain)(d)(), {}
    for i, (x, weight, site) in enumerate(zip(d.x, d.weights, d.adapters)):
        y = x.double() @ weight.double().t()
        for rows, own_a, own_b in each_adapter(site, len(x)):
            y[rows] += SCALE * torch.cat(
                [x[rows].double() @ a.double().t() @ b.double().t() for a, b in zip(own_a, own_b)], 1
            )
        golden[f"y{i}"] = y
    return lambda build: check_close(build(d)(), golden, yardstick, factor)


def work(model: shapes.Model, dtype: str, count: int, tokens: int, rank: int) -> dict[str, int]:
    e, ea = (t.itemsize for t in DTYPES[dtype])
    flops = sum(2 * tokens * k * sum(widths) for k, widths in model.groups())
    moved = sum((k * sum(widths) + tokens * (k + sum(widths))) * e for k, widths in model.groups())
    numbers = sum(rank * (k + n) for k, widths in model.groups() for n in widths)
    written = sum(2 * tokens * sum(widths) * e for _, widths in model.groups())
    return {
        "flops": flops + 2 * tokens * numbers,
        "moved": moved + count * numbers * ea + written,
        "floor_flops": flops,
        "floor_moved": moved,
    }


PEERS = {"bmm": bmm, "loop": each_site(loop), "padded": padded, "vllm": lambda d: libraries.vllm(d, SCALE)}


def cases(device: str, names=None, dtypes=None, dropouts=None, rank=shapes.RANK, peer_names=None):
    """Every case asked for; what is None takes this device's defaults.

    Raises:
        ValueError: an unknown model, dtype or peer; a dropout, since nothing trains here.
    """
    if dropouts is not None:
        raise ValueError("grouped has no dropout: these layers serve")
    names = lora.known("shape", names or DEFAULT[device], shapes.MODELS)
    wanted = lora.known("peer", libraries.usual(PEERS, device) if peer_names is None else peer_names, PEERS)
    dtypes = lora.known("dtype", dtypes or ("fp32", "bf16"), DTYPES)
    arms = {"fastft": each_site(ours)}
    arms |= {f"fastft:{b}": lora.on_backend(b, arms["fastft"]) for b in lora.several_backends(device)}
    missing = libraries.absent(wanted, device)
    arms |= {name: PEERS[name] for name in wanted if name not in missing}
    for name in names:
        model = shapes.MODELS[name]
        rows, counts, prefill = DEFAULT[device].get(name, (8, (1, 2), (16, 2)))
        for dtype in dtypes:
            barred = {"vllm": why} if "vllm" in arms and (why := libraries.vllm_barred(DTYPES[dtype][1])) else {}
            if "padded" in arms and rank > PADDED:
                barred["padded"] = f"it pads to rank {PADDED}, and this is {rank}"
            for sort, count, tokens in [*(("decode", c, rows) for c in counts), ("prefill", prefill[1], prefill[0])]:
                aimed = device == "cuda" and dtype == "bf16" and rank == shapes.RANK
                yield Case(
                    "grouped",
                    f"{sort} D={count} r={rank}",
                    name,
                    f"one layer, {tokens} tokens",
                    dtype,
                    inputs=lambda dev, seed, m=model, t=dtype, c=count, n=tokens: make_inputs(m, t, c, n, rank, dev, seed),
                    tensors=Inputs.tensors,
                    floor=each_site(frozen),
                    arms={name: arm for name, arm in arms.items() if name not in barred},
                    checker=checker,
                    skipped=missing | barred,
                    target=TARGETS.get((name, sort, count)) if aimed else None,
                    **work(model, dtype, count, tokens, rank),
                )
