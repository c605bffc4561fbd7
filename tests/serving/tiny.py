"""A tiny model, adapters of every kind for it on disk, and what a single request should give: the model with its adapter
merged."""

import copy
import time

import pytest
import torch

import fastft

transformers = pytest.importorskip("transformers")

VOCABULARY = 128


def llama(seed=0, dtype=torch.float32, **options):
    """2 layers, hidden 64. Weights three times as large as usual: logits that tell adapters apart."""
    torch.manual_seed(seed)
    config = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config.update(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    config.update(bos_token_id=None, eos_token_id=None, pad_token_id=None, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model.to(dtype)


def redraw(model):
    """The model, its matrices drawn so that attention and positions show in its tokens."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model


KINDS = {
    "lora1": lambda: fastft.LoRA(r=1, lora_alpha=2, target_modules="all-linear"),
    "lora4": lambda: fastft.LoRA(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]),
    "lora16": lambda: fastft.LoRA(r=16, lora_alpha=16, use_rslora=True, target_modules="all-linear"),
    "s2ft": lambda: fastft.S2FT(down_ratio=0.25, o_ratio=0.25, seed=1),
    "spiel": lambda: fastft.SpIEL(density=0.1, target_modules="all-linear", seed=2),
    "head": lambda: fastft.LoRA(r=4, lora_alpha=16, target_modules=["lm_head", "q_proj"]),
}


def save_adapter(folder, kind, seed, std=0.05):
    """An adapter of `llama()` with random values in `folder`; what was there is replaced."""
    model = llama()
    handle = fastft.attach(model, KINDS[kind]())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * std)
    handle.save(folder)


def merged(model, folder):
    """The plain model with the adapter in its weights."""
    return fastft.load(copy.deepcopy(model), folder).merge_and_unload().eval()


@torch.no_grad()
def greedy(model, prompt, count):
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)  # or it would be guessed, and 0 in a prompt taken for padding
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return tokens[0, len(prompt) :].tolist()


@torch.no_grad()
def worst_gap(model, completion):
    """How far the produced tokens' logits lie below the model's largest ones: 0 for tokens that it would choose itself."""
    prompt, tokens = completion.prompt_ids, completion.tokens
    logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :].float()
    return float((logits.amax(-1) - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]).max())


def prompt(length, seed):
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def waits_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "never happened"
        time.sleep(0.001)
