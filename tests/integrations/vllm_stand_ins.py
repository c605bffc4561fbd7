"""What of vLLM the plugin meets, rebuilt small: the names and signatures that were read in vLLM 0.32 and 0.33.
`tests/vllm` compares these with the real ones."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass
class LoRAMapping:
    index_mapping: tuple
    prompt_mapping: tuple
    is_prefill: bool = True


@dataclass
class LoRAConfig:
    max_loras: int
    max_lora_rank: int = 64


class PunicaWrapperBase(ABC):
    def __init__(self, max_num_batched_tokens, max_batches, device, **kwargs):
        self.device = device

    def _update_base_metadata(self, mapping, lora_index_to_id, max_loras, vocab_size):
        slots = [lora_index_to_id.index(i) if i > 0 else -1 for i in mapping.prompt_mapping]
        self._sampler_indices = torch.tensor(slots, dtype=torch.long)

    @property
    def sampler_indices(self):
        return self._sampler_indices

    def _select_full_linear_output(self, y, adapter_y, bias_stacked, module_enabled):
        safe = self.sampler_indices.clamp_min(0)
        full = adapter_y.to(y.dtype) + bias_stacked[safe].to(y.dtype)
        return torch.where(((self.sampler_indices >= 0) & module_enabled[safe])[:, None], full, y)

    def update_metadata(self, mapping, lora_index_to_id, max_loras, vocab_size, **kwargs):
        raise NotImplementedError

    @abstractmethod
    def add_shrink(self, y, x, lora_a_stacked, scale, **kwargs): ...

    @abstractmethod
    def add_expand(self, y, x, lora_b_stacked, output_slices, offset_start=0, add_inputs=True, **kwargs): ...

    @abstractmethod
    def add_lora_embedding(self, y, x, lora_b_stacked, add_inputs=True, **kwargs): ...

    @abstractmethod
    def add_lora_linear(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, *, buffer=None, **kwargs): ...

    @abstractmethod
    def add_lora_logits(self, y, x, lora_a_stacked, lora_b_stacked, scale, *, buffer=None, **kwargs): ...

    @abstractmethod
    def apply_lora_full_linear(self, y, x, weight_stacked, bias_stacked, module_enabled): ...

    def moe_lora_align_block_size(self, topk_ids, num_tokens, block_size, num_experts, max_loras, adapter_enabled):
        raise NotImplementedError

    def add_lora_fused_moe(self, y, x, lora_a_stacked, lora_b_stacked, topk_weights):
        raise NotImplementedError

    def add_lora_w13(self, y, x, lora_a_stacked, lora_b_stacked, topk_ids, topk_weights):
        raise NotImplementedError

    def add_lora_w2(self, y, x, lora_a_stacked, lora_b_stacked, topk_weights):
        raise NotImplementedError


class Layer:
    """A layer with LoRA: vLLM's stacks and how it fills them."""

    def __init__(self, slots, rank, k, widths, dtype=torch.float32):
        self.output_slices = tuple(widths)
        self.lora_a_stacked = tuple(torch.zeros(slots, 1, rank, k, dtype=dtype) for _ in widths)
        self.lora_b_stacked = tuple(torch.zeros(slots, 1, n, rank, dtype=dtype) for n in widths)

    def reset_lora(self, index):
        for stack in (*self.lora_a_stacked, *self.lora_b_stacked):
            stack[index] = 0

    def set_lora(self, index, lora_a, lora_b):
        self.reset_lora(index)
        for stack, own in (
            (s, o) for pair in ((self.lora_a_stacked, lora_a), (self.lora_b_stacked, lora_b)) for s, o in zip(*pair)
        ):
            if own is not None:
                stack[index, 0, : own.shape[0], : own.shape[1]].copy_(own, non_blocking=True)


class LoRAModelManager:
    """Adapters by number: {layer name: (list of A, list of B)}; the first free slot is taken, as vLLM does."""

    def __init__(self, layers, slots, wrapper):
        self.modules, self.adapters = layers, {}
        self.punica_wrapper_mapping = {"language_model": wrapper}
        self.lora_index_to_id = [None] * slots
        self._last = None

    def activate_adapter(self, lora_id):
        if lora_id in self.lora_index_to_id:
            return False
        index = self.lora_index_to_id.index(None)
        self.lora_index_to_id[index] = lora_id
        for name, layer in self.modules.items():
            if name in self.adapters[lora_id]:
                layer.set_lora(index, *self.adapters[lora_id][name])
            else:
                layer.reset_lora(index)
        return True

    def deactivate_adapter(self, lora_id):
        self.lora_index_to_id[self.lora_index_to_id.index(lora_id)] = None

    def set_adapter_mapping(self, mapping):
        now = mapping, tuple(self.lora_index_to_id)
        if now != self._last:  # nothing is told of weights that changed in place
            for wrapper in self.punica_wrapper_mapping.values():
                wrapper.update_metadata(mapping, self.lora_index_to_id, len(self.lora_index_to_id) + 1, 0)
            self._last = now


def platform(name, device):
    """What `current_platform` is there: `device` is torch's name of the devices."""

    class Platform:
        device_type = device

        def is_cuda(self):
            return name == "cuda"

        def is_cpu(self):
            return name == "cpu"

        @classmethod
        def get_punica_wrapper(cls):
            return "theirs"

    return Platform()
