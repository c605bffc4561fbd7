"""Make demo/model: a 2.4 M parameter Llama and tokenizer, pretrained on the prose of `demo.data` (10 minutes on one core).

    python -m demo.pretrain [--steps 900] [--out demo/model]

The weights in the repository came from this script. `fastft train` is for fine-tuning; pretraining is this plain loop.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.data import functions, prose

LENGTH, BATCH, VOCABULARY = 256, 8, 2048
# `generation` marks what a loss on assistant turns covers.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; code is in its training text so that fine-tuning on code is not punished by long token sequences."""
    special = ["<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[1], model_max_length=512
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def pack(documents: list[list[int]], eos: int) -> torch.Tensor:
    """[rows, LENGTH] int64: documents separated by `eos`, one after another."""
    stream = torch.tensor([token for document in documents for token in (*document, eos)])
    return stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss * len(batch) for batch in rows.split(BATCH)]
    model.train()
    return (torch.stack(losses).sum() / len(rows)).item()


def save(model: LlamaForCausalLM, folder: Path) -> None:
    copy.deepcopy(model).to(torch.float16).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    options = parser.parse_args()

    documents = prose()
    random.Random(0).shuffle(documents)
    tokenizer = make_tokenizer(documents + functions(1500))
    tokenizer.save_pretrained(options.out)
    encoded = [tokenizer(document).input_ids for document in documents]
    held_out, train = encoded[:80], encoded[80:]
    held_rows = pack(held_out, tokenizer.eos_token_id)
    print(f"{len(documents)} documents, {sum(map(len, encoded))} tokens", flush=True)

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    decayed = [p for p in model.parameters() if p.dim() > 1]
    other = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 60, 0.02 + 0.98 * (1 + math.cos(math.pi * i / options.steps)) / 2)
    )
    order = random.Random(1)
    rows = torch.empty(0, LENGTH, dtype=torch.int64)
    started = time.monotonic()
    for step in range(options.steps):
        if len(rows) < BATCH:  # a new epoch: new order of the documents, so other boundaries
            order.shuffle(train)
            rows = pack(train, tokenizer.eos_token_id)
            rows = rows[torch.randperm(len(rows))]
        batch, rows = rows[:BATCH], rows[BATCH:]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 200 == 199:
            save(model, options.out)  # an interrupted run leaves a model too
        if step % 100 == 0 or step == options.steps - 1:
            print(
                f"step {step} loss {loss.item():.3f} held out {mean_loss(model, held_rows):.3f} "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
    save(model, options.out)
    print(f"{options.out}: {sum(f.stat().st_size for f in options.out.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
