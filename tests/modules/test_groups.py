"""ProjectionGroup: sharing one input between the calls of several layers, and everything that may come in between."""

import copy
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

import fastft

from .blocks import ORDERS, K, assert_equal, nothing_waits, pair, run, shrinks, some_x


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
        x = torch.randn(40, K)
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


def test_with_one_member_merged_all_run_alone():
    block, handle, twin, apart = pair()
    for m, own in ((block, handle), (twin, apart)):
        m.q_proj.set_merged(own._adapter, True)
    x = some_x()
    for _ in range(2):
        assert_equal([block(x)], [twin(x)])
    block.q_proj.set_merged(handle._adapter, False)
    assert handle.groups[0].grouped and shrinks(lambda: block(x)) == 1


def test_with_one_member_in_evaluation_all_run_alone():
    block, handle, twin, _ = pair(lora_dropout=0.5)
    x = some_x()
    for m in (block, twin):
        m.k_proj.eval()
    assert_equal([block(x)[..., 16:24]], [twin(x)[..., 16:24]])
    assert handle.groups[0].grouped and nothing_waits()
    block.train()
    assert shrinks(lambda: block(x)) == 1


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
