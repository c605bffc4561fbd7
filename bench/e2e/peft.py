"""PEFT models before and after `fastft.accelerate`.

step    a whole training step of a small Llama, over the same model frozen (as `step`, whose floor and peers these are)
call    forward and backward of a layer too small to compute anything, vs PEFT's layer: what Python costs; and the
        row "accelerate" says how long it takes to accelerate a model of 500 layers
"""

import copy
import time
from dataclasses import dataclass

import torch
from torch import nn

import fastft
from fastft.ops.lora_linear import lora_linear

from .. import peers, shapes
from ..ops import lora
from ..runner import Case, Fact, check_close
from . import step

TARGETS = {  # dtype, p -> ratio to the floor at r=16
    ("fp32", 0.0): 1.095,
    ("fp32", 0.05): 1.115,
    ("bf16+fp32", 0.0): 1.15,
    ("bf16+fp32", 0.05): 1.15,
}
CALL_TARGET, LAYERS, ACCELERATE_TARGET = 1.0, 500, 0.5
TINY, TINY_RANK = "tiny", 4


def accelerated(model, d: step.Inputs):
    trained = step.peft(model, d)
    fastft.accelerate(model, strict=True)
    return trained


ARMS = {"fastft": accelerated, "peft": step.peft, "peft-compile": step.compiled_peft}


@dataclass(frozen=True)
class Tiny:
    """PEFT's layer on a linear [N, K], its input x [T, K] and dy [T, N]."""

    layer: nn.Module
    x: torch.Tensor
    dy: torch.Tensor


def make_tiny(linear, device, seed: int) -> Tiny:
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        config = LoraConfig(r=TINY_RANK, target_modules=["0"], init_lora_weights=False)
        model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(linear.k, linear.n, device=device)))
        x, dy = torch.randn(linear.tokens, linear.k, device=device), torch.randn(linear.tokens, linear.n, device=device)
    return Tiny(model[0].train(), x, dy)


def called(accelerate: bool):
    def build(d: Tiny):
        layer, x = copy.deepcopy(d.layer), d.x.clone().requires_grad_()
        trained = {"x": x, "a": layer.lora_A["default"].weight, "b": layer.lora_B["default"].weight}
        if accelerate:
            fastft.accelerate(layer, strict=True)

        def run():
            for tensor in trained.values():
                tensor.grad = None
            y = layer(x)
            y.backward(d.dy)
            return {"y": y.detach(), **{name: tensor.grad for name, tensor in trained.items()}}

        run.parameters = layer.parameters
        if accelerate:
            run.facts = lambda: [overhead(d, layer), seconds_to_accelerate(d)]
        return run

    return build


@torch.no_grad()
def overhead(d: Tiny, layer) -> Fact:
    base, a, b = d.layer.base_layer, d.layer.lora_A["default"].weight, d.layer.lora_B["default"].weight
    scale, linear = d.layer.scaling["default"], nn.functional.linear

    def operations():
        return linear(d.x, base.weight, base.bias) + linear(linear(d.x, a), b) * scale

    ours = _microseconds(lambda: layer(d.x)) - _microseconds(
        lambda: lora_linear(d.x, base.weight, base.bias, a, b, scale, 0.0)
    )
    theirs = _microseconds(lambda: d.layer(d.x)) - _microseconds(operations)
    return Fact("overhead", ours, "us", target=theirs, met=ours <= theirs, timed=True)


def _microseconds(call, batches=200, calls=20) -> float:
    """The shortest of many short batches: of what others on this machine take, the least."""
    best = float("inf")
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, time.perf_counter() - start)
    return best / calls * 1e6


def seconds_to_accelerate(d: Tiny) -> Fact:
    model = nn.ModuleList(copy.deepcopy(d.layer) for _ in range(LAYERS))
    start = time.perf_counter()
    fastft.accelerate(model)
    seconds = time.perf_counter() - start
    return Fact("accelerate", seconds, "s", target=ACCELERATE_TARGET, met=seconds <= ACCELERATE_TARGET, timed=True)


def call_checker(d: Tiny):
    wide = Tiny(copy.deepcopy(d.layer).double(), d.x.double(), d.dy.double())
    golden, yardstick = called(False)(wide)(), called(False)(d)()
    return lambda build: check_close(build(d)(), golden, yardstick, 2.0)


def cases(device: str, names=None, dtypes=None, dropouts=None, rank=shapes.RANK, peer_names=None):
    """Every case asked for; what is None takes the defaults.

    Raises:
        ValueError: an unknown shape, dtype or peer, or what this needs is not installed.
    """
    lora.known("shape", names or (), (TINY, *shapes.MODELS))
    lora.known("dtype", dtypes or (), step.DTYPES)
    lora.known("peer", peer_names or (), ARMS)
    if reason := step.transformers_missing() or peers.peft_missing():
        raise ValueError(reason)
    wanted = ("peft",) if peer_names is None else peer_names
    for name in names or (step.TARGET_SHAPE, TINY):
        if name == TINY:
            if dtypes is None or "fp32" in dtypes:
                yield _call(shapes.LINEARS[TINY])
            continue
        shape = shapes.MODELS[name]
        for dtype in dtypes or ("fp32", "bf16+fp32"):
            for p in step.DROPOUTS if dropouts is None else dropouts:
                known_target = (name, rank) == (step.TARGET_SHAPE, shapes.RANK)
                yield Case(
                    "peft",
                    f"accelerated step r={rank} p={p:g}",
                    name,
                    f"{shape.layers} layers, {shape.batch}x{shape.length} tokens",
                    dtype,
                    inputs=lambda dev, seed, s=shape, t=dtype, q=p: step.make_inputs(s, t, rank, q, dev, seed),
                    tensors=lambda d: [*d.model.parameters(), d.ids],
                    floor=step.training(step.frozen),
                    arms={n: step.training(arm) for n, arm in ARMS.items() if n == "fastft" or n in wanted},
                    checker=step.checker,
                    target=TARGETS.get((dtype, p)) if known_target else None,
                    **step.work(shape, rank, dtype, p),
                )


def _call(linear) -> Case:
    return Case(
        "peft",
        "call vs PEFT",
        TINY,
        str(linear),
        "fp32",
        inputs=lambda device, seed: make_tiny(linear, device, seed),
        tensors=lambda d: [*d.layer.parameters(), d.x, d.dy],
        floor=called(False),
        arms={"fastft": called(True)},
        checker=call_checker,
        target=CALL_TARGET,
        **call_work(linear),
    )


def call_work(linear) -> dict[str, int]:
    """Of a LoRA layer; the floor computes the same."""
    ours = lora.work(linear, "fp32", TINY_RANK, 0.0)
    return {"flops": ours["flops"], "moved": ours["moved"], "floor_flops": ours["flops"], "floor_moved": ours["moved"]}
