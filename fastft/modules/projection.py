"""A layer's output with several adapters, one after the other."""

from typing import NamedTuple

import torch

from ..ops.lora_inference import lora_inference
from ..ops.lora_linear import SharedInput, lora_linear
from .norms import factor


class Projection(NamedTuple):
    """What one adapter adds to a forward of one module; tensors and numbers as in `ops.lora_linear.lora_linear`."""

    name: str
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scale: float
    dropout: float  # of this forward: 0 in evaluation
    lora_bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    weight_norm: torch.Tensor | None = None

    def options(self) -> dict[str, torch.Tensor | None]:
        """The keyword arguments of `SharedInput.project`."""
        return {"lora_bias": self.lora_bias, "magnitude": self.magnitude, "weight_norm": self.weight_norm}


def project(input, weight, bias, projections):
    """The output on input [..., K] with all these adapters on the base weight [N, K] and bias.

    Each turns the weight before it into W + scale · B A, and with a magnitude multiplies that by magnitude / weight_norm.
    """
    if len(projections) == 1:
        (one,) = projections
        return lora_linear(input, weight, bias, one.lora_A, one.lora_B, one.scale, one.dropout, **one.options())
    y = None
    for projection, (shared, i) in zip(projections, _share(input, projections)):
        b, scale = projection.lora_B, projection.scale
        if y is None:
            y = shared.project(i, weight, bias, b, scale, **projection.options())
        elif projection.magnitude is None:
            y = shared.update(i, y, b, scale, lora_bias=projection.lora_bias)
        else:
            y = _multiply(shared.update(i, y if bias is None else (y - bias).to(y.dtype), b, scale), projection, bias)
        if projection.lora_bias is not None and projection is not projections[-1]:  # a later magnitude doesn't multiply it
            extra = projection.scale * projection.lora_bias
            bias = extra if bias is None else bias + extra
    return y


def infer(input, weight, bias, one, norms):
    """The same with one adapter by `ops.lora_inference`; None where that is not for it. norms: of its `weight_norm`."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or one.dropout or one.lora_bias is not None:
        return None
    g = None if one.magnitude is None else norms.factor(one.magnitude, one.weight_norm)
    return lora_inference(input, weight, bias, one.lora_A, one.lora_B, one.scale, g)


def add(y, input, projections):
    """The output y [..., N] of a base layer on input [..., K], of equal dtype, with what these adapters add to it."""
    for projection, (shared, i) in zip(projections, _share(input, projections)):
        y = shared.update(i, y, projection.lora_B, projection.scale, lora_bias=projection.lora_bias)
    return y


def _multiply(u, projection, bias):
    y = factor(projection.magnitude, projection.weight_norm) * u
    return (y if bias is None else y + bias).to(u.dtype)


def _share(input, projections):
    """(SharedInput, index in it) for every projection: those of equal dropout and dtype share one read of the input."""
    alike: dict[tuple, list[Projection]] = {}
    for projection in projections:
        alike.setdefault((projection.dropout, projection.lora_A.dtype), []).append(projection)
    places = {}
    for (dropout, _), group in alike.items():
        shared = SharedInput(input, [projection.lora_A for projection in group], dropout)
        places.update({projection.name: (shared, i) for i, projection in enumerate(group)})
    return [places[projection.name] for projection in projections]
