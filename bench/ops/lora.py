"""The LoRA layer: forward, dX and adapter gradients of one adapted linear, over the frozen linear's forward and dX.

    y = x Wt + bias + s drop(x) At Bt        x [T, K], W [N, K], A [R, K], B [N, R]

Operations of one call (a multiply-add counts two):  floor 4 T K N; the adapter adds 6 T R (K + N): S, its expansion,
dS, dB, dA, dX's part. Fewest bytes, with e bytes an element of x, W, y: the floor reads x, W, dy, W and writes y, dx;
the adapter's five ops read x twice (S, dA), dy once, read and write y and dx once more, move S and dS (float32, each
written once and read twice), the packed mask (written once, read twice), A three times, B twice, dA and dB.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import fastft
from fastft import testing

from .. import libraries, peers, shapes
from ..runner import Case, WrongResult, check_close

DTYPES = {  # name: (x, W, y; adapters)
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16+fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16+fp32": (torch.float16, torch.float32),
}
DEFAULT_DTYPES = ("fp32", "bf16", "bf16+fp32")
DROPOUTS = (0.0, 0.05)
SCALE = 2.0

# Ratio to the floor at r=16 without dropout; dropout may add DROPOUT_ADDS.
TARGETS = {
    ("square2048", "fp32"): 1.035,
    ("square2048", "bf16"): 1.05,
    ("square2048", "bf16+fp32"): 1.08,
    ("square4096", "fp32"): 1.02,
    ("square4096", "bf16"): 1.025,
    ("square4096", "bf16+fp32"): 1.055,
}
DROPOUT_ADDS = 0.02


@dataclass(frozen=True)
class Inputs:
    """x [T, K] and dy [T, N]; weight [N, K], bias [N] or None; adapters a [R, K], b [N, R] as parameters."""

    x: torch.Tensor
    dy: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    a: torch.nn.Parameter
    b: torch.nn.Parameter
    p: float
    scale: float = SCALE

    def tensors(self):
        return [t for t in (self.x, self.dy, self.weight, self.bias, *self.trained().values()) if t is not None]

    def trained(self) -> dict[str, torch.Tensor]:
        """The adapter's parameters by the names of their gradients."""
        return {"da": self.a, "db": self.b}


def make_inputs(linear: shapes.Linear, dtype: str, rank: int, p: float, device, seed: int) -> Inputs:
    """Random inputs at which the base's and the adapter's parts of y and of dx are equally large."""
    act, adapter = DTYPES[dtype]
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size, std=1.0, dtype=act):
        return torch.randn(size, generator=generator, device=device).mul_(std).to(dtype)

    t, k, n = linear.tokens, linear.k, linear.n
    return Inputs(
        x=normal(t, k).requires_grad_(),
        dy=normal(t, n),
        weight=normal(n, k, std=k**-0.5),
        bias=normal(n) if linear.bias else None,
        a=torch.nn.Parameter(normal(rank, k, std=k**-0.5, dtype=adapter)),
        b=torch.nn.Parameter(normal(n, rank, std=rank**-0.5 / SCALE, dtype=adapter)),
        p=p,
    )


def floor(d: Inputs):
    """Forward and dX of the frozen linear alone."""
    layer = peers.frozen_linear(d)

    def run():
        y = layer(d.x)
        (dx,) = torch.autograd.grad(y, d.x, d.dy)
        return {"y": y.detach(), "dx": dx}

    return run


def adapted(make_layer):
    """Builder of an arm from a function Inputs -> layer: forward, dX and the gradients of the adapter."""

    def build(d: Inputs):
        layer, trained = make_layer(d), d.trained()

        def run():
            y = layer(d.x)
            dx, *gradients = torch.autograd.grad(y, (d.x, *trained.values()), d.dy)
            return {"y": y.detach(), "dx": dx, **dict(zip(trained, gradients))}

        return run

    return build


def ours(d: Inputs):
    rank = d.a.shape[0]
    base = peers.frozen_linear(d)
    layer = fastft.LoRALinear.from_linear(base, r=rank, lora_alpha=d.scale * rank, lora_dropout=d.p)
    layer.lora_A, layer.lora_B = d.a, d.b
    return layer.train()


def on_backend(name: str, build=None):
    """Ours, or what `build` makes, forced onto one backend."""
    build = build or adapted(ours)

    def forced(d):
        run = build(d)

        def inside():
            with testing.use(name):
                return run()

        if hasattr(run, "parameters"):
            inside.parameters = run.parameters
        return inside

    return forced


def plain(d: Inputs):
    """The formula as PyTorch operations in the case's dtypes: what the other arms' errors are measured by."""

    def layer(x):
        update = F.linear(F.linear(F.dropout(x, d.p).to(d.a.dtype), d.a), d.b) * d.scale
        return (F.linear(x, d.weight, d.bias) + update).to(x.dtype)

    return layer


def double(d: Inputs) -> Inputs:
    wide = {name: getattr(d, name).detach().double() for name in ("x", "dy", "weight", "a", "b")}
    wide |= {name: wide[name].requires_grad_() for name in ("x", "a", "b")}
    return replace(d, **wide, bias=None if d.bias is None else d.bias.double(), p=0.0)


def checker(d: Inputs, factor: float = 2.0):
    """The gate: without dropout each arm equals the float64 formula; with dropout its backward replays its mask."""
    still = replace(d, p=0.0)
    golden = adapted(plain)(double(d))()
    yardstick = adapted(plain)(still)()

    def check(build):
        check_close(build(still)(), golden, yardstick, factor)
        if d.p > 0:
            check_dropout(build, d)

    return check


def _dot(u, v) -> float:
    return (u.detach().double() * v.detach().double()).sum().item()


def check_dropout(build, d: Inputs, probes: int = 4) -> None:
    """Whether an arm drops with probability p and uses one mask in forward and backward, whatever its generator.

    With the mask fixed, the adapter's part u of y is linear in each of x, A and B, so for any dy
    ``<dy, u> = <dA, A> = <dB, B> = <dX's part, x>``; a gradient under another mask breaks its equality by a random
    amount of sqrt(2 p / (1-p)) |u| at standard normal dy, and must hide in 0.05 |u| in every probe. The mask itself moves
    u by sqrt(p / (1-p)) |u|, which the p T K dropped elements settle to about 1 / sqrt(p T K) (4 sigma are allowed).

    Raises:
        WrongResult: one of these does not hold.
    """
    base, still = floor(d)(), build(replace(d, p=0.0))()
    u = still["y"].double() - base["y"].double()
    moved = (build(d)()["y"].double() - still["y"].double()).norm() / u.norm()
    expected = (d.p / (1 - d.p)) ** 0.5
    if not abs(moved / expected - 1) <= 0.05 + 4 / (d.p * d.x.numel()) ** 0.5:
        raise WrongResult(f"dropout p={d.p} moves y by {moved:.3f} of the adapter's part, expected {expected:.3f}")
    for probe in range(probes):
        generator = torch.Generator(d.x.device).manual_seed(probe)
        dy = torch.randn(d.dy.shape, generator=generator, device=d.x.device).to(d.dy.dtype)
        probed = replace(d, dy=dy)
        out, base = build(probed)(), floor(probed)()
        u = out["y"].double() - base["y"].double()
        want = _dot(dy, u)
        for name, got in {
            "dA": _dot(out["da"], d.a),
            "dB": _dot(out["db"], d.b),
            "dX": _dot(out["dx"].double() - base["dx"].double(), d.x),
        }.items():
            if not abs(got - want) <= 0.05 * u.norm().item():
                raise WrongResult(f"{name} does not replay forward's dropout mask: {got:.4g} against {want:.4g}")


def work(linear: shapes.Linear, dtype: str, rank: int, p: float) -> dict[str, int]:
    """Floating-point operations and fewest bytes of one call, of the arm and of the floor (formulas: module docstring)."""
    t, k, n = linear.tokens, linear.k, linear.n
    floor_moved = 2 * (t * k + t * n + k * n) * DTYPES[dtype][0].itemsize
    flops, moved = adapter_work(t, k, [n], rank, DTYPES[dtype], p)
    return {
        "floor_flops": 4 * t * k * n,
        "floor_moved": floor_moved,
        "flops": 4 * t * k * n + flops,
        "moved": floor_moved + moved,
    }


def adapter_work(tokens: int, k: int, outs: list[int], rank: int, dtypes, p: float) -> tuple[int, int]:
    """(operations, fewest bytes) that adapters add to linears of `outs` out-features which share x and dX; a mask each."""
    count, n, (e, ea) = len(outs), sum(outs), (dtype.itemsize for dtype in dtypes)
    moved = (4 * tokens * k + 3 * tokens * n) * e + 6 * tokens * count * rank * 4 + rank * (4 * count * k + 3 * n) * ea
    mask = count * 3 * tokens * ((k + 7) // 8) if p > 0 else 0
    return 6 * tokens * rank * (count * k + n), moved + mask


def compiled(d: Inputs):
    return torch.compile(plain(d))


PEERS = peers.LORA | {"compile": (compiled, lambda: None), "unsloth": (libraries.unsloth, lambda: None)}


def cases(device: str, names=None, dtypes=None, dropouts=None, rank=shapes.RANK, peer_names=None):
    """Every case asked for; what is None takes this device's defaults.

    Raises:
        ValueError: an unknown shape, dtype or peer.
    """
    linears = shapes.resolve(names or shapes.DEFAULT[device])
    dtypes = known("dtype", dtypes or DEFAULT_DTYPES, DTYPES)
    arms = {"fastft": adapted(ours)}
    arms |= {f"fastft:{b}": on_backend(b) for b in several_backends(device)}
    wanted = known("peer", libraries.usual(peers.LORA_DEFAULT, device) if peer_names is None else peer_names, PEERS)
    missing = libraries.absent(wanted, device) | {n: why for n in wanted if (why := PEERS[n][1]())}
    arms |= {name: adapted(PEERS[name][0]) for name in wanted if name not in missing}
    for shape, linear in linears.items():
        for dtype in dtypes:
            for p in DROPOUTS if dropouts is None else dropouts:
                target = TARGETS.get((shape, dtype)) if rank == shapes.RANK and p in DROPOUTS else None
                barred = dict.fromkeys([n for n in peers.WITHOUT_DROPOUT if n in arms and p > 0], "it has no dropout")
                if "unsloth" in arms and (reason := libraries.unsloth_barred(linear.bias, p)):
                    barred["unsloth"] = reason
                yield Case(
                    "lora",
                    f"layer r={rank} p={p:g}",
                    shape,
                    str(linear),
                    dtype,
                    # p and the loop's variables are bound now, not when the case runs.
                    inputs=lambda dev, seed, s=linear, t=dtype, q=p: make_inputs(s, t, rank, q, dev, seed),
                    tensors=Inputs.tensors,
                    floor=floor,
                    arms={n: arm for n, arm in arms.items() if n not in barred},
                    checker=checker,
                    skipped=missing | barred,
                    target=target + DROPOUT_ADDS * (p > 0) if target else None,
                    **work(linear, dtype, rank, p),
                )


def several_backends(device: str) -> list[str]:
    """The kernels' backends on a GPU, if there is more than one to compare."""
    # On a CPU the others (Triton's interpreter, host-run CUDA) exist for proof alone.
    kernels = [b for b in testing.available(device) if b != "reference"] if device == "cuda" else []
    return kernels if len(kernels) > 1 else []


def known(kind, names, table):
    unknown = [n for n in names if n not in table]
    if unknown:
        raise ValueError(f"unknown {kind} {unknown[0]!r}; known: {', '.join(table)}")
    return names
