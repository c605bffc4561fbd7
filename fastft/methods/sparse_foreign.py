"""Adapters of entries that others wrote: those of the SpIEL authors' fork of PEFT (``peft_type`` SFT) and PEFT's SHiRA.

They are read, and are then a `SparseMask`: what is saved afterwards is fastft's own format.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from ..modules.adapted_linear import features
from ..ops.entries import Entries
from .sparse import Counts, SparseMask, SparseMethod, stored_shape
from .sparse_files import pack_index
from .targets import exactly

_SHARED = {"peft_type", "base_model_name_or_path", "auto_mapping", "inference_mode", "target_modules", "revision"}
_SHARED |= {"modules_to_save", "task_type", "peft_version"}
# What decided training, and says nothing of the file.
_OF_TRAINING = {"density", "num_tunable_weights", "selection_algorithm", "reselection_steps", "selection_accumulation_steps"}
_OF_TRAINING |= {"reselection_rate_policy", "initial_reselection_rate", "candidate_reselection_steps", "dtype"}
_OF_TRAINING |= {"candidate_reselection_proportion", "mask_type", "random_seed", "init_weights"}


@dataclass(frozen=True)
class ForeignEntries(SparseMethod):
    """What the two share: how their tensors become fastft's."""

    needs_weights: ClassVar[str | None] = None

    def positions(self, name, module, tensors) -> torch.Tensor:
        """int64 [E]: where each value belongs in the stored weight, row-major, in the file's order."""
        raise NotImplementedError

    def tensors_of(self, name, module, values):
        tensors = {part: values[self.target_key(name, part)] for part in self.shapes(name, module)}
        flat, order = self.positions(name, module, tensors).sort()
        index = pack_index(Entries.of_flat(flat, stored_shape(module)))
        return {"delta": tensors["delta"].float()[order], "index": index}

    def placement(self, name):
        return None  # `Handle.restore` reads fastft's own files only

    def check_tensors(self, name, module, tensors):
        """`tensors_of` has refused what doesn't fit."""

    def native(self, tensors):
        counts = {name: Counts(len(parts["index"])) for name, parts in tensors.items()}
        own = {f.name: getattr(self, f.name) for f in fields(SparseMethod) if f.init}
        return SparseMask(**{**own, "counts": counts, "target_modules": exactly(counts), "history": []})

    @classmethod
    def _refuse(cls, config, known):
        refused = {key: value for key, value in config.items() if value and key not in _SHARED | _OF_TRAINING | known}
        if refused:
            raise ValueError(f"adapter_config.json: not supported: {refused}")


@dataclass(frozen=True)
class SftFile(ForeignEntries):
    """github.com/AlanAnsell/peft: ``sft_delta.values`` [E], ``sft_delta.indices`` [E]: row-major positions in any order."""

    peft_type: ClassVar[str] = "SFT"
    file_names: ClassVar[dict[str, str]] = {"delta": "sft_delta.values", "index": "sft_delta.indices"}

    def shapes(self, name, module):
        return {"delta": (self.counts[name].entries,), "index": (self.counts[name].entries,)}

    def positions(self, name, module, tensors):
        return tensors["index"].long()

    @classmethod
    def from_config(cls, config):
        cls._refuse(config, {"num_deltas"})
        deltas: Any = config.get("num_deltas")
        if not isinstance(deltas, dict) or not deltas or not all(type(n) is int and n >= 0 for n in deltas.values()):
            raise ValueError("adapter_config.json has no num_deltas: {module name: how many}")
        counts = {name: Counts(n) for name, n in deltas.items()}
        return cls(counts=counts, target_modules=exactly(counts), modules_to_save=config.get("modules_to_save"))


@dataclass(frozen=True)
class ShiraFile(ForeignEntries):
    """PEFT's SHiRA (Bhardwaj et al. 2024, arXiv:2406.13175): ``shira_weight`` [E] and ``shira_indices`` [2, E], rows and
    columns of the weight [N, K]."""

    peft_type: ClassVar[str] = "SHIRA"
    file_names: ClassVar[dict[str, str]] = {"delta": "shira_weight", "index": "shira_indices"}

    r: int = 32

    def shapes(self, name, module):
        count = self.r * sum(features(module))
        return {"delta": (count,), "index": (2, count)}

    def positions(self, name, module, tensors):
        rows, columns = tensors["index"].long()
        (n, k), stored = features(module), stored_shape(module)
        for what, index, size in (("rows", rows, n), ("columns", columns, k)):
            if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
                raise ValueError(f"{what} {int(index.min())} to {int(index.max())} of {name!r}, which has {size}")
        if stored != (n, k):  # transformers' Conv1D
            rows, columns = columns, rows
        return rows * stored[1] + columns

    @classmethod
    def from_config(cls, config):
        cls._refuse(config, {"r", "fan_in_fan_out"})
        if config.get("fan_in_fan_out"):
            raise ValueError("adapter_config.json: SHiRA with fan_in_fan_out is not supported")
        r = config.get("r")
        if type(r) is not int or r < 1:
            raise ValueError(f"adapter_config.json: r is {r!r}")
        options = {"target_modules": config.get("target_modules"), "modules_to_save": config.get("modules_to_save")}
        return cls(r=r, counts={}, **options)
