"""Which modules a method adapts: the options shared by all methods, and the only walk over a model's modules.

The options mean what they mean in PEFT, so that a config written for one works in the other.
"""

import difflib
import math
import re
import reprlib
import warnings
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..modules.adapted_linear import LINEAR_CLASSES, Adapted, is_linear
from ..modules.quantized import held_like, quantization, sizes
from ..modules.sharding import is_sharded, reshard

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CLASSIFIER_HEADS = ("score", "classifier")
# What PEFT trains in full for a task, and looks for in files whose task_type that is.
_TASK_HEADS = {"SEQ_CLS": CLASSIFIER_HEADS, "TOKEN_CLS": CLASSIFIER_HEADS, "QUESTION_ANS": ("qa_outputs",)}


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """Options with which every method chooses what it trains.

    Args:
        target_modules: list of names (a module matches if its name is, or ends with a dot and, an entry), a regular
            expression that must match the whole name, or "all-linear" (every linear layer but the output head; not the
            weights of experts that are parameters of three dimensions, which a warning names).
            None takes PEFT's table for the model's architecture, if peft is installed.
        exclude_modules: list or regular expression, matched the same way; never adapted.
        layers_to_transform: only layers with this index or these indices; the index is the first numbered segment of
            the name. Only with a list of target_modules.
        layers_pattern: name(s) of the module list that holds the layers, for models with several.
        modules_to_save: modules whose name ends with an entry are trained in full, on a copy.
        bias: "none"; "lora_only" trains copies of the biases of adapted layers; "all" of every bias in the model.
        task_type: PEFT's, written to the file. As there, the model's heads "score" and "classifier" ("SEQ_CLS", "TOKEN_CLS")
            or "qa_outputs" ("QUESTION_ANS") are trained in full, as if modules_to_save named them.
        allow_tied_weights: adapt weights that other modules share. Such an adapter can't be merged.
    """

    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    task_type: str | None = None
    allow_tied_weights: bool = False

    def __post_init__(self):
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f'bias is {self.bias!r}; it must be "none", "all" or "lora_only"')
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, str) and name != "modules_to_save":
                check_pattern(name, value)
            elif value is not None and not (
                isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(entry, str) for entry in value)
            ):
                raise TypeError(f"{name} is {value!r}; it must be a list of module names")
        layers = self.layers_to_transform
        for layer in layers if isinstance(layers, (list, tuple, set, range)) else () if layers is None else (layers,):
            if not isinstance(layer, int):
                raise TypeError(f"layers_to_transform is {layers!r}; it must be a layer's number or a list of them")
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None or self.layers_pattern):
            raise ValueError("layers_to_transform and layers_pattern need target_modules as a list, not a string")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern has no effect without layers_to_transform; give both")


def with_heads(options: TargetOptions, model: nn.Module) -> TargetOptions:
    """The options with those heads in modules_to_save which their task_type means and the model has."""
    given = list(options.modules_to_save or [])
    heads = [head for head in _TASK_HEADS.get(options.task_type, ()) if head not in given]
    heads = [head for head in heads if _saved_modules(base_modules(model), [head])]
    return replace(options, modules_to_save=given + heads) if heads else options


def check_pattern(option: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{option}: {pattern!r} is no regular expression: {error}") from error


def exactly(names) -> str:
    """What `target_modules` must be for these modules alone: an entry of a list also means those whose names end with it."""
    return "|".join(map(re.escape, names))


def check_rows(name: str, weight: torch.Tensor) -> None:
    """Raises ValueError unless the rows lie in memory without gaps inside and without overlapping, as ops need it that write
    parts of a weight."""
    (rows, columns), (down, across) = weight.shape, weight.stride()
    if (across != 1 and columns > 1) or (down < columns and rows > 1):
        raise ValueError(
            f"the weight of {name!r} has strides {weight.stride()}, but its rows must lie in memory one after the other: "
            "make it contiguous first, module.weight.data = module.weight.data.contiguous()"
        )


@dataclass
class Matched:
    """What the options select: linear layers by name, and own tensors of modules that are trained on a copy."""

    targets: dict[str, nn.Module]
    copies: dict[str, tuple[nn.Module, list[str]]]

    def edited(self) -> list[str]:
        """The base tensors that the adapter stands for, by full name."""
        return [f"{name}.weight" for name in self.targets] + [
            f"{name}.{own}" for name, (_, owned) in self.copies.items() for own in owned
        ]

    def copy_key(self, name: str, own: str) -> str:
        """The key of a copied tensor in adapter_model.safetensors. PEFT wraps adapted layers, hence base_layer."""
        return f"base_model.model.{name}.{'base_layer.' if name in self.targets else ''}{own}"


def match(model: nn.Module, options: TargetOptions, *, lenient: bool = False) -> Matched:
    """Select modules. Raises before anything is touched.

    `lenient` (for adapter files, which are checked tensor by tensor) allows entries that match nothing and weights
    that are shared, as PEFT does.

    Raises:
        ValueError: an entry or everything matches nothing, shared weights, overlapping options, unsupported modules.
        TypeError: weights that are not plain floating-point parameters.
    """
    reshard(model)
    modules = base_modules(model)
    targets = _resolve_targets(model, modules, options)
    names = [name for name in modules if _is_target(name, targets, options)]
    saved = _saved_modules(modules, options.modules_to_save or [])
    _check_entries(modules, targets, names, saved, options, lenient)
    for name in names:
        _check_target(name, modules[name])
        parent = modules.get(name.rpartition(".")[0])
        if isinstance(parent, nn.TransformerEncoderLayer):
            raise ValueError(
                f"{name!r} belongs to an nn.TransformerEncoderLayer, which in evaluation reads the weight without calling "
                "the layer, so that an adapter on it would be passed over; exclude it with exclude_modules"
            )
    selected = {name: modules[name] for name in names}
    matched = Matched(selected, _copied_tensors(modules, selected, saved, options.bias))
    if not (options.allow_tied_weights or lenient):
        _check_tied(model, matched)
    return matched


def base_modules(model) -> dict[str, nn.Module]:
    """All modules of the model by name, without the parts that adapters added."""
    modules, added = {}, set()
    for name, module in model.named_modules():
        if module in added:
            continue
        modules[name] = module
        if isinstance(module, Adapted):
            added.update(part for holder in module.holders for part in getattr(module, holder, nn.Module()).modules())
    return modules


def _takes_all_linear(options) -> bool:
    return isinstance(options.target_modules, str) and options.target_modules.lower() == "all-linear"


def _resolve_targets(model, modules, options) -> str | set[str]:
    targets = options.target_modules
    if targets is None:
        return _default_targets(model)
    if not _takes_all_linear(options):
        return targets if isinstance(targets, str) else set(targets)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = [head] if head is not None else []
    if not heads and options.task_type == "SEQ_CLS":
        heads = [getattr(model, name) for name in CLASSIFIER_HEADS if hasattr(model, name)][:1]
    # Subclasses of nn.Linear (attention's own projection) are selected too, and refused by name later: leaving them out in
    # silence would train less than was asked for.
    return {
        name for name, module in modules.items() if name and any_linear(module) and not any(module is head for head in heads)
    }


def warn_of_experts(model, options) -> None:
    """PEFT's "all-linear" adapts them too: whoever comes from there would train less without a word."""
    if not _takes_all_linear(options):
        return
    left = {}  # one of each last name
    for name, module in base_modules(model).items():
        if isinstance(module, nn.modules.conv._ConvNd) or _excluded(name, options.exclude_modules):
            continue
        for own, weight in module._parameters.items():
            if weight is not None and weight.dim() == 3 and min(weight.shape) > 1:
                left.setdefault(own, f"{name}.{own}")
    if left:
        warnings.warn(
            f'"all-linear" leaves out {", ".join(left.values())} and their like: experts, whose weights are parameters of '
            "three dimensions and no linear layers. fastft adapts linear layers; exclude_modules that name the experts' "
            "modules silence this",
            stacklevel=4,
        )


def any_linear(module) -> bool:
    return isinstance(module, nn.Linear) or is_linear(module) or quantization(module) is not None


def _default_targets(model) -> str | set[str]:
    architecture = getattr(getattr(model, "config", None), "model_type", None)
    try:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as table
    except ImportError:
        table = {}
    if architecture not in table:
        raise ValueError(
            f"no default targets for model type {architecture!r}"
            + ("" if table else " (the table comes from peft, which is not installed)")
            + '; give target_modules, for example target_modules="all-linear"'
        )
    targets = table[architecture]
    return targets if isinstance(targets, str) else set(targets)


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _ends_with(name: str, entries) -> bool:
    return any(suffix in entries for suffix in _suffixes(name))


def _excluded(name: str, excluded) -> bool:
    if not excluded:
        return False
    return bool(re.fullmatch(excluded, name)) if isinstance(excluded, str) else _ends_with(name, excluded)


def _is_target(name: str, targets, options: TargetOptions) -> bool:
    if not name:
        return False
    if _excluded(name, options.exclude_modules):
        return False
    if any(re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in options.modules_to_save or []):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:  # a full name is meant whatever its layer
        return True
    return _ends_with(name, targets) and in_layers(name, options)


def in_layers(name: str, options: TargetOptions) -> bool:
    """Is the module in one of the layers_to_transform? All are where none are given."""
    wanted = options.layers_to_transform
    if wanted is None or wanted == []:
        return True
    patterns = options.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # Lazy: the first numbered segment is the layer, later ones are for instance experts.
        lead = r".*?\." if not options.layers_pattern else r"(?:^|.*?\.)"
        found = re.match(rf"{lead}{pattern}\.(\d+)\.", name)
        if found:
            return int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def _saved_modules(modules, entries) -> list[str]:
    """modules_to_save matches by plain suffix ("norm" also takes "input_layernorm"), as in PEFT."""
    return [name for name in modules if name and any(name.endswith(entry) for entry in entries)]


def _quoted(value) -> str:
    """As an error quotes what a file may hold: not megabytes of it."""
    quoting = reprlib.Repr()
    quoting.maxstring = quoting.maxother = 200
    quoting.maxlist = quoting.maxset = 20
    return quoting.repr(value)


def _check_entries(modules, targets, names, saved, options, lenient):
    known = [name for name in modules if name]
    if not lenient:
        ends = {suffix for name in known for suffix in _suffixes(name)}
        chosen = options.target_modules is not None  # PEFT's table lists what any model of an architecture has
        for entry in sorted(targets - ends)[:1] if chosen and isinstance(targets, set) else ():
            raise ValueError(f"target_modules: no module is named {_quoted(entry)}{_near(entry, known)}")
        for entry in options.modules_to_save or []:
            if not _saved_modules(known, [entry]):
                raise ValueError(f"modules_to_save: no module's name ends with {_quoted(entry)}{_near(entry, known)}")
    if not names:
        choosing = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        given = ", ".join(f"{key}={_quoted(value)}" for key in choosing if (value := getattr(options, key)) is not None)
        near = _near(targets, known) if isinstance(targets, str) else ""
        hint = ""
        if isinstance(options.target_modules, str) and _suffix_matches(options.target_modules, known):
            listed = f"target_modules=[{_quoted(options.target_modules)}]"
            hint = f"; a string is a regular expression for the whole name: write {listed}"
        given = given or "what the method adapts"
        raise ValueError(f"no module matches {given}{hint or near}; the model's modules are named like {_some(known)}")
    excluded = options.exclude_modules
    if excluded and not any(_excluded(name, excluded) for name in known):
        warnings.warn(f"exclude_modules={_quoted(excluded)} excludes nothing", stacklevel=4)
    both = [name for name in names if any(name == s or name.startswith(s + ".") for s in saved)]
    if both:
        raise ValueError(f"both target_modules and modules_to_save match {both[:5]}; write longer names to tell them apart")


def _suffix_matches(entry: str, known) -> bool:
    return any(name == entry or name.endswith(f".{entry}") for name in known)


def _near(entry: str, known) -> str:
    last = {name.rsplit(".", 1)[-1] for name in known}
    near = difflib.get_close_matches(entry, [*sorted(last), *known], n=3, cutoff=0.5)
    return f"; near matches: {', '.join(map(repr, near))}" if near else ""


def _some(names) -> str:
    shown = names[:: max(1, len(names) // 5)][:5]
    return ", ".join(map(repr, shown))


def _check_target(name, module):
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and (is_sharded(weight) or hasattr(weight, "ds_shape")):  # fully_shard's, ZeRO's
        raise ValueError(
            f"the weight of {name!r} is divided among processes already; attach first, then call fully_shard (or let FSDP "
            "or DeepSpeed wrap the model), and make the optimizer last"
        )
    quantized = quantization(module) is not None
    if not quantized and not is_linear(module):
        supported = ", ".join(".".join(cls) for cls in LINEAR_CLASSES)
        raise ValueError(
            f"{name!r} is matched but is a {type(module).__module__}.{type(module).__qualname__}; only {supported} "
            "and quantised linear layers (bitsandbytes, torchao, GPTQ) can be adapted. Exclude it with exclude_modules, or "
            "give longer names in target_modules"
        )
    if "forward" in module.__dict__:
        raise ValueError(
            f"the forward of {name!r} was replaced on the instance (by an offloading hook?), so an adapter would "
            "never run; attach before adding such hooks"
        )
    weight = held_like(module)
    if not quantized and (type(weight) is not nn.Parameter or weight.dtype not in DTYPES or weight.dim() != 2):
        kind = f"{type(weight).__name__} of {weight.dtype} and shape {list(weight.shape)}"
        raise TypeError(f"the weight of {name!r} is a {kind}; a 2-D nn.Parameter of one of {DTYPES} is needed")
    if weight.device.type == "meta":
        raise ValueError(f"the weight of {name!r} is on the meta device; load the model's weights before attaching")


def _check_tied(model, matched: Matched):
    tied = tied_names(model)
    for name in matched.edited():
        if name in tied:
            raise ValueError(
                f"{name} is shared with {', '.join(tied[name])}, and would change or come apart with it; "
                "exclude it, or pass allow_tied_weights=True (the adapter can then not be merged)"
            )


def parameter_count(model: nn.Module) -> int:
    """Numbers that the parameters of the model without adapters stand for: two where a byte holds two quantised ones."""
    found = {}
    for module in base_modules(model).values():
        for parameter in module._parameters.values():
            if parameter is not None:
                packed = parameter is getattr(module, "weight", None) and quantization(module) is not None
                found[id(parameter)] = math.prod(sizes(module)) if packed else parameter.numel()
    return sum(found.values())


def tied_names(model) -> dict[str, list[str]]:
    """For every parameter that lies on the same memory as others: the others' names."""
    places = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.device.type != "meta" and parameter.numel():
            # Tensor subclasses that wrap others (torchao's) have no address of their own.
            places[parameter.device, parameter.data_ptr() or id(parameter)].append(name)
    return {name: [o for o in group if o != name] for group in places.values() for name in group if len(group) > 1}


def _copied_tensors(modules, names, saved, bias) -> dict[str, tuple[nn.Module, list[str]]]:
    copies: dict[str, tuple[nn.Module, list[str]]] = {}
    for name, module in modules.items():
        if any(name == s or name.startswith(s + ".") for s in saved):
            buffers = [b for b in module._buffers if b not in module._non_persistent_buffers_set]
            own = [n for n in (*module._parameters, *buffers) if getattr(module, n) is not None]
        elif (bias == "all" or (bias == "lora_only" and name in names)) and module._parameters.get("bias") is not None:
            own = ["bias"]
        else:
            continue
        if own != ["bias"] and (kind := quantization(module)) is not None:
            raise ValueError(
                f"modules_to_save matches {name!r}, whose weight is quantised ({kind}): codes can't be trained; give it an "
                "adapter with target_modules, or load the model without quantising it (llm_int8_skip_modules)"
            )
        if own and "forward" in module.__dict__:
            raise ValueError(f"the forward of {name!r} was replaced on the instance; attach before adding such hooks")
        if own:
            _check_called(name, modules, "bias" if own == ["bias"] and bias == "all" else "modules_to_save")
            copies[name] = (module, own)
    return copies


def _check_called(name: str, modules, option: str) -> None:
    """Raises ValueError where others read the module's own tensors without calling it: they would pass over copies."""
    parent, _, own = name.rpartition(".")
    parts = name.split(".")
    around = [name, *(".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1))]
    if any(isinstance(modules.get(one), nn.TransformerEncoderLayer) for one in around):
        why = (
            "is or lies in an nn.TransformerEncoderLayer, which in evaluation reads the weights without calling the modules"
        )
    elif own == "out_proj" and isinstance(modules.get(parent), nn.MultiheadAttention):
        why = "belongs to an nn.MultiheadAttention, which reads its weight and bias without calling it"
    else:
        return
    advice = 'use bias="none" or "lora_only"' if option == "bias" else "leave it out, with longer names in modules_to_save"
    raise ValueError(f"{option} selects {name!r}, which {why}, so that a copy would be passed over; {advice}")
