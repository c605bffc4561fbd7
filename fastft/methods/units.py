"""Coupled units of a transformer: what the layers of one block write and read of the same hidden features.

In a feed-forward block, a channel is a row of up (and gate) and the column of down that reads it. In an attention, a head
is rows of v and the columns of o that read it; under grouped-query attention the rows of one KV head go with the columns of
all query heads that share it. Exchanging two channels in all their slices leaves the block's function as it is, and so does
exchanging two KV groups if q and k follow: Structured Sparse Fine-Tuning (S²FT, arXiv:2412.06289) trains such units.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..modules.adapted_linear import LINEAR_CLASSES, features, is_linear, is_transposed
from ..modules.quantized import quantization
from .grouping import _CROSS
from .targets import any_linear, base_modules

# Names of a block's layers in transformers' models, below the block: (down, up, gate). The gate's outputs go through the
# activation where there is one. One name for up and gate: a fused layer, the gate's rows first.
_FEED_FORWARD = (
    ("down_proj", "up_proj", "gate_proj"),
    ("down_proj", "gate_up_proj", "gate_up_proj"),
    ("w2", "w3", "w1"),
    ("wo", "wi_1", "wi_0"),
    ("wo", "wi", None),
    ("c_proj", "c_fc", None),
    ("dense_4h_to_h", "dense_h_to_4h", None),
    ("fc2", "fc1", None),
    ("fc_out", "fc_in", None),
    ("lin2", "lin1", None),
    ("output.dense", "intermediate.dense", None),
)
# (o, v). A v that is no layer of its own is named by the fused one.
_ATTENTION = (
    ("o_proj", "v_proj"),
    ("o_proj", "qkv_proj"),
    ("out_proj", "v_proj"),
    ("dense", "v_proj"),
    ("c_proj", "c_attn"),
    ("dense", "query_key_value"),
    ("out_lin", "v_lin"),
    ("output.dense", "self.value"),
    ("o", "v"),
)
_FUSED = ("qkv_proj", "c_attn")  # rows [all of q, all of k, all of v]
_INTERLEAVED = ("query_key_value",)  # q, k and v within every head
# Where an attention and then the configs around it say its sizes.
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")


@dataclass(frozen=True)
class UnitSlice:
    """What one unit is in one linear layer: of unit u, the features offset + u·size … offset + (u + 1)·size - 1.

    `kind` is "columns" (in-features) or "rows" (out-features) of the logical weight [N, K], however it is stored.
    """

    module: str
    kind: str
    size: int
    offset: int = 0

    def features(self, units: Tensor) -> Tensor:
        """int64 [len(units) · size], ascending if the units [...] are; on their device."""
        inside = torch.arange(self.size, device=units.device)
        return (self.offset + units.long()[:, None] * self.size + inside).flatten()


@dataclass(frozen=True)
class Coupled:
    """One feed-forward block ("ffn": units are channels) or one attention ("attention": query heads, or KV groups).

    `slices` by role: "down" (columns), "up" and, if there is one, "gate" (rows); or "o" (columns) and "v" (rows), the
    latter absent where the units have no rows of their own. `read_out` is "down" or "o", also where `slices` was narrowed
    to those that may train.
    """

    name: str
    family: str
    count: int
    slices: dict[str, UnitSlice]
    read_out: UnitSlice | None = None

    @property
    def key(self) -> str:
        """What tells it from the model's others: the parent module's name and the family."""
        return f"{self.name}:{self.family}"


def coupled_units(model: nn.Module, by_group: bool) -> list[Coupled]:
    """All feed-forward blocks and self-attentions of known layouts, in the model's order.

    With `by_group` an attention's units are its KV groups (rows of one KV head of v, columns of all its query heads of o).
    Otherwise they are its query heads, and "v" is there only if each has a KV head of its own. "v" is left out as well
    where q, k and v are interleaved in one layer, and in models whose layers lend each other keys and values.
    Experts that are modules are a block each; experts in one 3-D parameter hold no linear layer, and aren't found.

    Raises:
        ValueError: nothing is found; weights whose shapes fit neither each other nor the heads that the attention or the
            config tells; a layer that only resembles a linear one.
    """
    modules = base_modules(model)
    found = []
    for name in modules:
        for down, up, gate in _FEED_FORWARD:
            if _all_linear(modules, name, down, up):
                found.append(_feed_forward(modules, name, down, up, gate))
                break
        if _CROSS.search(name.rpartition(".")[2]):
            continue  # its keys and values are another sequence's
        for o, v in _ATTENTION:
            if _all_linear(modules, name, o, v):
                found.append(_attention(modules, name, o, v, by_group))
                break
    if not found:
        layouts = [" + ".join(dict.fromkeys(filter(None, reversed(layout)))) for layout in (*_FEED_FORWARD, *_ATTENTION)]
        raise ValueError(
            f"no feed-forward block or self-attention of a known layout in a {type(model).__name__}; known are modules "
            f"with the linear layers {', '.join(layouts)}"
        )
    return found


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _all_linear(modules, name: str, *children: str) -> bool:
    inner = [modules.get(_join(name, child)) for child in children]
    if not all(module is not None and any_linear(module) for module in inner):
        return False
    for child, module in zip(children, inner):
        _check_plain(_join(name, child), module)
    return True


def _check_plain(name, module):
    # Subclasses are refused: without them less would train than was asked for.
    if (kind := quantization(module)) is not None:
        raise ValueError(
            f"the weight of {name!r} is quantised ({kind}), and channels and heads train where they stand in a weight; load "
            "the model without quantising it, or use LoRA"
        )
    if not is_linear(module):
        supported = " and ".join(".".join(cls) for cls in LINEAR_CLASSES)
        raise ValueError(f"{name!r} is a {type(module).__module__}.{type(module).__qualname__}; only {supported} are known")


def _feed_forward(modules, name, down, up, gate) -> Coupled:
    down, up = _join(name, down), _join(name, up)
    count = features(modules[down])[1]
    fused = gate is not None and _join(name, gate) == up
    slices = {"down": UnitSlice(down, "columns", 1), "up": UnitSlice(up, "rows", 1, count if fused else 0)}
    if fused:
        slices["gate"] = UnitSlice(up, "rows", 1)
    elif gate is not None and _all_linear(modules, name, gate):
        slices["gate"] = UnitSlice(_join(name, gate), "rows", 1)
        _check_rows(modules, slices["gate"].module, count, f"{down!r} reads {count}")
    _check_rows(modules, up, 2 * count if fused else count, f"{down!r} reads {count}{', and it is up and gate' * fused}")
    return Coupled(name, "ffn", count, slices, slices["down"])


def _attention(modules, name, o, v, by_group) -> Coupled:
    own, inner = v.rpartition(".")[2], _join(name, v.rpartition(".")[0]).rstrip(".")
    o, v = _join(name, o), _join(name, v)
    heads, kv_heads, head_dim, lends = _geometry(modules, name, inner, features(modules[o])[1])
    told = f"the attention {name!r} has {heads} heads of {head_dim} features, {kv_heads} of them KV heads"
    if features(modules[o])[1] != heads * head_dim:
        raise ValueError(f"{o!r} reads {features(modules[o])[1]} features, not {heads * head_dim}: {told}")
    count = kv_heads if by_group else heads
    slices = {"o": UnitSlice(o, "columns", heads // count * head_dim)}
    fused, interleaved = own in _FUSED, own in _INTERLEAVED
    if own == "c_attn" and not is_transposed(modules[v]):
        interleaved = True  # GPT-BigCode's, unless it has one KV head
    else:
        _check_rows(modules, v, (heads + 2 * kv_heads if fused or interleaved else kv_heads) * head_dim, told)
    if not interleaved and not lends and count == kv_heads:
        slices["v"] = UnitSlice(v, "rows", head_dim, (heads + kv_heads) * head_dim if fused else 0)
    return Coupled(name, "attention", count, slices, slices["o"])


def _geometry(modules, name, inner, width) -> tuple[int, int, int, bool]:
    """(query heads, KV heads, features of a head, whether layers use each other's keys and values)."""
    holders = [modules[name], modules[inner]]  # first, because a layer's sizes may differ from its config's
    parts = name.split(".") if name else []
    outward = [inner, *(".".join(parts[:end]) for end in range(len(parts), -1, -1))]
    holders += [config for at in outward if (config := getattr(modules.get(at), "config", None)) is not None]
    heads = _number(holders, _HEADS)
    if heads is None:
        raise ValueError(f"neither the attention {name!r} nor a config around it tells the number of its heads")
    shared = _number(holders[:2], ("num_key_value_groups",))  # query heads that share a KV head
    kv_heads = heads // shared if shared else _number(holders, _KV_HEADS) or heads
    head_dim = _number(holders, _HEAD_DIM) or (_number(holders, ("hidden_size",)) or width) // heads
    if heads % kv_heads:
        raise ValueError(f"the attention {name!r} has {heads} heads, which {kv_heads} KV heads can't share evenly")
    return heads, kv_heads, head_dim, bool(_number(holders, ("num_kv_shared_layers",)))


def _number(holders, names) -> int | None:
    values = (getattr(holder, name, None) for holder in holders for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)


def _check_rows(modules, name, expected, reason):
    if (rows := features(modules[name])[0]) != expected:
        raise ValueError(f"{name!r} has {rows} out-features, not {expected}: {reason}")
