"""One captured shrink and expand serves every number of adapters: only on a GPU."""

import pytest
import torch

from fastft.ops import grouped
from tests.golden import run_on
from tests.ops.grouped_cases import make, route
from tests.ops.test_grouped import ALL_KINDS, BF16, F32, LORAS, bits, drawn

TOKENS = 48
SITES = [(ALL_KINDS, 64, (16, 9, 40)), (LORAS * 2, 1024, (512, 264))]


def routing_of(active, capacity):
    """(segments, assignments) of a step with so many adapters: one has half of the tokens, every tenth token has none."""
    slots = [-1] * TOKENS
    for t in range(TOKENS):
        if active and t % 10:
            slots[t] = t // 2 % active if t % 2 else 0
    segments, assignments, _ = route(slots)
    padded = torch.tensor([[0, 0, 0]] * capacity, dtype=torch.int32)
    padded[capacity - len(segments) :] = segments  # empty ones first
    return padded, assignments


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("backend", ["cuda_on_gpu", "triton_on_gpu"])
def test_replays_serve_every_number_of_adapters(backend, dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    with run_on(backend) as device:
        for adapters, k, outputs in SITES:
            replays_are_eager(adapters, k, outputs, dtype, device)


def replays_are_eager(adapters, k, outputs, dtype, device):
    case, capacity = make(adapters, k, outputs, dtype).to(device), len(adapters)
    x, base = (drawn(TOKENS, n, dtype, device, seed)[0] for seed, n in enumerate((k, sum(outputs))))
    y = base.clone()
    segments, assignments = (t.to(device) for t in routing_of(0, capacity))

    def step():
        tables = case.pieces, segments, assignments
        s = grouped.grouped_shrink(x, case.store, case.offsets, *tables, 1, case.width)
        grouped.grouped_expand_(y, x, s, case.store, case.offsets, case.columns, *tables, None, 1)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles what is compiled when it is first called
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    # Up to the capacity and back, so that more and fewer adapters than before follow.
    for active in [*range(capacity + 1), *range(capacity, -1, -1)]:
        for static, new in zip((segments, assignments), routing_of(active, capacity)):
            static.copy_(new)
        x.copy_(x.flip(0))
        found = []
        for run in (step, graph.replay):
            y.copy_(base)
            run()
            found.append(y.clone())
        assert torch.equal(bits(found[0]), bits(found[1])), f"{active} of {capacity} adapters, {k} -> {outputs}"
        assert torch.equal(bits(found[0]), bits(base)) == (active == 0), active
