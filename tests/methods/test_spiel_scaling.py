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


def train(updates, scale=1.0, clip=None, scaler=None, copied=False):
    net = model()
    handle = fastft.attach(net, fastft.SpIEL(density=0.1, target_modules=["0", "2"], **CYCLE))
    if copied:
        net = copy.deepcopy(net)
        handle = fastft.methods.handles(net)["default"]
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


@pytest.mark.parametrize("copied", [False, True])
def test_a_scaled_loss_changes_nothing(copied):
    plain = train(9)
    assert plain[0].method.history[0]["changed"] > 0
    assert_same_run(plain, train(9, scale=2.0**16, copied=copied))
    assert_same_run(plain, train(9, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**12)))


def test_what_grows_starts_from_clipped_gradients():
    free, clipped = train(3), train(3, clip=1e-3)
    one, two = (sum(opt.state[h.delta]["exp_avg"].norm() for h in held(run)) for run, opt in (free, clipped))
    assert two < one / 20


def test_a_skipped_step_leaves_nothing_behind():
    net = model()
    handle = fastft.attach(net, fastft.SpIEL(density=0.1, target_modules=["0", "2"], **CYCLE))
    optimizer, scaler = handle.optimizer(lr=1e-2), torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    for step in range(9):
        for overflow in (step in (0, 1, 5), False):
            x, y = batch(step, 0)
            loss = (net(x) - y).square().mean()
            scaler.scale(loss * float("inf") if overflow else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            handle.step()
            optimizer.zero_grad()
            for one in held(handle):
                assert one.candidates is None or one.candidate_pending.isfinite().all()
            if not overflow:
                break
    assert [choice["update"] for choice in handle.method.history] == [3, 7]
    assert all(one.delta.isfinite().all() for one in held(handle))


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
    assert one.changed_since(lambda before: before.mul_(2)) == 0.5
    one.delta.grad = None
    assert one.changed_since(taken.append) == 1.0
    assert len(taken) == 2 and not taken[0].any() and not taken[1].any(), "an update leaves nothing to the next one"
