"""Every language model of transformers, small: an engine gives generate()'s tokens or refuses it at the start, and LoRA
trains it as PEFT's does."""

import copy

import pytest
import torch

import fastft
from fastft.serving import Engine
from tests.serving.tiny import greedy, prompt, redraw, worst_gap

transformers = pytest.importorskip("transformers")
from transformers.models.auto import modeling_auto  # noqa: E402

pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]

CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
TASKS = {
    "causal": CAUSAL,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}

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


def small(kind, name):
    """A model of few and small layers, or why there is none. name: of its class."""
    try:
        cls = transformers.CONFIG_MAPPING[kind]
        known = cls()
        config = cls(**{name: value for name, value in OPTIONS.items() if has(known, name)})
        text = config.get_text_config()
        for name, value in OPTIONS.items() if text is not config else ():
            if has(text, name):
                setattr(text, name, value)
        made = getattr(transformers, name)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in made(copy.deepcopy(config)).parameters())
        if size > 50e6:
            return f"{size} parameters are many"
        torch.manual_seed(0)
        model = redraw(made(config).eval())
    except Exception as error:
        return f"no small {kind} by these options: {error!r:.200}"
    if getattr(model, "generation_config", None) is not None:
        model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model


@pytest.mark.parametrize("kind", sorted(CAUSAL))
def test_it_is_served_as_it_generates(kind):
    model = small(kind, CAUSAL[kind])
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


@pytest.mark.parametrize("task, kind", [(task, kind) for task, names in TASKS.items() for kind in sorted(names)])
def test_lora_trains_it_as_pefts_does(task, kind):
    """In float64, where rounding hides nothing: the loss, and every factor's gradient, of fastft.attach and accelerate."""
    peft = pytest.importorskip("peft")
    name = TASKS[task][kind]
    model = small(kind, name if isinstance(name, str) else name[0])
    if isinstance(model, str):
        pytest.skip(model)
    model, ids = model.double(), torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task == "seq2seq":
        inputs["decoder_input_ids"] = ids[:, :7]

    def trained(model):
        """The loss, and gradients by what is trained."""
        loss = model(**inputs).logits.square().mean()
        loss.backward()
        factors = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
        return {"loss": loss} | {name.removeprefix("base_model.model."): p.grad for name, p in factors.items()}

    try:
        model(**inputs).logits.square().mean().backward()
        model.requires_grad_(False)
    except Exception as error:
        pytest.skip(f"it does not train: {error!r:.200}")
    with fastft.testing.use("reference"):  # kernels take no float64
        own = copy.deepcopy(model)
        try:
            fastft.attach(own, fastft.LoRA(r=4, lora_alpha=8, target_modules="all-linear"))
        except ValueError as refusal:  # of a router that is a linear layer's subclass
            assert "exclude_modules" in str(refusal) or "shared" in str(refusal)
            return
        factors = {name: p for name, p in own.named_parameters() if "lora_" in name}
        targets = sorted({name.rpartition(".lora_")[0] for name in factors})
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
        try:
            theirs = peft.get_peft_model(copy.deepcopy(model), config).double()
        except ValueError as refusal:
            pytest.skip(f"PEFT refuses it: {refusal!r:.200}")  # Mamba's out_proj, whose weight a fused kernel reads
        if len(targets) != sum(isinstance(module, peft.tuners.lora.LoraLayer) for module in theirs.modules()):
            pytest.skip("PEFT leaves some of them out")
        own.eval(), theirs.eval()
        for i, (name, parameter) in enumerate(factors.items()):
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) * 0.2
            parameter.data = drawn
            theirs.get_parameter("base_model.model." + name.replace(".default", ".default.weight")).data = drawn.clone()
        accelerated = fastft.accelerate(copy.deepcopy(theirs))
        want, through = trained(theirs), trained(accelerated)
        found = {name.replace(".default", ".default.weight"): value for name, value in trained(own).items()}
    for each in (found, through):
        assert each.keys() == want.keys()
        for name, value in want.items():
            assert (value is None) == (each[name] is None), name
            if value is not None:
                torch.testing.assert_close(each[name], value, rtol=1e-7, atol=1e-9, equal_nan=True)
