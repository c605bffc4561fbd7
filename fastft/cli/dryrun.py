"""`fastft train --dry-run`: matched modules, trainable parameters and a memory estimate, without loading a weight."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

from ..methods.sparse import SparseMethod, stored_shape
from ..modules.adapted_linear import features, is_linear
from ..modules.sparse import SparseEntries
from ..ops.entries import Entries
from .config import TrainConfig
from .data import Tokenized, check_fit
from .errors import UserError
from .loading import load
from .slices import memory, pattern, per_layer, share
from .train import attach, choose_device_and_dtype, make_method


def report(config: TrainConfig, rows: Tokenized, held_out: Tokenized) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    handle, sizes = estimate(config, rows, held_out)
    console = Console()
    # A name is whole also where there is no terminal to say how wide it is.
    names = Column("modules with an adapter", overflow="fold")
    table = Table(names, "how many", "in -> out", title=config.title(), title_justify="left")
    for (name, shape), count in _matched(handle).items():
        table.add_row(name, str(count), shape)
    console.print(table)
    for name, slices in per_layer(handle).items():
        console.print(f"{name}: {slices['line']}")
    if config.method == "s2ft" and config.select != "random":
        console.print(f"(numbers of a random choice: those by {config.select} are known when it is measured)")
    if config.method == "lift":
        console.print("(entries that stop training are kept, which takes 8 bytes and a copy of the weight's own for each)")
    trainable, whole = share(handle)
    console.print(f"trainable: {trainable:,} parameters, {100 * trainable / whole:.2f} % of {whole:,}")
    table = Table("memory, estimated", "MiB", title_justify="left")
    for name, size in sizes.items():
        table.add_row(name, f"{size / 2**20:,.1f}")
    table.add_row("sum", f"{sum(sizes.values()) / 2**20:,.1f}", style="bold")
    console.print(table)
    console.print("without the Python process itself and the allocator's reserve")


def estimate(config: TrainConfig, rows: Tokenized, *held_out: Tokenized) -> tuple[Any, dict[str, int]]:
    """Run one forward with the longest rows on fake tensors and count what autograd keeps for backward.

    Returns:
        (handle, bytes by kind).
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    _, dtype = choose_device_and_dtype(config)
    architecture = load("AutoConfig", config.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
    check_fit(model, rows, *held_out)
    _hollow(model)
    base = _base(model, dtype, config.bits())
    longest = sorted((len(row["input_ids"]) for row in rows.rows), reverse=True)[: config.batch_size]
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    handle = _attach(config, model, fake)
    with fake:
        tokens = torch.zeros(len(longest), longest[0], dtype=torch.int64)
        kept = _kept_for_backward(model, tokens)
    if config.gradient_checkpointing:
        # Kept: every layer's input, and while backward is in one layer all of that layer.
        layers = getattr(architecture, "num_hidden_layers", 1)
        kept = tokens.numel() * architecture.hidden_size * dtype.itemsize * layers + kept // layers
    adapter = memory(handle)
    if config.bits():
        adapter.pop("entries from before", None)  # they work beside the codes
    sizes = {
        **base,
        **adapter,
        f"activations ({tokens.shape[0]} x {tokens.shape[1]} tokens)": kept,
    }
    return handle, sizes


def _attach(config: TrainConfig, model: Any, fake: Any) -> Any:
    """The adapter on a hollow model. A slice would be written into weights that have no room for it: it is made fake."""
    import fastft

    if config.method == "lora":
        return attach(config, model, [], 0)
    unscored = {name: getattr(TrainConfig, name) for name in ("select", "largest", "calibration_rows")}
    try:
        method = make_method(dataclasses.replace(config, **unscored)).bind(model)
        if isinstance(method, SparseMethod):
            method = unchosen(method)
        with fake:
            return fastft.attach(model, method)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def unchosen(method: Any) -> Any:
    """A method of entries that trains as many, but looks at no weights to choose them."""

    class Unchosen(type(method)):
        def bind(self, model):
            return self

        def check_layout(self, name, module):
            """A hollow weight's rows are all one element."""

        def initial(self, name, module):
            import torch

            count, rows = self.counts[name].entries, stored_shape(module)[0]
            columns = torch.zeros(count, dtype=torch.int32)
            return {"delta": torch.zeros(count), "starts": torch.zeros(rows + 1, dtype=torch.int64), "columns": columns}

        def install(self, name, module, adapter, tensors):
            entries = Entries(tensors["starts"], tensors["columns"], stored_shape(module))
            held = SparseEntries(entries, tensors["delta"])
            held.observer = self.observer()
            if self.remembers_first:
                held.all_first()
            module.add_entries(adapter, held)

    return Unchosen(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init})


def _hollow(model: Any) -> None:
    """Give every meta tensor of `model` one real element seen at its full shape: attach takes it, and it costs no memory."""
    import torch

    made: dict[torch.Tensor, torch.Tensor] = {}  # tied parameters stay tied
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None and tensor.is_meta:
                    if tensor not in made:
                        value = torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)
                        made[tensor] = torch.nn.Parameter(value) if own is module._parameters else value
                    own[name] = made[tensor]


def _base(model: Any, dtype: Any, bits: int | None) -> dict[str, int]:
    """Bytes of the base's weights by kind, as `loading.load_base` would have them."""
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if bits and is_linear(module) and module is not head]
    weights = {id(module.weight): module.weight for module in linear}
    rest = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in weights)
    if not weights:
        return {f"base weights ({dtype})": rest}
    if bits == 4:  # blocks of 64 with an 8-bit scale, of whose scales 256 share a float32
        codes = sum(w.numel() * (4 + 8 / 64 + 32 / (64 * 256)) / 8 for w in weights.values())
    else:  # a float32 for each row
        codes = sum(w.numel() + 4 * features(module)[0] for module, w in zip(linear, weights.values()))
    return {
        f"base weights, {bits} bits": math.ceil(codes),
        f"base weights that stay ({dtype})": rest,
        "one layer's weight, dequantised": max(w.numel() for w in weights.values()) * dtype.itemsize,
    }


def _kept_for_backward(model: Any, tokens: Any) -> int:
    """Bytes of distinct storages that one forward with loss saves for backward, parameters excluded."""
    import torch

    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # holding it keeps the id from being used again
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def _matched(handle: Any) -> Counter:
    return Counter((pattern(name), "{1} -> {0}".format(*features(module))) for name, module in handle.targets.items())
