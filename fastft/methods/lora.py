"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): a trained low-rank term scale · B A on linear layers.

    y = (W + scale · B A) x + bias                                 LoRA; scale = lora_alpha / r
    y = (W + scale · B A) x + bias + scale · lora_bias             with lora_bias
    y = g ∘ (W + scale · B A) x + bias, g = m / ‖W + scale · B A‖  with use_dora: DoRA (Liu et al. 2024, arXiv:2402.09353)

rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732) takes scale = lora_alpha / sqrt(r), for large r.
"""

import math
import warnings
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn

from ..checkpoint.files import Shapes
from ..listing import quoted
from ..modules.adapted_linear import LoRASettings, features, is_transposed
from ..modules.merging import pristine
from ..modules.norms import RowNorms
from ..modules.quantized import held_like, quantization
from .base import Method
from .grouping import siblings
from .name_patterns import NamePatterns

INITIALISATIONS = (True, False, "gaussian", "orthogonal")
# Data-driven initialisations that leave the base as it is: once trained, the file is plain LoRA.
_HARMLESS_WHEN_LOADED = (*INITIALISATIONS, "eva")
# Options that say nothing about what the adapter computes.
_NOT_IN_FILES = {"adapter_dtype", "allow_tied_weights", "group_projections", "pack_weights"}
# Keys of PEFT's file that say nothing about what the adapter computes.
_DESCRIPTIVE = {
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("megatron_core", "qalora_group_size", "eva_config", "runtime_config"),
}


@dataclass(frozen=True)
class LoRA(Method):
    """Options of LoRA, with PEFT's names and meaning; those of `TargetOptions` choose the modules.

    Args:
        r: rank, at least 1. lora_alpha: the low-rank term's factor is lora_alpha / r (/ sqrt(r) with use_rslora).
        lora_dropout: dropout probability of the low-rank term's input, in [0, 1).
        use_dora: DoRA: each output has a trained magnitude m, at the start the norm of the weight's row, so that A and B
            train the row's direction alone. The norm in g is a constant in backward (the paper's section 4.3). m is held in
            float32. Dropout acts on what A reads and nothing else: y = g ∘ (W x + scale · B A drop(x)) + bias. PEFT's
            differs for lora_dropout > 0: it drops the input of the correction (g - 1) ∘ W x too, which takes a second
            product with W in forward and in backward and adds noise to a term that has nothing to regularise but m. Without
            dropout, and in evaluation, the two are equal. Of several active adapters, DoRA multiplies those before it. The
            norm takes a pass over W in every forward, also of one token: merge before generating.
        lora_bias: a trained bias on B, whatever the layer's own does; not with use_dora. Merging needs a layer with a bias.
        rank_pattern, alpha_pattern: {name or regular expression: value} overriding r and lora_alpha for modules whose
            name is, or ends with a dot and, a match.
        init_lora_weights: True (A Kaiming-uniform, B zero), "gaussian" (A normal with std 1/r, B zero), "orthogonal"
            (https://datta0.github.io/posts/rethink-lora-init), False (both random). The same seed gives PEFT's A.
        fan_in_fan_out: for PEFT's sake; the layer's class decides how its weight is stored (True on an nn.Linear warns).
        adapter_dtype: dtype of A and B. None: float32 on 16-bit and quantised weights, as PEFT; torch.bfloat16 on bfloat16
            weights halves the adapter's memory and traffic.
        group_projections: q, k and v of an attention, and gate and up of an MLP, share one read of their input, in
            backward too. `handle.groups` says which do.
        pack_weights: the base weights of such a group moreover lie in one buffer, so that on GPUs one GEMM computes all.
            The outputs are then columns of one matrix, freed together. CPUs, where that was slower, compute them apart.
    """

    peft_type: ClassVar[str] = "LORA"
    file_names: ClassVar[dict[str, str]] = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_bias": "lora_B.bias",
        "lora_magnitude": "lora_magnitude_vector",
    }
    wide_parts: ClassVar[frozenset[str]] = frozenset({"lora_magnitude"})
    needs_weights: ClassVar[str | None] = None

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    fan_in_fan_out: bool | None = None
    adapter_dtype: torch.dtype | None = None
    use_dora: bool = False
    lora_bias: bool = False
    group_projections: bool = True
    pack_weights: bool = False

    def __post_init__(self):
        super().__post_init__()
        ranks = {"r": self.r, **self.rank_pattern}
        for key, r in ranks.items():
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ValueError(f"rank {key}={r!r}; a rank is an integer of at least 1")
        for key, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
                raise ValueError(f"{key}={alpha!r}; it must be a finite number")
        self._ranks, self._alphas  # noqa: B018  (compiled now, so that a key that is no pattern is told at once)
        for option in ("use_rslora", "use_dora", "lora_bias", "group_projections", "pack_weights"):
            if not isinstance(getattr(self, option), bool):
                raise TypeError(f"{option}={getattr(self, option)!r}; it must be True or False")
        if self.pack_weights and not self.group_projections:
            raise ValueError("pack_weights packs the weights of groups; it needs group_projections=True")
        if not isinstance(self.lora_dropout, (int, float)):
            raise TypeError(f"lora_dropout={self.lora_dropout!r}; it must be a number")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout={self.lora_dropout}; it must lie in [0, 1)")
        if self.init_lora_weights not in INITIALISATIONS:
            raise ValueError(f"init_lora_weights={self.init_lora_weights!r} is not supported; supported: {INITIALISATIONS}")
        if self.init_lora_weights == "orthogonal" and any(r % 2 for r in ranks.values()):
            raise ValueError('init_lora_weights="orthogonal" needs even ranks')
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias and use_dora can't be combined, as in PEFT: DoRA multiplies weights, not biases")
        if self.lora_bias and self.init_lora_weights not in (True, False):
            raise ValueError(f"lora_bias needs init_lora_weights True or False, not {self.init_lora_weights!r}")

    @cached_property
    def _ranks(self) -> NamePatterns:
        return NamePatterns("rank_pattern", self.rank_pattern)

    @cached_property
    def _alphas(self) -> NamePatterns:
        return NamePatterns("alpha_pattern", self.alpha_pattern)

    def rank(self, name: str) -> int:
        return self._ranks.get(name, self.r)

    def scale(self, name: str) -> float:
        alpha, r = self._alphas.get(name, self.lora_alpha), self.rank(name)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    # ---- what `Method` asks

    def shapes(self, name, module):
        (n, k), r = features(module), self.rank(name)
        shapes = {"lora_A": (r, k), "lora_B": (n, r)}
        if self.lora_bias:
            shapes["lora_bias"] = (n,)
        if self.use_dora:
            shapes["lora_magnitude"] = (n,)
        return shapes

    def expected(self, targets):
        # PEFT also writes the base's own tensors of an output head that has an adapter (save_embedding_layers="auto").
        base = {
            f"base_model.model.{name}.base_layer.{own}": pristine(module, own).detach()
            for name, module in targets.items()
            for own in ("weight", "bias")
            if quantization(module) is None and getattr(module, own, None) is not None
        }
        return Shapes(super().expected(targets), base)

    def initial(self, name, module):
        (n, k), r = features(module), self.rank(name)
        # Two nn.Linear draw as many random numbers as PEFT draws, so the same seed gives the same A.
        a = nn.Linear(k, r, bias=False).weight.data
        second = nn.Linear(r, n, bias=self.lora_bias)
        b = second.weight.data
        if self.init_lora_weights == "orthogonal":
            q = torch.linalg.qr(torch.randn(r, r))[0]
            a = (torch.randn(k, r // 2) @ q[0::2]).t() / 10
            b = torch.randn(r // 2, n).t() @ q[1::2] / 10
        elif self.init_lora_weights:
            if self.init_lora_weights == "gaussian":
                nn.init.normal_(a, std=1 / r)
            else:
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            nn.init.zeros_(b)
            if self.lora_bias:
                nn.init.zeros_(second.bias)
        weight = held_like(module) if quantization(module) else pristine(module, "weight")
        parts = {"lora_A": a.to(weight.dtype), "lora_B": b.to(weight.dtype)}
        if self.lora_bias:
            parts["lora_bias"] = second.bias.data.to(weight.dtype)
        if self.use_dora:
            factors = (part.to(weight.device) for part in parts.values())
            parts["lora_magnitude"] = RowNorms()(weight, *factors, self.scale(name), is_transposed(module))
        return parts

    def dtype(self, weight):
        return self.adapter_dtype or torch.promote_types(weight.dtype, torch.float32)

    def install(self, name, module, adapter, tensors):
        module.add_lora(adapter, settings=LoRASettings(self.scale(name), self.lora_dropout), **tensors)

    def check(self, matched, model):
        sliced = [name for name, module in matched.items() if self.use_dora and getattr(module, "_parts", None)]
        if sliced:
            raise ValueError(
                f"use_dora: {quoted(sliced)} hold an adapter that trains a part of the weight; the two don't mix"
            )
        quantized = {name: kind for name, module in matched.items() if (kind := quantization(module)) is not None}
        if quantized and self.use_dora:
            raise ValueError(
                f"use_dora: the weight of {quoted(quantized)} is quantised ({next(iter(quantized.values()))}); DoRA "
                "needs the norms of its rows, for which every forward would dequantise all of it. Leave use_dora off, or "
                "load the model without quantising it"
            )
        if quantized and self.pack_weights:
            raise ValueError(f"pack_weights: the weight of {quoted(quantized)} is quantised and can't be packed")
        for name, module in matched.items():
            if name not in quantized and self.adapter_dtype not in (None, torch.float32, module.weight.dtype):
                raise TypeError(
                    f"adapter_dtype={self.adapter_dtype} on the {module.weight.dtype} weight of {name!r}; "
                    "use that dtype or float32"
                )
        for option, patterns in (("rank_pattern", self._ranks), ("alpha_pattern", self._alphas)):
            if idle := patterns.idle(matched):
                warnings.warn(f"{option}: {quoted(idle, 5)} match no adapted module", stacklevel=4)
        idle = [name for name in matched if self.scale(name) == 0]
        if idle:
            warnings.warn(f"lora_alpha is 0 for {quoted(idle)}: B A is multiplied by 0 and never trained", stacklevel=4)
        if self.fan_in_fan_out and not any(is_transposed(module) for module in matched.values()):
            warnings.warn("fan_in_fan_out=True is ignored: the weights of nn.Linear are stored [out, in]", stacklevel=4)
        if self.pack_weights and not siblings(matched):
            warnings.warn("pack_weights is ignored: no two adapted layers are known to read one input", stacklevel=4)
        bare = [name for name, module in matched.items() if self.lora_bias and getattr(module, "bias", None) is None]
        if bare:
            warnings.warn(f"lora_bias: {quoted(bare)} have no bias, so that the adapter can't be merged", stacklevel=4)

    def to_config(self, matched):
        return {
            "peft_type": self.peft_type,
            "task_type": self.task_type,
            "inference_mode": True,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": self._written_targets(matched),
            "exclude_modules": _as_list(self.exclude_modules),
            "layers_to_transform": _as_list(self.layers_to_transform),
            "layers_pattern": _in_order(self.layers_pattern),
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "modules_to_save": _as_list(self.modules_to_save),
            "use_rslora": self.use_rslora,
            "bias": self.bias,
            "init_lora_weights": self.init_lora_weights,
            "fan_in_fan_out": any(module.fan_in_fan_out for module in matched.values()),
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
            "revision": None,
        }

    def _written_targets(self, matched):
        targets = self.target_modules
        if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
            return sorted(matched)
        return _as_list(targets)

    @classmethod
    def from_config(cls, config):
        supported = {f.name for f in fields(cls)} - _NOT_IN_FILES
        refused = {k: v for k, v in config.items() if v and k not in supported and k not in _DESCRIPTIVE}
        if refused:
            raise ValueError(f"adapter_config.json: not supported: {refused}; supported: {', '.join(sorted(supported))}")
        options = {key: config[key] for key in supported if config.get(key) is not None}
        init = options.get("init_lora_weights", True)
        if (init.lower() if isinstance(init, str) else init) not in _HARMLESS_WHEN_LOADED:
            raise ValueError(
                f"adapter_config.json: init_lora_weights={init!r} changed the base weights, so the file is no plain "
                "LoRA of the base; convert it with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
            )
        return cls(**{**options, "init_lora_weights": init if init in INITIALISATIONS else True})


def _as_list(value: Any):
    """As JSON can hold it: sets and ranges are lists there."""
    return value if value is None or isinstance(value, (str, int)) else sorted(value)


def _in_order(value: Any):
    """The same for what counts in its order: of several patterns the first that matches does."""
    return list(value) if isinstance(value, (list, tuple)) else _as_list(value)
