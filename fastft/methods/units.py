"""Coupled units of a transformer: what the layers of one block write and read of the same hidden features.

In a feed-forward block, a channel is a row of up (and gate) and the column of down that reads it. In an attention, a head
is rows of v and the columns of o that read it; under grouped-query attention the rows of one KV head go with the columns of
all query heads that share it. Exchanging two channels in all their slices leaves the block's function as it is, and so does
exchanging two KV groups if q and k follow: Structured Sparse Fine-Tuning (S²FT, arXiv:2412.06289) trains such units.
A linear attention has such heads too; where it stands beside softmax attentions, its sizes are its own, not the config's.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..modules.adapted_linear import features, is_linear, is_transposed
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
# A layout without a gate may be gated all the same: its up has twice the rows then. Which half goes through the activation
# differs, so only in these classes the halves are known.
_GATE_FIRST = ("MoshiGatingMLP", "KyutaiSpeechToTextGatingMLP")
_GATE_LAST = ("MoonshineDecoderMLP", "MoonshineStreamingDecoderMLP")
# (o, v). A v that is no layer of its own is named by the fused one.
_ATTENTION = (
    ("o_proj", "v_proj"),
    ("o_proj", "qkv_proj"),
    ("o_proj.linear", "v_proj.linear"),
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
_DIFFERENTIAL = "lambda_q1"  # a parameter of every differential attention (arXiv:2410.05258)
# Where an attention and then the configs around it say its sizes. Those of v come first: a linear attention may have others.
_HEADS = ("num_v_heads", "num_attention_heads", "num_heads", "n_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEAD_DIM = ("head_v_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
_WAY_OUT = "; leave its layers out with exclude_modules, or the family with ratios of 0"


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


@dataclass(frozen=True)
class Block:
    """A feed-forward block ("ffn") or attention ("attention") by its layers' names alone; nothing of it is checked yet.

    `layers`: role -> module's name. Up and gate are one module where they are fused, and v is the fused one of q, k and v.
    """

    name: str
    family: str
    layers: dict[str, str]


def known_blocks(model: nn.Module) -> list[Block]:
    """All feed-forward blocks and self-attentions whose layers have the names of a known layout, in the model's order.

    Raises:
        ValueError: there are none.
    """
    modules = base_modules(model)
    found = []
    for name in modules:
        for down, up, gate in _FEED_FORWARD:
            if _all_linear(modules, name, down, up):
                layers = {"down": _join(name, down), "up": _join(name, up)}
                if gate is not None and _all_linear(modules, name, gate):
                    layers["gate"] = _join(name, gate)
                elif gate is None and _twice(modules, layers):
                    layers["gate"] = layers["up"]
                found.append(Block(name, "ffn", layers))
                break
        if _CROSS.search(name.rpartition(".")[2]):
            continue  # its keys and values are another sequence's
        for o, v in _ATTENTION:
            if _all_linear(modules, name, o, v):
                found.append(Block(name, "attention", {"o": _join(name, o), "v": _join(name, v)}))
                break
    if not found:
        layouts = [" + ".join(dict.fromkeys(filter(None, reversed(layout)))) for layout in (*_FEED_FORWARD, *_ATTENTION)]
        raise ValueError(
            f"no feed-forward block or self-attention of a known layout in a {type(model).__name__}; known are modules "
            f"with the linear layers {', '.join(layouts)}"
        )
    return found


def coupled_units(model: nn.Module, by_group: bool, blocks: list[Block] | None = None) -> list[Coupled]:
    """The units of these blocks, by default of all `known_blocks`.

    With `by_group` an attention's units are its KV groups (rows of one KV head of v, columns of all its query heads of o).
    Otherwise they are its query heads, and "v" is there only if each has a KV head of its own. "v" is left out as well
    where q, k and v are interleaved in one layer, in models whose layers lend each other keys and values, and in
    differential attentions; "up" and "gate" where they are fused in an order that isn't known.
    Experts that are modules are a block each; experts in one 3-D parameter hold no linear layer, and aren't found.

    Raises:
        ValueError: no blocks are given and there are none; weights whose shapes fit neither each other nor the heads that
            the attention or the config tells.
    """
    modules = base_modules(model)
    make = {"ffn": _feed_forward, "attention": partial(_attention, by_group=by_group)}
    return [make[block.family](modules, block) for block in (known_blocks(model) if blocks is None else blocks)]


def why_no_slice(role: str, layer: str) -> str:
    """What an error says of a layer that `coupled_units` gives no slice of."""
    if role == "v":
        return (
            f"which rows of {layer!r} are a head's values, and which columns of o read them, is not known; supported are "
            "v layers of their own and layers with the rows [q, k, v], not q, k and v interleaved by head, differential "
            "attention, or layers that use each other's keys and values. Set v_ratio=0 (o_ratio trains columns of o), or "
            "leave the layer out with exclude_modules"
        )
    return (
        f"{layer!r} is up and gate in one; which half is the gate is known of gate_up_proj and of the classes "
        f"{', '.join(_GATE_FIRST + _GATE_LAST)}. Set up_ratio=0 and gate_ratio=0 (down_ratio trains columns of down), or "
        "leave the layer out with exclude_modules"
    )


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _all_linear(modules, name: str, *children: str) -> bool:
    inner = [modules.get(_join(name, child)) for child in children]
    return all(module is not None and any_linear(module) for module in inner)


def _twice(modules, layers) -> bool:
    return _features(modules[layers["up"]])[0] == 2 * _features(modules[layers["down"]])[1]


def _features(module) -> tuple[int, int]:
    """(out, in) also of subclasses of nn.Linear, which may stand in a block whose other layers train."""
    known = is_linear(module) or quantization(module) is not None
    return features(module) if known else tuple(module.weight.shape)


def _feed_forward(modules, block) -> Coupled:
    down, up, gate = (block.layers.get(role) for role in ("down", "up", "gate"))
    count = _features(modules[down])[1]
    if up == gate:
        _check_rows(modules, up, 2 * count, f"{down!r} reads {count}, and it is up and gate")
        gate_first = _gate_comes_first(modules[block.name], up)
        offsets = {} if gate_first is None else {"up": count * gate_first, "gate": count * (not gate_first)}
    else:
        offsets = {"up": 0} if gate is None else {"up": 0, "gate": 0}
        for role in reversed(offsets):
            _check_rows(modules, block.layers[role], count, f"{down!r} reads {count}")
    slices = {"down": UnitSlice(down, "columns", 1)}
    slices |= {role: UnitSlice(block.layers[role], "rows", 1, offset) for role, offset in offsets.items()}
    return Coupled(block.name, "ffn", count, slices, slices["down"])


def _gate_comes_first(module, up: str) -> bool | None:
    """In a layer that is up and gate; None: not known."""
    classes = {cls.__name__ for cls in type(module).__mro__}
    if up.rpartition(".")[2] == "gate_up_proj" or classes & {*_GATE_FIRST}:
        return True
    return False if classes & {*_GATE_LAST} else None


def _attention(modules, block, by_group) -> Coupled:
    name, o, v = block.name, block.layers["o"], block.layers["v"]
    inner, _, own = v.rpartition(".")
    fused, interleaved = own in _FUSED, own in _INTERLEAVED
    width, rows = _features(modules[o])[1], _features(modules[v])[0]
    heads, kv_heads, head_dim, lends = _geometry(modules, name, inner, width, None if fused or interleaved else rows)
    differential = hasattr(modules[name], _DIFFERENTIAL)
    if differential:  # o reads pairs of heads, and each reads two KV heads that don't lie side by side
        heads, kv_heads, head_dim = heads // 2, max(1, kv_heads // 2), 2 * head_dim
    told = f"the attention {name!r} has {heads} heads of {head_dim} features, {kv_heads} of them KV heads"
    if width != heads * head_dim:
        raise ValueError(f"{o!r} reads {width} features, not {heads * head_dim}: {told}{_WAY_OUT}")
    count = kv_heads if by_group else heads
    slices = {"o": UnitSlice(o, "columns", heads // count * head_dim)}
    if own == "c_attn" and not (is_linear(modules[v]) and is_transposed(modules[v])):
        interleaved = True  # GPT-BigCode's, unless it has one KV head
    else:
        _check_rows(modules, v, (heads + 2 * kv_heads if fused or interleaved else kv_heads) * head_dim, told)
    if not interleaved and not lends and not differential and count == kv_heads:
        slices["v"] = UnitSlice(v, "rows", head_dim, (heads + kv_heads) * head_dim if fused else 0)
    return Coupled(name, "attention", count, slices, slices["o"])


def _geometry(modules, name, inner, width, v_rows) -> tuple[int, int, int, bool]:
    """(query heads, KV heads, features of a head, whether layers use each other's keys and values).

    width: features that o reads; v_rows: those that v writes, None where it is fused with others.
    """
    itself = [modules[name], modules[inner]]  # first, because a layer's sizes may differ from its config's
    parts = name.split(".") if name else []
    outward = [inner, *(".".join(parts[:end]) for end in range(len(parts), -1, -1))]
    configs = [config for at in outward if (config := getattr(modules.get(at), "config", None)) is not None]
    heads = _number(itself + configs, _HEADS)
    if heads is None:
        raise ValueError(f"neither the attention {name!r} nor a config around it tells the number of its heads{_WAY_OUT}")
    shared = _number(itself, ("num_key_value_groups",))  # query heads that share a KV head
    kv_heads = heads // shared if shared else _number(itself, _KV_HEADS)
    if kv_heads is None:
        # The config's KV heads are those of softmax attentions. A v as wide as o's input has one for every head.
        kv_heads = heads if v_rows == width else _number(configs, _KV_HEADS) or heads
    head_dim = _number(itself + configs, _HEAD_DIM) or (_number(itself + configs, ("hidden_size",)) or width) // heads
    if heads % kv_heads:
        raise ValueError(f"the attention {name!r} has {heads} heads, which {kv_heads} KV heads can't share evenly{_WAY_OUT}")
    return heads, kv_heads, head_dim, bool(_number(itself + configs, ("num_kv_shared_layers",)))


def _number(holders, names) -> int | None:
    values = (getattr(holder, name, None) for holder in holders for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)


def _check_rows(modules, name, expected, reason):
    if (rows := _features(modules[name])[0]) != expected:
        raise ValueError(f"{name!r} has {rows} out-features, not {expected}: {reason}{_WAY_OUT}")
