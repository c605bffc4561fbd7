"""Every causal language model of transformers, small: an engine gives generate()'s tokens, or refuses it at the start."""

import copy

import pytest
import torch

from fastft.serving import Engine
from tests.serving.tiny import greedy, prompt, worst_gap

transformers = pytest.importorskip("transformers")
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES  # noqa: E402

pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]

# By what their authors call it.
SIZES = {
    64: "hidden_size n_embd d_model dim embedding_size word_embed_proj_dim hidden_dim",
    96: "intermediate_size ffn_dim n_inner d_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size",
    48: "moe_intermediate_size shared_expert_intermediate_size",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_key_value_heads num_experts_per_tok",
    4: "num_attention_heads n_head n_heads decoder_attention_heads attention_heads encoder_attention_heads "
    "num_experts n_routed_experts num_local_experts",
    16: "head_dim kv_lora_rank v_head_dim",
    24: "q_lora_rank",
    8: "rotary_dim qk_rope_head_dim qk_nope_head_dim",
    128: "vocab_size",
    256: "max_position_embeddings n_positions n_ctx max_sequence_length",
    1: "n_group topk_group first_k_dense_replace n_shared_experts bos_token_id is_decoder",
    0: "pad_token_id",
}
OPTIONS = {name: size for size, names in SIZES.items() for name in names.split()} | dict.fromkeys(["eos_token_id"])


def has(config, name) -> bool:
    try:
        return hasattr(config, name)
    except RuntimeError:  # it differs by layer
        return False


def small(kind):
    """A model of few and small layers, or why there is none."""
    try:
        cls = transformers.CONFIG_MAPPING[kind]
        known = cls()
        config = cls(**{name: value for name, value in OPTIONS.items() if has(known, name)})
        text = config.get_text_config()
        for name, value in OPTIONS.items() if text is not config else ():
            if has(text, name):
                setattr(text, name, value)
        made = getattr(transformers, NAMES[kind])
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in made(copy.deepcopy(config)).parameters())
        if size > 50e6:
            return f"{size} parameters are many"
        torch.manual_seed(0)
        model = made(config).eval()
    except Exception as error:
        return f"no small {kind} by these options: {error!r:.200}"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model


@pytest.mark.parametrize("kind", sorted(NAMES))
def test_it_is_served_as_it_generates(kind):
    model = small(kind)
    if isinstance(model, str):
        pytest.skip(model)
    prompts = [prompt(length, length) for length in (9, 23, 5)]
    try:
        want = [greedy(model, each, 8) for each in prompts]
    except Exception as error:
        pytest.skip(f"generate() fails: {error!r:.200}")
    try:
        with Engine(model, max_running=4, cache_bytes=8 << 20) as engine:
            found = engine.generate(prompts, max_tokens=8)
    except ValueError as refusal:
        assert type(model).__name__ in str(refusal)
        return
    for completion, tokens in zip(found, want):
        assert completion.error is None
        assert completion.tokens == tokens or worst_gap(model, completion) < 1e-3
