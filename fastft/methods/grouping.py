"""Which adapted layers are taken for projections of one input. A wrong guess shows in the first forward, and is dropped."""

import re

from ..modules.adapted_linear import features
from ..modules.adapter_group import AdapterGroup
from ..modules.packed import PackedWeights
from .targets import tied_names

# Names of sibling layers that read one tensor in transformers' models; in an attention the query's come first.
_ATTENTION = (
    ({"q_proj", "q_a_proj"}, {"k_proj", "v_proj", "kv_a_proj_with_mqa"}),
    ({"query"}, {"key", "value"}),
    ({"query_proj"}, {"key_proj", "value_proj"}),
    ({"q"}, {"k", "v"}),
    ({"wq"}, {"wk", "wv"}),
    ({"to_q"}, {"to_k", "to_v"}),
    ({"q_lin"}, {"k_lin", "v_lin"}),
)
_OTHER = (
    {"gate_proj", "up_proj"},
    {"w1", "w3"},
    {"wi_0", "wi_1"},
    {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"},
    {"in_proj_qkvz", "in_proj_ba"},
)
# In these, or modules of these, the keys and values come from another sequence than the queries.
_CROSS = re.compile(r"cross|encoder_attn|EncDec", re.IGNORECASE)


def siblings(modules, in_features=lambda module: features(module)[1]) -> list[list[str]]:
    """Names of the modules that probably read one input, in groups of at least two with equal in-features."""
    found: dict[tuple, list[str]] = {}
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        for family, (query, rest) in enumerate(_ATTENTION):
            if own in rest or (own in query and not _CROSS.search(".".join(parent.split(".")[-2:]))):
                found.setdefault((parent, "attention", family, in_features(module)), []).append(name)
        for family, names in enumerate(_OTHER):
            if own in names:
                found.setdefault((parent, "other", family, in_features(module)), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def make_groups(method, adapter, targets) -> list[AdapterGroup]:
    """Group what `adapter` adds low-rank factors to, and pack base weights if the method's options ask for it."""
    lowrank = {name: module for name, module in targets.items() if adapter.name in module._settings}
    groups = []
    for names in siblings(lowrank) if method.group_projections else ():
        group = AdapterGroup(adapter, names, [lowrank[name] for name in names])
        if method.pack_weights:
            _pack(group)
        for member in group.members:
            member._groups[adapter.name] = group
        groups.append(group)
    return groups


def _pack(group) -> None:
    if any(member._part("lora_bias", group.adapter.name) is not None for member in group.members):
        group.unpacked = "lora_bias would have to be in the packed bias"
        return
    others = {id(g.packed): g for m in group.members for g in m._groups.values() if g.packed is not None}
    for other in others.values():
        if other.packed.members != group.members:
            group.unpacked = f"adapter {other.adapter.name!r} packs {', '.join(other.names)}"
            return
        group.packed = other.packed
        return
    group.packed = PackedWeights(group.members)


def check_packable(model, targets) -> None:
    """Raises ValueError for weights that others share: they would come apart."""
    tied = tied_names(model)
    for name in (name for names in siblings(targets) for name in names):
        for own in (f"{name}.weight", f"{name}.bias"):
            if own in tied:
                raise ValueError(
                    f"pack_weights: {own} is shared with {', '.join(tied[own])}, and would come apart; exclude it from "
                    "target_modules, or leave pack_weights off"
                )
