"""A linear of whose weight single entries train, over the frozen linear's forward and dX.

    layer      forward, dX and the entries' gradient, dYᵀ X at the entries
    beside     the entries' delta beside an untouched weight, forward alone, over the frozen linear's forward: a few tokens
               (decoding) to many
    update     AdamW of 5 % of six matrices (100 million weights where they are 4096 x 4096) and its way into the weights,
               vs LIFT's published algorithm (`entry_updates`); also beside a copy of the bytes that it has to move

Operations of a call with E entries, T tokens (a multiply-add counts two): the floor 4 T K N, the gradient 2 T E; beside
2 T K N and 2 T E. Fewest bytes, e an element of x, W, y: the floor reads x, W, dy, W and writes y, dx; the gradient reads x
and dy again and an index of 4 bytes an entry, and writes E float32. Beside: x, W, y; y once more in and out; index, delta.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from .. import entries, entry_updates, peers, shapes, slices
from ..runner import Case
from . import lora
from .partial import forward, gate

DTYPES = ("fp32", "bf16+fp32", "fp16+fp32")  # deltas are float32
DEFAULT_DTYPES = ("fp32", "bf16+fp32")
DENSITIES = {"cpu": (0.01, 0.05), "cuda": (0.001, 0.01, 0.05)}
BESIDE, UPDATED = 0.01, 0.05
TOKENS = (1, 16, 128, 1024)
LAYER_TOKENS = 1024  # of the square shapes
TARGETS = {
    ("square2048", "fp32", 0.01): 1.05,
    ("square4096", "fp32", 0.01): 1.06,
    ("square2048", "bf16+fp32", 0.01): 1.07,
    ("square4096", "bf16+fp32", 0.01): 1.07,
    ("square2048", "fp32", 0.05): 1.12,
    ("square4096", "fp32", 0.05): 1.14,
    **{(f"llama3-8b/{name}", "bf16+fp32", 0.001): 1.15 for name in ("q_proj", "gate_proj", "down_proj")},
    ("llama3-8b/k_proj", "bf16+fp32", 0.001): 1.30,
    **{
        (f"llama3-8b/{name}", "bf16+fp32", density): 1.60
        for name in ("q_proj", "k_proj", "gate_proj", "down_proj")
        for density in (0.01, 0.05)
    },
}
UPDATE_TARGET, REACH = 0.1, {"cpu": 0.5, "cuda": 0.6}
# Where no shape is asked for: (layer, beside, update).
DEFAULT = {
    "cpu": (shapes.DEFAULT["cpu"], shapes.DEFAULT["cpu"], ("square4096",)),
    "cuda": (shapes.DEFAULT["cuda"], ("llama3-8b/q_proj", "llama3-8b/down_proj"), ("square4096",)),
}
PEERS = {"plain": lambda: None, "published": lambda: None, "csr": lambda: None}
PEERS |= {"shira": peers.peft_missing, "peft": peers.peft_missing}


def layer_checker(d: entries.Inputs, factor: float = 2.0):
    """The gate: y, dX and the entries' gradient equal float64's, with round(base + delta) in the weight."""
    live = entries.written(d)
    wide = replace(lora.double(live), delta=torch.nn.Parameter(d.delta.detach().double()))
    return gate(d, _dense(wide), _dense(live), {"ddelta"}, factor)


def _dense(d):
    """The definition: all of dW by autograd, of a weight that holds the delta."""
    found = slices.full(d)()
    return {"y": found["y"], "dx": found["dx"], "ddelta": found["dw"][d.entries.rows(), d.entries.columns.long()]}


def forward_checker(d: entries.Inputs, factor: float = 2.0):
    """The gate: y equals x (W + delta)ᵀ, or for LoRAs theirs, in float64."""
    wide = replace(lora.double(d), delta=torch.nn.Parameter(d.delta.detach().double()))
    return gate(d, _outputs(wide), _outputs(d), {"y", "y_lora"}, factor)


def _outputs(d):
    with torch.no_grad():
        weight = d.weight.to(d.delta.dtype, copy=True)
        weight[d.entries.rows(), d.entries.columns.long()] += d.delta
        y = F.linear(d.x.to(weight.dtype), weight, None if d.bias is None else d.bias.to(weight.dtype))
        return {"y": y.to(d.x.dtype), "y_lora": lora.plain(d)(d.x)}


def work(linear: shapes.Linear, density: float, dtype: str) -> dict[str, dict[str, int]]:
    """Floating-point operations and fewest bytes of each sort of case, of the arm and of its floor (module docstring)."""
    t, k, n, count = linear.tokens, linear.k, linear.n, entries.count_of(linear, density)
    e = lora.DTYPES[dtype][0].itemsize
    floor, one_way = lora.work(linear, dtype, 0, 0.0), (t * k + t * n + k * n) * e
    dense = entry_updates.MATRICES * k * n
    return {
        "layer": {
            "floor_flops": floor["floor_flops"],
            "floor_moved": floor["floor_moved"],
            "flops": floor["floor_flops"] + 2 * t * count,
            "moved": floor["floor_moved"] + (t * k + t * n) * e + 8 * count,
        },
        "beside": {
            "floor_flops": 2 * t * k * n,
            "floor_moved": one_way,
            "flops": 2 * t * k * n + 2 * t * count,
            "moved": one_way + 2 * t * n * e + 8 * count,
        },
        "update": {
            "flops": 15 * entry_updates.MATRICES * count,
            "moved": entry_updates.moved(linear, density, dtype),
            "floor_flops": 15 * entry_updates.MATRICES * count + 2 * dense,
            # The mask twice; the gradient cleared and read, weights read and written: all dense.
            "floor_moved": dense * (2 + 4 * e) + entry_updates.MATRICES * count * 8 * e,
        },
    }


def cases(device: str, names=None, dtypes=None, dropouts=None, rank=shapes.RANK, peer_names=None):
    """Every case asked for; what is None takes this device's defaults.

    Raises:
        ValueError: an unknown shape, dtype or peer; a dropout or rank, which entries don't have.
    """
    if dropouts is not None or rank != shapes.RANK:
        raise ValueError("sparse has no dropout and no rank: entries have neither, and their LoRA is as large as they are")
    wanted = lora.known("peer", PEERS if peer_names is None else peer_names, PEERS)
    dtypes = lora.known("dtype", dtypes or DEFAULT_DTYPES, DTYPES)
    missing = {n: why for n in wanted if (why := PEERS[n]())}
    there = [n for n in wanted if n not in missing]
    for i, make in enumerate((_layers, _besides, _updates)):
        for shape, linear in shapes.resolve(names or DEFAULT[device][i]).items():
            for dtype in dtypes:
                yield from make(device, shape, linear, dtype, there, missing)


def _ours(device, build):
    """Arms of ours: as it chooses its kernels, and on each backend where there are several."""
    return {"fastft": build} | {f"fastft:{b}": lora.on_backend(b, build) for b in lora.several_backends(device)}


def _layers(device, shape, linear, dtype, there, missing):
    if shape in shapes.DEFAULT["cpu"]:
        linear = replace(linear, tokens=LAYER_TOKENS)
    arms = _ours(device, entries.training(entries.ours))
    others = {name: entries.training(getattr(entries, name)) for name in ("plain", "published", "shira")}
    for density in DENSITIES[device]:
        yield Case(
            "sparse",
            f"layer {100 * density:g} %",
            shape,
            str(linear),
            dtype,
            inputs=lambda dev, seed, p=density: entries.make_inputs(linear, p, dtype, dev, seed),
            tensors=entries.Inputs.everything,
            floor=lora.floor,
            arms={**arms, **{n: arm for n, arm in others.items() if n in there}},
            checker=layer_checker,
            skipped={n: why for n, why in missing.items() if n in others},
            target=TARGETS.get((shape, dtype, density)),
            **work(linear, density, dtype)["layer"],
        )


def _besides(device, shape, linear, dtype, there, missing):
    others = {"csr": forward(entries.CsrDelta), "peft": forward(peers.peft, "y_lora")}
    for tokens in TOKENS:
        sized = replace(linear, tokens=tokens)
        yield Case(
            "sparse",
            f"beside {100 * BESIDE:g} % T={tokens} vs frozen forward",
            shape,
            str(sized),
            dtype,
            inputs=lambda dev, seed, s=sized: entries.make_inputs(s, BESIDE, dtype, dev, seed),
            tensors=entries.Inputs.everything,
            floor=forward(peers.frozen_linear),
            arms={**_ours(device, forward(entries.beside)), **{n: arm for n, arm in others.items() if n in there}},
            checker=forward_checker,
            skipped={n: why for n, why in missing.items() if n in others},
            **work(sized, BESIDE, dtype)["beside"],
        )


def _updates(device, shape, linear, dtype, there, missing):
    yield Case(
        "sparse",
        f"update {100 * UPDATED:g} % vs LIFT's algorithm",
        shape,
        f"{entry_updates.MATRICES} x {linear.k}x{linear.n}",
        dtype,
        inputs=lambda dev, seed: entry_updates.make_inputs(linear, UPDATED, dtype, dev, seed),
        tensors=entry_updates.Inputs.tensors,
        floor=entry_updates.published,
        arms=_ours(device, entry_updates.ours),
        checker=entry_updates.checker,
        target=UPDATE_TARGET,
        copies=entry_updates.copies,
        reach=REACH[device],
        **work(linear, UPDATED, dtype)["update"],
    )
