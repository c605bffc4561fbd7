"""Which linears of a model can have adapters while it is served, and which of them are computed together."""

import re

from torch import nn

from ..methods.grouping import siblings
from ..methods.targets import any_linear, base_modules, tied_names
from ..modules.adapted_linear import is_linear
from ..modules.quantized import quantization
from ..modules.routed import RoutedModel, Site, group_obstacle

# Their rows are those that a router chose, so tokens can't be told by their place in the batch.
_EXPERTS = re.compile(r"(^|\.)experts\.\d+(\.|$)")


def find_sites(model: nn.Module) -> list[Site]:
    """Every linear (plain, transformers' Conv1D, quantised), those of one input that can be packed in one site.

    Left out, so that an adapter which names them is refused: single experts of a mixture, layers whose forward was replaced
    on the instance, the inside of an nn.TransformerEncoderLayer (which reads weights without calling the layer).
    """
    modules, tied = base_modules(model), tied_names(model)
    found = {name: module for name, module in modules.items() if name and _servable(name, module, modules)}
    grouped: dict[str, list[str]] = {}
    for names in siblings(found):
        shared = any(f"{name}.{own}" in tied for name in names for own in ("weight", "bias"))
        if not shared and group_obstacle([found[name] for name in names]) is None:
            grouped.update(dict.fromkeys(names, names))
    sites, done = [], set()
    for name in found:
        if name not in done:
            names = grouped.get(name, [name])
            done.update(names)
            sites.append(Site.of({own: found[own] for own in names}))
    return sites


def _servable(name, module, modules) -> bool:
    if not any_linear(module) or not (is_linear(module) or quantization(module) is not None):
        return False
    parent = modules.get(name.rpartition(".")[0])
    inside = isinstance(parent, nn.TransformerEncoderLayer | nn.MultiheadAttention)
    return not inside and "forward" not in module.__dict__ and not _EXPERTS.search(name)


def install(model: nn.Module, sites: list[Site] | None = None) -> RoutedModel:
    """Make the linears of these sites (default: all that `find_sites` finds) routed, in place.

    Raises:
        ValueError: the model is routed already, holds adapters, or a site's members can't be packed.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return RoutedModel(model, find_sites(model) if sites is None else sites, head)
