"""Attention over the paged cache, each request for itself.

The library's own `sdpa` and `eager` put a batch into one row and mask what belongs to others, by adding: a NaN in one
request's keys then is a NaN in everybody's scores, and the work is that of all queries times all keys (32 decoding
requests: 32 times too much). Here a request reads its own cache alone. Flash attention does so anyhow and is left as it is.

A step's `Plan` is made on the host once (`Planner`) and read by every layer (`attend`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy
import torch
import torch.nn.functional as F

from .. import _native

NAME = "fastft_paged"  # as an attn_implementation


@dataclass
class Chunk:
    """Several tokens of one request: tokens begin:end of the batch after `past` in the cache, all of them at `rows`."""

    begin: int
    end: int
    past: int
    rows: torch.Tensor | None  # int64 [past + end - begin]; None if past is 0: nothing is read
    mask: torch.Tensor | None  # bool [end - begin, past + end - begin]


@dataclass
class Plan:
    """Which tokens attend to what. Rows are those of a layer's cache, [tokens, KV heads · head size]."""

    tokens: int
    decoding: torch.Tensor | None  # int64 [B]: tokens that are one token of a request; None if all are, in order
    rows: torch.Tensor | None  # int64 [B · L], 0 beyond a request's length: zeros, which nobody writes
    mask: torch.Tensor | None  # bool [B, 1, 1, L]; None if all are equally long
    width: int
    chunks: list[Chunk]
    read: bool = False  # whether a layer did


class Planner:
    """Makes the plans of one cache's steps. A plan's tensors are overwritten by the next one's.

    Args:
        page_size: tokens a block. stride: rows from one block to the next. Block 0 holds zeros that nobody writes.
        native: let the runtime write rows and masks, where it is built. 32 requests of 67 tokens take 22 us, and 216 after a
            large GEMM, when caches are cold as they are after a step; numpy's small operations take 44 and 358.
    """

    def __init__(self, page_size: int, stride: int, device: torch.device, native: bool = True):
        self.page_size, self.stride, self.device = page_size, stride, device
        self._within = numpy.arange(page_size)
        runtime, _ = _native.runtime()
        self._write = getattr(runtime, "cache_rows", None) if native else None
        self._room = 0

    def plan(self, spans: list[tuple[int, int]], blocks: list[list[int]]) -> Plan:
        """For requests with (tokens in the cache, tokens in this batch) `spans`, whose cache lies in `blocks`."""
        begin, chunks, single, lengths, tokens = 0, [], [], [], []
        for (past, length), own in zip(spans, blocks):
            if length == 1:
                single.append(own)
                lengths.append(past + 1)
                tokens.append(begin)
            else:
                chunks.append(self._chunk(begin, past, length, own))
            begin += length
        decoding = torch.tensor(tokens, device=self.device) if chunks else None
        if not single:
            return Plan(begin, decoding, None, None, 0, chunks)
        width = max(lengths)
        rows, mask = self._decoded(single, lengths, width)
        return Plan(begin, decoding, rows, None if min(lengths) == width else mask, width, chunks)

    def _decoded(self, blocks: list[list[int]], lengths: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and mask of requests that get one token."""
        items = len(blocks) * width
        if self._room < items:
            self._room = 2 * items
            self._rows_out = torch.empty(self._room, dtype=torch.int64)
            self._mask_out = torch.empty(self._room, dtype=torch.bool)
            self._outs = self._rows_out.numpy(), self._mask_out.numpy()
        if self._write is not None:
            self._write(blocks, lengths, self.page_size, self.stride, width, *self._outs)
        else:
            pages = -(-width // self.page_size)
            table = numpy.array([(own + [0] * (pages - len(own)))[:pages] for own in blocks])
            mask = numpy.arange(width) < numpy.array(lengths)[:, None]
            self._outs[0][:items] = (self._rows(table)[:, :width] * mask).reshape(-1)
            self._outs[1][:items] = mask.reshape(-1)
        rows, mask = self._rows_out[:items], self._mask_out[:items].view(len(blocks), 1, 1, width)
        return (rows, mask) if self.device.type == "cpu" else (rows.to(self.device), mask.to(self.device))

    def _chunk(self, begin: int, past: int, length: int, blocks: list[int]) -> Chunk:
        rows = mask = None
        if past:
            rows = torch.from_numpy(self._rows(numpy.array(blocks))[: past + length]).to(self.device)
            mask = torch.ones(length, past + length, dtype=torch.bool, device=self.device).tril_(past)
        return Chunk(begin, begin + length, past, rows, mask)

    def _rows(self, blocks: numpy.ndarray) -> numpy.ndarray:
        """The rows [..., tokens] of blocks [..., pages]."""
        return (blocks[..., None] * self.stride + self._within).reshape(*blocks.shape[:-1], -1)


def attend(query, keys, values, new_keys, new_values, plan: Plan, scale: float | None) -> torch.Tensor:
    """Attention [T, heads, head size] for query [T, heads, head size].

    keys, values: a layer's cache [rows, KV heads · head size], in which the new ones [T, KV heads, head size] are already.
    """
    heads, size = query.shape[1:]
    kv_heads = new_keys.shape[1]
    if plan.decoding is None:
        return _decode(query, keys, values, plan, kv_heads, scale)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if plan.rows is not None:
        out.index_copy_(0, plan.decoding, _decode(query[plan.decoding], keys, values, plan, kv_heads, scale))
    for chunk in plan.chunks:
        k, v = new_keys[chunk.begin : chunk.end], new_values[chunk.begin : chunk.end]
        if chunk.rows is not None:
            k = keys.index_select(0, chunk.rows).view(-1, kv_heads, size)
            v = values.index_select(0, chunk.rows).view(-1, kv_heads, size)
        attended = F.scaled_dot_product_attention(
            query[chunk.begin : chunk.end].transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            scale=scale,
            enable_gqa=heads != kv_heads,
        )
        out[chunk.begin : chunk.end] = attended[0].transpose(0, 1)
    return out


def _decode(query, keys, values, plan: Plan, kv_heads: int, scale):
    """One token each. Query heads of one KV head go as its queries: 0.5 ms instead of 0.8 with enable_gqa and 7.9 with
    repeated keys (32 requests of 96 tokens, 8/4 heads of 64, one thread)."""
    batch, heads, size = query.shape
    shape = (batch, plan.width, kv_heads, size)
    k = keys.index_select(0, plan.rows).view(shape).transpose(1, 2)
    v = values.index_select(0, plan.rows).view(shape).transpose(1, 2)
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, size)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=plan.mask, scale=scale).reshape(batch, heads, size)


def _forward(module, query, key, value, attention_mask, scaling=None, cache=None, **kwargs):
    """An attention function as transformers calls it: query [1, heads, T, head size]; returns [1, T, heads, head size]."""
    plan = getattr(cache, "fastft_plan", None)
    if plan is None:
        raise ValueError(
            f"attn_implementation {NAME!r} got no cache: it works inside a running fastft.serving.Engine alone (stop the "
            "engine to use its model otherwise), and with layers that pass on to it what the model is called with"
        )
    if kwargs.get("softcap") is not None or getattr(module, "sinks", None) is not None:
        raise ValueError("softcap and attention sinks are not supported: use a flash attention implementation")
    plan.read = True
    cache.update(key, value, module.layer_idx, kwargs)  # writes; what it reads back is empty
    keys, values = cache.layer_to_allocator[module.layer_idx].get_cache_for_block_table(module.layer_idx)
    flat = keys.shape[-1] * keys.shape[-2]
    query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
    return attend(query, keys.reshape(-1, flat), values.reshape(-1, flat), key, value, plan, scaling)[None], None


def cannot_be_served(model) -> str:
    """Why not, of a model that computes its attention itself: it would read nothing of the cache, and others' prompts."""
    return (
        f"{type(model).__name__} doesn't attend through transformers' AttentionInterface, so it can't read the paged cache, "
        "and its answers would be wrong; supported are models that do, such as Llama, Qwen, Mistral and GPT-NeoX: serve "
        "one of them"
    )


@functools.cache
def register() -> None:
    """Make `NAME` known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _forward)
