"""ProjectionGroup: sharing one input between the calls of several layers, and everything that may come in between."""

import copy
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastft
from fastft.modules import groups
from tests.methods.models import randomize

K = 24


class Block(nn.Module):
    """q, k and v as an attention has them; `call` says how its forward calls them."""

    def __init__(self, call=None):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(K, n) for n in (16, 8, 12))
        self.call = call or (lambda m, x: (m.q_proj(x), m.k_proj(x), m.v_proj(x)))

    def forward(self, x):
        return torch.cat(self.call(self, x), -1)


def pair(call=None, **options):
    """One block grouped, its twin not."""
    torch.manual_seed(0)
    block = Block(call)
    twin = copy.deepcopy(block)
    options = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], **options}
    torch.manual_seed(1)
    handle = fastft.attach(block, fastft.LoRA(**options))
    torch.manual_seed(1)
    apart = fastft.attach(twin, fastft.LoRA(**options, group_projections=False))
    randomize(handle)
    randomize(apart)
    return block, handle, twin, apart


def some_x(*lead):
    return torch.randn(*(lead or (5, 3)), K, generator=torch.Generator().manual_seed(1)).requires_grad_()


def run(block, handle, x, forward=None, seed=0):
    """Output and all gradients."""
    x = x.detach().clone().requires_grad_()
    for parameter in handle.parameters():
        parameter.grad = None
    torch.manual_seed(seed)
    y = (block if forward is None else forward)(x * 1)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in handle.parameters())]


def assert_equal(got, want, **tolerance):
    assert len(got) == len(want)
    for g, w in zip(got, want):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w, **(tolerance or {"rtol": 1e-5, "atol": 1e-5}))


def shrinks(function):
    with fastft.testing.record() as calls:
        function()
    return sum(call.op == "lora_shrink" for call in calls)


def nothing_waits():
    return getattr(groups._slot, "round", None) is None


ORDERS = {
    "q, k, v": lambda m, x: (m.q_proj(x), m.k_proj(x), m.v_proj(x)),
    "v, q, k": lambda m, x: (m.v_proj(x), m.q_proj(x), m.k_proj(x)),
}


@pytest.mark.parametrize("order, p", [("q, k, v", 0.0), ("q, k, v", 0.3), ("v, q, k", 0.0)])
def test_a_round_reads_x_once(order, p):
    block, handle, twin, apart = pair(ORDERS[order], lora_dropout=p)
    for lead in ((5, 3), (7,), (), (0,), (2, 2, 2)):
        x = some_x(*lead)
        with fastft.testing.record() as calls:
            got = run(block, handle, x)
        ops = [call.op for call in calls]
        assert [ops.count(f"lora_{op}") for op in ("shrink", "expand_", "grad_sb", "grad_a", "grad_x_")] == [1, 3, 3, 1, 1]
        # Three seeds drawn at once are those drawn one by one, on the CPU's generator.
        assert_equal(got, run(twin, apart, x))
        assert nothing_waits()
    (state,) = handle.groups
    assert state.members == ("q_proj", "k_proj", "v_proj") and state.grouped and state.reason is None


def test_masks_differ_between_members_and_repeat_with_the_seed():
    block, handle, *_ = pair(lora_dropout=0.5)
    for module in (block.q_proj, block.k_proj, block.v_proj):  # every member computes drop(x) summed over K
        module.weight.data.zero_(), module.bias.data.zero_()
        module.lora_A["default"].data.fill_(1.0), module.lora_B["default"].data.fill_(1.0)
    x = some_x(50)
    torch.manual_seed(1)
    first = block(x)
    torch.manual_seed(1)
    assert torch.equal(block(x), first) and not torch.equal(block(x), first)
    q, k, v = first[:, 0], first[:, 16], first[:, 24]
    assert not torch.allclose(q, k) and not torch.allclose(k, v) and not torch.allclose(q, v)
    assert handle.groups[0].grouped


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
    if misuse == "backend" and not block_backend_differs():
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


def block_backend_differs():
    from fastft.ops.registry import Scope

    return Scope().forced is None


def test_what_was_shared_by_mistake_is_let_go():
    calls = []
    block, handle, *_ = pair(lambda m, x: (m.q_proj(x), m.k_proj(x * 2), m.v_proj(x * 3)))
    x = some_x().detach() * 1
    kept = weakref.ref(x)
    block(x)
    del x, calls
    block(some_x())
    assert kept() is None and not handle.groups[0].grouped


def test_whole_rounds_in_any_circumstances_stay_grouped():
    block, handle, twin, apart = pair()
    x = some_x()
    with torch.no_grad():
        assert_equal([block(x)], [twin(x)])
    assert_equal(run(block, handle, x), run(twin, apart, x))
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal([block(x)], [twin(x)], rtol=2e-2, atol=2e-2)
    block.eval()
    assert_equal([block(x)], [twin(x)])
    with handle.disabled(), apart.disabled():
        assert_equal([block(x)], [twin(x)])
    handle.set_active(False), apart.set_active(False)
    assert shrinks(lambda: block(x)) == 0
    handle.set_active(), apart.set_active()
    assert_equal(run(block, handle, x), run(twin, apart, x))
    assert handle.groups[0].grouped and shrinks(lambda: block(x)) == 1


def test_inference_mode_runs_alone():
    """Tensors made there don't count their changes, so a change between two members would not be seen."""
    block, handle, twin, _ = pair()
    with torch.inference_mode():
        x = torch.randn(4, K)
        assert_equal([block(x)], [twin(x)])
        assert shrinks(lambda: block(x)) == 3
    assert handle.groups[0].grouped and shrinks(lambda: block(some_x())) == 1


def test_other_inputs_are_refused_as_without_a_group():
    block, *_ = pair()
    with pytest.raises(ValueError, match="shapes do not fit"):
        block(torch.randn(3, K + 1))
    assert nothing_waits()


def test_members_that_do_not_fit_together_run_alone():
    block, handle, twin, _ = pair()
    for m in (block, twin):
        m.k_proj.lora_A["default"] = nn.Parameter(torch.empty(4, K, device="meta"))
    x = some_x()
    assert_equal([block.q_proj(x)], [twin.q_proj(x)])
    assert nothing_waits() and handle.groups[0].grouped
    for m in (block, twin):
        m.k_proj.lora_A["default"] = nn.Parameter(torch.empty(0))  # a shard
    assert_equal([block.q_proj(x)], [twin.q_proj(x)])
    replica = block.v_proj._replicate_for_data_parallel()
    replica._parameters, replica.lora_A = dict(block.v_proj._parameters), block.v_proj.lora_A
    assert_equal([replica(x)], [twin.v_proj(x)])
    assert nothing_waits()


def test_an_exception_in_the_middle():
    block, handle, twin, apart = pair()
    x = some_x()
    bad = block.k_proj.lora_B["default"].data
    block.k_proj.lora_B["default"].data = bad[:, :2]
    with pytest.raises(ValueError, match="shapes do not fit"):
        block(x)
    assert nothing_waits(), "the member that failed took the round with it"
    block.k_proj.lora_B["default"].data = bad
    assert_equal(run(block, handle, x), run(twin, apart, x))
    assert handle.groups[0].grouped

    def fail(*_):
        raise KeyboardInterrupt

    hook = block.k_proj.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        block(x)
    hook.remove()
    assert_equal(run(block, handle, x), run(twin, apart, x))


def test_hooks_and_replaced_weights_act():
    block, handle, twin, apart = pair()
    for m in (block, twin):
        m.q_proj.register_forward_hook(lambda module, args, y: y * 2)
        m.v_proj.weight = nn.Parameter(torch.ones(12, K), requires_grad=False)
    assert_equal(run(block, handle, some_x()), run(twin, apart, some_x()))
    assert handle.groups[0].grouped


def test_threads_do_not_mix():
    block, handle, twin, _ = pair()
    meet = threading.Barrier(2, timeout=60)

    def call(m, x):  # both threads are between the same two members at the same time
        q = m.q_proj(x)
        meet.wait()
        k = m.k_proj(x)
        meet.wait()
        return q, k, m.v_proj(x)

    inputs = [some_x(4), torch.randn(6, K)]
    want = [twin(x) for x in inputs]
    block.call, got = call, [None, None]

    def work(i):
        for _ in range(20):
            got[i] = block(inputs[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    [worker.start() for worker in workers], [worker.join() for worker in workers]
    assert_equal(got, want)
    assert handle.groups[0].grouped


# ---- gradient checkpointing


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


# ---- copies


def test_copies_are_groups_of_the_copied_members():
    block, handle, twin, _ = pair(lambda m, x: ORDERS["q, k, v"](m, x))
    x = some_x()
    block.q_proj(x)  # a round waits
    block.call = twin.call = None
    copies = [copy.deepcopy(block), pickle.loads(pickle.dumps(block))]
    block.call = ORDERS["q, k, v"]
    for other in copies:
        other.call = ORDERS["q, k, v"]
        own = fastft.methods.handles(other)["default"]
        (group,) = own._groups
        assert group is other.q_proj._groups["default"] and group.members == [other.q_proj, other.k_proj, other.v_proj]
        assert group.adapter is own._adapter is not handle._adapter
        assert shrinks(lambda other=other: other(x)) == 1
    twin.call = block.call
    for module in (copies[0], twin):
        module.double()
    with fastft.testing.use("reference"):
        assert_equal([copies[0](x.double())], [twin(x.double())])
    assert copies[0].q_proj._groups["default"].state().grouped


def test_compiled_into_one_graph():
    block, handle, twin, apart = pair()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = some_x()
    assert_equal(run(block, handle, x, compiled), run(twin, apart, x), rtol=1e-4, atol=1e-5)
    assert shrinks(lambda: block(x)) == 1 and handle.groups[0].grouped
