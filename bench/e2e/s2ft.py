"""S²FT on a small Llama: whole training steps, and exchanging one adapter for another.

    step      forward, loss, backward, update, over the same model whose selected linears compute dX and nothing else
    switch    of one adapter's slices for another's in the weights, vs PEFT's merge of a LoRA with as many trained numbers

The floor of a step has an autograd node at each selected linear, where ours has one, so that backward runs as deep: to the
lowest linear that has selected units. The node saves the weight alone and hands a dummy parameter a gradient of one zero;
fused AdamW updates the dummies. So the floor is what a step would take if dW, what is kept for it, and the update were free.
Every arm trains the units that `fastft.attach` chose. `full` trains all parameters; the row "speedup" tells how much of the
floor's speed over it is left to ours. "state_bytes": what an arm holds between steps beyond the pretrained model (deltas or
copies, gradients, moments, pristine slices; without indices and counters), per trained number. Besides that and what the
floor saves, the row "saved_bytes" has the copies of x[:, C].
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import nn

import fastft
from fastft.methods.handle import handles
from fastft.ops.partial_linear import Part

from .. import exchange, peers, shapes, slices
from ..ops import lora
from ..runner import Case, Fact, WrongResult, check_close
from . import step

DTYPES = {"fp32": torch.float32, "bf16+fp32": torch.bfloat16}  # of the model; deltas are float32
METHODS = {  # case -> (options, a step's target)
    "down 3 %": ({"down_ratio": 0.03}, 1.02),
    "down 3 % + o 5 %": ({"down_ratio": 0.03, "o_ratio": 0.05}, 1.03),
}
SHARE = 0.97  # of the floor's speed over full fine-tuning
STATE_BYTES = 20  # a trained number: delta, gradient, two moments, pristine value
SWITCH = ("llama-6l", "square2048-1l", "square4096-1l")
SWITCH_TARGET = 0.1
LR, GATE_LR = 1e-5, 1e-3


@dataclass(frozen=True)
class Inputs:
    """A pristine model, token ids [batch, length], and the part of each selected linear by name."""

    model: nn.Module
    ids: torch.Tensor
    options: dict[str, float]
    parts: dict[str, Part]
    lr: float = LR


def make_inputs(shape: shapes.Model, dtype: str, options, device, seed: int) -> Inputs:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = step.make_model(shape, DTYPES[dtype], device)
        ids = torch.randint(shape.vocab, (shape.batch, shape.length), device=device)
    handle = fastft.attach(copy.deepcopy(model), fastft.S2FT(**options))  # on a copy: what it would choose
    return Inputs(model, ids, options, {n: m.part_of(handle.name) for n, m in handle.targets.items()})


def fused_adamw(model, trained, d: Inputs):
    return torch.optim.AdamW(trained.values(), lr=d.lr, weight_decay=0.0, fused=True)


def training(prepare, optimize=fused_adamw, state_target=None, after=None, facts=None):
    """Builder of an arm as `step.training`, which also tells what it holds between steps.

    Its run has `held`: [model, trained, optimizer].

    facts: (inputs, model, trained, optimizer) -> list[Fact], where that is not the row "state_bytes" alone.
    """

    def build(d: Inputs):
        held = []

        def optimizer(model, trained, d):
            held[:] = model, trained, optimize(model, trained, d)
            return held[-1]

        run = step.training(prepare, optimizer, after)(d)
        run.held = held
        run.facts = lambda: facts(d, *held) if facts else [state_bytes(d, *held, state_target)]
        return run

    return build


def state_bytes(d: Inputs, model, trained, optimizer, target=None) -> Fact:
    parameters = list(trained.values())
    kept = [*model.parameters(), *model.buffers(), *parameters, *(p.grad for p in parameters)]
    kept += [value for state in optimizer.state.values() for value in state.values()]
    extra = _bytes(kept) - _bytes([*d.model.parameters(), *d.model.buffers()])
    per_number = extra / sum(p.numel() for p in parameters)
    return Fact("state_bytes", per_number, "B/entry", target=target, met=None if target is None else per_number <= target)


def _bytes(tensors) -> int:
    """Of the distinct storages of numbers; without counters and indices."""
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.is_floating_point() and t.dim()}
    return sum(storage.nbytes() for storage in kept.values())


def ours(model, d: Inputs):
    handle = fastft.attach(model, fastft.S2FT(**d.options))
    return {f"{name}.part": module.slice_delta[handle.name] for name, module in handle.targets.items()}


def own_optimizer(model, trained, d: Inputs):
    (handle,) = handles(model).values()
    return handle.optimizer(lr=d.lr)


def plain(model, d: Inputs):
    """What a careful user writes: an autograd node per linear (`slices.PlainSlice`); `write_back` is its other half."""
    return {f"{name}.part": _replaced(model.get_submodule(name), part) for name, part in d.parts.items()}


def _replaced(linear, part):
    dim, index = part.dim(), part.index.long()
    values = nn.Parameter(linear.weight.detach().index_select(dim, index).float())
    linear.forward = lambda x: rows_of(slices.PlainSlice, x, linear.weight, linear.bias, values, index, dim)
    return values


def rows_of(node, x, *rest):
    """`node` on the rows of x."""
    return node.apply(x.flatten(0, -2), *rest).view(*x.shape[:-1], -1)


def write_back(model, trained, d: Inputs):
    optimizer = fused_adamw(model, trained, d)
    sites = [
        (model.get_submodule(name).weight.detach(), part.dim(), part.index.long(), trained[f"{name}.part"])
        for name, part in d.parts.items()
    ]

    def write(*_):
        for weight, dim, index, values in sites:
            weight.index_copy_(dim, index, values.detach().to(weight.dtype))

    optimizer.register_step_post_hook(write)
    return optimizer


class FrozenNode(torch.autograd.Function):
    """x Wᵀ + bias; backward computes dX, and hands `dummy` one zero."""

    @staticmethod
    def forward(ctx, x, weight, bias, dummy):
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None)
        ctx.dtype = dummy.dtype
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, None, None, dy.new_zeros(1, dtype=ctx.dtype)


def frozen(model, d: Inputs):
    dummies = {name: nn.Parameter(torch.zeros(1, device=d.ids.device)) for name in d.parts}
    for name, dummy in dummies.items():
        linear = model.get_submodule(name)
        linear.forward = lambda x, m=linear, p=dummy: rows_of(FrozenNode, x, m.weight, m.bias, p)
    return dummies


def full(model, d: Inputs):
    model.requires_grad_(True)
    return dict(model.named_parameters())


def masked(model, d: Inputs):
    """The definition in PyTorch's own operations: all of dW, of which only the parts' entries reach the optimizer."""
    trained = {}
    for name, part in d.parts.items():
        weight = model.get_submodule(name).weight.requires_grad_(True)
        mask = slices.mask(part, weight)
        weight.register_hook(lambda gradient, mask=mask: gradient * mask)
        trained[f"{name}.weight"] = weight
    return trained


def checker(d: Inputs, factor: float = 2.0):
    """The gate: the parts' gradients of the first step are float64's, and so is how far that step lowers the loss.

    Arms that train more than the parts lower it further: of them only the gradients are compared.
    """
    d, wide = (replace(d, model=model, lr=GATE_LR) for model in (d.model, copy.deepcopy(d.model).double()))
    golden, want, _ = _two_steps(wide, training(masked))
    yardstick, plainly, _ = _two_steps(d, training(masked))
    # A loss is rounded when it is formed, and by luck the yardstick's errors cancel.
    eps = torch.finfo(next(d.model.parameters()).dtype).eps
    allowed = max(factor * abs(plainly - want), 4 * eps * golden["loss"].item())

    def check(build):
        got, gain, alone = _two_steps(d, build)
        check_close(got, golden, yardstick, factor)
        if alone and not abs(gain - want) <= allowed:
            raise WrongResult(f"the first step lowers the loss by {gain:.3e}, not by {want:.3e} (± {allowed:.0e})")

    return check


def _two_steps(d: Inputs, build):
    """(loss and the parts' gradients of the first step, what the second's loss is less, whether the parts train alone)."""
    run = build(d)
    out = run()
    gradients = []
    for name, part in d.parts.items():
        gradient = out.get(f"{name}.part")
        if gradient is None:
            gradient = slices.cut(part, out[f"{name}.weight"])
        gradients.append(gradient.flatten())
    first = {"loss": out["loss"].clone(), "parts": torch.cat(gradients)}
    return first, (first["loss"] - run()["loss"]).item(), len(out) == len(d.parts) + 1


def work(shape: shapes.Model, options, dtype: str) -> dict[str, int]:
    """Operations and fewest bytes of a step, if backward ran through all linears (`step.forward_work`).

    What a slice adds: `ops/partial.py`.
    """
    tokens, e = shape.batch * shape.length, DTYPES[dtype].itemsize
    flops, moved = (2 * amount for amount in step.forward_work(shape, tokens, e))
    features = {"down_ratio": shape.intermediate, "o_ratio": shape.heads * shape.head_dim}
    columns = shape.layers * sum(ratio * features[name] for name, ratio in options.items())
    numbers = columns * shape.hidden
    read = 3 * tokens * columns + shape.layers * len(options) * tokens * shape.hidden
    return {
        "floor_flops": flops,
        "floor_moved": moved,
        "flops": flops + round((2 * tokens + 15) * numbers),
        "moved": moved + round(read * e + numbers * (4 + 7 * 4 + 2 * e)),
    }


STEP_PEERS = {"plain": training(plain, write_back), "full": training(full)}
SWITCH_PEERS = {"lora-exchange": exchange.lora}


def cases(device: str, names=None, dtypes=None, dropouts=None, rank=shapes.RANK, peer_names=None):
    """Every case asked for; what is None takes the defaults.

    Raises:
        ValueError: an unknown shape, dtype or peer; a dropout or rank, which slices don't have.
    """
    lora.known("shape", names or (), shapes.MODELS)
    lora.known("dtype", dtypes or (), DTYPES)
    lora.known("peer", peer_names or (), {**STEP_PEERS, **SWITCH_PEERS, "peft": None})
    if dropouts is not None or rank != shapes.RANK:
        raise ValueError("s2ft has no dropout and no rank: a slice has neither, and its LoRA is as large as the slice")
    if reason := step.transformers_missing():
        raise ValueError(reason)
    for dtype in dtypes or ("fp32",):
        for name in names or (step.TARGET_SHAPE,):
            yield from _steps(name, dtype, peer_names)
        for name in names or SWITCH:
            if peers.peft_missing() is None:  # whose merge it is measured by
                yield _switch(name, dtype, peer_names)


def _steps(name, dtype, peer_names):
    shape = shapes.MODELS[name]
    for case, (options, target) in METHODS.items():
        if options.get("o_ratio", 1) * shape.heads * shape.layers < 1:
            continue  # less than one head
        chosen = {n: arm for n, arm in STEP_PEERS.items() if peer_names is None or n in peer_names}
        yield Case(
            "s2ft",
            f"step {case}",
            name,
            f"{shape.layers} layers, {shape.batch}x{shape.length} tokens",
            dtype,
            inputs=lambda dev, seed, o=options: make_inputs(shape, dtype, o, dev, seed),
            tensors=lambda d: [*d.model.parameters(), d.ids],
            floor=training(frozen),
            arms={"fastft": training(ours, own_optimizer, STATE_BYTES), **chosen},
            checker=checker,
            target=target if (name, dtype) == (step.TARGET_SHAPE, "fp32") else None,
            rival="full",
            share=SHARE,
            **work(shape, options, dtype),
        )


def _switch(name, dtype, peer_names):
    shape, ratio = shapes.MODELS[name], METHODS["down 3 %"][0]["down_ratio"]
    chosen = {n: arm for n, arm in SWITCH_PEERS.items() if peer_names is None or n in peer_names}
    return Case(
        "s2ft",
        "switch down 3 % vs PEFT merge",
        name,
        f"{shape.layers} x down_proj {shape.intermediate}x{shape.hidden}",
        dtype,
        inputs=lambda dev, seed: exchange.make_inputs(shape, DTYPES[dtype], ratio, dev, seed),
        tensors=lambda d: list(d.model.parameters()),
        floor=exchange.peft,
        arms={"fastft": exchange.ours, **chosen},
        checker=exchange.checker,
        target=SWITCH_TARGET if name in SWITCH else None,
        **exchange.work(shape, ratio, DTYPES[dtype].itemsize),
    )
