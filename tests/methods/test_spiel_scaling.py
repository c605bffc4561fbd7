"""What SpIEL sees of candidates' gradients is what the optimizer gets: unscaled, clipped, and nothing of skipped steps."""

import copy

import pytest
import torch
from torch import nn

import fastft

CYCLE = {"reselection_steps": 4, "selection_accumulation_steps": 3, "total_steps": 40}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 16))


def batch(step, half):
    generator = torch.Generator().manual_seed(100 * step + half)
    return torch.randn(9, 24, generator=generator), torch.randn(9, 16, generator=generator)


def train(updates, scale=1.0, clip=None, scaler=None, copied=False, hooked=False, early=False):
    net = model()
    handle = fastft.attach(net, fastft.SpIEL(density=0.1, target_modules=["0", "2"], **CYCLE))
    if copied:
        net = copy.deepcopy(net)
        handle = fastft.methods.handles(net)["default"]
    for parameter in handle.parameters() if hooked else ():
        parameter.register_post_accumulate_grad_hook(lambda parameter: None)
    optimizer = handle.optimizer(lr=1e-2)
    for step in range(updates):
        for half in range(2):
            x, y = batch(step, half)
            loss = (net(x) - y).square().mean() / 2
            (loss * scale if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        elif scale != 1:
            for parameter in handle.parameters():
                parameter.grad /= scale
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(handle.parameters(), clip)
        optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        if early:
            optimizer.zero_grad()
        handle.step()
        optimizer.zero_grad()
    return handle, optimizer


def held(handle):
    return [module.sparse["default"] for module in handle.targets.values()]


def assert_same_run(one, two):
    for a, b in zip(held(one[0]), held(two[0]), strict=True):
        assert torch.equal(a.entries.flat(), b.entries.flat())
        torch.testing.assert_close(a.delta, b.delta, rtol=1e-4, atol=1e-6)
        for name in ("exp_avg", "exp_avg_sq", "age"):
            torch.testing.assert_close(one[1].state[a.delta][name], two[1].state[b.delta][name], rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("how", [{}, {"copied": True}, {"early": True}, {"hooked": True}], ids=str)
def test_a_scaled_loss_changes_nothing(how):
    plain = train(9)
    assert plain[0].method.history[0]["changed"] > 0
    assert_same_run(plain, train(9, scale=2.0**16, **how))
    assert_same_run(plain, train(9, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**12)))


@pytest.mark.parametrize("early", [False, True])
def test_what_grows_starts_from_clipped_gradients(early):
    free, clipped = train(3), train(3, clip=1e-3, early=early)
    one, two = (sum(opt.state[h.delta]["exp_avg"].norm() for h in held(run)) for run, opt in (free, clipped))
    assert two < one / 20


@pytest.mark.filterwarnings("error:adapter")
@pytest.mark.parametrize("how", ["late", "early", "fused", "by hand", "to zeros"])
def test_a_skipped_step_leaves_nothing_behind(how):
    """fused: GradScaler calls its step(). by hand, to zeros: gradients are cleared, and handle.step() is not called."""
    steps = (0, True), (0, False), (1, True), (1, False), *((step, step == 5) for step in range(2, 9)), (5, False)
    runs = []
    for overflows in (True, False):
        net = model()
        handle = fastft.attach(net, fastft.SpIEL(density=0.1, target_modules=["0", "2"], **CYCLE))
        optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2, fused=how == "fused")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
        for step, overflow in steps:
            if overflow and not overflows:
                continue
            x, y = batch(step, 0)
            loss = (net(x) - y).square().mean()
            if overflow:  # in the second layer alone: what the first one saw is finite
                loss = loss + (net[2](x.new_ones(3, 40)) * float("inf")).sum()
            scaler.scale(loss).backward()
            if not overflow or how not in ("by hand", "to zeros"):
                scaler.step(optimizer)
                scaler.update(2.0**8)
                if how == "early":
                    optimizer.zero_grad()
                handle.step()
                assert all(one.candidates is None or one.candidate_pending.isfinite().all() for one in held(handle))
            optimizer.zero_grad(set_to_none=how != "to zeros")
        assert [choice["update"] for choice in handle.method.history] == [3, 7]
        runs.append((handle, optimizer))
    for one, two in zip(*map(held, next(zip(*runs)))):
        assert torch.equal(one.delta, two.delta) and one.delta.isfinite().all()


def test_gradients_of_whole_rows_may_be_nothing():
    """Those of units that a ReLU cut off; the first numbers of a gradient then say nothing of its scale."""
    sums = []
    for scale in (1.0, 2.0**16):
        net = nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 1))
        nn.init.constant_(net[0].weight, 0.01)
        net[1].weight.data = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
        handle = fastft.attach(net, fastft.SpIEL(density=0.5, target_modules=["0"], **CYCLE))
        optimizer = handle.optimizer()
        (net(torch.ones(2, 64)).sum() * scale).backward()
        for parameter in handle.parameters():
            parameter.grad /= scale
        optimizer.step(), handle.step()
        sums.append(held(handle)[0].candidate_sum)
    torch.testing.assert_close(*sums)


def test_gradients_that_are_asked_for_are_no_updates():
    """As adversarial training asks for those of the input, and a probe for the parameters' own."""
    sums = []
    for asks in (False, True):
        handle, _ = train(1)
        x, y = batch(1, 0)
        for wanted in ([x], list(handle.parameters())) if asks else ():
            torch.autograd.grad((handle.model(x.requires_grad_()) - y).square().mean(), wanted)
        (handle.model(x) - y).square().mean().backward()
        sums.append(held(handle)[0].candidate_pending)
    assert torch.equal(*sums) and sums[0].any()


def test_an_overflow_of_candidates_alone_grows_nothing_of_it():
    handle, optimizer = train(2)
    one = held(handle)[0]
    one.candidate_pending[3] = torch.inf
    one.delta.grad = torch.ones_like(one.delta)
    optimizer.step(), handle.step()
    assert one.updates == 3 and all(t.isfinite().all() for t in optimizer.state[one.delta].values())


def test_parameters_that_two_optimizers_share_are_refused():
    net = model()
    handle = fastft.attach(net, fastft.LIFT(density=0.1, filter_rank=4, update_interval=2, target_modules=["0", "2"]))
    first, second = handle.parameters()
    optimizers = torch.optim.AdamW([first]), torch.optim.AdamW([second])
    with pytest.raises(RuntimeError, match="one optimizer must hold all of them"):
        for step in range(2):
            x, y = batch(step, 0)
            (net(x) - y).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
            handle.step()


def test_a_process_without_a_gradient_takes_part_in_the_mean():
    """An expert may get no tokens in one process: it must not wait for the others, nor they for it."""
    one, taken = held(train(1)[0])[0], []
    assert one.changed_since(taken.append) == 1.0
    one.delta.grad = torch.ones_like(one.delta)
    one._note_gradient(one.delta)
    one.note_update()
    assert one.changed_since(lambda before: before.mul_(2)) == 0.5
    one.delta.grad = None
    assert one.changed_since(taken.append) == 1.0
    assert len(taken) == 2 and not taken[0].any() and not taken[1].any(), "an update leaves nothing to the next one"
