"""One batch on PEFT's path and on fastft's: do loss and gradients agree?

How far two right implementations may differ depends on the dtype and on what the model makes of rounding errors on their
way through it, so that is measured: PEFT's run is repeated with every adapted layer's output, and the gradient that comes
back through it, changed by as much as rounding does. A gradient may differ by `FACTOR` times what that changes it by;
something wrong in a layer (a scale, a mask, a missing term) changes its gradients by several per cent at least, in any
dtype. Rounding may also send a token to another expert, and one that gets no token has no gradient: what is missing counts
as zero where that happened without us, too.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..listing import listed
from .peft_sparse import sparse_kinds

FACTOR = 4.0  # each side rounds some more often than once per layer: base, low-rank term, their sum, an adapter's gradient
# Of one output: a 16-bit one is rounded once; a float32 one is also a sum of thousands of rounded terms.
_NOISE = {torch.float32: 4.0, torch.bfloat16: 0.5, torch.float16: 0.5, torch.float64: 4.0}  # in units of the dtype's eps
NOISY_RUNS = 4  # a token between two experts stays where it was in about half of them
SHOWN = 10


class CheckError(RuntimeError):
    """Loss or gradients on fastft's path are not those of PEFT's."""


@dataclass(frozen=True)
class Difference:
    """Of the loss or of one parameter's gradient: ‖ours - PEFT's‖ / ‖PEFT's‖ (of a gradient of zero: / ‖noise‖), and how
    large it may be."""

    name: str
    error: float
    allowed: float

    @property
    def excess(self) -> float:
        return self.error / self.allowed if self.error == self.error else float("inf")


def compare(model: nn.Module, batch, accelerate) -> list[Difference]:
    """Check `batch` on `model` as it is, then again after `accelerate()`; prints the parameters that differ most.

    The model runs in evaluation mode, so without any dropout. Gradients, training modes and the random state are as before.

    Args:
        batch: the model's arguments as a dict, among them labels, or a function of the model that returns the loss.

    Raises:
        CheckError: a difference is larger than allowed, after the table was printed.
        ValueError: the model returns no loss, or what PEFT computes is not finite.
    """
    with _undisturbed(model):
        plain = _run_of_peft(model, batch)
        noise, moved = dict.fromkeys(plain, 0.0), set()
        with _rounding_noise(model) as dtypes:
            for _ in range(NOISY_RUNS):
                noisy = _run_of_peft(model, batch)
                moved |= noisy.keys() ^ plain.keys()
                for name in {**plain, **noisy}:
                    noise[name] = max(noise.get(name, 0.0), _distance(noisy.get(name), plain.get(name)))
        accelerate()
        own = _run(model, batch)
    # One number can come out of the noise unchanged by luck, so the loss may differ by a rounding in any case.
    floors = {"loss": max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)}
    differences = []
    for name in {**plain, **own}:
        ours, theirs, floor = own.get(name), plain.get(name), floors.get(name, 0.0)
        missing = (ours is None) != (theirs is None) and name not in moved
        differences.append(_difference(name, ours, theirs, noise.get(name, 0.0), floor, missing))
    worst = sorted(differences, key=lambda d: d.excess, reverse=True)
    print(_table(worst[:SHOWN], len(differences)))
    if wrong := [d for d in worst if not d.excess <= 1]:
        found = ", ".join(f"{d.name} by {d.error:.2g} (allowed {d.allowed:.2g})" for d in wrong[:5])
        if moved := sorted(moved | own.keys() ^ plain.keys()):
            raise CheckError(
                f"{listed(moved)} had a gradient in some of the runs only, and {len(wrong)} of {len(differences)} differ: "
                f"{found}. Either rounding sends tokens of this batch to other experts, or something is wrong on fastft's "
                "path: a check of the model in float32 (model.float()) or on more tokens tells which"
            )
        raise CheckError(f"{len(wrong)} of {len(differences)} differ from PEFT's: {found}")
    return differences


def _run(model, batch) -> dict[str, torch.Tensor]:
    """The loss, as "loss", and the gradients."""
    model.zero_grad(set_to_none=True)
    loss = batch(model) if callable(batch) else getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError("the model returned no loss for this batch; it needs labels, or pass a function that returns one")
    if loss.requires_grad:
        loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def _run_of_peft(model, batch) -> dict[str, torch.Tensor]:
    found = _run(model, batch)
    if bad := [name for name, value in found.items() if not value.isfinite().all()]:
        what = f"loss is {found['loss'].item()}" if "loss" in bad else f"gradients are not finite ({listed(bad)})"
        raise ValueError(
            f"PEFT's own {what} on this batch, so there is nothing to compare with; give another batch (one with labels to "
            "predict), or look for what overflows in the model (float16 ends at 65504: try bfloat16 or float32)"
        )
    return found


@contextmanager
def _undisturbed(model):
    training = {module: module.training for module in model.modules()}
    gradients = {p: p.grad for p in model.parameters()}
    devices = sorted({p.device.index for p in gradients if p.device.type == "cuda"})
    model.eval()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


@contextmanager
def _rounding_noise(model):
    """Yields the set of the dtypes that outputs of the layers, and of 16-bit factors in them, turn out to have."""
    from peft.tuners.lora.layer import LoraLayer

    dtypes = set()

    def round_again(module, args, y):
        if not isinstance(y, torch.Tensor) or y.dtype not in _NOISE:
            return y
        dtypes.add(y.dtype)
        # In float32, so that the factor itself is not rounded away; the gradient is multiplied by it on its way back.
        wide = torch.promote_types(y.dtype, torch.float32)
        noise = torch.randn(y.shape, dtype=wide, device=y.device) * (_NOISE[y.dtype] * torch.finfo(y.dtype).eps)
        return (y.to(wide) * (1 + noise)).to(y.dtype)

    def round_factor(module, args, y):
        """PEFT rounds what A and B give to their dtype, which may be narrower than that of the layer's output."""
        return round_again(module, args, y) if y.dtype.itemsize == 2 else y

    layers = [module for module in model.modules() if isinstance(module, (LoraLayer, *sparse_kinds()))]
    lora = [layer for layer in layers if isinstance(layer, LoraLayer)]
    factors = [part for layer in lora for part in (*layer.lora_A.values(), *layer.lora_B.values())]
    handles = [layer.register_forward_hook(round_again) for layer in layers]
    handles += [part.register_forward_hook(round_factor) for part in factors]
    try:
        yield dtypes
    finally:
        for handle in handles:
            handle.remove()


def _distance(one, other) -> float:
    """‖one - other‖, where None, no gradient, is zero."""
    one, other = (None if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in (one, other))
    return torch.linalg.vector_norm(other if one is None else one if other is None else one - other).item()


def _difference(name, own, want, noise, floor, missing) -> Difference:
    floor = max(floor, torch.finfo((own if want is None else want).dtype).eps * FACTOR)  # where nothing before this rounds
    error, size = _distance(own, want), noise if want is None else _distance(want, None) or noise
    if missing or size == 0:  # as of an A whose B is still zero
        return Difference(name, float("inf") if missing or error else 0.0, floor)
    return Difference(name, error / size, max(FACTOR * noise / size, floor))


def _table(worst, count) -> str:
    lines = [("", "differs by", "allowed"), *((d.name, f"{d.error:.2e}", f"{d.allowed:.2e}") for d in worst)]
    width = max(len(line[0]) for line in lines)
    title = f"fastft beside PEFT on one batch, relative: the {len(worst)} largest of {count}, each by what it may be"
    return "\n".join([title, *(f"{name:{width}}  {error:>10}  {allowed:>8}" for name, error, allowed in lines)])
