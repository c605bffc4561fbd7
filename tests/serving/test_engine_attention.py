"""Attention over the paged cache against the formula, and requests that don't see each other."""

import pytest
import torch

from fastft.serving.attention import Planner, attend

HEADS, KV_HEADS, SIZE, PAGE, STRIDE, BLOCKS = 4, 2, 8, 4, 16, 12


def scene(spans, seed=0):
    """A cache in which requests with (past, new) tokens lie in blocks of their own, everything else full of NaN."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.full((BLOCKS * STRIDE, KV_HEADS * SIZE), float("nan")) for _ in range(2))
    keys[:PAGE], values[:PAGE] = 0, 0  # block 0: nobody's, zeros
    total = sum(new for _, new in spans)
    query = torch.randn(total, HEADS, SIZE, generator=generator)
    new_keys, new_values = (torch.randn(total, KV_HEADS, SIZE, generator=generator) for _ in range(2))
    blocks, histories, free, at = [], [], torch.randperm(BLOCKS - 1, generator=generator).tolist(), 0
    for past, new in spans:
        own = [free.pop() + 1 for _ in range(-(-(past + new) // PAGE))]
        history = []
        for cache, fresh in ((keys, new_keys), (values, new_values)):
            full = torch.cat([torch.randn(past, KV_HEADS, SIZE, generator=generator), fresh[at : at + new]])
            rows = torch.tensor([own[i // PAGE] * STRIDE + i % PAGE for i in range(past + new)])
            cache[rows] = full.flatten(1)
            history.append(full)
        blocks.append(own)
        histories.append(history)
        at += new
    return query, keys, values, new_keys, new_values, blocks, histories


def golden(query, spans, histories, scale=SIZE**-0.5):
    out, at = [], 0
    for (past, new), (keys, values) in zip(spans, histories):
        for i in range(new):
            for head in range(HEADS):
                k, v = (t[: past + i + 1, head * KV_HEADS // HEADS].double() for t in (keys, values))
                out.append(torch.softmax(k @ query[at + i, head].double() * scale, 0) @ v)
        at += new
    return torch.stack(out).view(at, HEADS, SIZE).float()


SPANS = {
    "decoding": [(3, 1), (7, 1), (0, 1), (8, 1)],
    "equally long": [(5, 1), (5, 1)],
    "prompts": [(0, 5), (0, 2)],
    "chunk with a past": [(6, 3)],
    "mixed": [(5, 1), (4, 4), (0, 3), (9, 1), (3, 2)],
}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", SPANS)
def test_it_is_the_formula(name, native):
    spans = SPANS[name]
    query, keys, values, new_keys, new_values, blocks, histories = scene(spans)
    plan = Planner(PAGE, STRIDE, torch.device("cpu"), native).plan(spans, blocks)
    got = attend(query, keys, values, new_keys, new_values, plan, None)
    assert torch.allclose(got, golden(query, spans, histories), atol=2e-6)
    scaled = attend(query, keys, values, new_keys, new_values, plan, 0.5)
    assert torch.allclose(scaled, golden(query, spans, histories, 0.5), atol=2e-6)


@pytest.mark.parametrize("sick", range(5))
def test_nan_in_one_request_changes_no_bit_of_another(sick):
    spans = SPANS["mixed"]
    query, keys, values, new_keys, new_values, blocks, _ = scene(spans)
    plan = Planner(PAGE, STRIDE, torch.device("cpu")).plan(spans, blocks)
    healthy = attend(query, keys, values, new_keys, new_values, plan, None)
    begin = sum(new for _, new in spans[:sick])
    own = torch.zeros(len(query), dtype=torch.bool)
    own[begin : begin + spans[sick][1]] = True
    query[own], new_keys[own], new_values[own] = (float("nan"),) * 3
    for block in blocks[sick]:
        keys[block * STRIDE : block * STRIDE + PAGE] = float("nan")
        values[block * STRIDE : block * STRIDE + PAGE] = float("inf")
    ill = attend(query, keys, values, new_keys, new_values, plan, None)
    assert torch.equal(ill[~own], healthy[~own]) and ill[own].isnan().all()


def test_plans_of_steps_that_follow_each_other_are_those_of_numpy():
    """One planner: blocks grow and are replaced in place (as the library does with equal ones), requests come and go."""
    generator, planner = torch.Generator().manual_seed(0), Planner(PAGE, STRIDE, torch.device("cpu"))
    live, free = {}, list(range(1, 60))
    for step in range(60):
        if step % 5 == 0:
            live[step] = [0, []]
        if step % 7 == 6:
            free += live.pop(next(iter(live)))[1]
        if step % 11 == 10:
            blocks = live[next(iter(live))][1]
            free.append(blocks[0])
            blocks[0] = free.pop(0)
        spans = []
        for state in live.values():
            new = 1 if state[0] else int(torch.randint(1, 6, (), generator=generator))
            while len(state[1]) * PAGE < state[0] + new:
                state[1].append(free.pop(0))
            spans.append((state[0], new))
        blocks = [state[1] for state in live.values()]
        plan = planner.plan(spans, blocks)
        other = Planner(PAGE, STRIDE, torch.device("cpu"), native=False).plan(spans, blocks)
        assert (plan.width, plan.tokens, len(plan.chunks)) == (other.width, other.tokens, len(other.chunks))
        for name in ("decoding", "rows", "mask"):
            mine, its = getattr(plan, name), getattr(other, name)
            assert (mine is None and its is None) or torch.equal(mine, its)
        for state, (_, new) in zip(live.values(), spans):
            state[0] += new


@pytest.mark.parametrize(
    "blocks,lengths,width,says",
    [
        ([[1]], [5], 5, "5 tokens, of which 4"),
        ([[1, 2]], [5], 4, "5 tokens"),
        ([[1]], [4, 4], 4, "2 lengths"),
        ([[1]] * 9, [1] * 9, 4, "room for 32"),
    ],
)
def test_rows_that_have_no_place_are_refused(blocks, lengths, width, says):
    runtime = pytest.importorskip("fastft._runtime")
    rows, mask = torch.full((32,), 7), torch.full((32,), 7, dtype=torch.uint8)
    with pytest.raises(ValueError, match=says):
        runtime.cache_rows(blocks, lengths, PAGE, STRIDE, width, rows.numpy(), mask.numpy())
    assert (rows == 7).all() and (mask == 7).all()
