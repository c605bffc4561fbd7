"""SpIEL against a dense version of itself, and what its choices must leave alone."""

import math

import pytest
import torch

import fastft
from fastft.methods.spiel import choose_growth
from fastft.ops.entries import Entries

from .dense_spiel import DenseSpIEL
from .sparse_net import NAMES, Net, attached, chosen, dense, held, inputs, loss_of, method, outputs, train

F32, BF16 = torch.float32, torch.bfloat16


def assert_state(handle, optimizer, reference, tolerance=2e-4):
    for name, one in held(handle).items():
        on = one.entries.mask()
        assert torch.equal(on, reference.active[name]), f"{name}: other entries"
        pairs = [("delta", one.delta, reference.delta)]
        state = optimizer.state[one.delta]
        for key, theirs in (("exp_avg", reference.mean), ("exp_avg_sq", reference.square), ("age", reference.age)):
            pairs += [(key, state[key], theirs)] if key in state else []
        for key, ours, theirs in pairs:
            want = theirs[name][on]
            error = (ours.double() - want).abs().max() / want.abs().max().clamp(min=1e-9)
            assert error <= (0 if key == "age" else tolerance), f"{name}.{key}: {error}"
        for key, theirs in (("row_max", reference.rows), ("column_max", reference.columns)):
            if key in state:
                torch.testing.assert_close(state[key].double(), theirs[name], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("policy", ["linear", "cosine"])
@pytest.mark.parametrize("selection", ["accumulated", "momentum"])
def test_is_the_dense_algorithm(selection, policy, micro):
    """Which entries train, their deltas, moments and ages after every update of five cycles."""
    decay, lr = 0.5, 0.02
    net, handle = attached(selection, policy=policy)
    eps = 1e-8 if selection == "momentum" else 1e-6
    reference = DenseSpIEL(Net(), chosen(handle), handle.method, lr, eps=eps, decay=decay)
    optimizer = handle.optimizer(lr=lr, weight_decay=decay)
    sizes = {name: len(one.entries) for name, one in held(handle).items()}
    for step in range(20):
        train(net, handle, 1, optimizer, start=step, micro=micro)
        reference.update(micro)
        assert_state(handle, optimizer, reference)
        assert {name: len(one.entries) for name, one in held(handle).items()} == sizes, "exactly as many as before"
        for name, weight in reference.base.items():
            inside = chosen(handle)[name]
            assert torch.equal(net.get_submodule(name).weight[~inside], weight[~inside].float()), "others: pretrained bits"
    assert [h["update"] for h in handle.method.history] == [2, 6, 10, 14, 18]
    assert [h["changed"] for h in handle.method.history] == reference.replaced
    assert all(h["entries"] == sum(sizes.values()) for h in handle.method.history)
    assert reference.replaced[1] > reference.replaced[3] > 0


def test_first_choice_replaces_everything_it_can_or_not():
    """linear: all but the candidates that would grow at once again; cosine: a fraction from the start."""
    for policy, selection in (("linear", "momentum"), ("cosine", "momentum"), ("linear", "accumulated")):
        net, handle = attached(selection, policy=policy, initial_reselection_rate=0.2)
        before = chosen(handle)
        train(net, handle, 2)
        stayed = sum(int((before[name] & mask).sum()) for name, mask in chosen(handle).items())
        count = sum(int(mask.sum()) for mask in before.values())
        if policy == "cosine":
            assert stayed == count - sum(int(0.2 * (1 + math.cos(math.pi / 10)) / 2 * int(m.sum())) for m in before.values())
        elif selection == "momentum":
            assert stayed == 0
        else:
            assert 0 < stayed < 0.5 * count
        assert handle.method.history[0]["overlap_with_first"] == stayed


@pytest.mark.parametrize("policy", ["linear", "cosine"])
def test_rates_fall_to_nothing(policy):
    spiel = method("accumulated", Net(), policy=policy, total_steps=202, initial_reselection_rate=0.3)
    rates = [spiel.rate(t, 202) for t in range(6, 203, 4)]
    assert rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(0, abs=1e-12) and rates[0] < 0.3
    assert spiel.rate(2, 202) == (1.0 if policy == "linear" else pytest.approx(0.3, rel=1e-3))
    net, handle = attached("accumulated", policy=policy, total_steps=6)
    optimizer = train(net, handle, 5)
    before = chosen(handle)
    train(net, handle, 8, optimizer, start=5)
    for name, mask in chosen(handle).items():
        assert torch.equal(mask, before[name]), "nothing is replaced at total_steps and after it"
    assert [h["update"] for h in handle.method.history] == [2, 6] and handle.method.history[1]["changed"] == 0


def test_schedule():
    """Updates 1, 2, 5, 6, … collect, a choice forgets what was collected; nothing is kept in between."""
    net, handle = attached("accumulated")
    optimizer = handle.optimizer(lr=0.01)
    for step in range(12):
        loss_of(net, inputs(step)).backward()
        collecting = step % 4 < 2
        for one in held(handle).values():
            assert (one.candidates is not None) == collecting, step
            assert one.observed == (step % 4 if collecting else 0)
            assert not collecting or one.candidate_pending.any()
        optimizer.step(), optimizer.zero_grad(), handle.step()
        handle.step()  # no new update: nothing
        assert all(one.updates == step + 1 for one in held(handle).values())
        assert all(one.candidates is None or not one.candidate_pending.any() for one in held(handle).values())


def test_after_the_last_choice_nothing_is_held():
    net, handle = attached("accumulated", total_steps=6)
    train(net, handle, 10)
    assert all(one.candidates is None for one in held(handle).values())


def test_what_no_choice_will_use_is_not_collected(tmp_path):
    net, handle = attached("accumulated", total_steps=5)
    train(net, handle, 4)
    handle.save(tmp_path)
    again = Net()
    for model, one in ((net, handle), (again, fastft.load(again, tmp_path))):  # what was loaded only learns it here
        train(model, one, 1, start=4)
        assert all(entries.candidates is None and entries.observer is None for entries in held(one).values())


@pytest.mark.parametrize("kind", ["accumulated", "momentum"])
def test_what_is_frozen_keeps_its_entries(kind):
    net, handle = attached(kind)
    optimizer = train(net, handle, 1)
    one = net.b.sparse["default"]
    one.delta.requires_grad_(False)
    before, mask = one.delta.clone(), one.entries.mask()
    train(net, handle, 1, optimizer, start=1)
    assert handle.method.history[0]["changed"] and torch.equal(one.entries.mask(), mask) and torch.equal(one.delta, before)


@pytest.mark.parametrize("rows", [0, 3])
def test_a_gradient_of_nothing_chooses_no_candidates(rows):
    """Of an expert without tokens, or a loss all of whose labels are masked."""
    net, handle = attached("accumulated")
    (net(torch.randn(rows, 12)) * 0).sum().backward()
    assert all(one.candidates is None for one in held(handle).values())


def test_it_must_know_the_end_of_the_run():
    net, handle = attached("accumulated", total_steps=None)
    with pytest.raises(RuntimeError, match="total_steps"):
        train(net, handle, 1)
    handle.total_steps = 20
    train(net, handle, 3)


@pytest.mark.parametrize("moments", [F32, BF16])
@pytest.mark.parametrize("selection", ["accumulated", "momentum"])
def test_a_choice_keeps_the_bits_of_what_stays(selection, moments):
    if selection == "momentum" and moments == BF16:
        pytest.skip("SM3 has no moments")
    net, handle = attached(selection, policy="cosine")
    options = {} if selection == "momentum" else {"moment_dtype": moments}
    optimizer = train(net, handle, 5, **options)
    base = held(handle)
    pretrained = Net()
    loss_of(net, inputs(5)).backward()
    optimizer.step(), optimizer.zero_grad()
    old = {}
    for name, one in base.items():
        state = {k: v.clone() for k, v in optimizer.state[one.delta].items()}
        old[name] = one.entries.copy(), one.delta.detach().clone(), state, one.delta
    y = outputs(net)
    handle.step()
    assert handle.method.history[-1]["changed"]
    dropped = {}
    for name, one in base.items():
        entries, delta, state, parameter = old[name]
        assert one.delta is parameter and one.delta.grad is None, "the parameter keeps its identity"
        both = entries.mask() & one.entries.mask()
        for key, before in (("delta", delta), *state.items()):
            now = one.delta.detach() if key == "delta" else optimizer.state[parameter][key]
            assert now.dtype == before.dtype
            if before.shape == delta.shape:
                assert torch.equal(dense(one.entries, now)[both], dense(entries, before)[both]), key
            else:
                assert torch.equal(now, before), f"{key} is not by entry"
        new, gone = one.entries.mask() & ~both, entries.mask() & ~both
        assert new.sum() == gone.sum() > 0
        assert not dense(one.entries, one.delta)[new].any(), "new entries start where they are"
        weight = pretrained.get_submodule(name).weight
        assert torch.equal(net.get_submodule(name).weight[gone], weight[gone]), "dropped ones: the pretrained bits"
        dropped[name] = torch.where(gone, dense(entries, delta), 0)
        if "age" in state:
            assert optimizer.state[parameter]["age"].dtype == torch.int32
            assert (dense(one.entries, optimizer.state[parameter]["age"])[new] == 2).all()
            kept = dense(one.entries, optimizer.state[parameter]["age"])[both]
            assert set(kept.tolist()) <= {4 + 2, 6}, "as many updates as they had"
    with torch.no_grad():
        for name, delta in dropped.items():
            net.get_submodule(name).weight.add_(delta)
    torch.testing.assert_close(outputs(net), y), "the forward changed through dropped deltas alone"


def test_state_is_by_entry_also_where_a_weight_has_as_many_rows():
    """SM3's accumulators are of rows and columns, even if there are as many of these as entries."""
    for share in (20, 12):  # of rows, and of columns
        net = torch.nn.Sequential(torch.nn.Linear(12, 20))
        spiel = {"selection": "momentum", "reselection_steps": 4, "selection_accumulation_steps": 2, "total_steps": 20}
        handle = fastft.attach(net, fastft.SpIEL(density=share / 260, **spiel, target_modules=["0"]))
        (one,) = held(handle).values()
        assert len(one.entries) == share
        optimizer = handle.optimizer(lr=0.1)
        net(inputs(0)).square().mean().backward()
        optimizer.step(), handle.step()
        net(inputs(1)).square().mean().backward()
        optimizer.step()
        before = {key: value.clone() for key, value in optimizer.state[one.delta].items()}
        handle.step()
        assert handle.method.history[-1]["changed"] == share
        for key, value in before.items():
            assert torch.equal(optimizer.state[one.delta][key], value), key


@pytest.mark.parametrize("micro", [1, 4])
def test_seeds_are_means_of_updates(micro):
    """Whatever the number of micro-batches: bias correction returns the mean gradient of whole updates."""
    net, handle = attached("accumulated")
    lr, seen = 1e-9, []  # the weights hardly move, so that a dense twin sees the same gradients
    first, twin = chosen(handle), Net()
    for step in range(2):
        twin.zero_grad()
        for part in range(micro):
            (loss_of(twin, inputs(step, part)) / micro).backward()
        seen.append({name: twin.get_submodule(name).weight.grad.clone() for name in NAMES})
    optimizer = train(net, handle, 2, micro=micro, lr=lr)
    for name, one in held(handle).items():
        state = optimizer.state[one.delta]
        new = (one.entries.mask() & ~first[name])[one.entries.mask()]
        gradients = torch.stack([s[name][one.entries.mask()] for s in seen])
        assert new.any() and (state["age"][new] == 2).all()
        torch.testing.assert_close((state["exp_avg"] / (1 - 0.9**2))[new], gradients.mean(0)[new], rtol=1e-4, atol=1e-7)
        want = gradients.square().mean(0)[new]
        torch.testing.assert_close((state["exp_avg_sq"] / (1 - 0.999**2))[new], want, rtol=1e-4, atol=1e-9)


def test_seeds_suit_pytorchs_optimizer_too():
    """It has one step for all entries; what its bias correction returns is the mean."""
    net, handle = attached("accumulated", policy="cosine", initial_reselection_rate=0.5)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-9, eps=1e-6, weight_decay=0.0)
    twin, seen = Net(), []
    for step in (4, 5):
        twin.zero_grad()
        loss_of(twin, inputs(step)).backward()
        seen.append({name: twin.get_submodule(name).weight.grad.clone() for name in NAMES})
    train(net, handle, 5, optimizer)
    before = chosen(handle)
    train(net, handle, 1, optimizer, start=5)
    for name, one in held(handle).items():
        state, mask = optimizer.state[one.delta], one.entries.mask()
        new = (mask & ~before[name])[mask]
        gradients = torch.stack([s[name][mask] for s in seen])
        assert new.any() and state["step"] == 6
        torch.testing.assert_close((state["exp_avg"] / (1 - 0.9**6))[new], gradients.mean(0)[new], rtol=1e-4, atol=1e-7)


def growth(active, deltas, candidates, sums, rate, shape=(2, 5)):
    from fastft.modules.sparse import SparseEntries

    one = SparseEntries(Entries.of_flat(torch.tensor(active), shape), torch.tensor(deltas))
    one.consider(Entries.of_flat(torch.tensor(candidates), shape))
    one.candidate_sum.copy_(torch.tensor(sums))
    one.observed = 1
    grown, again = choose_growth(one, rate)
    return grown.flat().tolist(), again.tolist()


def test_drop_rule():
    """Worked by hand: active 0 2 4 6, of which 2 and 6 moved least."""
    active, moved = [0, 2, 4, 6], [3.0, -0.1, 2.0, 0.2]
    assert growth(active, moved, [1, 3, 5, 7], [1.0, -4.0, 2.0, 3.0], 0.5) == ([3, 7], [False] * 4), "the largest |sum|"
    assert growth(active, moved, [1, 2, 3, 5], [1.0, 9.0, 2.0, 1.5], 0.5) == ([3], [False, True, False, False]), "again"
    assert growth(active, moved, [0, 3, 4, 5], [9.0, 1.0, 9.0, 2.0], 0.5) == ([3, 5], [False] * 4), "what stays can't grow"
    assert growth(active, moved, [0, 1, 4, 6], [9.0, 1.0, 9.0, 0.0], 0.5) == ([1], [False] * 3 + [True]), (
        "candidates run out"
    )
    assert growth(active, moved, [1, 3, 5, 7], [1.0, 1.0, 1.0, 1.0], 0.5) == ([1, 3], [False] * 4), "of equal ones the first"
    assert growth(active, moved, [1, 3, 5, 7], [1.0] * 4, 0.0) == ([], [False] * 4)


def test_what_is_dropped_and_grown_again_goes_on():
    """Its delta and its state are left as they are."""
    net, handle = attached("accumulated")
    optimizer = train(net, handle, 1)
    loss_of(net, inputs(1)).backward()
    optimizer.step(), optimizer.zero_grad()
    before = {n: (one.entries.mask(), dense(one.entries, one.delta)) for n, one in held(handle).items()}
    handle.step()
    stayed = 0
    for name, one in held(handle).items():
        mask, delta = before[name]
        both = mask & one.entries.mask()
        stayed += int(both.sum())
        assert torch.equal(dense(one.entries, one.delta)[both], delta[both])
        assert (dense(one.entries, optimizer.state[one.delta]["age"])[both] == 2).all()
    assert stayed, "the rate is 1, so only the rule keeps them"


@pytest.mark.parametrize("selection", ["accumulated", "momentum"])
def test_modules_that_take_no_part(selection):
    """A layer without gradients (an expert that got no tokens) keeps its entries; one may also be too small for any."""
    net = Net()
    net.unused, net.tiny = torch.nn.Linear(8, 8), torch.nn.Linear(1, 1)
    options = {"reselection_steps": 4, "selection_accumulation_steps": 2, "total_steps": 20, "selection": selection}
    handle = fastft.attach(net, fastft.SpIEL(density=0.15, target_modules=[*NAMES, "unused", "tiny"], **options))
    assert len(held(handle)["tiny"].entries) == 0 and len(held(handle)["unused"].entries)
    before = chosen(handle)["unused"]
    train(net, handle, 7)
    assert torch.equal(chosen(handle)["unused"], before) and handle.method.history[0]["changed"]


def test_momentum_needs_sm3():
    net, handle = attached("momentum")
    with pytest.raises(RuntimeError, match="SM3"):
        train(net, handle, 2, torch.optim.SGD(handle.parameters(), lr=0.1))


def test_first_entries_are_random_and_the_same_for_a_seed():
    one, two, three = (chosen(attached("accumulated", seed=seed)[1]) for seed in (0, 0, 1))
    for name in NAMES:
        assert torch.equal(one[name], two[name]) and not torch.equal(one[name], three[name])
    spiel = attached("accumulated")[1].method
    numel = 12 * 20 + 20 * 16 + 16 * 10
    assert [spiel.counts[n].entries for n in NAMES] == [int(0.15 * 750) * s // numel for s in (240, 320, 160)]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"density": 0}, "nothing would train"),
        ({"density": 1.5}, "density=1.5"),
        ({"density": 1.0}, "more than the"),
        ({"selection": "best"}, "accumulated, momentum"),
        ({"policy": "constant"}, "linear, cosine"),
        ({"selection_accumulation_steps": 5}, "more than"),
        ({"reselection_steps": 0}, "reselection_steps=0"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"allow_tied_weights": True}, "in place"),
    ],
)
def test_refused_options(options, message):
    net = Net()
    with pytest.raises(ValueError, match=message):
        fastft.attach(net, method(options.pop("selection", "accumulated"), net, **options))
