"""PEFT's tuner (`LoraModel`) under acceleration: it accelerates what is added later, and routes mixed batches."""

from contextlib import contextmanager

from torch import nn

from .peft_layers import accelerate_layers
from .peft_mixed import Index, Routed, using
from .swapping import Swapped, swap


class FastTuner(Swapped):
    """Mixed into the class of any PEFT tuner whose layers were accelerated."""

    def inject_adapter(self, *args, **kwargs):
        result = super().inject_adapter(*args, **kwargs)
        accelerate_layers(self.model, self._fastft.strict)
        return result


class FastLoraModel(FastTuner):
    """Mixed into `LoraModel`."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        names, beams = kwargs.get("adapter_names"), kwargs.get("num_beams")
        beams = beams if isinstance(beams, int) else 1
        if names is None or kwargs.get("alora_offsets") is not None or self._will_refuse(names, beams):
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
            return
        with using(self._table(names, beams)):
            yield

    def _will_refuse(self, names, beams: int) -> bool:
        """Is this a call that PEFT refuses, in words of its own?"""
        from peft.tuners.lora.layer import LoraLayer

        known = {"__base__"}
        for layer in self.modules():
            if isinstance(layer, LoraLayer):
                known |= layer.lora_A.keys() | layer.lora_embedding_A.keys()
        return self.training or not known.issuperset(names) or (beams > 1 and not isinstance(names, list | tuple))

    def _table(self, names, beams: int) -> dict[nn.Module, Index]:
        """Every adapted module's names. Makes those that PEFT computes read them."""
        from peft.tuners.lora.layer import LoraLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        # Beam search repeats the samples, but not those of an encoder.
        index = Index(name for name in names for _ in range(beams))
        adapted = [module for module in self.modules() if isinstance(module, LoraLayer | AuxiliaryTrainingWrapper)]
        for module in adapted:
            if not isinstance(module, Swapped):
                swap(module, Routed, None)
        table = dict.fromkeys(adapted, index)
        if beams > 1 and hasattr(self.model, "get_encoder"):
            encoder = self.model.get_encoder()
            if encoder is not None and encoder is not self.model:
                own = Index(names)
                table.update((module, own) for module in encoder.modules() if module in table)
        return table
