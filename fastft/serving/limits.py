"""What an engine takes: sizes of its cache and batches by default, and what a model and a request must be."""

from __future__ import annotations

import logging
import math
import numbers

import torch

from . import attention

_log = logging.getLogger("fastft.serving")

# On a CPU transformers would take 60 % of the memory: 4.5 GB here for a model of 2 layers.
CPU_CACHE_BYTES = 512 << 20
_PAGE = {"cpu": 16, "cuda": 256}  # flash attention's block tables need 256
_RUNNING = {"cpu": 64, "cuda": 256}
_BATCH_TOKENS = {"cpu": 512, "cuda": 2048}  # a step takes as long as its prompts: others wait for it
_INT32 = 1 << 31
_SUPPORTED = "supported are models of attention layers alone, such as Llama, Qwen3, Mistral and GPT-NeoX: serve one of them"


def check_model(model) -> None:
    """Raises ValueError for what could fail or mix requests up only later, in the engine's thread."""
    config = model.config.get_text_config()
    if getattr(model, "_device_mesh", None) is not None:
        raise ValueError("the model is split over several devices (tensor parallel), which adapters are not: load it on one")
    mapped = getattr(model, "hf_device_map", None) or {}  # tells of offloaded weights too
    for places in (mapped.values(), (parameter.device for parameter in model.parameters())):
        if len(devices := sorted({str(place) for place in places})) > 1:
            raise ValueError(
                f"the model lies on several devices ({', '.join(devices)}), as device_map or offloading place it; an engine "
                "serves one that lies on one: load it with device_map={'': 0}"
            )
    if model.device.type == "meta":
        raise ValueError("the model has no weights yet (its device is meta)")
    if not model._can_set_attn_implementation():  # transformers looks at the class's source
        raise ValueError(attention.cannot_be_served(model))
    kinds = set(getattr(config, "layer_types", None) or [])
    if other := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise ValueError(
            f"{type(model).__name__} has layers of the types {', '.join(other)}, whose state the paged cache doesn't hold; "
            f"{_SUPPORTED}"
        )
    sliding = kinds - {"full_attention"} or (not kinds and getattr(config, "sliding_window", None) is not None)
    special = sliding or getattr(config, "attn_logit_softcapping", None) or any(hasattr(m, "sinks") for m in model.modules())
    if special and "flash" not in (config._attn_implementation or ""):
        raise ValueError(
            f"{type(model).__name__} has sliding windows, softcapping or sinks in its attention, which are served with "
            "flash attention alone: load it with attn_implementation='flash_attention_2'"
        )
    if getattr(config, "num_attention_heads", None) is None:  # xLSTM
        raise ValueError(
            f"{type(model).__name__} has no num_attention_heads in its configuration, by which the cache of keys and values "
            f"is sized; {_SUPPORTED}"
        )


def batching_config(
    model, max_batch_tokens, num_blocks, page_size, cache_bytes, max_running, prefix_sharing: bool, flash: bool | None
):
    """transformers' ContinuousBatchingConfig with every size that a CPU needs. Raises ValueError if they don't fit."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    kind = "cpu" if model.device.type == "cpu" else "cuda"
    page_size = page_size or _PAGE[kind]
    max_running = max_running or _RUNNING[kind]
    max_batch_tokens = max_batch_tokens or max(_BATCH_TOKENS[kind], max_running)
    if page_size < 4 or max_running < 1 or max_batch_tokens < max_running:
        raise ValueError(
            f"page_size {page_size} (at least 4), max_running {max_running} (at least 1) and max_batch_tokens "
            f"{max_batch_tokens} (at least max_running: every running request has a token in a step) don't go together"
        )
    if num_blocks is None and (cache_bytes is not None or kind == "cpu"):
        per_block = block_bytes(model, page_size)
        num_blocks = int((cache_bytes or CPU_CACHE_BYTES) // per_block)
        if num_blocks < 1:
            raise ValueError(f"cache_bytes {cache_bytes or CPU_CACHE_BYTES} holds no block: one takes {per_block}")
        # More than all running requests can fill is of use for shared prefixes alone: as much again.
        num_blocks = min(num_blocks, 2 * max_running * math.ceil(positions(model) / page_size))
    return ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=num_blocks,
        max_batch_tokens=max_batch_tokens,
        max_requests_per_batch=max_running,
        allow_block_sharing=prefix_sharing,
        return_logprobs=True,  # the row that also tells of logits that are not finite
        auto_switch_to_flash=flash is not False,
    )


def block_bytes(model, page_size: int) -> int:
    """Bytes of the cache for `page_size` tokens of all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * 2 * heads * size * model.dtype.itemsize * page_size


def free_share(cache) -> float:
    """What requests can have of the library's cache, 0 to 1: also blocks that are only kept in case a prompt comes again."""
    kept = sum(len(each.ledger.cached_blocks) * each.bytes_per_block for each in cache.cache_allocators.values())
    return (cache.compute_free_capacity(relative=False) + kept) / (cache.num_sectors * cache.bytes_per_sector)


def positions(model) -> int:
    """Tokens that a request may have. With longrope those of the short factors: the library turns all of a step by the
    factors of the longest request in it, also those whose keys in the cache were turned by the others."""
    return min([_own_positions(model), *_short_ropes(model)])


def why_short(model) -> str:
    """What keeps `positions` below the model's own number, for messages; "" where nothing does."""
    short = positions(model)
    if short >= _own_positions(model):
        return ""
    return f", as the model's longrope has other factors beyond {short:,}, which are not served"


def _own_positions(model) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or _INT32


def _short_ropes(model) -> list[int]:
    """The length up to which each longrope of the model has its short factors."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    nested = [each for each in parameters.values() if isinstance(each, dict)]  # by layer type
    return [
        each["original_max_position_embeddings"] for each in nested or [parameters] if each.get("rope_type") == "longrope"
    ]


# Fields of a GenerationConfig that change which tokens come, with the values that change nothing. None never does.
_CHANGING = {
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "sequence_bias": ([], {}),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "num_beams": (1,),
}
_CHANGING_DRAWS = {  # where do_sample is on
    "top_k": (0, -1, 50),  # 50 is what transformers takes where nothing is said
    "min_p": (0,),
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}


def warn_of_generation_config(model) -> None:
    """Tell which of the model's own settings for generating are not applied, so that answers differ from generate()'s."""
    config = getattr(model, "generation_config", None)
    fields = {**_CHANGING, **(_CHANGING_DRAWS if getattr(config, "do_sample", None) else {})}
    given = {name: getattr(config, name, None) for name in fields}
    told = [f"{name} {given[name]!r:.40}" for name in fields if given[name] is not None and given[name] not in fields[name]]
    if told:
        _log.warning(
            "the model's generation_config has %s, which fastft does not apply: answers differ from generate()'s. Give the "
            "fields their neutral values to end this warning",
            ", ".join(told),
        )


def drawing(model) -> tuple[float, float]:
    """temperature and top_p for requests of the HTTP interface that give none: the model's own where it is meant to be
    drawn from, or OpenAI's 1."""
    config = getattr(model, "generation_config", None)
    if not getattr(config, "do_sample", None):
        return 1.0, 1.0
    return tuple(1.0 if value is None else float(value) for value in (config.temperature, config.top_p))


def stop_tokens(model, tokenizer) -> frozenset[int]:
    """The end-of-text tokens that the model and the tokenizer name."""
    found = set()
    for ids in (
        getattr(getattr(model, "generation_config", None), "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    ):
        found.update(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset(token for token in found if token is not None)


def check_prompts(prompts, tokenizer) -> list:
    """Several prompts as a list. Raises TypeError for what is one alone, ValueError for a text that nobody can read."""
    if isinstance(prompts, str):
        raise TypeError(f"prompts is a text, must be a list of prompts: give [{prompts[:40]!r}]")
    prompts = prompts.tolist() if isinstance(prompts, torch.Tensor) else list(prompts)
    if any(isinstance(prompt, numbers.Integral) for prompt in prompts):
        raise TypeError("prompts is one prompt's token ids, must be a list of prompts: give [prompt]")
    if tokenizer is None and any(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(
            "a prompt is a text, and the engine has no tokenizer: give token ids, or Engine(..., tokenizer=...)"
        )
    return prompts


def check_prompt(prompt_ids, model, max_tokens: int, max_length: int) -> list[int]:
    """The prompt as a list. Raises ValueError if it could never be run."""
    prompt = prompt_ids.tolist() if isinstance(prompt_ids, torch.Tensor) else list(prompt_ids)
    vocabulary = model.config.get_text_config().vocab_size
    if not prompt:
        raise ValueError("the prompt has no tokens")
    if not all(type(token) is int for token in prompt):
        wrong = next(token for token in prompt if type(token) is not int)
        raise ValueError(f"the prompt holds {wrong!r} ({type(wrong).__name__}), token ids are int")
    if min(prompt) < 0 or max(prompt) >= vocabulary:
        raise ValueError(f"the prompt holds token ids {min(prompt)} to {max(prompt)}, the model has 0 to {vocabulary - 1}")
    if type(max_tokens) is not int or max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens!r}, must be an int of at least 1")
    if len(prompt) + max_tokens > max_length:
        why = why_short(model) if max_length == positions(model) else ""
        raise ValueError(f"{len(prompt)} prompt tokens and max_tokens {max_tokens} are more than {max_length} together{why}")
    return prompt


def check_sampling(temperature: float, top_p: float) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, must be at least 0 and finite")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, must be above 0 and at most 1")
