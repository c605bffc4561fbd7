"""S²FT, structured sparse fine-tuning (Yang et al. 2024, arXiv:2412.06289): "select sparsely, compute densely".

A few units train: channels of the feed-forward (columns of down_proj, with them rows of up_proj) and heads of the attention
(columns of o_proj, with them rows of v_proj). They train in place, so forward and dX cost what the frozen model costs; of dW
only the slice is computed, and of x only the slice's features are kept. Nothing is permuted: the slices are index lists in
the model's own order, adapters share one base, and grouped-query attention is no special case.

Deviations from the authors' code (github.com/Infini-AI-Lab/S2FT), where it deviates from the paper: gradients accumulate,
columns of down_proj are columns, heads follow their KV group, and what is kept for backward is a copy of the slice, not a
view that holds all of x.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch

from ..modules.adapted_linear import is_transposed
from ..modules.quantized import quantization
from ..modules.slices import SliceSettings
from ..ops.partial_linear import slice_dim
from ..optim.slice_adamw import SliceAdamW
from .base import Method
from .selection import SELECTORS, choose, unit_scores, wanted_slices
from .targets import check_rows, exactly, in_layers, match, tied_names
from .units import coupled_units, known_blocks, why_no_slice

# Fractions of the paper's experiments, by model; o and d there are o_ratio and down_ratio here.
PRESETS = {
    "llama-2-7b": {"o_ratio": 0.052, "down_ratio": 0.02},
    "llama-3-8b": {"down_ratio": 0.03},
}
_RATIOS = ("down", "up", "gate", "o", "v")
_IN_FILES = {"down_ratio", "up_ratio", "gate_ratio", "o_ratio", "v_ratio", "select", "largest", "multiple", "seed"}
_IN_FILES |= {"modules_to_save", "bias", "task_type"}
_DESCRIPTIVE = {"peft_type", "base_model_name_or_path", "auto_mapping", "inference_mode", "target_modules", "slices"}


@dataclass(frozen=True)
class ChosenSlice:
    """What trains of one linear: `units` units of `size` rows or columns (`kind`), counted from feature `offset` on."""

    kind: str
    size: int
    offset: int
    units: int


@dataclass(frozen=True)
class S2FT(Method):
    """Options of S²FT. Ratios are fractions of all units of the model, chosen over all layers, so that layers get different
    numbers; a layer with none is left alone, and backward ends at the lowest one that has any.

    Args:
        down_ratio: of the feed-forward channels, those whose columns of down_proj train (the paper's d).
        o_ratio: of the attention heads, those whose columns of o_proj train.
        up_ratio, gate_ratio: of the channels, those whose rows of up_proj, of gate_proj train. Rows keep the layer's whole
            input for backward, columns only their part.
        v_ratio: of the heads, those whose rows of v_proj train. Then a head comes with its group: the query heads that
            share one key-value head. The slices of one family are nested, since one ranking orders its units.
        select: "random" (the paper's S²FT-R), or by the size of the unit's "weight", "activation", "product" of both or
            "gradient"; formulas in `selection.unit_scores`.
        largest: take the units with the largest scores; the smallest are the paper's better choice.
        multiple: each layer's count is a multiple of this (64 suits tensor cores).
        calibration: batches for what "activation", "product" and "gradient" measure: dictionaries of the model's keyword
            arguments, with labels for "gradient". Read once, by `attach`.
        seed: of the random choice; the same on every rank and machine.
        target_modules and the other options of `TargetOptions` limit the choice; by default all units may be chosen.

    `S2FT.preset("llama-3-8b")` gives the paper's ratios.
    """

    peft_type: ClassVar[str] = "S2FT"
    file_names: ClassVar[dict[str, str]] = {"slice_delta": "s2ft_delta", "slice_units": "s2ft_units"}
    trains_merged: ClassVar[bool] = True
    placed_by: ClassVar[str] = "slice"

    down_ratio: float = 0.03
    o_ratio: float = 0.0
    up_ratio: float = 0.0
    v_ratio: float = 0.0
    gate_ratio: float = 0.0
    select: str = "random"
    largest: bool = False
    multiple: int = 1
    calibration: Iterable[Any] | None = field(default=None, repr=False, compare=False)
    seed: int = 0
    # What was chosen; made by attach or read from a file.
    chosen: dict[str, ChosenSlice] | None = field(default=None, repr=False)
    units: dict[str, torch.Tensor] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def preset(cls, model: str, **options) -> "S2FT":
        """The paper's ratios for a model: "llama-2-7b" or "llama-3-8b"; options go on top.

        Raises:
            ValueError: no preset of that name.
        """
        if model not in PRESETS:
            raise ValueError(f"no preset {model!r}; there are {', '.join(PRESETS)}")
        return cls(**{**dict.fromkeys((f"{r}_ratio" for r in _RATIOS), 0.0), **PRESETS[model], **options})

    def __post_init__(self):
        super().__post_init__()
        for name, ratio in ((f"{r}_ratio", self.ratios(all=True)[r]) for r in _RATIOS):
            if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 <= ratio <= 1:
                raise ValueError(f"{name}={ratio!r}; it must be a fraction in [0, 1]")
        if not self.ratios():
            raise ValueError("all ratios are 0, so nothing would train; give down_ratio, o_ratio, up_ratio or v_ratio")
        if self.select not in SELECTORS:
            raise ValueError(f"select={self.select!r} is not supported; supported: {', '.join(SELECTORS)}")
        for option, least in (("multiple", 1), ("seed", 0)):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{option}={value!r}; it must be an integer of at least {least}")
        if not isinstance(self.largest, bool):
            raise TypeError(f"largest={self.largest!r}; it must be True or False")
        if self.allow_tied_weights:
            raise ValueError("allow_tied_weights: S²FT changes weights in place, so a shared one would change everywhere")

    def ratios(self, all: bool = False) -> dict[str, float]:
        """Slice ("down", "up", "gate", "o", "v") -> its ratio, where that is not 0."""
        found = {name: getattr(self, f"{name}_ratio") for name in _RATIOS}
        return found if all else {name: ratio for name, ratio in found.items() if ratio}

    # ---- what `Method` asks

    def bind(self, model):
        if self.units is not None:  # chosen on another model; one of the same shapes gets the same
            self._check_modules(model)
            return self
        ratios = self.ratios()
        blocks = known_blocks(model)
        for role, ratio in ratios.items():
            if not any(role in block.layers for block in blocks):
                having = ", ".join(sorted({f"{role}_ratio" for block in blocks for role in block.layers}))
                raise ValueError(
                    f"{role}_ratio={ratio}, but no block of a known layout in this {type(model).__name__} has such a layer; "
                    f"set it to 0. There are layers for {having}"
                )
        possible = list(dict.fromkeys(layer for b in blocks for role, layer in b.layers.items() if role in ratios))
        targets = match(model, self if self.target_modules is not None else self._anywhere(possible)).targets
        allowed = targets.keys()
        if strangers := sorted(allowed - set(possible)):
            raise ValueError(
                f"target_modules matches {strangers[:3]}, of which no slice is asked for; with these ratios S²FT trains "
                f"modules like {possible[:3]}"
            )
        for name, module in targets.items():
            if (kind := quantization(module)) is not None:
                raise ValueError(
                    f"the weight of {name!r} is quantised ({kind}), and channels and heads train where they stand in a "
                    "weight; load the model without quantising it, leave it out with exclude_modules, or use LoRA"
                )
        # Only now anything of the blocks is checked, so that one which doesn't fit is in the way of its own layers alone.
        blocks = [b for b in blocks if any(role in ratios and layer in allowed for role, layer in b.layers.items())]
        structures = coupled_units(model, self.v_ratio > 0, blocks)
        self._check_slices(blocks, structures, allowed)
        structures = [replace(c, slices={k: s for k, s in c.slices.items() if s.module in allowed}) for c in structures]
        structures = [c for c in structures if c.slices.keys() & ratios.keys()]
        scores = unit_scores(model, structures, ratios, self.select, self.calibration)
        units = choose(structures, ratios, scores, largest=self.largest, multiple=self.multiple, seed=self.seed)
        slices = wanted_slices(structures, ratios)
        chosen = {
            name: ChosenSlice(slices[name].kind, slices[name].size, slices[name].offset, len(found))
            for name, found in units.items()
        }
        limits = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "calibration": None}
        return replace(self, target_modules=exactly(chosen), chosen=chosen, units=units, **limits)

    def _anywhere(self, possible):
        """The same options with all of these modules as targets, within the chosen layers."""
        names = [name for name in possible if in_layers(name, self)]
        if possible and not names:
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform!r}: no slice lies in these layers; slices can be chosen of "
                f"modules like {possible[:3]}"
            )
        return replace(self, target_modules=exactly(names), layers_to_transform=None, layers_pattern=None)

    def _check_slices(self, blocks, structures, allowed):
        """A layer that is named needs a slice; without target_modules some layer of each role does."""
        for block, structure in zip(blocks, structures, strict=True):
            for role in self.ratios().keys() & block.layers.keys() - structure.slices.keys():
                layer = block.layers[role]
                named = self.target_modules is not None
                if layer in allowed and (named or not any(role in other.slices for other in structures)):
                    raise ValueError(f"{role}_ratio={getattr(self, f'{role}_ratio')}: {why_no_slice(role, layer)}")

    def _check_modules(self, model):
        modules = dict(model.named_modules())
        if missing := [name for name in self.chosen if name not in modules]:
            raise ValueError(
                f"the units were chosen on another model, and this one has no modules {missing[:3]}; attach to a model of "
                "the same architecture, or a new S2FT(...), which chooses anew"
            )

    def check(self, matched, model):
        tied = tied_names(model)
        for name, module in matched.items():
            if f"{name}.weight" in tied:
                raise ValueError(
                    f"{name}.weight is shared with {', '.join(tied[f'{name}.weight'])}; S²FT changes it in place"
                )
            if 0 not in module.weight.stride():  # as those of a dry run have it
                check_rows(name, module.weight)
            if "lora_magnitude" in module._modules:
                raise ValueError(f"{name!r} holds a DoRA adapter, which multiplies the weight; the two don't mix")
            one = self.chosen[name]
            size = module.weight.shape[_dim(one, module)]
            last = max(one.units, 1 + max(self.units[name].tolist())) if self.units else one.units
            if last * one.size + one.offset > size:
                raise ValueError(f"{last} units of {one.size} {one.kind} from {one.offset} on don't fit {name!r}: {size}")

    def shapes(self, name, module):
        one = self.chosen[name]
        shape = list(module.weight.shape)
        shape[_dim(one, module)] = one.units * one.size
        return {"slice_delta": tuple(shape), "slice_units": (one.units,)}

    def initial(self, name, module):
        delta = torch.zeros(self.shapes(name, module)["slice_delta"], device=module.weight.device)
        return {"slice_delta": delta, "slice_units": self.units[name].to(torch.int32)}

    def check_tensors(self, name, module, tensors):
        super().check_tensors(name, module, {"slice_delta": tensors["slice_delta"]})
        one, units = self.chosen[name], tensors["slice_units"]
        size = module.weight.shape[_dim(one, module)]
        last = (size - one.offset) // one.size
        if units.dtype != torch.int32:
            raise ValueError(f"the units of {name!r} are {units.dtype}, not torch.int32")
        if (units.diff() <= 0).any() or (units.numel() and not 0 <= units[0] <= units[-1] < last):
            raise ValueError(f"the units of {name!r} must ascend within [0, {last})")

    def dtype(self, weight):
        return torch.promote_types(weight.dtype, torch.float32)

    def placement(self, name):
        return self.chosen.get(name)

    def install(self, name, module, adapter, tensors):
        one = self.chosen[name]
        module.add_slice(adapter, **tensors, settings=SliceSettings(one.kind, one.size, one.offset))

    def optimizer(self, handle, lr, weight_decay, **options):
        slices = {
            module.slice_delta[handle.name]: (module, handle.name)
            for module in handle.targets.values()
            if handle.name in module._parts
        }
        for module, _ in slices.values():
            module.check_whole()
        return SliceAdamW(list(handle.parameters()), slices, lr=lr, weight_decay=weight_decay, **options)

    def to_config(self, matched):
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name in _IN_FILES}
        return {
            **options,
            "modules_to_save": sorted(self.modules_to_save) if self.modules_to_save else None,
            "peft_type": self.peft_type,
            "inference_mode": True,
            "target_modules": sorted(matched),
            "slices": {name: vars(self.chosen[name]) for name in sorted(matched)},
        }

    @classmethod
    def from_config(cls, config):
        refused = {key: value for key, value in config.items() if value and key not in _IN_FILES | _DESCRIPTIVE}
        if refused:
            raise ValueError(f"adapter_config.json: not supported: {refused}")
        slices = config.get("slices")
        if not isinstance(slices, dict) or not slices:
            raise ValueError("adapter_config.json has no slices")
        chosen = {name: _chosen(name, one) for name, one in slices.items()}
        options = {key: config[key] for key in _IN_FILES if config.get(key) is not None}
        return cls(**options, target_modules=exactly(chosen), chosen=chosen)


def _dim(one: ChosenSlice, module) -> int:
    return slice_dim(one.kind, is_transposed(module))


def _chosen(name: str, entry: Any) -> ChosenSlice:
    if not isinstance(entry, dict) or entry.keys() != {f.name for f in fields(ChosenSlice)}:
        raise ValueError(f"adapter_config.json: the slice of {name!r} is {entry!r}")
    numbers = {"size": 1, "offset": 0, "units": 1}
    fits = all(type(entry[key]) is int and least <= entry[key] < 2**31 for key, least in numbers.items())
    if entry["kind"] not in ("rows", "columns") or not fits or math.prod((entry["size"], entry["units"])) >= 2**31:
        raise ValueError(f"adapter_config.json: the slice of {name!r} is {entry!r}")
    return ChosenSlice(**entry)
