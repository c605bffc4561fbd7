"""vLLM with fastft's kernels for LoRA: a plugin (entry point group ``vllm.general_plugins``), so installing is enough.

vLLM keeps its engine, tensor parallelism (it slices weights before they reach its stacks), adapter slots and server. What
changes is the mathematics of its LoRA layers: the cost follows the true ranks of the adapters in a batch, not
``max_lora_rank``; rows without an adapter are not touched; results are the same from run to run (no float atomics). It costs
memory: `vllm_sites` keeps a second copy of vLLM's stacks.

Written against vLLM 0.32 and 0.33; ``VLLM_PLUGINS=""`` starts vLLM without it. Importing this module does not import vLLM.
"""

import functools
import inspect
import logging

import torch

from . import vllm_sites
from .vllm_sites import Route, Sites

WRAPPER = f"{__name__}.FastftPunicaWrapper"


def register() -> None:
    """The plugin's entry point: vLLM calls it in each of its processes, maybe more than once."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda() or current_platform.is_cpu():  # (device_type is "cuda" on AMD's ROCm, too)
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: WRAPPER)
    else:
        logging.getLogger(__name__).warning(
            "fastft has kernels for NVIDIA GPUs and for CPUs, none for vLLM's %s: vLLM uses its own for LoRA",
            type(current_platform).__name__,
        )


def __getattr__(name):
    if name == WRAPPER.rpartition(".")[2]:  # how vLLM finds the class that `register` named
        return _wrapper_of_vllm()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _wrapper_of_vllm() -> type:
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

    tell_activations(LoRAModelManager)
    return wrapper_class(PunicaWrapperBase)


def tell_activations(manager: type) -> None:
    """Make `manager.activate_adapter` tell our wrappers which slot was filled. An adapter that is loaded again in place
    (``load_inplace``) changes neither mapping nor slots, so vLLM asks for no new metadata then."""
    activate = manager.activate_adapter

    @functools.wraps(activate)
    def activate_adapter(self, lora_id, *args, **kwargs):
        wrappers = [w for w in set(self.punica_wrapper_mapping.values()) if hasattr(w, "sites")]
        for wrapper in wrappers:
            wrapper.sites.refresh()  # changes of other slots, which would pass for seen afterwards
        activated = activate(self, lora_id, *args, **kwargs)
        if activated:
            slot = self.lora_index_to_id.index(lora_id)
            for wrapper in wrappers:
                wrapper.sites.refresh(slice(slot, slot + 1))
        return activated

    manager.activate_adapter = activate_adapter


def obstacles(wrapper: type) -> list[str]:
    """Why this wrapper does not fit the class of vLLM's that it is made from; empty if it does."""
    base, missing = wrapper.__base__, []
    for name in ("_update_base_metadata", "_select_full_linear_output", "sampler_indices"):
        if not hasattr(base, name):
            missing.append(f"no {name}")
    for name, own in vars(wrapper).items():
        if not inspect.isfunction(own) or name == "__init__":
            continue
        if not hasattr(base, name):
            missing.append(f"no {name}")
            continue
        known = inspect.signature(own).parameters
        for parameter in inspect.signature(getattr(base, name)).parameters.values():
            if parameter.name not in known and parameter.kind is not parameter.VAR_KEYWORD and own is not _no_experts:
                missing.append(f"{name} has a parameter {parameter.name}")
    return missing + [f"{name} is abstract" for name in sorted(getattr(wrapper, "__abstractmethods__", ()))]


def _no_experts(self, *args, **kwargs):
    raise NotImplementedError(
        "fastft's vLLM plugin has no LoRA on mixtures of experts. Leave the experts without adapters (--lora-target-modules "
        'q_proj k_proj v_proj o_proj), or start vLLM with VLLM_PLUGINS="" to run its own LoRA kernels'
    )


def _flat(tensor):
    return tensor.reshape(-1, tensor.shape[-1])


def _call(op: str, *args):
    """Within a graph of torch.compile as one opaque op, which is given the route by its tensor; else straight."""
    if torch.compiler.is_compiling():
        *args, route = args
        getattr(torch.ops.fastft_vllm, op)(*args, route.segments)
    else:
        getattr(vllm_sites, op)(*args)


def wrapper_class(base: type) -> type:
    """Our wrapper as a subclass of vLLM's PunicaWrapperBase; shapes and meanings are those of its docstrings, and all
    results are written in place. Raises RuntimeError for a base that it does not fit."""

    class FastftPunicaWrapper(base):
        def __init__(self, max_num_batched_tokens, max_batches, device, **kwargs):
            super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
            slots = kwargs["lora_config"].max_loras
            self.sites = Sites()
            self.tokens = Route(self.sites, slots, max_num_batched_tokens, device)
            self.samples = Route(self.sites, slots, max_num_batched_tokens, device)  # rows that logits are asked for

        def update_metadata(self, mapping, lora_index_to_id, max_loras, vocab_size, **kwargs):
            self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
            self.is_prefill = mapping.is_prefill
            slot_of = {lora_id: slot for slot, lora_id in enumerate(lora_index_to_id) if lora_id is not None}
            self.tokens.fill(mapping.index_mapping, slot_of)
            self.samples.fill(mapping.prompt_mapping, slot_of)
            self.no_lora = not self.tokens.active
            self.sites.refresh()

        def add_lora_linear(
            self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, *, buffer=None, add_inputs=True, **kwargs
        ):
            slices = list(output_slices)
            _call(
                "linear_",
                _flat(y),
                _flat(x),
                list(lora_a_stacked),
                list(lora_b_stacked),
                slices,
                scale,
                add_inputs,
                self.tokens,
            )

        def add_shrink(self, y, x, lora_a_stacked, scale, **kwargs):
            x = _flat(x)
            for at, stack in enumerate(lora_a_stacked):
                _call("shrink_", y[at], x, stack, scale, self.tokens)

        def add_expand(self, y, x, lora_b_stacked, output_slices, offset_start=0, add_inputs=True, **kwargs):
            parts, slices = list(x), list(output_slices)
            _call("expand_", _flat(y), parts, list(lora_b_stacked), slices, offset_start, add_inputs, self.tokens)

        def add_lora_embedding(self, y, x, lora_b_stacked, add_inputs=True, **kwargs):
            _call("expand_", _flat(y), [_flat(x)], [lora_b_stacked], [y.shape[-1]], 0, add_inputs, self.tokens)

        def add_lora_logits(self, y, x, lora_a_stacked, lora_b_stacked, scale, *, buffer=None, **kwargs):
            y = _flat(y)
            _call("linear_", y, _flat(x), [lora_a_stacked], [lora_b_stacked], [y.shape[1]], scale, True, self.samples)

        def apply_lora_full_linear(self, y, x, weight_stacked, bias_stacked, module_enabled):
            own = torch.empty(len(x), weight_stacked.shape[-2], dtype=torch.float32, device=x.device)
            _call("shrink_", own, x, weight_stacked, 1.0, self.samples)
            y.copy_(self._select_full_linear_output(y, own, bias_stacked, module_enabled))

        moe_lora_align_block_size = add_lora_fused_moe = add_lora_w13 = add_lora_w2 = _no_experts

    if missing := obstacles(FastftPunicaWrapper):
        raise RuntimeError(
            f"fastft does not know this vLLM's {base.__name__}: {'; '.join(missing)}. Use vLLM 0.32 or 0.33, or start vLLM "
            'with VLLM_PLUGINS="" to run its own LoRA kernels'
        )
    return FastftPunicaWrapper
