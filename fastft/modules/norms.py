"""The row norms by which DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353) divides its magnitudes."""

import weakref
from typing import NamedTuple

import torch

from ..ops.dora import dora_norm, inverse_norm, squared_row_norm
from .sharding import is_sharded, weights_come_and_go


class _Last(NamedTuple):
    """Norms and DoRA's factors, and copies of what they were made of."""

    squares: torch.Tensor  # ‖W‖², the very tensor that is kept
    scale: float
    a: torch.Tensor
    b: torch.Tensor
    norm: torch.Tensor
    magnitude: torch.Tensor | None = None
    factor: torch.Tensor | None = None


class RowNorms:
    """``‖W + scale · B A‖`` of a layer's rows; of it ‖W‖², which depends on the frozen weight alone, is kept.

    Of A and B no version tells whether they changed: fused optimizers, and writes through ``.data``, count none. (Writes
    through ``weight.data`` to the frozen weight itself are not seen for the same reason.) So what depends on them is kept
    with copies of them, with which they are compared: on a CPU, without gradients, as in generating, where each token would
    read all of W once more. Copies and pickles start empty. A compiled graph, and whoever shards a model, can't ask whether
    the weight changed: there all is computed each time.
    """

    def __init__(self):
        self._kept = None  # weak reference to W, what must not have changed, ‖W‖²
        self._last: _Last | None = None

    def __reduce__(self):
        return RowNorms, ()

    def forget(self) -> None:
        """Hold nothing of the weight: `Module.to` may swap its tensors, and refuses those that a weak reference knows."""
        self._kept = self._last = None

    def __call__(self, weight, lora_A, lora_B, scale, fan_in_fan_out=False):
        """[N] float32 (float64 of a float64 weight), no gradient; arguments as of `ops.dora.dora_norm`."""
        weight = weight.contiguous()
        squares, a, b = self._squares(weight, fan_in_fan_out), lora_A.detach(), lora_B.detach()
        if torch.compiler.is_compiling():
            return dora_norm(weight, squares, a, b, scale, fan_in_fan_out)
        if torch.is_grad_enabled() or not weight.is_cpu or self._kept is None or self._kept[2] is not squares:
            self._last = None
            return dora_norm(weight, squares, a, b, scale, fan_in_fan_out)
        last = self._last
        if last is None or last.squares is not squares or last.scale != scale or not (_same(last.a, a) and _same(last.b, b)):
            norm = dora_norm(weight, squares, a, b, scale, fan_in_fan_out)
            last = self._last = _Last(squares, scale, a.clone(), b.clone(), norm)
        return last.norm

    def kept_factor(self, weight, lora_A, lora_B, scale, magnitude):
        """`factor` of all this as it is kept, or None where it is not, or something has changed: with no more questions than
        it takes, as a GEMM has emptied the caches of what they need."""
        last, kept = self._last, self._kept
        if any(part is None for part in (weight, lora_A, lora_B, magnitude)):  # replicas hold them elsewhere
            return None
        if last is None or last.factor is None or kept is None or last.squares is not kept[2] or last.scale != scale:
            return None
        if kept[0]() is not weight or kept[1] != _state(weight) or weight.requires_grad or weights_come_and_go():
            return None
        same = _same(last.a, lora_A) and _same(last.b, lora_B) and _same(last.magnitude, magnitude)
        return last.factor if same else None

    def factor(self, magnitude, norm):
        """`factor`, of a norm that this gave: kept as that is."""
        last = self._last
        if last is None or last.norm is not norm:
            return factor(magnitude, norm)
        if last.factor is None or not _same(last.magnitude, magnitude):
            last = self._last = last._replace(magnitude=magnitude.detach().clone(), factor=factor(magnitude, norm))
        return last.factor

    def _squares(self, weight, fan_in_fan_out):
        if torch.compiler.is_compiling() or not _keeps_count(weight) or weights_come_and_go() or _swapping():
            return squared_row_norm(weight, fan_in_fan_out)
        if weight.requires_grad:
            self._kept = None
            return squared_row_norm(weight, fan_in_fan_out)
        state, kept = _state(weight), self._kept
        if kept is None or kept[0]() is not weight or kept[1] != state:
            kept = weakref.ref(weight), state, squared_row_norm(weight, fan_in_fan_out)
            # What is computed while a CUDA graph is captured holds its numbers only after the graph ran.
            if not (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
                self._kept = kept
        return kept[2]


def _state(weight) -> tuple:
    return weight.data_ptr(), weight._version, weight.dtype, weight.device


def _same(kept, now) -> bool:
    return kept.dtype is now.dtype and kept.device == now.device and torch.equal(kept, now)


def _keeps_count(weight) -> bool:
    """Does its version tell whether it changed? (Not of inference tensors; subclasses may have no memory of their own.)"""
    return type(weight) in (torch.Tensor, torch.nn.Parameter) and not weight.is_inference()


def _swapping() -> bool:
    """Does `Module.to` swap tensors? It refuses those that a weak reference knows."""
    return torch.__future__.get_swap_module_params_on_conversion()


def keep_wide(parameter, before: torch.Tensor, weight: torch.Tensor) -> None:
    """After a cast of the model, which rounds its weights: a magnitude stays at least float32, and as it was `before`.

    Not where it is sharded: fully_shard wants one dtype of all that it gathers together.
    """
    if not is_sharded(parameter) and parameter.dtype != (wide := torch.promote_types(weight.dtype, torch.float32)):
        parameter.data = before.to(parameter.device, wide)


def factor(magnitude, norm):
    """DoRA's factor of each row, magnitude / norm, differentiable in magnitude; a row of zeros has 0."""
    return magnitude.to(norm.dtype) * inverse_norm(norm)
