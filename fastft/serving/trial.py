"""A trial before an engine takes requests: does the model answer from the paged cache what it answers without one?

The code of some models counts positions by itself (BART's decoder), sees what comes later (BERT) or attends in a way of its
own (DiffLlama). In a batch of many requests it runs without a word, and every answer is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .requests import Request, Sampling

_LENGTH, _TOKENS = 8, 4  # of a prompt, of an answer
# How far log-probabilities may be off: of float32 weights, and of others, whose sums round more in another batch.
_OFF, _OFF_16 = 0.05, 0.5


@dataclass
class Answer:
    """A prompt, the tokens that are likeliest after it, and their log-probabilities."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


@torch.no_grad()
def expected(model, max_length: int) -> list[Answer]:
    """Two answers of the model as it is, without a cache. None where none fits into max_length.

    Raises ValueError for what the model raises, but for a lack of memory.
    """
    length = min(_LENGTH, max_length - _TOKENS)
    if length < 1:
        return []
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    logprobs = ids.new_empty((2, 0), dtype=torch.float32)
    for _ in range(_TOKENS):
        try:
            logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ValueError(f"{type(model).__name__} can't be served, it can't be called: {error!r}") from error
        largest = F.log_softmax(logits.float(), dim=-1).max(-1, keepdim=True)
        logprobs, ids = torch.cat([logprobs, largest.values], 1), torch.cat([ids, largest.indices], 1)
    return [Answer(row[:length], row[length:], own) for row, own in zip(ids.tolist(), logprobs.tolist())]


def run(model, answers: list[Answer], start) -> None:
    """Have the engine answer the same prompts at once; `start` takes a Request.

    Raises ValueError if it fails or answers otherwise.
    """
    sampling = Sampling(max_tokens=_TOKENS, logprobs=True)
    requests = [Request(f"trial-{i}", answer.prompt, None, sampling, lambda _: None) for i, answer in enumerate(answers)]
    for request in requests:
        start(request)
    name, wrong = type(model).__name__, []
    for request, answer in zip(requests, answers):
        completion = request.result()
        if completion.error is not None:
            raise ValueError(f"{name} can't be served, a trial request failed: {completion.error}") from completion.error
        wrong.append(_worst(completion, answer))
    exact = model.dtype is torch.float32 and getattr(model, "hf_quantizer", None) is None
    if wrong and (max(wrong) > _OFF if exact else min(wrong) > _OFF_16):
        raise ValueError(
            f"{name} can't be served: log-probabilities of a trial request's answer are off by up to {max(wrong):.3g} from "
            "what the model gives without a cache, so all answers would be wrong. Its code may not pass on positions or the "
            "cache; supported are decoders such as Llama, Qwen, Mistral and GPT-NeoX. If the difference is rounding, leave "
            "the trial out: Engine(trial=False), fastft serve --no-trial"
            + ("; but first, model.eval(): it is in training mode" if model.training else "")
        )


def _worst(completion, answer: Answer) -> float:
    """How far the log-probabilities are apart, up to the first token that is another one."""
    worst = 0.0
    for token, logprob, other, want in zip(completion.tokens, completion.logprobs, answer.tokens, answer.logprobs):
        worst = max(worst, abs(logprob - want))
        if token != other:
            break
    return worst
