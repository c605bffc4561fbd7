"""Adapters for the serving benchmarks: folders as users have them, what they add as dense float64 deltas, and the peers."""

import copy
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

import fastft
from fastft import testing

from . import peers, shapes
from .e2e import step

SCALE = 2.0
S2FT_RATIOS = {"down_ratio": 0.03, "up_ratio": 0.03}
SPIEL_DENSITY = 0.01
STD = 0.02  # of what an adapter adds to a weight's entry, about


@dataclass(frozen=True, eq=False)
class Inputs:
    """A model, token ids, the adapter of every row ("" for none), and the adapters' folders, which live as long as this."""

    model: nn.Module
    ids: torch.Tensor
    names: tuple[str, ...]
    folder: Path
    kept: object = field(repr=False)

    @property
    def distinct(self) -> list[str]:
        return [name for name in dict.fromkeys(self.names) if name]


def make_inputs(shape: shapes.Model, dtype, adapters: dict[str, tuple], names, tokens: int, device, seed: int) -> Inputs:
    """
    Args:
        adapters: name -> ("lora", rank), ("s2ft",) or ("spiel",). names: of each row, a multiple of them. tokens: a row.
    """
    kept = tempfile.TemporaryDirectory(prefix="fastft-bench-")
    folder = Path(kept.name)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = step.make_model(shape, dtype, device).eval().requires_grad_(False)
        ids = torch.randint(shape.vocab, (len(names), tokens), device=device)
        for name, (kind, *options) in adapters.items():
            make_adapter(model, folder / name, kind, *options)
    return Inputs(model, ids, tuple(names), folder, kept)


def make_adapter(model, folder: Path, kind: str, rank: int = shapes.RANK) -> None:
    """A folder with a random adapter of the model."""
    if kind == "lora":
        return make_lora(model, folder, rank)
    own = copy.deepcopy(model).float()
    method = fastft.S2FT(**S2FT_RATIOS) if kind == "s2ft" else fastft.SpIEL(density=SPIEL_DENSITY, total_steps=100)
    handle = fastft.attach(own, method)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.copy_(torch.randn_like(parameter) * STD)
    handle.save(folder)


def make_lora(model, folder: Path, rank: int, targets=None, dtype=torch.float32, std: float = STD) -> None:
    """A random LoRA on the linears called `targets` (default: all but the head), its tensors in `dtype`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    names = [name for name in step.linear_names(model) if targets is None or name.rpartition(".")[2] in targets]
    tensors = {}
    for name in names:
        n, k = model.get_submodule(name).weight.shape
        a, b = torch.randn(rank, k) * k**-0.5, torch.randn(n, rank) * (std * (k / rank) ** 0.5 / SCALE)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in names})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": SCALE * rank, "target_modules": targets, "bias": "none"}
    config |= {"task_type": "CAUSAL_LM", "inference_mode": True, "lora_dropout": 0.0, "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def factors(d: Inputs, name: str, dtype=torch.float32) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return read_lora(d.folder / name, d.ids.device, dtype)


def read_lora(folder: Path, device, dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A [R, K] and SCALE · B [N, R] of a LoRA adapter, by linear."""
    from safetensors.torch import load_file

    tensors, found = load_file(folder / "adapter_model.safetensors"), {}
    for key in tensors:
        linear, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        if part == "A.weight":
            a, b = tensors[key], SCALE * tensors[key.replace(".lora_A.", ".lora_B.")]
            found[linear] = a.to(device, dtype), b.to(device, dtype)
    return found


def deltas(d: Inputs, name: str, dtype) -> dict[str, tuple[torch.Tensor, ...]]:
    """What an adapter adds to each linear's weight: A and B of a LoRA, else the sparse matrix; of 32 dense ones a gate in
    float64 would hold 6 GB."""
    if json.loads((d.folder / name / "adapter_config.json").read_text())["peft_type"] == "LORA":
        return factors(d, name, dtype)
    own = copy.deepcopy(d.model).to(dtype)
    with torch.no_grad(), testing.use("reference"):  # kernels take no float64
        fastft.load(own, d.folder / name)
        own(input_ids=d.ids[:1, :1], use_cache=False)  # the first forward writes deltas into the weights
    found = {}
    for linear in step.linear_names(d.model):
        module = own.get_submodule(linear)
        found[linear] = ((module.weight.detach() - d.model.get_submodule(linear).weight.to(dtype)).to_sparse(),)
    return found


def added(x, delta):
    """x [M, K] through what `deltas` gives for a linear: [M, N]."""
    if len(delta) == 2:
        a, b = delta
        return x @ a.t() @ b.t()
    return (delta[0] @ x.t()).t()


def forward(model, d: Inputs, **options):
    """Builder's run: the logits of one forward of all rows."""

    def run():
        with torch.no_grad():
            return {"logits": model(input_ids=d.ids, use_cache=False, **options).logits}

    run.parameters = model.parameters
    return run


def base(d: Inputs):
    return forward(d.model, d)


def plain(d: Inputs, dtype=None):
    """The formula: every row on the base plus its adapter's delta, products in `dtype` or the model's."""
    dtype = dtype or next(d.model.parameters()).dtype
    model = copy.deepcopy(d.model).to(dtype)
    rows = {name: torch.tensor([i for i, own in enumerate(d.names) if own == name]) for name in d.distinct}
    wide = torch.promote_types(dtype, torch.float32)
    own_deltas = {name: deltas(d, name, wide) for name in d.distinct}
    for linear in step.linear_names(model):
        module = model.get_submodule(linear)

        def patched(x, module=module, linear=linear):
            y = nn.functional.linear(x, module.weight, module.bias)
            for name, own in rows.items():
                rows_of = x[own].to(wide).flatten(0, -2)
                y[own] = (y[own].to(wide) + added(rows_of, own_deltas[name][linear]).view_as(y[own])).to(dtype)
            return y

        module.forward = patched
    return forward(model, d)


def ours(d: Inputs):
    """The model's linears routed, the adapters in fastft's memory; without an engine, which adds no work to a forward."""
    from fastft.serving.memory import AdapterMemory
    from fastft.serving.routes import RouteBuffers
    from fastft.serving.sites import install

    model, device = copy.deepcopy(d.model), d.ids.device
    routed = install(model)
    there = sorted(path.name for path in d.folder.iterdir())
    memory = AdapterMemory(
        routed.sites,
        model=model,
        device=device,
        dtype=next(model.parameters()).dtype,
        adapter_dir=d.folder,
        slots=len(there),
        device_bytes=2 << 30,
    )
    for name in there:  # also those that no row names
        memory.load(name)
    leases = {name: memory.acquire(name) for name in d.distinct}
    routed.bind(memory)
    buffers, length = RouteBuffers(len(there), d.ids.numel(), device), d.ids.shape[1]
    slots = [leases[name].slot if name else -1 for name in d.names]
    buffers.fill(slots, [length] * len(slots), d.ids.numel())
    buffers.transfer(False)
    for route in (routed.tokens, routed.heads):
        buffers.publish(route)
    run = forward(model, d)
    run.kept = memory, leases
    return run


def peft_model(d: Inputs):
    from peft import PeftModel

    first, *others = d.distinct
    model = PeftModel.from_pretrained(copy.deepcopy(d.model), d.folder / first, adapter_name=first)
    for name in others:
        model.load_adapter(d.folder / name, adapter_name=name)
    return model.to(d.ids.device).to(next(d.model.parameters()).dtype).eval()


def peft(d: Inputs):
    return forward(peft_model(d), d, adapter_names=[name or "__base__" for name in d.names])


def accelerated_peft(d: Inputs):
    return forward(fastft.accelerate(peft_model(d)), d, adapter_names=[name or "__base__" for name in d.names])


def bmm(d: Inputs):
    """Stacked weights and two batched products a linear: rows stand sorted by adapter, equally many of each."""
    model, dtype = copy.deepcopy(d.model), next(d.model.parameters()).dtype
    stacks = [factors(d, name, dtype) for name in d.distinct]
    count = len(stacks)
    for linear in step.linear_names(model):
        module = model.get_submodule(linear)
        a = torch.stack([own[linear][0].t().contiguous() for own in stacks])  # [D, K, R]
        b = torch.stack([own[linear][1].t().contiguous() for own in stacks])  # [D, R, N]

        def patched(x, module=module, a=a, b=b):
            y = nn.functional.linear(x, module.weight, module.bias)
            rows = x.reshape(count, -1, x.shape[-1])
            y.view(count, rows.shape[1], -1).baddbmm_(torch.bmm(rows, a), b)
            return y

        module.forward = patched
    return forward(model, d)


def bmm_missing(names) -> str | None:
    """Why `bmm` can't do this batch, or None."""
    counts = [list(names).count(name) for name in dict.fromkeys(names)]
    same = "" not in names and len(set(counts)) == 1 and list(names) == sorted(names, key=list(names).index)
    return None if same else "needs equally many rows of every adapter, and none without"


PEERS = {"peft": (peft, peers.peft_missing), "bmm": (bmm, lambda: None)}
