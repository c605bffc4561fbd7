"""PEFT's LoRA linears on our ops: their class is swapped in place, and each call decides which path it takes.

* ``fused``: base and low-rank part by `lora_linear`, where the base is a bare `nn.Linear` or Conv1D.
* ``low-rank part``: any other base layer (quantised, hooked, wrapped) computes itself, `lora_update` adds to it.
* ``peft``: PEFT's own forward, with the reason in `fastft.report`.

Nothing of an adapter is kept between calls, since PEFT replaces parameters, scales and whole layers as it likes; but within
a forward layers may share their input (`peft_groups`).
"""

import torch
from torch import nn

from ..modules.norms import RowNorms, factor
from ..modules.projection import Projection, infer, project
from ..ops.lora_inference import few_tokens, lora_inference
from ..ops.lora_linear import examined_linear, lora_update
from .peft_bank import add
from .peft_eligible import (
    DTYPES,
    Input,
    autocasting,
    bare,
    base_obstacle,
    is_plain,
    kinds_of_peft,
    linear_classes,
    traced_or_hooked,
    unfit,
    unfit_factors,
    unfit_weight,
)
from .peft_groups import PeftGroup, group_layers
from .peft_mixed import Index, Routed, compiled_around, index_of
from .swapping import Swapped, swap, unswap

# Where PEFT's forward has no low-rank part either; `strict` lets them pass.
DISABLED, MERGED, INACTIVE = "adapters are disabled", "merged into the base weight", "no active adapter in this layer"
IDLE = frozenset((DISABLED, MERGED, INACTIVE))
REPLACED = "its forward was replaced on the instance, as X-LoRA does, so that what runs is not up to us"
_ROUTED = ("adapter_names", "alora_offsets")  # arguments that PEFT doesn't hand to the base layer


class FallbackError(RuntimeError):
    """A layer would have run on PEFT's path under `strict=True`."""


class Record:
    """What an accelerated layer holds besides PEFT's own: its name, and what its calls were."""

    group: PeftGroup | None = None  # and the layer's place in it
    place = 0

    def __init__(self, name: str, strict: bool):
        self.name, self.strict = name, strict
        self.norms = RowNorms()  # of the frozen base weight, for DoRA
        self.fused = self.beside = self.peft = 0
        self.reason: str | None = None  # of the last call that took PEFT's path


def accelerate_layers(model: nn.Module, strict: bool, share: bool) -> None:
    """Swap every layer that is exactly one of PEFT's LoRA linears; those swapped before take over `strict`."""
    kinds_of_peft()  # now, so that a compiled forward finds it cached
    classes, found = linear_classes(), {}
    for name, module in model.named_modules():
        if isinstance(module, Routed) and module.plain in classes:  # injected past the tuner, then run in a mixed batch
            unswap(module)
        if type(module) in classes:
            swap(module, FastLinear, Record(name, strict))
        elif isinstance(module, FastLinear):
            module._fastft.strict = strict
        else:
            continue
        found[name] = module
    group_layers(found, share)


class FastLinear(Swapped):
    """Mixed into `peft.tuners.lora.layer.Linear`, and into the classes that PEFT has for linears of quantised weights
    (`peft_eligible.linear_classes`), whose forwards differ from its only in what they do with the base layer."""

    def forward(self, x, *args, **kwargs):
        if (index := index_of(self)) is not None:
            if not (args or kwargs or torch.is_grad_enabled()):
                y = _grouped_apart(self, x, index) if compiled_around() else _grouped(self, x, index)
                if y is not None:
                    return y
            return _with_names(self, x, index, args, kwargs)
        without_gradient = not (args or kwargs or torch.is_grad_enabled() or torch.compiler.is_compiling())
        if without_gradient and (y := self._infer(x)) is not None:
            return y
        if not (args or kwargs) and (plain := self._commonest(x)) is not None:
            weight, bias, one = plain
            if not torch.compiler.is_compiling():  # counts would be baked into the graph, and guarded
                record = self.__dict__["_fastft"]
                record.fused += 1
                # A graph can't find what another call left.
                if record.group is not None and (y := record.group.project(self, x, weight, bias, one)) is not None:
                    return y
            return examined_linear(x, weight, bias, one.lora_A, one.lora_B, one.scale, one.dropout)
        if kwargs.get("adapter_names") is not None:  # PEFT checks them, and calls `_mixed_batch_forward` below
            return self.plain.forward(self, x, *args, **kwargs)
        given = Input.of(x)
        plan = self.plan(given)
        if isinstance(plan, str):
            self._count_peft(plan)
            return self.plain.forward(self, x, *args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in _ROUTED}
        base, record, group = self.base_layer, self._fastft, None
        beside = args or kwargs or base_obstacle(base, given) is not None
        if not torch.compiler.is_compiling():
            if beside:
                record.beside += 1
            else:
                record.fused += 1
            group = record.group if self._shareable(plan) else None
        plan = self._with_norms(base, plan)
        if beside:
            y = base(x, *args, **kwargs)
            together = group is not None and plan[0].magnitude is None and type(y) is torch.Tensor and y.dtype is given.dtype
            total = group.add(self, x, y, plan[0]) if together else None
            return self._beside(y, x, plan) if total is None else total
        weight, y = base.weight if type(base) is nn.Linear else base.weight.t(), None
        if len(plan) == 1 and (group is None or few_tokens(x)):
            y = infer(x, weight, base.bias, plan[0], record.norms)
        if y is None and group is not None:
            y = group.project(self, x, weight, base.bias, plan[0])
        return project(x, weight, base.bias, plan) if y is None else y

    def _infer(self, x) -> torch.Tensor | None:
        """The output without a gradient in the commonest case, by `lora_inference`; None otherwise.

        Of what `_commonest` asks only that which the ops don't find out themselves.
        """
        if (parts := self._one_plain_adapter()) is None or traced_or_hooked():
            return None
        (weight, bias, one), record = parts, self.__dict__["_fastft"]
        if one.dropout or not (record.group is None or few_tokens(x)):
            return None
        if one.lora_A.dtype is not weight.dtype and not self.__dict__["cast_input_dtype_enabled"]:
            return None
        y = lora_inference(x, weight, bias, one.lora_A, one.lora_B, one.scale)
        if y is not None:
            record.fused += 1
        return y

    def projection(self, x) -> Projection | None:
        """What a forward on x adds, where it is shareable: that of one adapter, whose A is a parameter."""
        plain = self._commonest(x)
        if plain is not None:
            return plain[2]
        plan = self.plan(Input.of(x))
        return plan[0] if not isinstance(plan, str) and self._shareable(plan) else None

    def _shareable(self, plan) -> bool:
        """Is it of one adapter whose A is the parameter itself? (What was cast is another tensor in each call.)"""
        return len(plan) == 1 and plan[0].lora_A is self.lora_A[plan[0].name].weight

    def _commonest(self, x) -> tuple[torch.Tensor, torch.Tensor | None, Projection] | None:
        """Base weight, bias and what is added in the commonest case, that of one adapter without options; None otherwise.

        What `plan` and `base_obstacle` find out in general, at 11 instead of 24 us a call (PEFT's own Python takes 22):
        modules and tensors are taken from the dictionaries that hold them, past `nn.Module.__getattr__`.
        """
        if (parts := self._one_plain_adapter()) is None:
            return None
        weight, _, one = parts
        a, b = one.lora_A, one.lora_B
        if unfit(x) or x.dtype is not weight.dtype or a.dtype is not b.dtype:
            return None
        if a.dtype is not x.dtype and not (a.dtype is torch.float32 and self.__dict__["cast_input_dtype_enabled"]):
            return None
        device = x.device
        if not (device == weight.device == a.device == b.device) or device.type == "meta" or autocasting(device.type):
            return None
        if not a.dim() == b.dim() == weight.dim() == 2 or a.shape[1] != x.shape[-1] or weight.layout is not torch.strided:
            return None
        return parts

    def _one_plain_adapter(self) -> tuple[torch.Tensor, torch.Tensor | None, Projection] | None:
        """Base weight, bias and what is added, where one plain adapter is active and nothing hooked."""
        own = self.__dict__
        active = own["_active_adapter"]
        if type(active) is list and len(active) == 1:
            active = active[0]
        if own["_disable_adapters"] or own["merged_adapters"] or own["lora_variant"] or type(active) is not str:
            return None
        modules = own["_modules"]
        base, a = modules["base_layer"], modules["lora_A"]._modules.get(active)
        if not (bare(base, nn.Linear) and bare(a, nn.Linear)):
            return None
        b, drop = modules["lora_B"]._modules[active], modules["lora_dropout"]._modules[active]
        if not (bare(b, nn.Linear) and (bare(drop, nn.Identity) or bare(drop, nn.Dropout))):
            return None
        base, a, b, scale = base._parameters, a._parameters, b._parameters, own["scaling"][active]
        # .get: DataParallel's replicas and FSDP hold them as attributes instead, which the general way finds.
        weight, a_bias, a = base.get("weight"), a.get("bias"), a.get("weight")
        b_bias, b = b.get("bias"), b.get("weight")
        if not (type(weight) is type(a) is type(b) is nn.Parameter and a_bias is b_bias is None and type(scale) is float):
            return None
        p = drop.p if drop.training and type(drop) is nn.Dropout else 0.0
        return weight, base["bias"], Projection(active, a, b, scale, p)

    def _mixed_batch_forward(self, x, *args, adapter_names, **kwargs):
        names = adapter_names if isinstance(adapter_names, Index) else Index(adapter_names)
        given = Input.of(x)
        plan = given.reason or self._projections(given, [n for n in dict.fromkeys(names) if n in self.lora_A])
        if not isinstance(plan, str) and any(one.magnitude is not None for one in plan):
            plan = "DoRA in a mixed batch"
        if isinstance(plan, str):
            self._count_peft(plan)
            return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in _ROUTED}
        y, rows = self.base_layer(x, *args, **kwargs), dict(names.rows(x.device))
        if plan:
            self._fastft.beside += 1
        for one in plan:
            own = rows[one.name]
            y[own] = _update(y[own], x[own], one)
        return y

    def _apply(self, fn, *args, **kwargs):
        self._fastft.norms.forget()
        return super()._apply(fn, *args, **kwargs)

    # ---- what PEFT changes base weights with: through weight.data, which no version counts

    def update_layer(self, *args, **kwargs):
        super().update_layer(*args, **kwargs)
        self._fastft.norms = RowNorms()  # OLoRA takes from the base what it gives to the adapter

    def merge(self, *args, **kwargs):
        self._fastft.norms = RowNorms()
        super().merge(*args, **kwargs)

    def unmerge(self):
        self._fastft.norms = RowNorms()
        super().unmerge()

    # ---- paths

    def plan(self, given) -> list[Projection] | str:
        """What the active adapters add to a forward on this `Input`, their norms left out, or why PEFT has to compute it.

        The base layer may be any.
        """
        if self.disable_adapters:
            return DISABLED
        if self.merged:
            return MERGED
        names = [name for name in self.active_adapters if name in self.lora_A]
        if not names:
            return INACTIVE
        return given.reason or self._projections(given, names)

    def _projections(self, given, names) -> list[Projection] | str:
        out = []
        for name in names:
            one = self._projection(name, given)
            if type(one) is str:
                return one
            if one.magnitude is not None and any(other.lora_bias is not None for other in out):
                return "DoRA after an adapter with lora_bias, which PEFT multiplies too"
            if one.magnitude is not None and self._corrects_a_part(name, out):
                return "DoRA with a dropout module in training, where PEFT leaves out of its correction what others add"
            out.append(one)
        return out

    def _corrects_a_part(self, name, before) -> bool:
        """Does PEFT take x Wᵀ alone into DoRA's correction, where the output holds more, of adapters `before` or of hooks?

        It does in training, wherever there is a dropout module, whatever its p: trainers switch dropout off by p = 0.
        """
        if not self.training or type(self.lora_dropout[name]) is nn.Identity:
            return False
        return bool(before) or not bare(self.base_layer, type(self.base_layer))

    def _projection(self, name, given) -> Projection | str:
        kinds, kind, variant = kinds_of_peft(), given.dtype, self.lora_variant.get(name)
        dora = type(variant) is kinds.dora
        if variant is not None and not dora and type(variant) not in kinds.as_plain:
            return f"variant {type(variant).__name__}"
        a, b, drop, scale = self.lora_A[name], self.lora_B[name], self.lora_dropout[name], self.scaling[name]
        if not (bare(a, nn.Linear) and bare(b, nn.Linear)) or a.bias is not None:
            return "lora_A or lora_B is hooked or no plain Linear"
        if not (bare(drop, nn.Identity) or bare(drop, nn.Dropout)):
            return f"dropout is a {type(drop).__name__}, or hooked"
        p = drop.p if type(drop) is nn.Dropout and drop.training else 0.0
        a, b, bias = a.weight, b.weight, b.bias
        if reason := unfit_factors(a, b, bias, given):
            return reason
        if a.dtype != kind and not (self.cast_input_dtype_enabled or given.autocast):
            return "casts of the input are switched off"
        if isinstance(scale, torch.Tensor):
            # Of hot-swapping: as a number it would stall a GPU, or be baked into a graph.
            a, b, scale, bias = a.float(), b.float() * scale, 1.0, None if bias is None else bias * scale
        elif a.dtype != b.dtype or (a.dtype != kind and a.dtype != torch.float32):
            a, b = a.float(), b.float()  # never narrower than what PEFT computes in
        if not dora:
            return Projection(name, a, b, scale, p, bias)
        base = self.base_layer
        if type(base) not in (nn.Linear, kinds.conv1d) or unfit_weight(base, given):
            return f"DoRA on a base layer that computes itself ({type(base).__name__})"
        if self.fan_in_fan_out != (type(base) is not nn.Linear):
            return "DoRA with a fan_in_fan_out that is not the base layer's"
        if p > 0 and self.training:
            return "DoRA with dropout, which PEFT also applies to the input of the magnitude's correction"
        magnitude = self.lora_magnitude_vector[name]
        if not bare(magnitude, kinds.dora_layer) or not is_plain(magnitude.weight, given):
            return "DoRA's magnitude is hooked or no plain tensor"
        return Projection(name, a, b, scale, 0.0, bias, magnitude.weight)

    def _with_norms(self, base, plan) -> list[Projection]:
        norms, transposed = self._fastft.norms, type(base) is not nn.Linear
        return [
            one
            if one.magnitude is None
            else one._replace(weight_norm=norms(base.weight, one.lora_A, one.lora_B, one.scale, transposed))
            for one in plan
        ]

    def _beside(self, y, x, plan):
        for one in plan:
            if one.magnitude is None:
                y = _update(y, x, one)
                continue
            bias = self.base_layer.bias
            u = _update(y if bias is None else (y - bias).to(y.dtype), x, one)
            total = factor(one.magnitude, one.weight_norm) * u
            y = (total if bias is None else total + bias).to(y.dtype)
        return y

    def _count_peft(self, reason) -> None:
        record = self._fastft
        if record.strict and reason not in IDLE:
            raise FallbackError(f"{record.name}: {reason}; so PEFT's own forward would run, which strict=True forbids")
        if not torch.compiler.is_compiling():
            record.peft += 1
            record.reason = reason


def _grouped(layer, x, index):
    """The output on a mixed batch that needs no gradient, all adapters in two launches; None where that can't be had."""
    bank = index.bank_of(layer)
    y = None if bank is None else add(bank, layer, x, index)
    if y is not None:
        layer.__dict__["_fastft"].beside += 1
    return y


_grouped_apart = torch.compiler.disable(_grouped)


@torch.compiler.disable
def _with_names(layer, x, index, args, kwargs):
    return layer.plain.forward(layer, x, *args, **{**kwargs, "adapter_names": index})


def _update(y, x, one: Projection):
    """y + the adapter's term on x, in the wider of their dtypes, rounded once to y's."""
    kind = torch.promote_types(y.dtype, Input.of(x).dtype)
    if kind not in DTYPES:  # what base layers may return
        kind = torch.float32
        return y + _update(torch.zeros_like(y, dtype=kind), x.to(kind), one).to(y.dtype)
    y_wide, x_wide = y.to(kind), x.to(kind)
    total = lora_update(y_wide, x_wide, one.lora_A, one.lora_B, one.scale, one.dropout, lora_bias=one.lora_bias)
    return total.to(y.dtype)
