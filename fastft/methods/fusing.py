"""Weighted sums of adapters whose delta is a slice of the weights (S²FT's fusion)."""

from dataclasses import replace

import torch

from .base import check_name, install_adapter, plain_model
from .handle import Handle, handles
from .targets import Matched, base_modules, exactly


def fuse(model, weights: dict[str, float], adapter_name: str = "fused") -> Handle:
    """Attach ``Σ weights[name] · delta[name]`` of attached S²FT adapters as a new adapter, on the union of their units.

    Args:
        model: with the adapters attached; they stay attached and become inactive, so that nothing counts twice.
        weights: adapter name -> its factor.
        adapter_name: of the sum.

    Returns:
        Its handle: to use, save, or train further.

    Raises:
        ValueError: an unknown adapter, one of another method, or adapters that train rows here and columns there of one
            module; a factor that is not finite. Nothing is changed then.
    """
    model = plain_model(model)
    check_name(model, adapter_name)
    found = handles(model)
    if not weights:
        raise ValueError("fuse needs at least one adapter: {name: factor}")
    for name, factor in weights.items():
        if name not in found:
            raise ValueError(f"no adapter {name!r} is attached; attached: {sorted(found)}")
        if getattr(found[name].method, "chosen", None) is None:
            raise ValueError(f"adapter {name!r} is {type(found[name].method).__name__}; only S²FT adapters can be fused")
        if found[name]._matched.copies:
            raise ValueError(f"adapter {name!r} also trains whole tensors (modules_to_save, bias), which have no sum")
        if not torch.isfinite(torch.tensor(float(factor))):
            raise ValueError(f"the factor of {name!r} is {factor}")
    sources = [found[name] for name in weights]
    # In the model's order, as a file's adapter gets them when it is loaded: optimizers know parameters by their places.
    adapted = {path for handle in sources for path in handle.targets}
    targets = {path: module for path, module in base_modules(model).items() if path in adapted}
    tensors, chosen = {}, {}
    for path, module in targets.items():
        parts = [(handle, weights[handle.name]) for handle in sources if path in handle.targets]
        tensors[path], chosen[path] = _sum(path, module, parts)
    first = sources[0].method
    method = replace(first, target_modules=exactly(chosen), chosen=chosen, units=None)
    fused = install_adapter(model, method, adapter_name, Matched(targets, {}), tensors, {})
    for handle in sources:
        handle.set_active(False)
    return fused


@torch.no_grad()
def _sum(path, module, parts):
    """The summed delta of one module on the union of the units, and where it lies."""
    layouts = {replace(handle.method.chosen[path], units=0) for handle, _ in parts}
    if len(layouts) > 1:
        described = " and ".join(f"{one.kind} in units of {one.size} from {one.offset} on" for one in layouts)
        raise ValueError(f"the adapters train different slices of {path!r} ({described}), which have no common units")
    units = torch.cat([module.slice_units[handle.name] for handle, _ in parts]).unique()
    dim = module.part_of(parts[0][0].name).dim(module.fan_in_fan_out)
    index = module._parts[parts[0][0].name].index(units.to(module.weight.device))
    shape = list(module.weight.shape)
    shape[dim] = len(index)
    total = torch.zeros(shape, dtype=torch.promote_types(module.weight.dtype, torch.float32), device=module.weight.device)
    for handle, factor in parts:
        at = torch.searchsorted(index, module.part_of(handle.name).index)
        total.index_add_(dim, at, module.slice_delta[handle.name].to(total.dtype), alpha=float(factor))
    return {"slice_delta": total, "slice_units": units}, replace(layouts.pop(), units=len(units))
