"""The adapters of PEFT's mixed batches, laid out for the grouped ops: a layer's in one store, made when first named.

B lies transposed there, so an adapter that was named takes its memory twice until `fastft.restore`. Before each batch every
adapter in it is compared with the parameters it was made of (`peft_watch`) and made again where one changed. Not seen are
writes through ``.data`` that keep the memory and those of another process to shared memory, which no version counts (after
an optimizer's step and PEFT's own such writes all is made again), and what only later makes an adapter unfit, as a hook on
its lora_A or another module as its dropout (switching dropout on or off is seen).
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..modules import huge_pages
from ..ops.grouped import FIELDS, LOW_RANK, grouped_add_, grouped_expand_, grouped_shrink, in_one_call, scale_bits
from .peft_eligible import DTYPES, PLAIN, autocasting, bare, unfit
from .peft_watch import Factors, Layers

_ALIGNED = 64  # bytes
_PLAIN_BIAS = (nn.Parameter, type(None))


class _Chosen(NamedTuple):
    """What adds a layer's adapters, and for which conditions and dtype of x."""

    op: Callable
    conditions: tuple
    dtype: torch.dtype


@dataclass(slots=True)
class LayerBank:
    """One layer's adapters in one store; none of them if `store` is None."""

    unfit: dict[str, str]  # adapters that are not in the store -> why
    store: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    pieces: torch.Tensor | None = None
    width: int = 0
    chosen: _Chosen | None = None


class Bank:
    """All layers' adapters of one PEFT model; `prepare` before each batch, `add` in each layer."""

    def __init__(self):
        self._slots: dict[str, int] = {}
        self._banks: dict[nn.Module, LayerBank] = {}
        self._layers = Layers(())
        self._made_of: dict[str, Factors] = {}
        self._lock = threading.Lock()

    def prepare(self, layers: list, names) -> tuple[dict[nn.Module, LayerBank], dict[str, int]]:
        """Which layers can take all these adapters, and the adapters' slots."""
        with self._lock:
            for name in names:
                self._slots.setdefault(name, len(self._slots))
            self._update(layers, names)
            banks = zip(layers, map(self._banks.__getitem__, layers), strict=True)
            usable = {layer: bank for layer, bank in banks if bank.store is not None and bank.unfit.keys().isdisjoint(names)}
            return usable, self._slots

    def _update(self, layers, names) -> None:
        """Lay these adapters out again where they changed. A failure on the way leaves everything as it was."""
        if not self._layers.are(layers):
            self._layers, self._banks, self._made_of = Layers(layers), {}, {}
        found, changed = {}, set()
        for name in names:
            before = self._made_of.get(name)
            if before is None or not before.unchanged():
                now = found[name] = Factors(self._layers, name)
                changed.update(range(len(layers)) if before is None else now.changed_in(before))
        if not found:
            return
        # The others in these layers are laid out with them, as they are now: forget those that are not what they were.
        kept = {name: own for name, own in self._made_of.items() if name not in found and own.unchanged()} | found
        # New ones: other threads may be using the old.
        self._banks.update({layers[i]: self._make(layers[i], kept) for i in sorted(changed)})
        self._made_of = kept

    def _make(self, layer, names) -> LayerBank:
        made = LayerBank({})
        present, kind = {}, None
        for name in names:
            if name not in layer.lora_A or name not in layer.lora_B:
                continue
            factors = _factors(layer, name)
            if isinstance(factors, str):
                made.unfit[name] = factors
                continue
            kind = kind or (factors[0].dtype, factors[0].device)
            if kind != (factors[0].dtype, factors[0].device):
                made.unfit[name] = "its dtype or device is not that of the layer's other adapters"
                continue
            present[name] = factors
        if present:
            _lay_out(made, present, self._slots, *kind)
        return made


def _lay_out(made: LayerBank, present, slots, dtype, device) -> None:
    unit = _ALIGNED // dtype.itemsize
    parts, offsets, at = [], [], 0
    pieces = torch.zeros(len(slots), 1, len(FIELDS), dtype=torch.int64)
    for name, (a, b, scale) in present.items():
        (r, k), n = a.shape, b.shape[0]
        left = len(offsets)
        for matrix in (a, b.t()):
            rows, width = matrix.shape
            padded = -(-width // unit) * unit
            part = torch.zeros(rows, padded, dtype=dtype, device=device)
            part[:, :width] = matrix
            parts.append(part.view(-1))
            offsets += range(at, at + rows * padded, padded)
            at += rows * padded
        pieces[slots[name], 0] = torch.tensor([LOW_RANK, r, left, left + r, 0, k, 0, n, 0, scale_bits(scale)])
        made.width = max(made.width, r)
    made.store, made.offsets = huge_pages.cat(parts), torch.tensor(offsets, dtype=torch.int64, device=device)
    made.columns, made.pieces = torch.zeros(0, dtype=torch.int16, device=device), pieces.to(device)


def _factors(layer, name):
    """(A, B, scale) of an adapter, or why it can't be grouped."""
    a, b, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    if layer.lora_variant.get(name) is not None:
        return "a variant of LoRA"
    if not (bare(a, nn.Linear) and bare(b, nn.Linear)) or a.bias is not None or b.bias is not None:
        return "lora_A or lora_B is hooked, has a bias, or is no plain Linear"
    drop = layer.lora_dropout[name]
    if not (bare(drop, nn.Identity) or (bare(drop, nn.Dropout) and not (drop.training and drop.p))):
        return "its dropout is on, hooked, or no plain Dropout"
    a, b = a.weight, b.weight
    if type(a) not in PLAIN or type(b) not in PLAIN or a.dtype not in DTYPES or a.dtype != b.dtype or a.device != b.device:
        return "lora_A and lora_B are no plain tensors of one dtype and device"
    if type(scale) is not float or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.is_meta:
        return "the scale is a tensor, or lora_A and lora_B don't fit"
    if a.is_inference() or b.is_inference():
        return "lora_A or lora_B was made under inference_mode, so that nothing tells when it changes"
    return a.detach(), b.detach(), scale


def add(bank: LayerBank, layer, x, index):
    """The layer's output on x with every sample's adapter, or None where it has to be computed another way."""
    own = layer.__dict__
    if own["_disable_adapters"] or own["merged_adapters"]:
        return None
    dtype, chosen = x.dtype, bank.chosen
    # As few questions as can be: a GEMM leaves nothing of them in the caches, so each took 1 to 2 us, 40 a layer.
    known = (
        index.usual
        and chosen is not None
        and (chosen.dtype is dtype and chosen.conditions == index.conditions)
        and type(x) is torch.Tensor
        and (x.is_cpu and x.layout is torch.strided and not x.is_nested)
        and (dtype is bank.store.dtype or own["cast_input_dtype_enabled"])
    )
    if not known and _refused(bank, own, x):
        return None
    shape = x.shape
    if len(index) != shape[0]:
        return None
    y = _base(own["_modules"]["base_layer"], x)
    if type(y) is not torch.Tensor or y.dtype is not dtype or not y.is_contiguous():
        return None
    length, segments, assignments = index.last
    if not known or len(shape) != 3 or shape[1] != length:
        length = shape[1:-1].numel()
        segments, assignments = index.routing(x.device, length)
        index.last = (length if x.is_cpu else None), segments, assignments
    plan = bank.pieces, segments, assignments
    op = chosen.op if known else _choose(bank, index, y, x, *plan)
    if op is not None:
        op(y, x.contiguous(), bank.store, bank.offsets, bank.columns, *plan, None, 1, bank.width)
    else:
        rows, out = x.reshape(-1, shape[-1]), y.view(-1, y.shape[-1])
        s = grouped_shrink(rows, bank.store, bank.offsets, *plan, 1, bank.width)
        grouped_expand_(out, rows, s, bank.store, bank.offsets, bank.columns, *plan, None, 1)
    return y


def _refused(bank, own, x) -> bool:
    """Can't x go through the layer's store?"""
    store, device = bank.store, x.device
    return bool(
        unfit(x)
        or store.device != device
        or (store.dtype is not x.dtype and store.dtype is not torch.float32)
        or autocasting(device.type)
        or not (x.dtype is store.dtype or own["cast_input_dtype_enabled"])
    )


def _base(base, x):
    """The base layer's output, past the module call of a plain linear."""
    if not bare(base, nn.Linear):
        return base(x)
    own = base._parameters
    weight, bias = own.get("weight"), own.get("bias")
    return F.linear(x, weight, bias) if type(weight) is nn.Parameter and type(bias) in _PLAIN_BIAS else base(x)


def _choose(bank, index, y, x, *plan):
    """What adds in one call, or None where there are its halves alone; the same from batch to batch, as a rule."""
    if not in_one_call(x.device):
        return None
    if index.conditions is None:  # somebody records the launches
        return grouped_add_
    op = grouped_add_.direct(y, x, bank.store, bank.offsets, bank.columns, *plan, None, 1, bank.width)
    bank.chosen = _Chosen(op, index.conditions, x.dtype)
    return op
