"""SpIEL and LIFT on a small Llama: whole training steps of entries that come and go, 1 % of all parameters.

    step      forward, loss, backward, update; between two choices
    cycle     20 such steps, SpIEL's period: in five of them candidates are found and their gradients summed, then 20 % of
              the entries are chosen anew. A call is the whole cycle, of the floor too: the ratio is that of the means

The floor is `s2ft`'s: a node at each linear that computes dX alone, and fused AdamW on a number each. LIFT's entries are as
many as SpIEL's. "entry_bytes", "state_bytes": `entries.state_facts`.
"""

import copy

import torch
from torch import nn

import fastft
from fastft.methods.handle import handles
from fastft.ops.partial_linear import Part

from .. import entries, entry_updates, peers, published_spiel, shapes
from ..ops import lora
from ..runner import Case, WrongResult
from . import s2ft, step

DENSITY, PERIOD, SUMMED = 0.01, 20, 5
ENDLESS = 10**9  # updates of a run that no benchmark reaches the end of
TARGETS = {"step": 1.10, "cycle": 1.18}
STATE_BYTES = {"SpIEL": 28, "LIFT": 24}  # an entry of a float32 weight; SpIEL's have an age


def methods(model, period=PERIOD):
    """Method by its name, the same number of entries each."""
    spiel = fastft.SpIEL(
        density=DENSITY,
        reselection_steps=period,
        selection_accumulation_steps=SUMMED,
        total_steps=ENDLESS,
    )
    counts = spiel.bind(model).counts
    density = sum(c.entries for c in counts.values()) / sum(model.get_submodule(n).weight.numel() for n in counts)
    return {"SpIEL": spiel, "LIFT": fastft.LIFT(density=density, update_interval=ENDLESS)}


def make_inputs(shape: shapes.Model, dtype: str, method: str, period: int, device, seed: int) -> s2ft.Inputs:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = step.make_model(shape, s2ft.DTYPES[dtype], device)
        ids = torch.randint(shape.vocab, (shape.batch, shape.length), device=device)
    options = {"method": method, "period": period}
    handle = fastft.attach(copy.deepcopy(model), methods(model)[method])  # on a copy: what it would choose
    parts = {n: Part("entries", m.sparse[handle.name].entries) for n, m in handle.targets.items()}
    return s2ft.Inputs(model, ids, options, parts)


def ours(model, d: s2ft.Inputs):
    handle = fastft.attach(model, methods(model, d.options["period"])[d.options["method"]])
    if d.options["period"] == ENDLESS:
        for module in handle.targets.values():  # what SpIEL sees of gradients for a choice is behind it
            module.sparse[handle.name].updates = SUMMED
    return {f"{name}.part": module.sparse[handle.name].delta for name, module in handle.targets.items()}


def own_optimizer(model, trained, d: s2ft.Inputs):
    (handle,) = handles(model).values()
    return handle.optimizer(lr=d.lr, betas=(0.9, 0.999), eps=1e-8)  # as the others'


def schedule(model):
    (handle,) = handles(model).values()
    handle.step()


def facts(d: s2ft.Inputs, model, trained, optimizer):
    (handle,) = handles(model).values()
    target = STATE_BYTES[d.options["method"]] if next(d.model.parameters()).dtype == torch.float32 else None
    return entries.state_facts(handle, optimizer, target)


def plain(model, d: s2ft.Inputs):
    """What a careful user writes: an autograd node per linear (`entries.PlainEntries`); `write_back` is its other half."""
    return {f"{name}.part": _replaced(model.get_submodule(name), part.index) for name, part in d.parts.items()}


def _replaced(linear, chosen):
    flat = chosen.flat()
    values = nn.Parameter(linear.weight.detach().flatten()[flat].float())
    linear.forward = lambda x: s2ft.rows_of(entries.PlainEntries, x, linear.weight, linear.bias, values, flat)
    return values


def write_back(model, trained, d: s2ft.Inputs):
    optimizer = s2ft.fused_adamw(model, trained, d)
    sites = [
        (model.get_submodule(n).weight.detach().view(-1), part.index.flat(), trained[f"{n}.part"])
        for n, part in d.parts.items()
    ]

    def write(*_):
        for weight, flat, values in sites:
            weight.index_copy_(0, flat, values.detach().to(weight.dtype))

    optimizer.register_step_post_hook(write)
    return optimizer


def shira(model, d: s2ft.Inputs):
    """PEFT's SHiRA on the same entries."""
    from peft import ShiraConfig, get_peft_model

    get_peft_model(model, ShiraConfig(r=1, target_modules=sorted({name.rpartition(".")[2] for name in d.parts})))
    trained = {}
    for name, part in d.parts.items():
        delta = nn.Parameter(torch.zeros(len(part.index), device=d.ids.device))
        entries.fill_shira(model.get_submodule(name), part.index, delta)
        trained[f"{name}.part"] = delta
    return trained


def published(model, d: s2ft.Inputs):
    """SpIEL as published, in plain PyTorch; `published_optimizer` and `published_schedule` are its other half."""
    sites = {n: published_spiel.Site(model.get_submodule(n), part.index.flat()) for n, part in d.parts.items()}
    for site in sites.values():
        site.linear.forward = site.forward
    period = d.options["period"]  # of an endless one the choice is behind it, as in ours
    seen = SUMMED if period == ENDLESS else 0
    model.spiel_schedule = published_spiel.Schedule(list(sites.values()), period, SUMMED, seen)
    return {f"{name}.part": site.delta for name, site in sites.items()}


def published_optimizer(model, trained, d: s2ft.Inputs):
    model.spiel_schedule.optimizer = s2ft.fused_adamw(model, trained, d)
    return model.spiel_schedule.optimizer


def published_schedule(model):
    model.spiel_schedule.after_update()


def cycle(build):
    """Builder of an arm whose call is a period of steps of what `build` makes."""

    def many(d: s2ft.Inputs):
        once = build(d)

        def run():
            for _ in range(d.options["period"]):
                out = once()
            return out

        run.step, run.parameters, run.facts, run.held = once, once.parameters, once.facts, once.held
        return run

    return many


STEP = s2ft.training(ours, own_optimizer, after=schedule, facts=facts)
PUBLISHED = s2ft.training(published, published_optimizer, after=published_schedule)


def cycle_checker(d: s2ft.Inputs):
    """The gate: each of the first two steps is as `s2ft.checker` says, and a period changes what trains."""
    checked = s2ft.checker(d)

    def check(build):
        checked(lambda d: build(d).step)
        run = build(d)
        run()
        if not _changed(run.held[0]):
            raise WrongResult("no entry was chosen anew in a period")

    return check


def _changed(model) -> int:
    """How many entries were chosen anew."""
    if hasattr(model, "spiel_schedule"):
        return model.spiel_schedule.changed
    (handle,) = handles(model).values()
    return sum(event["changed"] for event in handle.method.history)


def work(shape: shapes.Model, steps: int, dtype: str) -> dict[str, int]:
    """Operations and fewest bytes of the linears (`step.forward_work`) and of the entries (`ops/sparse.py`).

    Those of choices are not counted.
    """
    tokens, e, hidden = shape.batch * shape.length, s2ft.DTYPES[dtype].itemsize, shape.hidden
    flops, moved = (2 * amount for amount in step.forward_work(shape, tokens, e))
    size = shape.layers * sum(k * sum(outs) for k, outs in shape.groups())
    entries = round(DENSITY * (size + 2 * hidden * shape.vocab))
    read = shape.layers * sum(tokens * (k + sum(outs)) for k, outs in shape.groups()) * e
    return {
        "floor_flops": steps * flops,
        "floor_moved": steps * moved,
        "flops": steps * (flops + (2 * tokens + 15) * entries),
        "moved": steps * (moved + read + 8 * entries + entry_updates.moved_of(size, entries, e)),
    }


PEERS = {
    "plain": (s2ft.training(plain, write_back), lambda: None),
    "published": (PUBLISHED, lambda: None),
    "shira": (s2ft.training(shira), peers.peft_missing),
}


def cases(device: str, names=None, dtypes=None, dropouts=None, rank=shapes.RANK, peer_names=None):
    """Every case asked for; what is None takes the defaults.

    Raises:
        ValueError: an unknown shape, dtype or peer; a dropout or rank, which entries don't have.
    """
    lora.known("shape", names or (), shapes.MODELS)
    lora.known("dtype", dtypes or (), s2ft.DTYPES)
    lora.known("peer", peer_names or (), PEERS)
    if dropouts is not None or rank != shapes.RANK:
        raise ValueError("spiel has no dropout and no rank: entries have neither")
    if reason := step.transformers_missing():
        raise ValueError(reason)
    wanted = PEERS if peer_names is None else peer_names
    missing = {n: why for n in wanted if (why := PEERS[n][1]())}
    others = {n: PEERS[n][0] for n in wanted if n not in missing}
    for dtype in dtypes or ("fp32",):
        for name in names or (step.TARGET_SHAPE,):
            for method in STATE_BYTES:
                yield _case(name, dtype, method, "step", ENDLESS, {"fastft": STEP, **others}, missing)
            alone = {"published": cycle(PUBLISHED)} if "published" in others else {}
            yield _case(name, dtype, "SpIEL", "cycle", PERIOD, {"fastft": cycle(STEP), **alone}, {})


def _case(name, dtype, method, kind, period, arms, missing):
    shape, steps = shapes.MODELS[name], PERIOD if kind == "cycle" else 1
    floor = s2ft.training(s2ft.frozen)
    return Case(
        "spiel",
        f"{kind} of {steps} steps {method} 1 %" if kind == "cycle" else f"step {method} 1 %",
        name,
        f"{shape.layers} layers, {shape.batch}x{shape.length} tokens",
        dtype,
        inputs=lambda dev, seed: make_inputs(shape, dtype, method, period, dev, seed),
        tensors=lambda d: [*d.model.parameters(), d.ids],
        floor=cycle(floor) if kind == "cycle" else floor,
        arms=arms,
        checker=cycle_checker if kind == "cycle" else s2ft.checker,
        skipped=missing,
        target=TARGETS[kind] if (name, dtype) == (step.TARGET_SHAPE, "fp32") else None,
        **work(shape, steps, dtype),
    )
