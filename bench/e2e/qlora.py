"""QLoRA (Dettmers et al. 2023, arXiv:2305.14314): the training step of a PEFT model on weights in bitsandbytes' NF4, before
and after `fastft.accelerate`, over the same quantised model frozen.

In every arm the embeddings' output requires a gradient, as PEFT prepares models for training in few bits, so that backward
goes through all layers; the floor trains the first layer's norm.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import nn

from .. import peers, shapes
from ..ops import lora
from ..runner import Case
from . import peft, step

DTYPE = "nf4+fp32"


@dataclass(frozen=True)
class Inputs(step.Inputs):
    """`model` with its linears but the head in NF4; `dense`: the same with the numbers that they stand for."""

    dense: nn.Module | None = None


def missing() -> str | None:
    import importlib.util

    return None if importlib.util.find_spec("bitsandbytes") else "bitsandbytes is not installed (pip install bitsandbytes)"


def make_inputs(shape, rank: int, p: float, device, seed: int) -> Inputs:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    d = step.make_inputs(shape, "fp32", rank, p, device, seed)
    dense = copy.deepcopy(d.model)
    for name in step.linear_names(d.model):
        plain = d.model.get_submodule(name)
        layer = Linear4bit(plain.in_features, plain.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer.weight.data = plain.weight.data
        layer = layer.requires_grad_(False).to(device)  # which quantises
        d.model.set_submodule(name, layer)
        dense.get_submodule(name).weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    d.model.is_loaded_in_4bit = True
    return Inputs(**{**vars(d), "dense": dense})


def frozen(model, d: Inputs):
    model.enable_input_require_grads()
    return {"norm": model.model.layers[0].input_layernorm.weight.requires_grad_(True)}


def _arm(prepare):
    def prepared(model, d: Inputs):
        model.enable_input_require_grads()
        return prepare(model, d)

    return prepared


ARMS = {name: _arm(peft.ARMS[name]) for name in ("fastft", "peft")}


def checker(d: Inputs):
    """The gate of `step`, on the dense model with the quantised weights' numbers."""
    dense = step.Inputs(**{name: value for name, value in vars(d).items() if name != "dense"})
    check = step.checker(replace(dense, model=d.dense))

    def quantised(build):  # the dense model is but what it is measured by
        check(lambda given: build(replace(d, p=given.p)))

    return quantised


def work(shape, rank: int, p: float) -> dict[str, int]:
    """As `step.work`, the weights being half a byte and a float32 scale for each 64 of them; making floats of them is not
    counted."""
    found, weights = step.work(shape, rank, "fp32", p), shape.layers * sum(k * sum(outs) for k, outs in shape.groups())
    flops, moved = (2 * amount for amount in step.forward_work(shape, shape.batch * shape.length, 4))
    saved = round(2 * weights * (4 - 0.5 - 4 / 64))
    return {
        "floor_flops": flops,
        "floor_moved": moved - saved,
        "flops": found["flops"],
        "moved": found["moved"] - saved,
    }


def cases(device: str, names=None, dtypes=None, dropouts=None, rank=shapes.RANK, peer_names=None):
    """Every case asked for; what is None takes the defaults.

    Raises:
        ValueError: an unknown shape, dtype or peer, or transformers is not installed.
    """
    lora.known("shape", names or (), shapes.MODELS)
    lora.known("dtype", dtypes or (), (DTYPE,))
    lora.known("peer", peer_names or (), ARMS)
    if reason := step.transformers_missing():
        raise ValueError(reason)
    reason = peers.peft_missing() or missing()
    wanted = {n: arm for n, arm in ARMS.items() if n == "fastft" or peer_names is None or n in peer_names}
    for name in names or (step.TARGET_SHAPE,):
        for p in step.DROPOUTS if dropouts is None else dropouts:
            shape = shapes.MODELS[name]
            yield Case(
                "qlora",
                f"accelerated step r={rank} p={p:g}",
                name,
                f"{shape.layers} layers, {shape.batch}x{shape.length} tokens",
                DTYPE,
                inputs=lambda dev, seed, s=shape, q=p: make_inputs(s, rank, q, dev, seed),
                tensors=lambda d: [*d.model.parameters(), d.ids],
                floor=step.training(frozen),
                arms={} if reason else {n: step.training(arm) for n, arm in wanted.items()},
                checker=checker,
                skipped=dict.fromkeys(wanted, reason) if reason else {},
                **work(shape, rank, p),
            )
