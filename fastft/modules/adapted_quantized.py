"""What a linear layer with a quantised weight becomes while adapters are attached to it.

    y = base(x) + scale · (dropout(x) Aᵀ Bᵀ + lora_bias), or base(x) + x deltaᵀ, for every active adapter

The base's own forward and backward run as they would without adapters, whatever its library; the kernels add the adapter's
part in the dtype of its output. Nothing is ever written into the codes: see `code_obstacle`.
"""

import torch

from ..ops.registry import without_autocast
from .adapted_linear import AdaptedLinear
from .projection import add
from .quantized import quantization


class AdaptedQuantized(AdaptedLinear):
    """Mixed into quantised linear layers; what adapters hold is as in `AdaptedLinear`."""

    # Where it is True, bitsandbytes' Linear4bit rearranges its weight in the first forward of evaluation, with 16-bit
    # scales and without a backward: an evaluation before training would change the base and cut its gradients off.
    support_avx512bf16_for_cpu = property(lambda self: False)

    def code_obstacle(self):
        return (
            f"its weight is quantised ({quantization(self)}), and W + delta would have to be rounded to that coarse grid "
            'again, which loses most of what was trained. merge_and_unload(target="dequantized") makes plain layers of it; '
            "better, merge into the original 16-bit weights: load the unquantised checkpoint, fastft.load(model, adapter) "
            "and merge_and_unload(), or `fastft merge`"
        )

    def forward(self, input, *args, **kwargs):
        on = [adapter for adapter in self._adapters.values() if adapter.on()]
        y = self._plain_forward(self._copies(on), input, *args, **kwargs)
        projections = [self._projection(adapter.name, None) for adapter in on if adapter.name in self._settings]
        sparse = [adapter.name for adapter in on if adapter.name in self._parts]
        if not projections and not sparse:
            return y
        if sparse:
            self.refuse_replica()
        if input.requires_grad and torch.is_grad_enabled() and not y.requires_grad:
            raise RuntimeError(
                f"the forward of this {quantization(self)} layer has no backward, so nothing before it can be trained; "
                "load the model with a kernel that supports training (bitsandbytes: attach before the first evaluation)"
            )
        with without_autocast(y.device.type):  # y has been rounded as the base wants it
            x = input.to(y.dtype)
            for name in sparse:
                y = self._parts[name].update(self, name, x, y)
            if not projections:
                return y
            if len(projections) == 1 and not torch.compiler.is_compiling():
                group = self._groups.get(projections[0].name)
                added = None if group is None else group.add(self, x, y, projections[0])
                if added is not None:
                    return added
            return add(y, x, projections)
