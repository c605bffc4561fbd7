"""A tiny Llama, LoRA folders in PEFT's format, and what one request should give: the model with its adapter merged."""

import json

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 512
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def model(**options):
    """Weights larger than usual: logits that tell adapters apart."""
    torch.manual_seed(0)
    config = {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}
    config.update(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False)
    config.update(bos_token_id=None, eos_token_id=None, pad_token_id=None, **options)
    made = LlamaForCausalLM(LlamaConfig(**config)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return made


def adapter(base, folder, rank, *, alpha=16, rslora=False, targets=LINEARS, seed=0):
    """Writes a LoRA folder; returns it with what it adds to each weight, by name."""
    generator = torch.Generator().manual_seed(seed)
    tensors, deltas = {}, {}
    scale = alpha / rank**0.5 if rslora else alpha / rank
    for name, module in base.named_modules():
        if name.rpartition(".")[2] not in targets:
            continue
        out_features, in_features = module.weight.shape
        a = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        b = torch.randn(out_features, rank, generator=generator) / rank
        tensors[f"base_model.model.{name}.lora_A.weight"], tensors[f"base_model.model.{name}.lora_B.weight"] = a, b
        deltas[name] = scale * b @ a
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "use_rslora": rslora}
    config.update(target_modules=list(targets), bias="none", lora_dropout=0.0, inference_mode=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder), deltas


@torch.no_grad()
def greedy(base, deltas, prompt, tokens):
    """What the merged model says, alone."""
    before = {}
    for name, delta in deltas.items():
        weight = base.get_submodule(name).weight
        before[name] = weight.clone()
        weight += delta
    out = base.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)[0, len(prompt) :].tolist()
    for name, weight in before.items():
        base.get_submodule(name).weight.copy_(weight)
    return out
