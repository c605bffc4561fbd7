"""Operations and bytes: every case of every family counts them, and formulas give what PyTorch counts."""

import importlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastft.bench import entry_updates, exchange, peers, run, shapes
from fastft.bench.e2e import serve, step
from fastft.bench.ops import lora

pytest.importorskip("transformers")
pytest.importorskip("peft")
CPU, TINY = torch.device("cpu"), shapes.MODELS["tiny-llama"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("family", run.families())
def test_every_case_counts_operations_and_bytes(family, device):
    cases = list(importlib.import_module(run.families()[family]).cases(device))
    assert cases and len({case.key() for case in cases}) == len(cases)
    for case in cases:
        assert case.moved > 0 and case.floor_moved > 0, case
        assert case.uncounted or (case.flops > 0 and case.floor_flops > 0), case
        assert not (case.uncounted and case.flops), case
        assert all(type(n) is int for n in (case.flops, case.moved, case.floor_flops, case.floor_moved)), case
        # A case named "vs" has a floor that is no part of its arms.
        if " vs " not in case.name and family not in ("step", "peft"):
            assert case.flops >= case.floor_flops and case.moved >= case.floor_moved, case


def products(run) -> int:
    """Operations of the matrix products of a call; without attention's."""
    with FlopCounterMode(display=False) as counter:
        run()
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))


def test_operations_of_a_lora_layer():
    d = lora.make_inputs(shapes.LINEARS["tiny"], "fp32", 4, 0.0, CPU, 0)
    work = lora.work(shapes.LINEARS["tiny"], "fp32", 4, 0.0)
    for layer, flops in ((peers.frozen_linear(d), work["floor_flops"]), (lora.plain(d), work["flops"])):
        assert products(lambda layer=layer: layer(d.x).backward(d.dy)) == flops


def test_operations_of_a_step():
    """The first layer's q, k, v need no dX, which the formula counts."""
    d = step.make_inputs(TINY, "fp32", 4, 0.0, CPU, 0)
    work, tokens = step.work(TINY, 4, "fp32", 0.0), TINY.batch * TINY.length
    k, outs = TINY.groups()[0]
    spared = 2 * tokens * k * sum(outs)
    update = 15 * k * outs[0]
    assert products(step.training(step.frozen)(d)) == work["floor_flops"] - spared - update
    numbers = sum(p.numel() for p in (*d.a.values(), *d.b.values()))
    of_a = 2 * tokens * 4 * k * len(outs)  # their part of dX
    assert products(step.training(step.plain)(d)) == work["flops"] - spared - of_a - 15 * numbers


def test_the_plain_node_computes_no_gradient_that_is_not_asked_for():
    """Of a model's first q, k and v, whose input needs none. `addmm_` is not counted."""
    d = lora.make_inputs(shapes.LINEARS["tiny"], "fp32", 4, 0.0, CPU, 0)
    layer, x = peers.addmm(d), d.x.detach()
    tokens, k, n = len(x), *d.weight.t().shape
    assert products(lambda: layer(x).backward(d.dy)) == 2 * tokens * k * n + 2 * tokens * 4 * (2 * k + 2 * n)


def test_operations_of_served_rows():
    adapters = {"a": ("lora", 3), "b": ("lora", 5)}
    batch = serve.Batch("test", adapters, ("a", "a", "b", ""), 2)
    d = serve.make_inputs(TINY, "fp32", batch, CPU, 0)
    work = serve.work(TINY, batch, "fp32")
    assert products(serve.floor(d)) == work["floor_flops"]
    assert products(lambda: serve.served.plain(d.own)()) == work["flops"]


def test_bytes_of_a_frozen_model_count_every_tensor_once():
    model, tokens = step.make_model(TINY, torch.float32, CPU), 6
    sizes = {}

    def count(module, inputs, output):
        # x of q, k, v (and gate, up) is one tensor.
        sizes.update({(t.data_ptr(), t.shape): t for t in (module.weight.detach(), inputs[0], output)})

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    assert sum(t.numel() * 4 for t in sizes.values()) == step.forward_work(TINY, tokens, 4)[1]


def test_what_is_exchanged_is_what_the_formula_counts():
    d = exchange.make_inputs(TINY, torch.float32, 0.1, CPU, 0)
    work, numbers = exchange.work(TINY, 0.1, 4), sum(t.numel() for t in d.deltas[0].values())
    assert (work["flops"], work["moved"]) == (numbers, numbers * 24)
    products_of_ab = sum(2 * a.numel() * len(d.b[0][name]) for name, a in d.a[0].items())
    weights = TINY.layers * TINY.intermediate * TINY.hidden
    assert work["floor_flops"] == products_of_ab + 2 * weights


def test_sectors_of_few_and_of_all_entries():
    few = entry_updates.moved_of(10**6, 10, 4)
    assert few == pytest.approx(10 * 36 + 10 * 2 * 32, rel=1e-3), "each in a sector of its own"
    assert entry_updates.moved_of(10**6, 10**6, 4) == 10**6 * (36 + 8)
