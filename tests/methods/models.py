"""Small random models, and what `assert_same` compares before and after."""

import pytest
import torch

import fastft

transformers = pytest.importorskip("transformers")


def llama(seed=0, **options):
    torch.manual_seed(seed)
    config = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config.update(num_key_value_heads=1, max_position_embeddings=32, bos_token_id=None, eos_token_id=None)
    config.update(attention_bias=True, mlp_bias=True)
    return _with_biases(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, **options})))


def gpt2(seed=0, **options):
    torch.manual_seed(seed)
    config = {
        "vocab_size": 50,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 32,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config.update(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return _with_biases(transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**config, **options})))


def _with_biases(model):
    with torch.no_grad():  # zero at the start, which would hide errors
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def tokens(rows=2, length=7, seed=0):
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def randomize(handle, seed=3, std=0.2):
    """Give the adapter values that matter (B is zero at the start)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * std)


def snapshot(model):
    """Everything that must be the same again after detaching, or after a refused call."""
    return (
        {key: value.clone() for key, value in model.state_dict().items()},
        {name: type(module) for name, module in model.named_modules()},
        {name: set(module.__dict__) for name, module in model.named_modules()},
        {name: (id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)},
        [name for name, _ in model.named_buffers()],
        {name: [len(v) for k, v in sorted(m.__dict__.items()) if k.endswith("_hooks")] for name, m in model.named_modules()},
    )


def assert_same(before, after):
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    for key, value in before[0].items():
        assert torch.equal(value, after[0][key]), key


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def attached(model, name="default", seed=3, **options):
    handle = fastft.attach(model, fastft.LoRA(**{"r": 4, "target_modules": "all-linear", **options}), name)
    randomize(handle, seed)
    return handle
