"""A linear of whose weight a slice trains (columns C or rows R), over the frozen linear's forward and dX.

    layer      forward, dX and the slice's gradient           columns: dYᵀ X[:, C]        rows: dY[:, R]ᵀ X
    unmerged   the slice's delta beside an untouched weight, forward alone, vs a LoRA with as many trained numbers,
               r = C N / (K + N): a few tokens (decoding) to many
    update     AdamW of the slice and its way into the weight, vs PyTorch's fused AdamW and `index_copy_`

Operations of a call with C columns, T tokens (a multiply-add counts two; for rows exchange K and N): the floor 4 T K N, the
gradient 2 T N C; unmerged 2 T K N and 2 T N C; its LoRA 2 T (K + N) r. Fewest bytes, e an element of x, W, y: the floor
reads x, W, dy, W and writes y, dx; the gradient reads x[:, C], writes and reads its copy, reads dy and writes N C float32
(rows read and write dy[:, R], read that and x). Unmerged: x, W, y and as many float32 numbers as train; y once more in and
out. An update reads delta, gradient and two moments (float32) and the base's slice, and writes all but gradient and base,
and the weight's slice.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from .. import peers, shapes, slices
from ..runner import Case, WrongResult, check_close
from . import lora

KINDS = ("columns", "rows")
DEFAULT_DTYPES = ("fp32", "bf16+fp32")  # x, W, y; what trains (in "bf16" that is bfloat16 as well)
TOKENS = (1, 16, 128, 1024)
TARGETS = {("llama3-8b/down_proj", "columns"): 1.02}
# Where no shape is asked for: (layer, unmerged, update).
DEFAULT = {
    "cpu": (shapes.DEFAULT["cpu"], ("square2048", "llama-6l/down_proj"), shapes.DEFAULT["cpu"]),
    "cuda": (shapes.DEFAULT["cuda"], ("llama3-8b/down_proj",), ("llama3-8b/down_proj",)),
}


def layer_checker(d: slices.Inputs, factor: float = 2.0):
    """The gate: y, dX and what of dW an arm computes (the slice, the first one of its size, all) equal float64's."""
    golden, yardstick = _dense(lora.double(d)), _dense(d)
    return gate(d, golden, yardstick, {"dslice", "dfirst", "dw"}, factor)


def _dense(d: slices.Inputs):
    found = slices.full(d)()
    first = torch.arange(len(d.part.index), device=d.x.device)
    return {**found, "dslice": d.slice_of(found["dw"]), "dfirst": found["dw"].index_select(d.dim, first)}


def gate(d, golden, yardstick, alternatives, factor):
    """The gate of arms that give one of the `alternatives`, and all else that the golden outputs hold."""

    def check(build):
        out = build(d)()
        found = {name for name in alternatives if name in out}
        if len(found) != 1:
            raise WrongResult(f"gives {sorted(found) or 'none'} of {', '.join(sorted(alternatives))}")
        check_close(out, {n: want for n, want in golden.items() if n not in alternatives - found}, yardstick, factor)

    return check


def forward(make_layer, name="y"):
    """Builder of an arm: the output of a layer (a module in evaluation, or a function) without gradients; `name` tells the
    gate whose formula it must equal."""

    def build(d: lora.Inputs):
        layer, x = make_layer(d), d.x.detach()
        if isinstance(layer, torch.nn.Module):
            layer.eval()

        def run():
            with torch.no_grad():
                return {name: layer(x)}

        return run

    return build


def forward_checker(d: slices.Inputs, factor: float = 2.0):
    """The gate: y equals x (W + delta)ᵀ, or for LoRAs theirs, in float64."""
    return gate(d, _outputs(replace(lora.double(d), delta=d.delta.double())), _outputs(d), {"y", "y_lora"}, factor)


def _outputs(d: slices.Inputs):
    with torch.no_grad():
        weight = d.weight.to(d.delta.dtype).index_add(d.dim, d.part.index, d.delta)
        y = F.linear(d.x.to(weight.dtype), weight, None if d.bias is None else d.bias.to(weight.dtype))
        return {"y": y.to(d.x.dtype), "y_lora": lora.plain(d)(d.x)}


def updating(make):
    """Builder of an arm: `make` gives (weight, parameter, update).

    Calls take two gradients in turn: with one alone every update would be lr times its sign.
    """

    def build(d: slices.Inputs):
        weight, parameter, update = make(replace(d, weight=d.weight.clone()))
        generator, made = torch.Generator().manual_seed(1), []
        for std in (1.0, 0.3):
            made.append(torch.randn(d.delta.shape, generator=generator).mul_(std).to(parameter.device, parameter.dtype))
        calls = 0

        def run():
            nonlocal calls
            parameter.grad = made[calls % 2]
            calls += 1
            update()
            return {"w": weight}

        return run

    return build


def update_checker(d: slices.Inputs, factor: float = 2.0):
    """The gate: how far three updates move the weight, as in float64."""

    def moved(build, inputs):
        run = build(inputs)
        for _ in range(3):
            out = run()
        return {"w": out["w"].double() - d.weight.double()}

    wide = replace(lora.double(d), delta=torch.nn.Parameter(d.delta.detach().double()))
    golden = moved(updating(lambda i: slices.adamw_and_copy(i, foreach=True)), wide)
    yardstick = moved(updating(slices.adamw_and_copy), d)
    return lambda build: check_close(moved(build, d), golden, yardstick, factor)


def work(linear: shapes.Linear, kind: str, dtype: str) -> dict[str, dict[str, int]]:
    """Floating-point operations and fewest bytes of each sort of case, of the arm and of its floor (module docstring)."""
    t, k, n, c = linear.tokens, linear.k, linear.n, slices.slice_size(linear, kind)
    e, ea = (dt.itemsize for dt in lora.DTYPES[dtype])
    outer = n if kind == "columns" else k
    trained, rank = outer * c, slices.equal_rank(linear, kind)
    floor = lora.work(linear, dtype, 0, 0.0)
    one_way = (t * k + t * n + k * n) * e
    return {
        "layer": {
            **floor,
            "flops": floor["flops"] + 2 * t * outer * c,
            "moved": floor["floor_moved"] + (3 * t * c + t * outer) * e + trained * ea,
        },
        "unmerged": {
            "flops": 2 * t * k * n + 2 * t * outer * c,
            "moved": one_way + 2 * t * (n if kind == "columns" else c) * e + trained * ea,
            "floor_flops": 2 * t * k * n + 2 * t * (k + n) * rank,
            "floor_moved": one_way + 2 * t * n * e + (k + n) * rank * ea,
        },
        "update": {
            "flops": 15 * trained,
            "moved": trained * (7 * ea + 2 * e),
            "floor_flops": 15 * trained,
            "floor_moved": trained * (8 * ea + e),
        },
    }


PEERS = {
    "plain": lambda: None,
    "permuted": lambda: None,
    "full": lambda: None,
    "peft": peers.peft_missing,
}


def _sorts(device):
    """Sort of case -> (arms of ours, peers, floor, checker)."""

    def ours(build):
        return {"fastft": build} | {f"fastft:{b}": lora.on_backend(b, build) for b in lora.several_backends(device)}

    others = {"plain": lora.adapted(slices.plain), "permuted": slices.permuted, "full": slices.full}
    return {
        "layer": (ours(lora.adapted(slices.ours)), others, lora.floor, layer_checker),
        "unmerged": (
            ours(forward(slices.unmerged)),
            {"peft": forward(peers.peft, "y_lora")},
            forward(slices.low_rank, "y_lora"),
            forward_checker,
        ),
        "update": (ours(updating(slices.slice_adamw)), {}, updating(slices.adamw_and_copy), update_checker),
    }


def cases(device: str, names=None, dtypes=None, dropouts=None, rank=shapes.RANK, peer_names=None):
    """Every case asked for; what is None takes this device's defaults.

    Raises:
        ValueError: an unknown shape, dtype or peer; a dropout or rank, which slices don't have.
    """
    if dropouts is not None or rank != shapes.RANK:
        raise ValueError("partial has no dropout and no rank: a slice has neither, and its LoRA is as large as the slice")
    wanted = lora.known("peer", PEERS if peer_names is None else peer_names, PEERS)
    dtypes = lora.known("dtype", dtypes or DEFAULT_DTYPES, lora.DTYPES)
    for i, (sort, (arms, others, floor, checker)) in enumerate(_sorts(device).items()):
        missing = {n: why for n in wanted if n in others and (why := PEERS[n]())}
        arms = arms | {n: arm for n, arm in others.items() if n in wanted and n not in missing}
        for shape, linear in shapes.resolve(names or DEFAULT[device][i]).items():
            for dtype in dtypes:
                if sort != "layer" and lora.DTYPES[dtype][1] != torch.float32:
                    continue  # the deltas of attached layers are float32
                for kind in KINDS:
                    for sized, suffix, target in _variants(sort, shape, linear, kind):
                        yield Case(
                            "partial",
                            f"{sort} {kind} {100 * slices.RATIO:g} %{suffix}",
                            shape,
                            str(sized),
                            dtype,
                            inputs=lambda dev, seed, s=sized, k=kind, t=dtype: slices.make_inputs(s, k, t, dev, seed),
                            tensors=lambda d: [*slices.Inputs.tensors(d), d.a, d.b],
                            floor=floor,
                            arms=arms,
                            checker=checker,
                            skipped=missing,
                            target=target,
                            **work(sized, kind, dtype)[sort],
                        )


def _variants(sort, shape, linear, kind):
    """(linear, what the case is called besides, its target)."""
    if sort == "layer":
        return [(linear, "", TARGETS.get((shape, kind)))]
    if sort == "update":
        return [(linear, " vs AdamW + index_copy_", 1.0)]
    return [(replace(linear, tokens=t), f" T={t} vs LoRA", 1.0) for t in TOKENS]
