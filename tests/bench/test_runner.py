from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastft import testing
from fastft.bench import results, rounds, runner, stats
from fastft.bench.runner import Case, WrongResult


def square(x):
    return lambda: {"y": x * x}


def make_case(arms, **fields):
    """A case without autograd: y = x², whose checker compares with the float64 square."""

    def checker(x):
        golden = {"y": x.double() ** 2}
        return lambda build: runner.check_close(build(x)(), golden, {"y": x * x}, factor=2.0)

    def inputs(device, seed):
        return torch.randn(64, generator=torch.Generator().manual_seed(seed), device=device)

    fields = {"inputs": inputs, "checker": checker, **fields}
    return Case("toy", "square", "tiny", "64", "fp32", tensors=lambda x: [x], floor=square, arms=arms, **fields)


def by_name(measurements):
    return {m.implementation: m for m in measurements}


def test_an_arm_that_disagrees_gets_no_number():
    arms = {
        "fastft": square,
        "off": lambda x: lambda: {"y": x * x * 1.001},
        "nan": lambda x: lambda: {"y": x * float("nan")},
        "shape": lambda x: lambda: {"y": (x * x)[:-1]},
        "none": lambda x: lambda: {},
    }
    found = by_name(runner.measure(make_case(arms, skipped={"gone": "not installed"}), "cpu", rounds=3))
    assert found["fastft"].status == "quick" and found["fastft"].ratio is not None
    for name, why in {"off": "relative error", "nan": "relative error", "shape": "expected [64]", "none": "missing"}.items():
        assert found[name].status == "wrong" and why in found[name].note, name
        assert found[name].ratio is None and found[name].seconds is None
    assert found["gone"].status == "skipped" and found["gone"].note == "not installed"


def test_what_a_peer_raises_skips_it_and_ours_raises():
    def raising(error):
        def build(x):
            raise error

        return build

    arms = {
        "fastft": square,
        "fastft:other": raising(testing.BackendError("no kernel")),
        "peer": raising(MemoryError("too large")),
    }
    found = by_name(runner.measure(make_case(arms), "cpu", rounds=2))
    assert (found["peer"].status, found["peer"].note) == ("skipped", "MemoryError: too large")
    assert (found["fastft:other"].status, found["fastft:other"].note) == ("skipped", "BackendError: no kernel")
    assert found["fastft"].status == "quick"
    for name, error in (("fastft", testing.BackendError("no kernel")), ("fastft:other", TypeError("a bug"))):
        with pytest.raises(type(error)):
            runner.measure(make_case({name: raising(error)}), "cpu", rounds=2)


def test_every_arm_runs_in_every_round_in_changing_order(monkeypatch):
    ran = []

    def arm(name):
        return [lambda: ran.append(name)]

    monkeypatch.setitem(rounds.MIN_SAMPLE, "cpu", 0.0)  # one call a sample
    times = runner.interleaved({name: arm(name) for name in ("floor", "a", "b")}, "cpu", rounds=20, seed=1)
    orders = [tuple(ran[i : i + 3]) for i in range(len(ran) - 60, len(ran), 3)]
    assert all(sorted(order) == ["a", "b", "floor"] for order in orders)
    assert len(set(orders)) > 3
    assert {name: len(t) for name, t in times.items()} == {"floor": 20, "a": 20, "b": 20}


def test_calls_walk_through_the_input_sets(monkeypatch):
    seen = []
    monkeypatch.setitem(rounds.MIN_SAMPLE, "cpu", 0.0)
    runs = {name: [lambda s=s: seen.append(s) for s in range(3)] for name in ("floor", "a")}
    runner.interleaved(runs, "cpu", rounds=5)
    assert seen[-10:] == [(seen[-10] + i) % 3 for i in range(10)]


@pytest.mark.parametrize("elsewhere", [{}, {"fastft@old": lambda calls: 1.0}])
def test_on_a_gpu_no_arm_hides_its_launches_behind_the_one_before(monkeypatch, elsewhere):
    """The host runs ahead of a GPU that is busy; arms take what the slower of both takes, whatever runs before them."""
    host = gpu = 0.0

    def arm(launching, running):
        def run():
            nonlocal host, gpu
            host += launching
            gpu = max(host, gpu) + running

        return [run] * 3

    def seconds(start, stop):
        nonlocal host
        host = max(host, stop)  # waited for
        return stop - start

    def stamp():
        return max(host, gpu)

    monkeypatch.setattr(rounds, "clock", lambda device: (stamp, stamp, seconds))
    costs = {"floor": (6e-5, 22e-5), "floor2": (6e-5, 22e-5), "fastft": (30e-5, 26e-5), "peer": (15e-5, 27e-5)}
    times = rounds.interleaved({name: arm(*cost) for name, cost in costs.items()}, "cuda", 20, 0, elsewhere)
    assert {name: times[name] for name in costs} == {name: [pytest.approx(max(cost))] * 20 for name, cost in costs.items()}


def test_input_sets_exceed_a_gpus_cache_by_what_a_call_touches(monkeypatch):
    gpu = SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1000))
    case = make_case({}, inputs=lambda device, seed: torch.zeros(250))  # 1000 bytes
    assert [len(runner._input_sets(replace(case, moved=moved), gpu, 0)) for moved in (0, 5000, 500, 1)] == [4, 4, 7, 16]


def test_only_fastft_is_judged_and_only_beside_its_rivals():
    def told(**found):
        measured = [
            runner.Measurement(name.replace("_", ":"), ratio=stats.Interval(r, r - 0.01, r + 0.01), seconds=r)
            for name, r in found.items()
        ]
        for m in measured:
            if runner.is_ours(m.implementation):
                m.target, m.met = 1.05, m.ratio.median < 1.05
                m.facts = [runner.Fact("state_bytes", m.ratio.median, "B/entry", target=1.05, met=m.met)]
        return [line.split()[0] for line in results.losses(make_case({}), measured)]

    assert told(fastft=1.2, full=1.1) == ["MISSED", "MISSED"] and told(fastft=1.2, peft=1.1)[-1] == "LOST"
    assert told(fastft=1.0, fastft_triton=1.1) == ["MET", "LOOK", "LOOK"]


def fixed_times(monkeypatch, **factors):
    """Replace the clock: floor takes 1 s with ±`noise`, the others their factor."""

    def interleaved(runs, device, rounds, seed=0, elsewhere=None):
        g = torch.Generator().manual_seed(0)
        noise = factors.get("noise", 0.0)
        return {
            n: [factors.get(n, 1.0) * (1 + noise * torch.randn((), generator=g).item()) for _ in range(rounds)]
            for n in (*runs, *(elsewhere or {}))
        }

    monkeypatch.setattr(runner, "interleaved", interleaved)


def test_target_met_missed_and_void(monkeypatch):
    case = make_case({"fastft": square, "peer": square}, target=1.04)
    fixed_times(monkeypatch, fastft=1.03, peer=1.02)
    found = by_name(runner.measure(case, "cpu"))
    assert found["fastft"].status == "ok" and found["fastft"].met is True and found["peer"].met is None
    assert [line.split()[0] for line in results.losses(case, list(found.values()))] == ["LOST"]

    fixed_times(monkeypatch, fastft=1.0301, peer=1.03, noise=0.001)
    said = results.losses(case, runner.measure(case, "cpu"))
    assert [line.split()[0] for line in said] == ["CLOSE"], "behind, but the intervals overlap"

    fixed_times(monkeypatch, fastft=1.05, peer=1.2)
    found = by_name(runner.measure(case, "cpu"))
    assert found["fastft"].met is False
    assert [line.split()[0] for line in results.losses(case, list(found.values()))] == ["MISSED"]

    fixed_times(monkeypatch, fastft=0.5, noise=0.1)
    found = by_name(runner.measure(case, "cpu"))
    assert {m.status for m in found.values()} == {"void"} and found["fastft"].met is None


def test_share_of_a_rivals_gain(monkeypatch):
    case = make_case({"fastft": square, "full": square}, rival="full", share=0.97)
    for ours, word in ((1.02, "MET"), (1.05, "MISSED")):
        fixed_times(monkeypatch, fastft=ours, full=1.8)
        found = runner.measure(case, "cpu")
        (fact,) = by_name(found)["fastft"].facts
        assert (fact.metric, fact.unit, fact.met) == ("speedup", "x over full", word == "MET")
        assert fact.value == pytest.approx(1.8 / ours) and fact.ratio.median == pytest.approx(1 / ours)
        (said,) = results.losses(case, found)
        assert said.startswith(word) and "of the floor's 1.800, target 0.970" in said
    (fact,) = by_name(runner.measure(case, "cpu", quick=True))["fastft"].facts
    assert fact.met is None


def test_reach_of_a_copys_speed(monkeypatch):
    case = make_case({"fastft": square}, copies=square, reach=0.5, moved=1000)
    for ours, word in ((1.8, "MET"), (2.2, "MISSED")):
        fixed_times(monkeypatch, fastft=ours, copies=1.0)
        found = runner.measure(case, "cpu")
        (fact,) = by_name(found)["fastft"].facts
        assert (fact.metric, fact.unit, fact.met) == ("bandwidth", "GB/s", word == "MET")
        assert fact.ratio.median == pytest.approx(1 / ours)
        assert fact.value == pytest.approx(1e-6 / by_name(found)["fastft"].seconds)
        assert "copies" not in by_name(found), "it is no implementation"
        (said,) = results.losses(case, found)
        assert said.startswith(word) and "of a copy's" in said


def test_arms_tell_facts_and_their_own_parameters():
    w = torch.randn(8, 8, requires_grad=True)

    def copying(x):
        own = w.detach().clone().requires_grad_()

        def run():
            return {"y": x * x, "z": own @ own}

        run.parameters = lambda: [own]
        run.facts = lambda: [runner.Fact("state_bytes", 21.0, "B/entry", target=20, met=False)]
        return run

    case = make_case({"fastft": copying})
    found = runner.measure(case, "cpu", rounds=2)
    assert by_name(found)["fastft"].saved_bytes == 0, "its own parameters are free"
    assert [line for line in results.losses(case, found) if "state_bytes 21 B/entry, target 20" in line]


@pytest.mark.parametrize("how", [{"rounds": 39}, {"rounds": 40, "quick": True}])
def test_too_few_rounds_never_count(monkeypatch, how):
    fixed_times(monkeypatch)
    found = runner.measure(make_case({"fastft": square}, target=2.0), "cpu", **how)
    assert {m.status for m in found} == {"quick"} and all(m.met is None for m in found)


def test_saved_bytes_counts_each_storage_once_and_not_what_is_free():
    w = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(4, 8)

    def run():
        h = x @ w  # saves x and w: free
        (h * h.t().t() + h.exp()).sum().backward()  # saves h twice, once as a view, and exp's result

    assert runner.saved_bytes(run, [x, w]) == 2 * h_bytes(4, 8)


def h_bytes(*size):
    return torch.empty(size).untyped_storage().nbytes()


def test_check_close_limits():
    want = {"y": torch.randn(1000, dtype=torch.float64)}
    plain = {"y": want["y"].bfloat16()}
    runner.check_close(plain, want, plain, factor=1.0)
    worse = {"y": (want["y"] * 1.02).bfloat16()}
    with pytest.raises(WrongResult, match="y: relative error"):
        runner.check_close(worse, want, plain, factor=2.0)


def test_losses_tell_of_wrong_results_and_of_the_reference():
    found = [
        runner.Measurement("fastft", "wrong", note="dA: relative error 1"),
        runner.Measurement("fastft:x", backend="reference+triton"),
    ]
    said = results.losses(make_case({}), found)
    assert [line.split()[0] for line in said] == ["WRONG", "SLOW"] and "dA: relative error 1" in said[0]


def test_compiled_arms_are_timed_compiled_and_for_the_sizes_of_their_case(monkeypatch):
    """Counting ops, and the variants of other cases, must not send them back to eager code or to dynamic sizes."""
    made, calls = [], []

    def backend(graph, examples):
        made.append([size for e in examples if isinstance(e, torch.Tensor) for size in e.shape])

        def compiled(*args):
            calls.append(1)
            return graph(*args)

        return compiled

    def formula(x):
        return x * x

    def timed(runs, *args):
        assert "peer" in runs
        before = len(calls)
        times = interleaved(runs, *args)
        assert len(calls) - before >= 2 + 3, "warm-up and rounds"
        return times

    interleaved = runner.interleaved
    monkeypatch.setattr(runner, "interleaved", timed)
    monkeypatch.setitem(rounds.MIN_SAMPLE, "cpu", 0.0)
    torch.compiler.reset()
    for size in range(10, 22):  # more than torch.compile makes variants
        compiled = torch.compile(formula, backend=backend)
        arms = {"fastft": square, "peer": lambda x, compiled=compiled: lambda: {"y": compiled(x)}}
        runner.measure(make_case(arms, inputs=lambda device, seed, size=size: torch.ones(size)), "cpu", rounds=3)
        assert made and all(sizes == [size] and type(sizes[0]) is int for sizes in made), made
        made.clear()


def test_times_that_an_arm_tells_are_judged_in_quiet_runs_alone(monkeypatch):
    def build(x):
        run = square(x)
        run.facts = lambda: [
            runner.Fact("seconds", 1, "s", None, 2, True, timed=True),
            runner.Fact("bytes", 1, "B", None, 2, True),
        ]
        return run

    for void, met in ((True, None), (False, True)):
        monkeypatch.setattr(runner.stats, "is_void", lambda floor, void=void: void)
        monkeypatch.setitem(rounds.MIN_SAMPLE, "cpu", 0.0)
        found = by_name(runner.measure(make_case({"fastft": build}), "cpu"))["fastft"]
        assert {fact.metric: fact.met for fact in found.facts} == {"seconds": met, "bytes": True}
