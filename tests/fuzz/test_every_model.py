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

END = 2

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
    1: "n_group topk_group first_k_dense_replace n_shared_experts bos_token_id",
    0: "pad_token_id",
}
# Of each task's names so many have a small model, with transformers 5.
BUILT = {"causal": 160, "seq2seq": 20, "classification": 105}
# Of these sizes, in float64 or of these inputs these don't run at all.
UNTRAINED = ["dots3_note", "fsmt", "inkling2_text", "layoutlmv3", "lilt", "mistral4", "mra", "t5", "xglm", "xmod"]
OPTIONS = {name: size for size, names in SIZES.items() for name in names.split()} | dict.fromkeys(["eos_token_id"])


def settable(config, name) -> bool:
    own = getattr(type(config), name, None)
    try:
        return hasattr(config, name) and not (isinstance(own, property) and own.fset is None)
    except RuntimeError:  # it differs by layer
        return False


def small(task, kind):
    """A model of few and small layers, or why there is none."""
    name = TASKS[task][kind]
    options = OPTIONS | ({"is_decoder": True} if task == "causal" else {"eos_token_id": END})
    try:
        cls = transformers.CONFIG_MAPPING[kind]
        known = cls()
        if settable(known, "kv_lora_rank"):  # latent attention has a key for each head, and turns a part of it
            options |= {"num_key_value_heads": options["num_attention_heads"], "head_dim": options["qk_rope_head_dim"]}
        config = cls(**{option: value for option, value in options.items() if settable(known, option)})
        text = config.get_text_config()
        for option, value in options.items() if text is not config else ():
            if settable(text, option):
                setattr(text, option, value)
        made = getattr(transformers, name if isinstance(name, str) else name[0])
        if isinstance(text, made.config_class):  # the text half of a model that sees, say
            config = text
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


@pytest.mark.parametrize("task", TASKS)
def test_most_are_compared(task):
    """What no small model is made of is skipped below."""
    models = {kind: small(task, kind) for kind in TASKS[task]}
    missing = {kind: why for kind, why in models.items() if isinstance(why, str)}
    assert len(models) - len(missing) >= BUILT[task], missing


@pytest.mark.parametrize("kind", sorted(CAUSAL))
def test_it_is_served_as_it_generates(kind):
    model = small("causal", kind)
    if isinstance(model, str):
        pytest.skip(model)
    prompts = [prompt(length, length) for length in (9, 23, 5)]
    try:
        want = [greedy(model, each, 8) for each in prompts]
    except Exception:  # without attention layers, say; if it is served nonetheless, its logits tell
        want = [None] * len(prompts)
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
    model = small(task, kind)
    if isinstance(model, str):
        pytest.skip(model)
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = False  # some have no cache for a model of these layers
        config._experts_implementation = "eager"  # the others take no float64
    model, ids = model.double(), torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = END  # BART classifies by it
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
        copy.deepcopy(model)(**inputs).logits.square().mean().backward()
        model.requires_grad_(False)
    except Exception as error:
        if kind not in UNTRAINED:
            raise
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
            pytest.skip("PEFT leaves some of them out")  # of a mixture's, for which it takes the experts
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
