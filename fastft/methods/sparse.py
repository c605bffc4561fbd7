"""Methods that train single entries of the weights where they stand, and `SparseMask`, the one whose entries are given.

Forward and dX cost what the frozen model costs; of dW only the entries are computed. See `ops.sparse` for the formulas, and
`spiel` and `lift` for methods that choose the entries themselves, again and again.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from ..modules.adapted_linear import features
from ..modules.merging import pristine
from ..modules.quantized import quantization
from ..modules.sparse import SUMS, SparseEntries
from ..ops.entries import Entries
from ..optim.sparse import SparseAdamW
from .base import Method
from .processes import check_whole_state
from .sparse_files import pack_index, unpack_index
from .targets import check_rows, exactly, tied_names

_DESCRIPTIVE = {"peft_type", "base_model_name_or_path", "auto_mapping", "inference_mode", "target_modules"}
_OF_TARGETS = {"modules_to_save", "bias", "task_type"}


@dataclass(frozen=True)
class Counts:
    """How many entries one module trains, keeps without training them, and considers."""

    entries: int
    kept: int = 0
    candidates: int = 0


@dataclass(frozen=True)
class SparseMethod(Method):
    """What methods of single entries share. `counts`, `absolute` and `history` are made by attach or read from a file."""

    file_names: ClassVar[dict[str, str]] = {
        "delta": "sparse_delta",
        "index": "sparse_index",
        "value": "sparse_value",
        "kept_delta": "kept_delta",
        "kept_index": "kept_index",
        "first": "sparse_first",
        "kept_first": "kept_first",
        "candidate_index": "candidate_index",
        **{name: name for name in SUMS},
        "progress": "sparse_progress",
    }
    trains_merged: ClassVar[bool] = True
    fixed_shapes: ClassVar[bool] = False
    placed_by: ClassVar[str] = "number of entries"
    # Options that adapter_config.json holds.
    in_files: ClassVar[tuple[str, ...]] = ()
    # Do files tell which entries trained first?
    remembers_first: ClassVar[bool] = False
    # Does the method choose anew while it trains, in `Handle.step`?
    scheduled: ClassVar[bool] = False

    counts: dict[str, Counts] | None = field(default=None, repr=False)
    absolute: bool = field(default=False, repr=False)
    # What was chosen when, as dictionaries; grows while training.
    history: list[dict[str, Any]] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self):
        super().__post_init__()
        if self.allow_tied_weights:
            raise ValueError(
                f"allow_tied_weights: {type(self).__name__} changes weights in place, so shared ones would change everywhere"
            )

    # ---- what `Method` asks

    def check(self, matched, model):
        tied = tied_names(model)
        for name, module in matched.items():
            if quantization(module) is None and f"{name}.weight" in tied:
                raise ValueError(
                    f"{name}.weight is shared with {', '.join(tied[f'{name}.weight'])}; {type(self).__name__} changes it in "
                    "place. Leave it out with exclude_modules"
                )
            self.check_layout(name, module)
            if "lora_magnitude" in module._modules:
                raise ValueError(f"{name!r} holds a DoRA adapter, which multiplies the weight; the two don't mix")

    def check_layout(self, name, module):
        if quantization(module) is None:
            check_rows(name, module.weight)

    def shapes(self, name, module):
        count = self.counts[name]
        if self.absolute:
            return {"value": (count.entries,), "index": (count.entries,)}
        shapes = {"delta": (count.entries,), "index": (count.entries,), "progress": (2,)}
        if self.remembers_first:
            shapes["first"] = (-(-count.entries // 8),)  # bits
        if count.kept:
            shapes |= {"kept_delta": (count.kept,), "kept_index": (count.kept,)}
            if self.remembers_first:
                shapes["kept_first"] = (-(-count.kept // 8),)
        if count.candidates:
            shapes |= dict.fromkeys(("candidate_index", *SUMS), (count.candidates,))
        return shapes

    def choose(self, name: str, module) -> Entries:
        """The entries that module trains first."""
        raise NotImplementedError

    def initial(self, name, module):
        entries = self.choose(name, module)
        delta = torch.zeros(len(entries), dtype=torch.float32, device=entries.device)
        return {"delta": delta, "index": pack_index(entries), "progress": torch.zeros(2, dtype=torch.int64)}

    def check_tensors(self, name, module, tensors):
        shape = stored_shape(module)
        for part, tensor in tensors.items():
            bits = part in ("first", "kept_first")
            fits = tensor.dtype == torch.uint8 if bits else tensor.is_floating_point()
            if not fits and part != "progress" and not part.endswith("index"):
                raise ValueError(f"the {part} of {name!r} is {tensor.dtype}")
        for part in ("index", "kept_index", "candidate_index"):
            if part in tensors:
                unpack_index(tensors[part], shape, what=f"{part} of {name!r}")
        if "kept_index" in tensors:
            kept = unpack_index(tensors["kept_index"], shape)
            if len(kept) and (kept.find(unpack_index(tensors["index"], shape)) >= 0).any():
                raise ValueError(f"{name!r} both trains and keeps some entries")

    def dtype(self, weight):
        return torch.promote_types(weight.dtype, torch.float32)

    def placement(self, name):
        return None if name not in self.counts else self.counts[name].entries

    def install(self, name, module, adapter, tensors):
        held = SparseEntries(*self._start(module, tensors))
        if self.remembers_first and "first" not in tensors:  # the file had values only
            held.all_first()
        fill(held, tensors)
        held.observer = self.observer()
        module.add_entries(adapter, held)

    def _start(self, module, tensors):
        """(Entries, delta) from a file's tensors."""
        shape, device = stored_shape(module), tensors["index"].device
        entries = unpack_index(tensors["index"], shape).to(device)
        if "value" not in tensors:
            return entries, tensors["delta"]
        wide = self.dtype(module.weight)
        base = pristine(module, "weight")[entries.rows(), entries.columns.long()]
        return entries, tensors["value"].to(wide) - base.to(wide)

    def observer(self):
        """What sees the gradients of whole weights in backward, block by block, or None."""
        return None

    def optimizer(self, handle, lr, weight_decay, **options):
        return SparseAdamW(*self._trained(handle), lr=lr, weight_decay=weight_decay, **{"ages": False, **options})

    def _trained(self, handle):
        """(parameters, delta -> its module and name) for an optimizer."""
        entries = {module.sparse[handle.name].delta: (module, handle.name) for module in handle.targets.values()}
        for module, _ in entries.values():
            if quantization(module) is None:
                module.check_whole()
        return list(handle.parameters()), entries

    # ---- files

    def file_tensors(self, module, adapter, absolute):
        held = module.sparse[adapter.name]
        if absolute:
            if quantization(module) is not None:
                raise ValueError("the weights are quantised, so entries have no absolute values; save without `absolute`")
            union, value = self._values(module, adapter.name)
            return {"value": value, "index": pack_index(union)}
        tensors = {
            "delta": held.delta,
            "index": pack_index(held.entries),
            "progress": held.progress().to(held.delta.device),
        }
        if self.remembers_first:
            tensors["first"] = held.first
        if (kept := held.kept) is not None:
            tensors |= {"kept_index": pack_index(kept), "kept_delta": held.kept_delta}
            if self.remembers_first:
                tensors["kept_first"] = held.kept_first
        if (candidates := held.candidates) is not None:
            tensors |= {"candidate_index": pack_index(candidates), **{name: getattr(held, name) for name in SUMS}}
        return tensors

    def _values(self, module, name):
        """(all entries that differ from the pretrained weight, their values in the weight's dtype)."""
        weight = pristine(module, "weight")
        union, wide = module.sparse[name].entries, torch.promote_types(weight.dtype, torch.float32)
        for entries, _ in module.entry_deltas(name)[1:]:
            union = union.union(entries)
        value = weight[union.rows(), union.columns.long()].to(wide)
        for entries, delta in module.entry_deltas(name):
            value.index_add_(0, entries.find(union), delta.detach().to(wide))
        return union, value.to(weight.dtype)

    def refill(self, name, module, adapter, tensors):
        def change(held):
            held.choose(*self._start(module, {part: t.to(held.delta.device) for part, t in tensors.items()}))
            if self.remembers_first and "first" not in tensors:
                held.all_first()
            fill(held, {part: t.to(held.delta.device) for part, t in tensors.items()})
            held.observer = self.observer()  # a run at its end looks no more

        module.change_entries(adapter.name, change)

    def describe(self, handle, absolute):
        held = {name: module.sparse[handle.name] for name, module in handle.targets.items()}
        counts = {}
        for name, one in held.items():
            parts = [0 if part is None else len(part) for part in (one.entries, one.kept, one.candidates)]
            counts[name] = [sum(parts[:2]), 0, 0] if absolute else parts
        return {"entries": counts, "absolute": absolute, "history": self.history}

    def before_save(self, handle):
        if self.scheduled and handle._ever_updated and not self.updates(handle):
            warnings.warn(
                f"adapter {handle.name!r} was trained, but its entries were never chosen anew: call handle.step() after "
                "every optimizer step, or give the Trainer handle.callback()",
                stacklevel=3,
            )

    def resume(self, saved):
        self.history[:] = saved.history

    def updates(self, handle):
        return max((module.sparse[handle.name].updates for module in handle.targets.values()), default=0)

    def new_run(self, handle, total_steps):
        for module in handle.targets.values():
            held = module.sparse[handle.name]
            held.updates = 0
            held.consider(None)
            held.observer = self.observer()
        self.history.clear()
        return self

    def to_config(self, matched):
        return {
            **{name: getattr(self, name) for name in (*self.in_files, *_OF_TARGETS)},
            "modules_to_save": sorted(self.modules_to_save) if self.modules_to_save else None,
            "peft_type": self.peft_type,
            "inference_mode": True,
            "target_modules": sorted(matched),
        }

    @classmethod
    def from_config(cls, config):
        known = {*cls.in_files, *_OF_TARGETS, *_DESCRIPTIVE, "entries", "absolute", "history"}
        refused = {key: value for key, value in config.items() if value and key not in known}
        if refused:
            raise ValueError(f"adapter_config.json: not supported: {refused}")
        entries = config.get("entries")
        if not isinstance(entries, dict) or not entries:
            raise ValueError("adapter_config.json has no entries")
        counts = {name: _counts(name, numbers) for name, numbers in entries.items()}
        options = {key: config[key] for key in (*cls.in_files, *_OF_TARGETS) if config.get(key) is not None}
        history = config.get("history") or []
        absolute = bool(config.get("absolute"))
        return cls(**options, counts=counts, target_modules=exactly(counts), absolute=absolute, history=list(history))

    # ---- schedules

    def after_update(self, handle):
        if self.scheduled and handle._optimizer is not None:  # at once, not when the first choice is due
            check_whole_state(handle._optimizer())
        held = {name: module.sparse[handle.name] for name, module in handle.targets.items()}
        for one in held.values():
            one.updates += 1
        self.schedule(handle, next(iter(held.values())).updates)

    def schedule(self, handle, updates: int) -> None:
        """Called once per optimizer update, of which there were `updates`. The default chooses nothing anew."""


def stored_shape(module) -> tuple[int, int]:
    """Of the weight as it is stored; of a quantised one [N, K]."""
    return features(module) if quantization(module) is not None else tuple(module.weight.shape)


def fill(held: SparseEntries, tensors: dict[str, torch.Tensor]) -> None:
    """All but entries and delta from a file's tensors."""
    kept = tensors.get("kept_index")
    kept = None if kept is None else unpack_index(kept, held.shape).to(kept.device)
    held.keep(kept, tensors.get("kept_delta"), tensors.get("kept_first"))
    if "first" in tensors:
        held._put("first", tensors["first"])
    candidates = tensors.get("candidate_index")
    held.consider(None if candidates is None else unpack_index(candidates, held.shape).to(candidates.device))
    if candidates is not None:
        for name in SUMS:
            getattr(held, name).copy_(tensors[name])
    held.set_extra_state(tensors.get("progress", (0, 0)))


def _counts(name, numbers) -> Counts:
    fits = isinstance(numbers, list) and len(numbers) == 3 and all(type(n) is int and 0 <= n < 2**40 for n in numbers)
    if not fits:
        raise ValueError(f"adapter_config.json: the entries of {name!r} are {numbers!r}")
    return Counts(*numbers)


@dataclass(frozen=True)
class SparseMask(SparseMethod):
    """Train exactly these entries of the weights, and no others.

    Args:
        mask: module name -> bool tensor of the shape of its weight as it is stored.
        indices: module name -> integers, the row-major positions in its stored weight. One of the two.
        modules_to_save, bias, task_type: as in `TargetOptions`; the modules are those that are named.

    Raises:
        ValueError, TypeError (when attached, too): both or neither given, a name that is none, positions out of range or
            given twice, masks of another shape or dtype.
    """

    peft_type: ClassVar[str] = "SPARSE_MASK"
    needs_weights: ClassVar[str | None] = None

    mask: Mapping[str, torch.Tensor] | None = field(default=None, repr=False, compare=False)
    indices: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        super().__post_init__()
        if self.counts is None:
            self._check_given()

    def _check_given(self):
        if (self.mask is None) == (self.indices is None):
            raise ValueError("give either mask or indices: {module name: tensor}")
        given = self.indices if self.mask is None else self.mask
        if not isinstance(given, Mapping) or not given or not all(isinstance(name, str) for name in given):
            raise TypeError("mask and indices are {module name: tensor}, with at least one module")
        if self.mask is not None and not all(isinstance(mask, torch.Tensor) for mask in given.values()):
            raise TypeError("mask is {module name: tensor}; torch.tensor(...) makes one of a list")
        if self.target_modules is not None:
            raise ValueError("target_modules: the modules are those of mask or indices")

    def bind(self, model):
        if self.mask is None and self.indices is None:
            raise ValueError("this SparseMask was read from a file, where the entries stay: attach them by fastft.load")
        modules = dict(model.named_modules())
        given = self.indices if self.mask is None else self.mask
        if strangers := [name for name in given if name not in modules]:
            raise ValueError(f"the model has no modules {strangers[:3]}; give full names, as named_modules() has them")
        sizes = {name: one.sum() if self.indices is None else len(torch.as_tensor(one)) for name, one in given.items()}
        counts = {name: Counts(int(size)) for name, size in sizes.items()}
        return replace(self, target_modules=exactly(given), counts=counts, history=[])

    def check(self, matched, model):
        if left := [name for name in self.counts if name not in matched]:
            raise ValueError(
                f"entries are given for {left[:3]}, which don't get any: exclude_modules leaves them out, or they are "
                "trained in full (modules_to_save, or as the heads of this task_type); give one or the other"
            )
        super().check(matched, model)

    def choose(self, name, module):
        shape = stored_shape(module)
        try:
            if self.mask is None:
                index = torch.as_tensor(self.indices[name])
                if index.dim() != 1:
                    raise ValueError(f"the indices are a tensor {list(index.shape)}, they must be a list of integers")
                return Entries.of_flat(index, shape)
            mask = self.mask[name]
            if mask.dtype != torch.bool or tuple(mask.shape) != shape:
                raise ValueError(f"the mask is {mask.dtype} {list(mask.shape)}, it must be torch.bool {list(shape)}")
            return Entries.of_mask(mask)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from error
