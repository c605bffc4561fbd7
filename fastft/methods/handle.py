"""The handle of an attached adapter, and the promises it keeps (the contract of an attached model):

* `state_dict`, `save_pretrained`, `deepcopy`, `.to()` and trainer checkpoints see the pristine base plus the adapter's
  tensors, also while merged; a delta is never applied twice.
* `unmerge` and `detach` restore the bits of the base; `detach` also its classes, hooks and `requires_grad`, in any
  order of detaching several adapters.
* Any torch optimizer over `parameters()` works.
* Under fully_shard forwards, optimizers, `save`, `restore` and `state_dict` work; merging and detaching are refused.
"""

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..listing import listed
from ..modules.adapted_linear import Adapted
from ..modules.adapter import Adapter
from ..modules.adapter_group import GroupState
from ..modules.merging import PART
from ..modules.sharding import is_sharded, reshard
from ..modules.sparse import BUFFERS
from .dequantizing import check_target, fold_dequantized
from .grouping import make_groups
from .handle_files import AdapterFiles
from .targets import Matched, tied_names

_KEY = "_fastft_attachments"
_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"  # an attribute of a model that DistributedDataParallel looks at
_handles: "weakref.WeakSet[Handle]" = weakref.WeakSet()


def _note_update(optimizer, args, kwargs) -> None:
    """An update is a step of an optimizer that holds any of the adapter's parameters."""
    # Parameters' version counters don't tell: fused optimizers leave them as they are.
    if (overflow := getattr(optimizer, "found_inf", None)) is not None and bool(overflow):
        return  # GradScaler calls step() of fused optimizers to let them skip it
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for handle in [handle for handle in _handles if handle.attached]:
        updated = [p for p in handle.parameters() if id(p) in held]
        if not updated:
            continue
        if not handle.method.trains_merged and handle.merged and any(p.grad is not None for p in updated):
            raise RuntimeError(
                f"an optimizer updated adapter {handle.name!r} while it is merged: forwards use the weights from "
                "before, and no gradient reaches it; unmerge() before training"
            )
        if not handle._ever_updated:
            _warn_of_unreached(handle, held)
        handle._updated = handle._ever_updated = True
        handle._optimizer = weakref.ref(optimizer)
        handle.method.at_update(handle)
        if getattr(optimizer, "writes_parts", False):
            continue
        for module in handle.targets.values():
            tensors = module.adapter_tensors(handle._adapter) if handle.name in module._parts else ()
            if any(id(tensor) in held for _, _, tensor in tensors):
                module.refresh()


def _warn_of_unreached(handle, held) -> None:
    """Some of the parameters with these ids have gradients and others have none, which no optimizer tells of."""
    # Empty ones are what FSDP leaves of a parameter that other processes hold.
    own = [(name, p.grad) for name, p in handle.named_parameters() if id(p) in held and p.requires_grad and p.numel()]
    names = [name for name, grad in own if grad is None]
    if names and len(names) < len(own):
        warnings.warn(
            f"no gradient reached {listed(names)} of adapter {handle.name!r}: the model reads these weights "
            "without calling the layers (then nothing trains there; leave them out with exclude_modules), or they took no "
            "part in this step (unused experts, dropped layers), or gradient checkpointing with use_reentrant=True cut them "
            "off (model.enable_input_require_grads() helps)",
            stacklevel=4,
        )


register_optimizer_step_post_hook(_note_update)


@dataclass
class Attachments:
    """What a model remembers of its adapters; an attribute of the model, so that `deepcopy` takes it along."""

    requires_grad: dict[str, bool]
    handles: dict[str, "Handle"] = field(default_factory=dict)


def handles(model: nn.Module) -> dict[str, "Handle"]:
    """The handles of the adapters attached to this model, by name (also those of a deep copy)."""
    model = getattr(model, "_orig_mod", model)
    record = model.__dict__.get(_KEY)
    return dict(record.handles) if record else {}


class Handle(AdapterFiles):
    """One adapter on one model. Made by `fastft.attach` and `fastft.load`."""

    def __init__(self, model: nn.Module, method: Any, adapter: Adapter, matched: Matched):
        self.model = model
        self.method = method
        self.targets = matched.targets
        self.modules: dict[str, Any] = dict(matched.targets)
        self.modules.update((name, module) for name, (module, _) in matched.copies.items())
        self._matched = matched
        self._adapter = adapter
        self._updated = False  # by an optimizer, since the last step()
        self._ever_updated = False
        self.total_steps: int | None = None  # optimizer steps of the run, where a Trainer told
        self._optimizer: Any = None  # a weak reference to the one that made the last update
        self._groups: list[Any] = []
        self._shapes: dict[str, torch.Size] = {}  # of what a file holds, as they were before anything was sharded
        _handles.add(self)

    def __getstate__(self):  # weak references can't be pickled, and a copy's optimizer is another one
        return {**self.__dict__, "_optimizer": None}

    def __setstate__(self, state):  # a deep copy
        self.__dict__.update(state)
        _handles.add(self)

    def __repr__(self):
        state = "detached" if not self.attached else "active" if self._adapter.active else "inactive"
        return f"<{type(self.method).__name__} adapter {self.name!r} on {len(self.targets)} modules, {state}>"

    @property
    def name(self) -> str:
        return self._adapter.name

    @property
    def attached(self) -> bool:
        return handles(self.model).get(self.name) is self

    @property
    def merged(self) -> bool:
        return any(self.name in module._merged for module in self._attached().values())

    @property
    def sharded(self) -> bool:
        """Are the adapter's parameters divided among processes (fully_shard)? Every process must ask, or none, as what an
        evaluation has left gathered is given back for the answer."""
        reshard(self.model)
        return any(is_sharded(parameter) for parameter in self.parameters())

    @property
    def groups(self) -> list[GroupState]:
        """The groups of layers that share one input (q, k and v; gate and up), and what each does."""
        return [group.state() for group in self._groups] if self.attached else []

    # ---- training

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapter's trainable parameters, under the names they have in the model."""
        for path, module in self._attached().items():
            for holder, own, tensor in module.adapter_tensors(self._adapter):
                if isinstance(tensor, nn.Parameter):
                    yield ".".join(filter(None, (path, holder, self.name, own))), tensor

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_parameters())

    def optimizer(self, lr: float | None = None, weight_decay: float = 0.0, **options) -> torch.optim.Optimizer:
        """AdamW over the adapter: PyTorch's, fused where it can be; of methods that train slices of the weights in place
        `fastft.optim.slice_adamw.SliceAdamW`. `lr` is 1e-4 by default, for SpIEL by momentum 1e-3. `options` go to it."""
        self._attached()
        reshard(self.model)
        return self.method.optimizer(self, self.method.learning_rate if lr is None else lr, weight_decay, **options)

    def step(self) -> None:
        """Run the method's schedule (LoRA has none); call it after the optimizer's step. Without a new update: nothing."""
        if self._updated:
            self._updated = False
            self.method.after_update(self)
            return
        self.method.after_skipped(self)
        if not self._ever_updated and any(module.misses(self.name) for module in self.targets.values()):
            warnings.warn(
                f"the values of adapter {self.name!r} have changed, but no optimizer that holds its parameters has made a "
                "step (DeepSpeed's hold copies): the weights, in which the adapter trains, don't follow. Use "
                "DistributedDataParallel and handle.optimizer(), or call handle.refresh() after every change",
                stacklevel=2,
            )
        gradients = [] if self._ever_updated else [p.grad for p in self.parameters() if p.grad is not None]
        if gradients and all(grad.isfinite().all() for grad in gradients):  # else a GradScaler has skipped the step
            warnings.warn(
                f"adapter {self.name!r} has gradients, but no optimizer that holds its parameters has made a step; "
                "use handle.optimizer(), or make yours over handle.parameters() after attach",
                stacklevel=2,
            )

    def new_run(self, total_steps: int | None = None) -> None:
        """Another run of training begins: schedules (SpIEL's, LIFT's) count its updates from 0, to `total_steps` (which
        SpIEL needs, where no Trainer tells it).

        For an adapter that was trained before, in this process or the one whose file `fastft.load` has read. A Trainer with
        `callback` does it where it does not resume.
        """
        self._attached()
        self.method = self.method.new_run(self, total_steps)

    def refresh(self) -> None:
        """Bring what stands in the weights up to date with the adapter's values.

        Only needed after writing through a parameter's ``.data`` (as some averages of weights do), and in a compiled model
        after any change that no optimizer made: what an optimizer does is seen by itself, and so is in eager forwards what
        changes a parameter in place.
        """
        for module in self._attached().values():
            module.refresh()

    def callback(self):
        """A transformers `TrainerCallback`: checks what is trained, runs `step`, saves the adapter with checkpoints."""
        from .trainer_callback import trainer_callback

        return trainer_callback(self)

    # ---- switching

    def set_active(self, active: bool = True) -> None:
        """Let forwards use this adapter or not. All active adapters add up. Under gradient checkpointing call it only when
        every forward has had its backward, see `switch`."""
        self._attached()
        if active and not self._adapter.active:
            self.check_copies()
        self._adapter.active = active
        for module in self.targets.values():
            if self.name in module._parts:
                module.rebuild()

    def switch(self) -> None:
        """Make this adapter the only active one of the model. What other adapters trained stays attached.

        Slices are exchanged in place, in one walk over the weights that hold any: in time proportional to the slices.

        Under gradient checkpointing every forward must have had its backward before: what is recomputed in it uses the
        adapters that are active then, which would get the gradients of others, and nothing tells.
        """
        self._attached()
        others = [handle for handle in handles(self.model).values() if handle is not self and handle._adapter.active]
        for handle in others:
            handle._adapter.active = False
        self._adapter.active = True
        sliced = {id(m): m for h in (self, *others) for m in h.targets.values() if h.name in m._parts}
        for module in sliced.values():
            module.rebuild()

    @contextmanager
    def disabled(self):
        """Forwards of this thread inside the block run without this adapter, also while it is merged.

        Right between a forward and its backward; no module or parameter is touched. Under gradient checkpointing run the
        disabled forward under `torch.no_grad()`: what is recomputed during a backward uses the adapter.
        """
        self._attached()
        with self._adapter.disabled():
            yield

    def reference(self) -> nn.Module:
        """The model without any adapter, as a second one on the same tensors: no memory but for its modules.

        For trainers that ask for a reference model (TRL's ``DPOTrainer(model, ref_model=handle.reference())``); in a loop of
        one's own `disabled` is simpler. What is loaded into one model's base is in the other's too. Not while an adapter is
        merged, as those that train slices of the weights are.
        """
        from .reference import without_adapters

        self._attached()
        return without_adapters(self.model, handles)

    # ---- merging

    def merge(self) -> None:
        """Add the delta (computed in float32, rounded once) to the weights. Copies trained in full stay beside them.

        A merged adapter gets no gradients; `unmerge` before training on. The slices of S²FT are merged from the start and
        train so: their forward is the base's.

        Raises:
            ValueError: a weight is shared or quantised, or an adapter's `lora_bias` has no bias to go into. Nothing was
                merged.
        """
        self._whole("merge")
        self._refuse_merging("merge", [])
        for module in self.targets.values():
            module.set_merged(self._adapter, True)

    def unmerge(self) -> None:
        """Bring back the bits from before `merge`. The adapter goes on working beside the weights, if it is active."""
        self._whole("unmerge")
        for module in self.targets.values():
            module.set_merged(self._adapter, False)

    def merge_and_unload(self, target: str | torch.dtype | None = None) -> nn.Module:
        """Fold the adapter into the base for good, and detach it. Returns the model, plain again if it was the last.

        Args:
            target: what all quantised linear layers of the model become; others keep their dtype. "dequantized": plain
                layers in the dtype of the model's other parameters; or a dtype. They then take a plain layer's memory.

        Raises:
            ValueError: as `merge`; layers are quantised and no target is given. Nothing was changed.
        """
        modules = self._whole("merge_and_unload")
        check_target(target, self.model)
        for module in modules.values():
            module.check_class()
        self._refuse_merging("merge_and_unload", self._matched.edited(), target)
        if target is None:
            for module in modules.values():
                module.fold(self._adapter)
        else:
            fold_dequantized(self.model, modules.values(), self._adapter, target)
        self.detach()
        return self.model

    def detach(self) -> None:
        """Take the adapter off: bits, classes, hooks and (with the last adapter) `requires_grad` as before `attach`."""
        modules = self._whole("detach")
        for module in modules.values():
            module.check_class()  # all of them before the first is changed
        self._leave_to_us(False)
        for module in modules.values():
            module.remove(self._adapter)
        self._groups = []
        record = self.model.__dict__[_KEY]
        del record.handles[self.name]
        if not record.handles:
            delattr(self.model, _KEY)
            for name, parameter in self.model.named_parameters(remove_duplicate=False):
                parameter.requires_grad_(record.requires_grad.get(name, parameter.requires_grad))

    # ---- used by methods

    def last_optimizer(self) -> torch.optim.Optimizer:
        """The one that made the last update, whose state has to follow what a method chooses.

        Raises:
            RuntimeError: there was none, or it does not hold all that trains.
        """
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is None:
            raise RuntimeError(f"no optimizer has updated adapter {self.name!r} yet")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        others = [name for name, p in self.named_parameters() if p.requires_grad and id(p) not in held]
        if others:
            raise RuntimeError(
                f"{len(others)} parameters of adapter {self.name!r} are not in the optimizer that made the last step "
                f"({', '.join(others[:3])}); {type(self.method).__name__} moves its state along with the entries, so one "
                "optimizer must hold all of them"
            )
        return optimizer

    # ---- used by attach

    def register(self) -> None:
        record = self.model.__dict__.get(_KEY)
        if record is None:
            flags = {n: p.requires_grad for n, p in self.model.named_parameters(remove_duplicate=False)}
            record = Attachments(flags)
            setattr(self.model, _KEY, record)
            self.model.requires_grad_(False)
        record.handles[self.name] = self

    def made(self) -> None:
        """All tensors are installed."""
        self._groups = make_groups(self.method, self._adapter, self.targets)
        self._leave_to_us(True)
        self._shapes = {k: t.shape for k, t in self._file_tensors().items() if isinstance(t, nn.Parameter)}

    def _leave_to_us(self, ignore: bool) -> None:
        """Tell DistributedDataParallel not to send the buffers of entries from rank 0 in every forward: all ranks choose the
        same, and everything that follows from a choice would have to be made anew."""
        held = {
            path: set(module.sparse) for path, module in self.targets.items() if self.name in getattr(module, "sparse", {})
        }
        ours = {f"{path}.sparse.{self.name}.{buffer}" for path in held for buffer in BUFFERS}  # some come with a resume only
        ours |= {f"{path}.{PART}" for path, adapters in held.items() if adapters == {self.name}}
        names = set(getattr(self.model, _DDP_IGNORES, ()))
        names = names | ours if ignore else names - ours
        if names:
            setattr(self.model, _DDP_IGNORES, sorted(names))
        elif ours and hasattr(self.model, _DDP_IGNORES):
            delattr(self.model, _DDP_IGNORES)

    def check_copies(self) -> None:
        """Two active adapters can't both replace one tensor."""
        for path, (module, owned) in self._matched.copies.items():
            if not isinstance(module, Adapted):
                continue
            for other in module._adapters.values():
                if other is self._adapter or not other.active:
                    continue
                if {own for _, own, _ in module.adapter_tensors(other)} & set(owned):
                    raise ValueError(
                        f"{path!r} is trained in full by the active adapter {other.name!r}; "
                        f"call set_active(False) on the handle of {other.name!r} first"
                    )

    # ---- internals

    def _attached(self) -> dict[str, Any]:
        if not self.attached:
            raise RuntimeError(f"adapter {self.name!r} is detached; its handle can't be used any more")
        return self.modules

    def _whole(self, what: str) -> dict[str, Any]:
        """`_attached`, for what reads or writes base weights beside the adapter."""
        modules = self._attached()
        if self.sharded:
            raise RuntimeError(
                f"can't {what} adapter {self.name!r} while its model is sharded (fully_shard): save it with handle.save and "
                "load it into a model that is not"
            )
        return modules

    def _refuse_merging(self, what: str, names, target=None) -> None:
        """names: what would be overwritten besides what the modules' deltas edit."""
        edited = {f"{path}.{own}": None for path, module in self.targets.items() for own in module.edited(self.name)}
        for path, module in self.targets.items():
            obstacle = module.merge_obstacle(self.name) or (module.code_obstacle() if target is None else None)
            if obstacle:
                raise ValueError(f"can't {what} adapter {self.name!r} into {path!r}: {obstacle}")
        tied = tied_names(self.model)
        for name in {**edited, **dict.fromkeys(names)}:
            if name in tied:
                raise ValueError(
                    f"can't {what}: {name} is shared with {', '.join(tied[name])}, which would change too; "
                    "give the module a parameter of its own first (and set tie_word_embeddings=False)"
                )
