"""A trial before an engine takes requests: does the model answer from the paged cache what it answers without one?

The code of some models counts positions by itself (BART's decoder), sees what comes later (BERT) or attends in a way of its
own (DiffLlama). In a batch of many requests it runs without a word, and every answer is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .requests import Request, Sampling
from .sampling import choose, uniform

_PROMPTS, _LENGTH, _TOKENS = 4, 8, 4  # prompts of so many tokens, answers of so many
# So hot that all tokens are equally likely: what is compared comes from all of the vocabulary. The likeliest token tells
# little: a model may say the same one after anything.
_HOT = 1e30
# How far a log-probability may be off: so much, and so many roundings of its logit, as sums are formed in another order.
# Of 80 kinds of small models in float32 right ones are off by 0.000002, wrong ones by 0.03 (RoCBERT, seeing both ways) to 3.
_OFF, _ROUNDINGS = 0.005, 4


@dataclass
class Answer:
    """A prompt, tokens drawn after it, before each the log-probabilities of all, and how large a logit it hangs on."""

    prompt: list[int]
    tokens: list[int]
    logprobs: torch.Tensor  # float32 [tokens, vocabulary], on the CPU
    sizes: list[float]


@torch.no_grad()
def expected(model, max_length: int) -> list[Answer]:
    """Answers of the model as it is, without a cache. None where none fits into max_length.

    Raises ValueError for what the model raises, but for a lack of memory.
    """
    length = min(_LENGTH, max_length - _TOKENS)
    if length < 1:
        return []
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (_PROMPTS, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    logprobs, sizes = [], []
    for _ in range(_TOKENS):
        try:
            logits = model(input_ids=ids, use_cache=False).logits[:, -1].float()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ValueError(f"{type(model).__name__} can't be served, it can't be called: {error!r}") from error
        u = [uniform(seed, ids.shape[1]) for seed in range(_PROMPTS)]
        knobs = torch.tensor([[_HOT] * _PROMPTS, [1.0] * _PROMPTS, u], device=ids.device)
        tokens, _ = choose(logits, knobs, nucleus=False, logprobs=False)
        logprobs.append(F.log_softmax(logits, dim=-1).cpu())
        sizes.append(torch.maximum(logits.gather(-1, tokens[:, None])[:, 0].abs(), logits.amax(-1).abs()))
        ids = torch.cat([ids, tokens[:, None]], 1)
    rows = zip(ids.tolist(), torch.stack(logprobs, 1), torch.stack(sizes, 1).tolist())
    return [Answer(row[:length], row[length:], *own) for row, *own in rows]


def run(model, answers: list[Answer], start) -> None:
    """Have the engine answer the same prompts at once; `start` takes a Request.

    Raises ValueError if it fails or answers otherwise.
    """
    requests = []
    for i, answer in enumerate(answers):
        sampling = Sampling(max_tokens=_TOKENS, temperature=_HOT, seed=i, logprobs=True)
        requests.append(Request(f"trial-{i}", answer.prompt, None, sampling, lambda _: None))
    for request in requests:
        start(request)
    name, unit, off, beyond = type(model).__name__, _unit(model), [], []
    for request, answer in zip(requests, answers):
        completion = request.result()
        if completion.error is not None:
            raise ValueError(f"{name} can't be served, a trial request failed: {completion.error}") from completion.error
        for apart, size in zip(_apart(completion, answer), answer.sizes):
            off.append(apart)
            beyond.append(not apart <= max(_OFF, _ROUNDINGS * unit * size))  # NaN is beyond
    # A choice by a hair, of an expert say, may fall otherwise by chance: seldom in float32, often where rounding is coarser.
    chance = 1 / 4 if unit < torch.finfo(torch.float16).eps else 1 / 2
    if off and sum(beyond) >= chance * len(beyond):
        raise ValueError(
            f"{name} can't be served: log-probabilities of trial requests' tokens are off by up to {max(off):.3g} from what "
            f"the model gives without a cache, {sum(beyond)} of {len(off)} by more than rounding, so all answers would be "
            "wrong. Its code may not pass on positions or the cache; supported are decoders such as Llama, Qwen, Mistral "
            "and GPT-NeoX. If the difference is rounding, leave the trial out: Engine(trial=False), fastft serve --no-trial"
            + ("; but first, model.eval(): it is in training mode" if model.training else "")
        )


def _unit(model) -> float:
    """How far a number near 1 may be off, as the model's products are rounded."""
    kinds = [model.dtype]
    if model.dtype is torch.float32:
        backend = torch.backends.cuda if model.device.type == "cuda" else torch.backends.mkldnn
        coarser = {"tf32": torch.float16, "bf16": torch.bfloat16}  # TF32 has as many bits as float16 for what counts here
        kinds.append(coarser.get(backend.matmul.fp32_precision, model.dtype))
    if getattr(model, "hf_quantizer", None) is not None:
        kinds.append(torch.bfloat16)
    return max(torch.finfo(kind).eps for kind in kinds)


def _apart(completion, answer: Answer) -> list[float]:
    """How far the tokens' log-probabilities are off, up to the first token that is another one.

    Without parallel ops: they would give this thread a team beside the engine's (see `teams`).
    """
    apart = []
    for token, logprob, other, want in zip(completion.tokens, completion.logprobs, answer.tokens, answer.logprobs):
        apart.append(abs(logprob - want[token].item()))
        if token != other:
            break
    return apart
