"""The protocol of fine-tuning methods: attach a method to a model, or load an adapter from a folder.

A method is a frozen dataclass of options (a subclass of `Method`) that says, for each matched module, which tensors it
adds, and how it is written to `adapter_config.json`. Everything else (matching, copies of modules trained in full,
freezing, checking files, the handle and its promises) is here and in `handle`, once for all methods.
"""

import re
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..checkpoint.files import AdapterFileError, read_adapter
from ..modules.adapted_linear import Adapted, adapt
from ..modules.adapter import Adapter
from ..modules.merging import pristine
from ..modules.quantized import held_like, quantization
from ..modules.sharding import shares
from ..modules.slices import Buffers
from .grouping import check_packable
from .handle import Handle, handles
from .processes import check_unwrapped
from .targets import Matched, TargetOptions, match, warn_of_experts, with_heads

__all__ = ["AdapterFileError", "Handle", "Method", "attach", "handles", "load"]

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HOLDERS = nn.ParameterDict, nn.ModuleDict, Buffers  # which hold an adapter's tensors under its name


@dataclass(frozen=True, kw_only=True)
class Method(TargetOptions):
    """What a fine-tuning method has to say. `name` is always the module's full name in the model."""

    peft_type: ClassVar[str]
    # part that a module holds -> its name in adapter_model.safetensors
    file_names: ClassVar[dict[str, str]]
    known: ClassVar[dict[str, type["Method"]]] = {}
    # Parts of N numbers that are held at least in float32, whatever `dtype` says: 16-bit ones would hardly move in training.
    wide_parts: ClassVar[frozenset[str]] = frozenset()
    # Options of methods with low-rank factors, see `LoRA`. (Annotated, they would come first among its fields.)
    group_projections = False
    pack_weights = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "peft_type" in cls.__dict__:
            Method.known[cls.peft_type] = cls

    # Why a layer with a quantised weight can't be adapted, or None if it can.
    needs_weights: ClassVar[str | None] = "trains the weight where it stands, and codes on a coarse grid can't take it up"

    # Do the deltas of this method train while they stand in the weights? Otherwise a merged adapter gets no gradients.
    trains_merged: ClassVar[bool] = False

    def bind(self, model: nn.Module) -> "Method":
        """The method with what it chooses by looking at the model (before modules are matched). The default: itself."""
        return self

    def check(self, matched: dict[str, nn.Module], model: nn.Module) -> None:
        """Raise or warn about options that don't suit the matched modules. The default has none."""

    def check_tensors(self, name: str, module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        """Raise ValueError if a file's tensors for one module, by part, make no sense. Names, shapes and finiteness have
        been checked. The default asks for floating-point numbers."""
        for part, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise ValueError(f"the {part} of {name!r} is {tensor.dtype}; it must be a floating-point dtype")

    def check_file(self, directory, targets: dict[str, nn.Module], values: dict[str, torch.Tensor]) -> None:
        """`check_tensors` of every module with what a file holds. Raises AdapterFileError."""
        for name, module in targets.items():
            try:
                self.check_tensors(name, module, self.tensors_of(name, module, values))
            except ValueError as error:
                raise AdapterFileError(f"{directory}: {error}") from error

    def expected(self, targets: dict[str, nn.Module]) -> dict[str, tuple[int, ...]]:
        """Key -> shape of what a file holds of these modules."""
        parts = ((name, part, shape) for name, m in targets.items() for part, shape in self.shapes(name, m).items())
        return {self.target_key(name, part): tuple(shape) for name, part, shape in parts}

    def tensors_of(self, name: str, module: nn.Module, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One module's tensors by part, from a file's."""
        return {part: values[self.target_key(name, part)] for part in self.shapes(name, module)}

    def native(self, tensors: dict[str, dict[str, torch.Tensor]]) -> "Method":
        """The method whose files these tensors (by module and part) are, where this one only reads another's format."""
        return self

    # ---- saving: the defaults suit methods whose parts are what modules hold

    # Does a file that is restored hold tensors of the shapes that the modules hold now?
    fixed_shapes: ClassVar[bool] = True

    def file_tensors(self, module: nn.Module, adapter: Adapter, absolute: bool) -> dict[str, torch.Tensor]:
        """What a file holds of one module, by part. Raises ValueError: no `absolute` values."""
        if absolute:
            raise ValueError(f"{type(self).__name__} trains no entries of weights, so it has no absolute values to save")
        held = ((holder, t) for holder, _, t in module.adapter_tensors(adapter) if holder != "modules_to_save")
        return dict(held)

    def refill(self, name: str, module: nn.Module, adapter: Adapter, tensors: dict[str, torch.Tensor]) -> None:
        """Take over a file's tensors of one module, whose own keep their identity."""
        stood = adapter.name in module._parts and adapter.name in module._merged
        if stood:  # the slices may lie elsewhere afterwards
            module.set_merged(adapter, False)
        for part, tensor in self.file_tensors(module, adapter, False).items():
            tensor.copy_(shares(tensors[part], tensor))
        module.forget_indices()
        module.set_merged(adapter, True) if stood else module.refresh()

    def describe(self, handle: "Handle", absolute: bool) -> dict[str, Any]:
        """More of adapter_config.json, about what the modules hold now."""
        return {}

    def before_save(self, handle: "Handle") -> None:
        """Warn of what makes a file worthless."""

    def resume(self, saved: "Method") -> None:
        """Take over what a restored file says of the run so far."""

    def updates(self, handle: "Handle") -> int:
        """How many of this run its schedule has counted."""
        return 0

    def new_run(self, handle: "Handle", total_steps: int | None) -> "Method":
        """What `Handle.new_run` does; returns the method with what it says of a run's length replaced."""
        return self

    # What must be equal for one adapter's values to be taken over by another of the same shapes, and its name.
    placed_by: ClassVar[str] = "scale"

    def placement(self, name: str) -> Any:
        return self.scale(name)

    @property
    def learning_rate(self) -> float:
        """Of `Handle.optimizer`, where none is given."""
        return 1e-4

    def optimizer(self, handle: "Handle", lr: float, weight_decay: float, **options) -> torch.optim.Optimizer:
        """The optimizer of `Handle.optimizer`: AdamW, fused where PyTorch has it."""
        parameters = list(handle.parameters())
        if not options.get("foreach") and not options.get("differentiable"):  # PyTorch takes one of the three
            options.setdefault("fused", all(p.device.type in ("cpu", "cuda") for p in parameters))
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, **options)

    def shapes(self, name: str, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """The tensors that one matched module gets, by part."""
        raise NotImplementedError

    def initial(self, name: str, module: nn.Module) -> dict[str, torch.Tensor]:
        """Their values at the start of training, by part; any dtype and device."""
        raise NotImplementedError

    def scale(self, name: str) -> float:
        """The factor of the module's delta."""
        return 1.0

    def dtype(self, weight: torch.Tensor) -> torch.dtype:
        """The dtype in which the tensors of a module with this weight are held."""
        raise NotImplementedError

    def install(self, name: str, module: nn.Module, adapter: Adapter, tensors: dict[str, torch.Tensor]) -> None:
        """Give the (already adapted) module its tensors. Must not fail."""
        raise NotImplementedError

    def target_key(self, name: str, part: str) -> str:
        """The key of one of a module's tensors in adapter_model.safetensors."""
        return f"base_model.model.{name}.{self.file_names[part]}"

    def at_update(self, handle: Handle) -> None:
        """An optimizer has just made a step, and its gradients are still there. The default does nothing."""

    def after_update(self, handle: Handle) -> None:
        """The method's schedule, called once per optimizer update. The default has none."""

    def after_skipped(self, handle: Handle) -> None:
        """`Handle.step` was called and no optimizer has made a step since the last time. The default does nothing."""

    def to_config(self, matched: dict[str, nn.Module]) -> dict[str, Any]:
        """The contents of adapter_config.json, in PEFT's terms."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Method":
        """The method an adapter_config.json describes. ValueError names an option that is not supported."""
        raise NotImplementedError

    @staticmethod
    def read(directory, config: dict[str, Any]) -> "Method":
        """The method of any kind that a folder's config describes. Raises AdapterFileError."""
        kind = config.get("peft_type")
        if not isinstance(kind, str) or kind not in Method.known:
            raise AdapterFileError(f"{directory}: peft_type {kind!r} is not supported; supported: {sorted(Method.known)}")
        try:
            return Method.known[kind].from_config(config)
        except (ValueError, TypeError) as error:
            raise AdapterFileError(f"{directory}: {error}") from error


@torch.inference_mode(False)  # parameters that are made in inference mode can't be trained
def attach(model: nn.Module, method: Method, adapter_name: str = "default") -> Handle:
    """Attach a fine-tuning method to a model, in place, and freeze the rest of it.

    Attaching twice under different names adds both adapters; see `Handle.set_active`. If anything is wrong the model
    is left untouched.

    Args:
        model: any `nn.Module`; its modules keep their identity and names.
        method: `fastft.LoRA(...)` or another `Method`.
        adapter_name: letters, digits, "_" and "-"; part of the names of the adapter's parameters.

    Returns:
        The handle: parameters, optimizer, saving, merging, detaching.

    Raises:
        ValueError: options that match nothing or something that can't be adapted (with the near matches), shared
            weights, a name in use. TypeError: weights of an unsupported kind.
    """
    if not isinstance(method, Method):
        raise TypeError(f"attach needs a method such as fastft.LoRA(...), not {type(method).__name__}")
    model = plain_model(model)
    check_name(model, adapter_name)
    method = with_heads(method, model).bind(model)
    matched = match(model, method)
    warn_of_experts(model, method)
    _check_quantized(method, matched.targets)
    method.check(matched.targets, model)
    if method.pack_weights:
        check_packable(model, matched.targets)
    tensors = {name: method.initial(name, module) for name, module in matched.targets.items()}
    return install_adapter(model, method, adapter_name, matched, tensors, _own_values(matched))


@torch.inference_mode(False)
def load(model: nn.Module, directory, adapter_name: str = "default") -> Handle:
    """Attach the adapter in `directory` (written by `Handle.save` or by PEFT's `save_pretrained`).

    The folder holds adapter_config.json and adapter_model.safetensors; pickles are refused. Every tensor is checked
    (missing, extra, shape, dtype, finite) before the model is touched.

    Raises:
        FileNotFoundError: no such folder or files. AdapterFileError (a ValueError): a damaged file, tensors that do not
            fit the model (the first five are named), options that are not supported. Otherwise as `attach`.
    """
    model = plain_model(model)
    check_name(model, adapter_name)
    method, matched, values = read_folder(model, directory)
    tensors = {name: method.tensors_of(name, module, values) for name, module in matched.targets.items()}
    method = method.native(tensors)
    copies = {
        name: {own: values[matched.copy_key(name, own)].to(getattr(module, own), copy=True) for own in owned}
        for name, (module, owned) in matched.copies.items()
    }
    return install_adapter(model, method, adapter_name, matched, tensors, copies)


def read_folder(model, directory, look=None, accept=None, max_bytes: int | None = None):
    """The adapter in a folder, checked against a model which is not touched: (method, what it matches, tensors by key).

    Args:
        look: called with the config before anything is made of it. accept: called with the method and what it matches before
            tensors are read. Both may raise ValueError.
        max_bytes: refuse a larger file of tensors.

    Raises:
        as `load`.
    """
    found: dict[str, Any] = {}

    def expected(config):
        if look is not None:
            look(config)
        method = Method.read(directory, config)
        matched = match(model, method, lenient=True)
        _check_quantized(method, matched.targets)
        method.check(matched.targets, model)
        if accept is not None:
            accept(method, matched)
        found.update(method=method, matched=matched)
        shapes = method.expected(matched.targets)
        for name, (module, owned) in matched.copies.items():
            for own in owned:
                shapes[matched.copy_key(name, own)] = tuple(getattr(module, own).shape)
        return shapes

    values = read_adapter(directory, expected, max_bytes)
    found["method"].check_file(directory, found["matched"].targets, values)
    return found["method"], found["matched"], values


def plain_model(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be an nn.Module, not {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    check_unwrapped(model)
    peft = sys.modules.get("peft.tuners.tuners_utils")  # a model can't hold its layers if it was never imported
    theirs = [name for name, module in model.named_modules() if peft is not None and isinstance(module, peft.BaseTunerLayer)]
    if theirs:
        raise ValueError(
            f"the model holds adapters of PEFT's (at {theirs[0]!r}), whose parts would be adapted in turn: take them out by "
            "PEFT's unload() or merge_and_unload() first, or leave them to PEFT and call fastft.accelerate"
        )
    return model


def check_name(model, name):
    taken = handles(model)
    if not isinstance(name, str) or not _ADAPTER_NAME.fullmatch(name) or any(hasattr(kind(), name) for kind in _HOLDERS):
        raise ValueError(
            f"adapter name {name!r}: use 1 to 64 letters, digits, '_' or '-', and no name that modules have themselves, "
            "such as 'keys' or 'training'"
        )
    if name in taken:
        raise ValueError(f"an adapter named {name!r} is attached already; attached: {sorted(taken)}")
    if taken:
        return
    others = {own: path for path, module in model.named_modules() if isinstance(module, Adapted) for own in module._adapters}
    if others:
        raise ValueError(
            f"adapters ({', '.join(sorted(others))} at {next(iter(others.values()))!r}) are attached to a part of this "
            "model or to a whole that it is a part of; attach all adapters to one and the same module, or detach those first"
        )


def _check_quantized(method, targets):
    if method.needs_weights is None:
        return
    for name, module in targets.items():
        if (kind := quantization(module)) is not None:
            raise ValueError(
                f"the weight of {name!r} is quantised ({kind}): {type(method).__name__} {method.needs_weights}; load the "
                "model without quantising it, or use LoRA"
            )


def _own_values(matched: Matched) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: {own: pristine(module, own).detach().clone() for own in owned}
        for name, (module, owned) in matched.copies.items()
    }


def install_adapter(model, method, adapter_name, matched, tensors, copies) -> Handle:
    """Everything is known to fit; only from here on is the model touched."""
    adapter = Adapter(adapter_name)
    handle = Handle(model, method, adapter, matched)
    handle.check_copies()
    tensors = {name: _placed(method, held_like(matched.targets[name]), parts) for name, parts in tensors.items()}
    handle.register()
    for module in handle.modules.values():
        adapt(module, adapter)
    for name, parts in tensors.items():
        method.install(name, matched.targets[name], adapter, parts)
    for name, own in copies.items():
        handle.modules[name].add_copies(adapter, own)
    handle.made()
    return handle


def _placed(method, weight, parts):
    dtype, wide = method.dtype(weight), torch.promote_types(weight.dtype, torch.float32)

    def held_in(part, value):
        return value.dtype if not value.is_floating_point() else wide if part in method.wide_parts else dtype

    return {part: value.to(weight.device, held_in(part, value)).contiguous() for part, value in parts.items()}
