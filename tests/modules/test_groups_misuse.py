"""Groups that were guessed wrong: they dissolve, change nothing, and gradient checkpointing sees the same twice."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastft
from fastft.modules import groups
from fastft.ops.registry import Scope

from .blocks import Block, assert_equal, nothing_waits, pair, run, shrinks, some_x


def in_place(m, x):
    q = m.q_proj(x)
    with torch.no_grad():
        x.add_(1.0)  # q's backward needs the x from before
    return q.detach(), m.k_proj(x), m.v_proj(x)


def no_grad_between(m, x):
    with torch.no_grad():
        q = m.q_proj(x)
    return q, m.k_proj(x), m.v_proj(x)


def autocast_between(m, x):
    q = m.q_proj(x)
    with torch.autocast("cpu", torch.bfloat16):
        k = m.k_proj(x)
    return q, k.float(), m.v_proj(x)


def backend_between(m, x):
    q = m.q_proj(x)
    with fastft.testing.use("reference"):
        k = m.k_proj(x)
    with fastft.testing.use("reference"):
        return q, k, m.v_proj(x)


def evaluation_between(m, x):
    q = m.q_proj(x)
    m.k_proj.eval()
    k = m.k_proj(x)
    m.k_proj.train()
    return q, k, m.v_proj(x)


def disabled_between(m, x):
    q = m.q_proj(x)
    with m.handle.disabled():
        k = m.k_proj(x)
    return q, k, m.v_proj(x)


def factor_between(m, x):
    q = m.q_proj(x)
    own = m.k_proj.lora_A["default"]
    m.k_proj.lora_A["default"] = torch.nn.Parameter(2 * own.detach())
    k = m.k_proj(x)
    m.k_proj.lora_A["default"] = own
    return q, k, m.v_proj(x)


MISUSES = {
    "twice": lambda m, x: (m.q_proj(x) + m.q_proj(x), m.k_proj(x), m.v_proj(x)),
    "other x": lambda m, x: (m.q_proj(x), m.k_proj(x * 2), m.v_proj(x)),
    "equal x": lambda m, x: (m.q_proj(x), m.k_proj(x.view_as(x)), m.v_proj(x)),
    "missing": lambda m, x: (m.q_proj(x), m.k_proj(x), x[..., :12]),
    "in place": in_place,
    "no_grad": no_grad_between,
    "autocast": autocast_between,
    "backend": backend_between,
    "evaluation": evaluation_between,
    "disabled": disabled_between,
    "other A": factor_between,
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_a_wrong_guess_dissolves_and_changes_nothing(misuse):
    # Autocast's rounding hits sums in another order.
    tolerance = {"rtol": 1e-2, "atol": 1e-1} if misuse == "autocast" else {"rtol": 1e-5, "atol": 1e-5}
    p = 0.0
    if misuse == "evaluation":  # only dropout tells training from evaluation
        p = 0.9999
    block, handle, twin, apart = pair(MISUSES[misuse], lora_dropout=p)
    block.handle, twin.handle = handle, apart
    x = some_x()
    if misuse == "backend" and Scope().forced is not None:
        pytest.skip("the reference is forced already")
    for _ in range(3):
        got, want = run(block, handle, x), run(twin, apart, x)
        if p == 0:
            assert_equal(got, want, **tolerance)
    (state,) = handle.groups
    assert not state.grouped and "with the same input" in state.reason
    count = shrinks(lambda: block(x * 1))
    assert count == shrinks(lambda: twin(x * 1)), "dissolved for good"
    assert nothing_waits()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_checkpointing_replays_a_round(reentrant, p):
    block, handle, *_ = pair(lora_dropout=p)
    x = some_x()
    want = run(block, handle, x)
    for _ in range(2):
        got = run(block, handle, x, lambda x: checkpoint(block, x, use_reentrant=reentrant))
        assert_equal(got, want, rtol=0, atol=0)
    assert handle.groups[0].grouped and nothing_waits()


def consistent(block, y, handle):
    """Did backward see the dropout masks of forward? (sum of dY ∘ low-rank term = <dB, B> for every member)"""
    with torch.no_grad(), handle.disabled():
        low_rank = y.detach() - block(block.seen)
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    parts = (low_rank * weights).split([16, 8, 12], -1)
    for part, module in zip(parts, (block.q_proj, block.k_proj, block.v_proj)):
        b = module.lora_B["default"]
        torch.testing.assert_close((b.grad * b).sum(), part.sum(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_checkpointing_of_a_wrong_guess(reentrant, p):
    """The recomputation must do what the forward did, though the forward has shown that the guess was wrong."""
    block, handle, twin, apart = pair(MISUSES["other x"], lora_dropout=p)
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    block.seen = x = some_x()
    for step in range(3):
        torch.manual_seed(step)
        outs = [checkpoint(block, x * 1, use_reentrant=reentrant) for _ in range(2)]  # two forwards before their backwards
        for y in outs:
            for parameter in handle.parameters():
                parameter.grad = None
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
            consistent(block, y, handle)
        optimizer.step()
    assert not handle.groups[0].grouped and shrinks(lambda: block(x)) == 3
    if p == 0:
        assert_equal(run(block, handle, x), run(twin, apart, x))


def test_an_optimizer_that_steps_within_backward():
    """Forwards still wait to be run again then."""
    block, handle, twin, apart = pair(MISUSES["other x"])
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)

    def forward(x):
        y = checkpoint(block, x, use_reentrant=False)
        y.register_hook(lambda _: optimizer.step())
        return y

    x = some_x()
    for _ in range(2):
        assert_equal(run(block, handle, x, forward), run(twin, apart, x))
    optimizer.step()
    assert not handle.groups[0].grouped and shrinks(lambda: block(x)) == 3


def test_members_that_are_checkpointed_one_by_one():
    """What one region saves, another can't recompute."""
    block, handle, twin, apart = pair(
        lambda m, x: [checkpoint(m.get_submodule(n), x, use_reentrant=False) for n in ("q_proj", "k_proj", "v_proj")]
    )
    for _ in range(2):
        assert_equal(run(block, handle, some_x()), run(twin, apart, some_x()))
    assert not handle.groups[0].grouped


def test_saved_tensors_on_the_cpu_keep_a_round():
    block, handle, twin, apart = pair(lora_dropout=0.2)

    def offloaded(x):
        with torch.autograd.graph.save_on_cpu():
            return block(x)

    assert_equal(run(block, handle, some_x(), offloaded), run(twin, apart, some_x()))
    assert handle.groups[0].grouped


@pytest.mark.parametrize("taken_off", [False, True])
def test_weights_that_inference_mode_moved_can_be_trained_through(taken_off):
    block, x = Block(), some_x()
    handle = fastft.attach(block, fastft.LoRA(target_modules=["q_proj", "k_proj", "v_proj"], pack_weights=True))
    block.double().float()  # the next forward packs again
    with torch.inference_mode():
        block(x.detach())
        if taken_off:
            handle.detach()
    assert not any(parameter.is_inference() for parameter in block.parameters())
    block(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("taken_off", [False, True])
def test_a_failure_in_the_middle_keeps_nothing_alive(taken_off):
    def fail(m, x):
        m.q_proj(x)
        raise ZeroDivisionError

    block, handle, _, _ = pair(fail)
    x, kept = some_x(), weakref.ref(block.q_proj)
    with pytest.raises(ZeroDivisionError):
        block(x * 1)
    for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block.q_proj))):
        assert not any(group._waiting for m in copied.modules() for group in getattr(m, "_groups", {}).values())
    if taken_off:
        handle.detach()
        assert groups._slot.round() is None
    else:
        assert groups._slot.round() is not None
    del block, handle, copied, fail
    gc.collect()
    assert kept() is None
    assert groups._slot.round() is None
    assert groups._take() is None and nothing_waits()
