"""Accelerated layers without gradients: which calls take the shortest way, and that it passes nothing over."""

import pytest
import torch
from torch import nn

import fastft
from tests.integrations.peft_models import accelerated, layer, one
from tests.integrations.test_peft_accelerate_paths import FALLBACKS, X, hooked, parametrised, replaced

UNUSUAL = [hooked, replaced, parametrised, *FALLBACKS.values()]


@pytest.mark.parametrize("change", UNUSUAL, ids=lambda f: f.__name__.strip("<>"))
@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_passed_over_without_gradients(change, training):
    """What is asked before the shortest way, which only forwards without gradients take."""
    model = layer().train(training)
    usual = accelerated(model)
    change(one(model))
    fast = accelerated(model)
    with torch.no_grad():
        torch.testing.assert_close(one(fast)(X), one(model)(X), rtol=1e-4, atol=1e-4)
        (row,) = fastft.report(fast)
        assert row.calls["fused"] == 0
        change(one(usual))  # afterwards
        torch.testing.assert_close(one(usual)(X), one(model)(X), rtol=1e-4, atol=1e-4)
        assert fastft.report(usual).calls["fused"] == 0


@torch.no_grad()
def test_the_shortest_way():
    """One op and one addition to the count; not with dropout that is on, nor where modules or calls are followed."""
    model = layer(lora_dropout=0.5)
    fast = accelerated(model)
    shortest = [("lora_add_", "cpu")]
    if "cpu" not in fastft.testing.available("cpu"):
        pytest.skip("no C++ library")
    for fused, training in enumerate((False, True), 1):
        with fastft.testing.record() as calls:
            one(fast.train(training))(X)
        assert ([(call.op, call.backend) for call in calls] == shortest) != training
        assert fastft.report(fast).calls["fused"] == fused
    fast.eval()
    want, seen = one(model.eval())(X), []
    with nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module)):
        torch.testing.assert_close(one(fast)(X), want)
    assert one(fast).base_layer in seen and one(fast).lora_A["default"] in seen
    torch.testing.assert_close(torch.jit.trace(one(fast), X, check_trace=False)(X + 1), one(model)(X + 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(one(fast)(X), one(model)(X), rtol=2e-2, atol=2e-2)
