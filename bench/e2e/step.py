"""A whole training step of a small Llama: forward, loss, backward, AdamW, with LoRA on every linear but the head.

The floor is the same model, batch and optimizer with only layer 0's q_proj trained, so that backward runs through every
layer as with adapters; of its own it has that layer's dW, 0.7 % of the operations of llama-6l, and fewer parameters to
update. The adapters' products alone take 3/2 · R (1/K + 1/N) of a linear's operations. Packed weights are measured against
the same floor.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import nn

import fastft

from .. import libraries, peers, shapes
from ..ops import lora
from ..runner import Case, WrongResult, check_close

DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16+fp32": (torch.bfloat16, None),
}
DROPOUTS = (0.0, 0.05)
SCALE = 2.0
# (packed base weights?, p) -> ratio to the floor at r=16 in fp32
TARGETS = {(False, 0.0): 1.085, (False, 0.05): 1.105, (True, 0.0): 1.06, (True, 0.05): 1.08}
TARGET_SHAPE = "llama-6l"


@dataclass(frozen=True)
class Inputs:
    """A pristine model, token ids [batch, length], and the adapters a [R, K], b [N, R] of each linear by name."""

    model: nn.Module
    ids: torch.Tensor
    a: dict[str, torch.Tensor]
    b: dict[str, torch.Tensor]
    rank: int
    p: float
    scale: float = SCALE


def transformers_missing() -> str | None:
    import importlib.util

    return None if importlib.util.find_spec("transformers") else "transformers is not installed (pip install transformers)"


def linear_names(model) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]


def make_model(shape: shapes.Model, dtype: torch.dtype, device):
    """A Llama of that shape with random weights, to be trained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_hidden_layers=shape.layers,
        vocab_size=shape.vocab,
        max_position_embeddings=shape.length,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).to(device, dtype).train()


def make_inputs(shape: shapes.Model, dtype: str, rank: int, p: float, device, seed: int) -> Inputs:
    act, adapter = DTYPES[dtype]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = make_model(shape, act, device)
        ids = torch.randint(shape.vocab, (shape.batch, shape.length), device=device)
        a, b = {}, {}
        for name in linear_names(model):
            n, k = model.get_submodule(name).weight.shape
            kind = adapter or torch.float32
            a[name] = (torch.randn(rank, k, device=device) * k**-0.5).to(kind)
            b[name] = (torch.randn(n, rank, device=device) * (0.02 * (k / rank) ** 0.5 / SCALE)).to(kind)
    return Inputs(model, ids, a, b, rank, p)


def training(prepare, optimize=None, after=None):
    """Builder of an arm: `prepare` puts adapters on a copy of the model and returns its trained parameters by name.

    optimize: (model, trained, inputs) -> the optimizer, where it is not just fused AdamW.
    after: what is called with the model after each step of the optimizer.
    """

    def build(d):
        model = copy.deepcopy(d.model).requires_grad_(False)
        trained = prepare(model, d)
        optimizer = optimize(model, trained, d) if optimize else torch.optim.AdamW(trained.values(), lr=1e-5, fused=True)

        def run():
            optimizer.zero_grad(set_to_none=True)
            loss = model(input_ids=d.ids, labels=d.ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            out = {"loss": loss.detach(), **{name: p.grad for name, p in trained.items()}}
            if after is not None:
                after(model)
            return out

        run.parameters = model.parameters
        return run

    return build


def frozen(model, d: Inputs):
    weight = model.get_submodule("model.layers.0.self_attn.q_proj").weight.requires_grad_(True)
    return {"q_proj": weight}


def ours(model, d: Inputs, **options):
    method = fastft.LoRA(
        r=d.rank,
        lora_alpha=d.scale * d.rank,
        lora_dropout=d.p,
        target_modules="all-linear",
        adapter_dtype=_kind(d),
        **options,
    )
    handle = fastft.attach(model, method)
    return _filled(d, {n: (m.lora_A["default"], m.lora_B["default"]) for n, m in handle.targets.items()})


def packed(model, d: Inputs):
    return ours(model, d, pack_weights=True)


def ungrouped(model, d: Inputs):
    return ours(model, d, group_projections=False)


def peft(model, d: Inputs):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=d.rank, lora_alpha=d.scale * d.rank, lora_dropout=d.p, target_modules="all-linear")
    get_peft_model(model, config, autocast_adapter_dtype=_kind(d) == torch.float32)
    layers = {n: model.get_submodule(n) for n in d.a}
    return _filled(d, {n: (m.lora_A["default"].weight, m.lora_B["default"].weight) for n, m in layers.items()})


def compiled_peft(model, d: Inputs):
    trained = peft(model, d)
    model.compile()
    return trained


def addmm(model, d: Inputs):
    """One plain autograd node per linear (`peers.AddmmLoRA`)."""
    found = {}
    for name in d.a:
        linear = model.get_submodule(name)
        a, b = nn.Parameter(d.a[name].clone()), nn.Parameter(d.b[name].clone())
        linear.forward = _addmm_forward(linear, a, b, d)
        found[name] = a, b
    return _filled(d, found)


def _addmm_forward(linear, a, b, d):
    def forward(x):
        y = peers.AddmmLoRA.apply(x.flatten(0, -2), linear.weight, linear.bias, a, b, d.scale, d.p)
        return y.view(*x.shape[:-1], -1)

    return forward


def plain(model, d: Inputs):
    """The formula as PyTorch operations: what the other arms' errors are measured by."""
    found = {}
    for name in d.a:
        linear = model.get_submodule(name)
        a, b = nn.Parameter(d.a[name].clone()), nn.Parameter(d.b[name].clone())

        def forward(x, linear=linear, a=a, b=b):
            update = (x.to(a.dtype) @ a.t() @ b.t()) * d.scale
            return (nn.functional.linear(x, linear.weight, linear.bias) + update).to(x.dtype)

        linear.forward = forward
        found[name] = a, b
    return _filled(d, found)


def _kind(d: Inputs):
    return next(iter(d.a.values())).dtype


def _filled(d: Inputs, found):
    """The adapters' parameters, by name, holding the inputs' values."""
    trained = {}
    with torch.no_grad():
        for name, (a, b) in found.items():
            a.copy_(d.a[name])
            b.copy_(d.b[name])
            trained |= {f"{name}.a": a.requires_grad_(True), f"{name}.b": b.requires_grad_(True)}
    return trained


def checker(d: Inputs, factor: float = 2.0):
    """The gate: without dropout each arm's gradients of the first step equal those of the formula in float64.

    With dropout the loss must change; another p or another mask in backward is for the gate of one layer (`ops/lora.py`).
    """
    still = replace(d, p=0.0)
    wide = {name: {k: v.double() for k, v in getattr(d, name).items()} for name in ("a", "b")}
    golden = _gradients(training(plain)(replace(still, model=copy.deepcopy(d.model).double(), **wide))())
    yardstick = _gradients(training(plain)(still)())

    def check(build):
        got = build(still)()
        check_close(_gradients(got), golden, yardstick, factor)
        if d.p > 0 and build(d)()["loss"] == got["loss"]:
            raise WrongResult(f"dropout p={d.p} does not change the loss")

    return check


def _gradients(outputs):
    """All gradients of A's and of B's as one vector each: single small ones differ by luck."""
    return {
        kind: torch.cat([g.flatten() for name, g in sorted(outputs.items()) if name.endswith(f".{kind}")])
        for kind in ("a", "b")
    }


def forward_work(shape: shapes.Model, tokens: int, itemsize: int) -> tuple[int, int]:
    """(operations, fewest bytes) of the forward of all linears; those that share an input read it once.

    What lies between them (attention, norms, activations, the loss) is not counted. Their dX takes the same again.
    """
    groups = [*shape.groups() * shape.layers, (shape.hidden, [shape.vocab])]
    flops = sum(2 * tokens * k * sum(outs) for k, outs in groups)
    return flops, itemsize * sum(k * sum(outs) + tokens * (k + sum(outs)) for k, outs in groups)


def work(shape: shapes.Model, rank: int, dtype: str, p: float) -> dict[str, int]:
    """Operations and fewest bytes of a step: the linears' forward and dX, as if the first layer's were needed; what trains.

    The floor trains a q_proj: 2 T K N operations, x and dY read, dW written. AdamW takes 15 operations a number, reads it,
    its gradient and two moments, and writes all but the gradient.
    """
    act, kind = DTYPES[dtype]
    kinds = act, kind or torch.float32
    tokens = shape.batch * shape.length
    flops, moved = (2 * amount for amount in forward_work(shape, tokens, act.itemsize))
    k, q = shape.hidden, shape.heads * shape.head_dim
    adapters = [lora.adapter_work(tokens, k, outs, rank, kinds, p) for k, outs in shape.groups()] * shape.layers
    numbers = shape.layers * rank * sum(k * len(outs) + sum(outs) for k, outs in shape.groups())
    return {
        "floor_flops": flops + (2 * tokens + 15) * k * q,
        "floor_moved": moved + (tokens * (k + q) + 8 * k * q) * act.itemsize,
        "flops": flops + sum(added for added, _ in adapters) + 15 * numbers,
        "moved": moved + sum(added for _, added in adapters) + 7 * numbers * kinds[1].itemsize,
    }


ARMS = {  # case -> implementation -> (preparation, why it can't be had here)
    "": {
        "fastft": (ours, lambda: None),
        "fastft:ungrouped": (ungrouped, lambda: None),
        "peft": (peft, peers.peft_missing),
        "addmm": (addmm, lambda: None),
        "peft-compile": (compiled_peft, peers.peft_missing),
        "liger": (libraries.liger(peft), peers.peft_missing),
        "fastft:liger": (libraries.liger(ours), lambda: None),
    },
    " packed": {"fastft": (packed, lambda: None)},
}
PEERS_DEFAULT = ("peft", "addmm", "liger", "fastft:liger")


def cases(device: str, names=None, dtypes=None, dropouts=None, rank=shapes.RANK, peer_names=None):
    """Every case asked for; what is None takes the defaults.

    Raises:
        ValueError: an unknown shape, dtype or peer.
    """
    lora.known("shape", names or (), shapes.MODELS)
    lora.known("dtype", dtypes or (), DTYPES)
    lora.known("peer", peer_names or (), ARMS[""])
    if reason := transformers_missing():
        raise ValueError(reason)
    wanted = libraries.usual(PEERS_DEFAULT, device) if peer_names is None else peer_names
    for name in names or (TARGET_SHAPE,):
        shape = shapes.MODELS[name]
        for dtype in dtypes or ("fp32",):
            for p in DROPOUTS if dropouts is None else dropouts:
                for suffix, all_arms in ARMS.items():
                    always = [n for n in all_arms if n.startswith("fastft") and not libraries.uses_one(n)]
                    chosen = {n: arm for n, arm in all_arms.items() if n in always or n in wanted}
                    reasons = {n: why() for n, (_, why) in chosen.items()} | libraries.absent(chosen, device)
                    known_target = (name, dtype, rank) == (TARGET_SHAPE, "fp32", shapes.RANK)
                    yield Case(
                        "step",
                        f"step r={rank} p={p:g}{suffix}",
                        name,
                        f"{shape.layers} layers, {shape.batch}x{shape.length} tokens",
                        dtype,
                        inputs=lambda dev, seed, s=shape, t=dtype, q=p: make_inputs(s, t, rank, q, dev, seed),
                        tensors=lambda d: [*d.model.parameters(), d.ids],
                        floor=training(frozen),
                        arms={n: training(prepare) for n, (prepare, _) in chosen.items() if not reasons[n]},
                        checker=checker,
                        skipped={n: why for n, why in reasons.items() if why},
                        target=TARGETS.get((bool(suffix), p)) if known_target else None,
                        **work(shape, rank, dtype, p),
                    )
