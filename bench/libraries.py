"""Peers that are other libraries' GPU kernels, called as their users do, each absent with a reason.

unsloth   its fused LoRA linear: one autograd node, GEMMs into one output
liger     a Llama whose norms, rotations, SwiGLU and loss are Liger's Triton kernels; the LoRA on it is PEFT's, or ours
vllm      its LoRA kernels for many adapters, shrink and expand (from Punica), of 16-bit adapters
"""

import importlib.util
from contextlib import contextmanager

import torch

PACKAGES = {"unsloth": "unsloth", "liger": "liger-kernel", "vllm": "vllm"}
MODULES = {"unsloth": "unsloth", "liger": "liger_kernel", "vllm": "vllm"}


def missing(name: str, device: str) -> str | None:
    """Why a library can't be compared with on this device, or None."""
    name = name.rpartition(":")[2]
    if device != "cuda":
        return f"{PACKAGES[name]}'s kernels run on GPUs only"
    if importlib.util.find_spec(MODULES[name]) is None:
        return f"{PACKAGES[name]} is not installed (pip install {PACKAGES[name]})"
    return None


def absent(wanted, device: str) -> dict[str, str]:
    """Of the peers that are wanted, those libraries that can't be had, and why."""
    return {name: why for name in wanted if uses_one(name) and (why := missing(name, device))}


def usual(peers, device: str) -> list[str]:
    """Those peers that run where none is asked for: of libraries' kernels nothing is said on a CPU."""
    return [name for name in peers if device == "cuda" or not uses_one(name)]


def uses_one(name: str) -> bool:
    """Is it a library's, or ours together with one's (``fastft:liger``)?"""
    return name.rpartition(":")[2] in MODULES


def unsloth(d):
    """unsloth's fused linear with the inputs' adapters. It has no bias and no dropout; 16-bit activations round S and dS."""
    import unsloth  # noqa: F401  (first, or it complains)
    from unsloth.kernels.fast_lora import LoRA_W

    def layer(x):
        return LoRA_W.apply(x[None], d.weight, None, d.a, d.b, d.scale)[0]

    return layer


def unsloth_barred(d_bias: bool, p: float) -> str | None:
    """Why unsloth's fused linear can't be this layer, or None."""
    return "it has no bias" if d_bias else "it has no dropout" if p > 0 else None


def liger(prepare):
    """What `prepare` of `e2e.step` makes, on a model that Liger patched."""

    def prepared(model, d):
        from liger_kernel.transformers import apply_liger_kernel_to_llama
        from transformers.models.llama import modeling_llama

        with _restored(modeling_llama):
            apply_liger_kernel_to_llama(model=model)
            rotate = modeling_llama.apply_rotary_pos_emb
        inner = model.forward

        def forward(*arguments, **named):
            # Liger exchanges transformers' function for all models of the process; the other arms keep theirs.
            with _restored(modeling_llama):
                modeling_llama.apply_rotary_pos_emb = rotate
                return inner(*arguments, **named)

        model.forward = forward
        return prepare(model, d)

    return prepared


@contextmanager
def _restored(module):
    """What is exchanged in a module inside is put back."""
    before = dict(vars(module))
    try:
        yield
    finally:
        for name, value in vars(module).copy().items():
            if before.get(name) is not value:
                setattr(module, name, before[name])


def vllm(d, scale: float):
    """Builder's run over `ops.grouped`'s inputs: the GEMM of every site, then vLLM's shrink and expand."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    tokens, count = len(d.x[0]), len(d.adapters[0].a)
    rows = torch.empty(tokens, dtype=torch.int32, device=d.x[0].device)
    for slot, begin, end in d.segments.tolist():
        rows[begin:end] = slot
    meta = LoRAKernelMeta.make(count, tokens, device=rows.device)
    meta.prepare_tensors(rows)
    try:
        told = meta.meta_args(tokens, False)
    except TypeError:  # before it could make a kernel for each number of adapters
        told = meta.meta_args(tokens)
    stacks = []
    for site in d.adapters:
        outputs = range(len(site.a[0]))
        a = [torch.stack([own[j] for own in site.a]) for j in outputs]  # [D, R, K] an output
        b = [torch.stack([own[j] for own in site.b]) for j in outputs]  # [D, N, R]
        s = torch.empty(len(outputs), tokens, a[0].shape[1], dtype=torch.float32, device=rows.device)
        stacks.append((a, b, s))

    def run():
        found = {}
        with torch.no_grad():
            for i, (x, weight) in enumerate(zip(d.x, d.weights)):
                found[f"y{i}"] = y = torch.nn.functional.linear(x, weight)
                a, b, s = stacks[i]
                lora_shrink(x, a, s, *told, scale)
                lora_expand(s, b, y, *told, 0, True)
        return found

    return run


def vllm_barred(adapter: torch.dtype) -> str | None:
    """Why vLLM's kernels can't take adapters of this dtype, or None."""
    return None if adapter in (torch.float16, torch.bfloat16) else f"its kernels take 16-bit adapters, not {adapter}"
