"""`fastft tune` without a GPU: what it chooses by made-up times, what it writes, and what runs on the interpreter."""

import importlib
import json
import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from fastft import testing, tune
from fastft.bench import op_problems, op_runs, shapes
from fastft.kernels import _config, lora
from fastft.kernels._sampled import work_per_million
from fastft.ops import registry

START = {"BLOCK": 64, "num_warps": 4}
NUMBERS = {"BLOCK": [32, 64, 128, 256], "num_warps": [2, 4, 8], "num_stages": [1, 2]}


def near(config):
    return tune.neighbours(config, NUMBERS)


def allowed(config):
    return None


class Clock:
    """A timer: seconds by configuration, times a noise that all arms of a round share and one of each."""

    def __init__(self, seconds, shared=0.2, own=0.0, seed=0):
        self.seconds, self.shared, self.own, self.asked = seconds, shared, own, []
        self.random = random.Random(seed)

    def __call__(self, configs, rounds):
        self.asked.append((len(configs), rounds))
        times = [[] for _ in configs]
        for _ in range(rounds):
            drift = 1 + self.shared * self.random.random()
            for i, config in enumerate(configs):
                times[i].append(self.seconds(config) * drift * (1 + self.own * self.random.uniform(-1, 1)))
        return times


def by_block(config):
    return {32: 5.0, 64: 4.0, 128: 3.0, 256: 2.0}[config["BLOCK"]] * {2: 1.0, 4: 1.1, 8: 1.3}[config["num_warps"]]


def test_neighbours_differ_in_one_number_by_one_place_and_have_no_new_ones():
    assert near(START) == [
        {"BLOCK": 32, "num_warps": 4},
        {"BLOCK": 128, "num_warps": 4},
        {"BLOCK": 64, "num_warps": 2},
        {"BLOCK": 64, "num_warps": 8},
    ]
    assert [c["BLOCK"] for c in near({"BLOCK": 100})] == NUMBERS["BLOCK"]


@pytest.mark.parametrize("own", [0.0, 0.01])
def test_the_search_walks_to_the_fastest(own):
    choice = tune.search(START, near, allowed, Clock(by_block, own=own))
    assert choice.verdict == "faster" and choice.config == {"BLOCK": 256, "num_warps": 2}
    assert choice.ratio.median == pytest.approx(2.0 / 4.4, rel=0.02) and choice.ratio.hi < choice.floor.lo
    assert f"{choice.tried} candidates timed" in str(choice)


def test_one_step_goes_to_a_neighbour():
    choice = tune.search(START, near, allowed, Clock(by_block), steps=1)
    assert choice.config == {"BLOCK": 128, "num_warps": 4}


def test_what_is_left_out_is_never_timed_and_told():
    timed = []

    def seconds(config):
        timed.append(config)
        return by_block(config)

    choice = tune.search(START, near, lambda c: "spills 8 registers" if c["BLOCK"] > 64 else None, Clock(seconds))
    assert choice.config == {"BLOCK": 64, "num_warps": 2}
    assert choice.left_out[0] == ({"BLOCK": 128, "num_warps": 4}, "spills 8 registers")
    assert all(config["BLOCK"] <= 64 for config in timed) and f"{len(choice.left_out)} left out" in str(choice)


def test_where_no_candidate_looks_faster_nothing_changes():
    best = {"BLOCK": 256, "num_warps": 2}
    clock = Clock(by_block)
    choice = tune.search(best, near, allowed, clock)
    assert (choice.config, choice.verdict) == (best, "best") and "in use is the fastest" in str(choice)
    assert clock.asked == [(4, tune.SCREENING_ROUNDS)], "no rounds for what is slower"
    assert tune.search(START, near, lambda c: "no", Clock(by_block)).verdict == "best"


@pytest.mark.parametrize("seed", range(8))
def test_equal_configurations_are_never_chosen(seed):
    """Whatever noise picks one in the first rounds: the intervals must part in rounds of their own."""
    choice = tune.search(START, near, allowed, Clock(lambda c: 1.0, own=0.02, seed=seed))
    assert choice.config == START and choice.verdict in ("best", "noise")


def test_a_gain_within_noise_is_said_to_be_that():
    choice = tune.search(START, near, allowed, Clock(lambda c: 0.9999 if c["BLOCK"] == 128 else 1.0, own=0.03))
    assert (choice.config, choice.verdict) == (START, "noise") and "within noise" in str(choice)
    assert choice.ratio.median < 1 and not choice.ratio.hi < choice.floor.lo


def test_a_gpu_that_is_not_quiet_chooses_nothing():
    choice = tune.search(START, near, allowed, Clock(by_block, own=0.5))
    assert (choice.config, choice.verdict) == (START, "void") and "not quiet" in str(choice)


def test_a_second_search_reproduces_the_choice_or_says_that_it_is_noise_or_differs():
    fast, slow = {"BLOCK": 256, "num_warps": 2}, {"BLOCK": 32, "num_warps": 2}
    assert tune.agreement(fast, dict(fast), Clock(by_block)) == (True, "reproduced")
    same, said = tune.agreement(fast, slow, Clock(lambda c: 1.0, own=0.01))
    assert same and said.startswith("noise: this time") and "'BLOCK': 32" in said
    same, said = tune.agreement(slow, fast, Clock(by_block))
    assert not same and said.startswith("differs") and "0.400" in said
    assert tune.agreement(slow, fast, Clock(by_block, own=0.5))[1].startswith("void")


class Fake:
    """A bench of made-up times of any op."""

    def __init__(self, seconds):
        self.times, self.why_not = Clock(seconds), allowed


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """A family "toy" with two entries of one op, one of another."""
    tables = {
        "default": {
            "op": [{"when": {"dtypes": d}, "config": START} for d in ("32/32", "16/16")],
            "other": [{"when": {}, "config": START}],
        },
        "candidates": {"op": NUMBERS, "other": {"num_warps": [4, 8]}},
    }
    for folder, table in tables.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "toy.json").write_text(json.dumps(table))
    monkeypatch.setattr(_config, "CONFIGS", tmp_path)
    _config.table.cache_clear()
    _config._nearest.cache_clear()
    yield tmp_path
    _config.table.cache_clear()
    _config._nearest.cache_clear()


def run(seconds=by_block, **options):
    said = []
    agreed = tune.tune("toy", "sm_77", lambda op, when, used: Fake(seconds), say=said.append, **options)
    return agreed, "\n".join(said)


def test_what_is_written_is_what_the_lookup_returns(configs):
    assert _config.lookup("sm_77", "toy", "op", dtypes="16/16") == START
    agreed, said = run()
    best = {"BLOCK": 256, "num_warps": 2}
    assert agreed and "wrote" in said and "BLOCK 64 -> 256, num_warps 4 -> 2" in said
    for dtypes in ("16/16", "32/32"):
        assert _config.lookup("sm_77", "toy", "op", dtypes=dtypes) == best
    assert _config.lookup("sm_77", "toy", "other") == START == _config.lookup("sm_78", "toy", "op", dtypes="16/16")
    assert list(json.loads((configs / "sm_77" / "toy.json").read_text())) == ["op"], "what did not change is the default's"
    assert [path.name for path in (configs / "sm_77").iterdir()] == ["toy.json"]


def test_a_second_run_changes_nothing_and_check_agrees(configs):
    run()
    before = (configs / "sm_77" / "toy.json").read_text()
    assert "nothing is surely faster" in run()[1]
    agreed, said = run(check=True)
    assert agreed and said.count("    reproduced") == 3
    assert (configs / "sm_77" / "toy.json").read_text() == before


def test_check_disagrees_where_another_one_is_faster_and_writes_nothing(configs):
    tune.write(
        "sm_77",
        "toy",
        {"op": [{"when": {"dtypes": d}, "config": {"BLOCK": 32, "num_warps": 8}} for d in ("32/32", "16/16")]},
    )
    agreed, said = run(check=True)
    assert not agreed and "differs" in said
    assert _config.lookup("sm_77", "toy", "op", dtypes="16/16")["BLOCK"] == 32


def test_quick_takes_one_step_of_the_first_16_bit_entry(configs):
    run(quick=True)
    assert _config.lookup("sm_77", "toy", "op", dtypes="16/16") == {"BLOCK": 128, "num_warps": 4}
    assert _config.lookup("sm_77", "toy", "op", dtypes="32/32") == START


def test_another_folder_leaves_the_package_alone_and_is_read_again(configs, tmp_path):
    out = tmp_path / "elsewhere"
    run(root=out)
    assert not (configs / "sm_77").exists() and (out / "sm_77" / "toy.json").exists()
    assert run(root=out, check=True)[1].count("    reproduced") == 3


def test_an_interrupted_write_leaves_the_old_file(configs, monkeypatch):
    tune.write("sm_77", "toy", {"other": [{"when": {}, "config": START}]})
    before = (configs / "sm_77" / "toy.json").read_text()

    def stopped(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune.os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        tune.write("sm_77", "toy", {"op": []})
    assert (configs / "sm_77" / "toy.json").read_text() == before


def test_other_ops_of_a_device_stay(configs):
    tune.write("sm_77", "toy", {"other": [{"when": {}, "config": {"num_warps": 8}}]})
    tune.write("sm_77", "toy", {"op": [{"when": {}, "config": START}]})
    assert list(json.loads((configs / "sm_77" / "toy.json").read_text())) == ["other", "op"]


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        tune.main(["no-such-family"])
    assert "known: dora, grouped, lora" in capsys.readouterr().err


def test_every_op_has_candidates_and_the_numbers_in_use_are_among_them():
    tables = {path.stem for path in (_config.CONFIGS / "default").glob("*.json")}
    assert set(tune.families()) == tables == set(op_problems._MAKERS)
    for family in tables:
        table = _config.table("default", family)
        assert tune.declared(family).keys() == table.keys()
        for op, numbers in tune.declared(family).items():
            for entry in table[op]:
                config = entry["config"]
                unknown = {k: config[k] for k in numbers.keys() & config.keys() if config[k] not in numbers[k]}
                assert not unknown and tune.neighbours(config, numbers), (op, entry["when"], unknown)


TINY = shapes.LINEARS["tiny"]
PROBLEMS = [problem for family in op_problems._MAKERS for problem in op_problems.problems(family, TINY)]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_arguments_are_what_the_op_takes_and_bytes_are_counted(problem):
    """By the reference, which runs them; a pure function of the seed; bytes at least those of what changes."""
    args, again = problem.make("cpu", 0), problem.make("cpu", 0)
    assert all(torch.equal(a, b) for a, b in zip(args, again) if isinstance(a, torch.Tensor))
    with testing.use("reference"):
        found = op_runs.outcome(problem.op, registry.OPS[problem.op], args)
    assert found and all(torch.isfinite(out.float()).all() for out in found)
    assert all(torch.equal(a, b) for a, b in zip(args, again) if isinstance(a, torch.Tensor)), "copies are changed"
    assert op_problems.moved(problem.op, args, found) > 0


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if not p.when.keys() & {"M", "work"}], ids=str)
def test_arguments_are_those_that_the_entry_is_for(problem):
    """The lookup takes the entry's configuration for them; numbers of tokens and of entries are below."""
    args = problem.make("cpu", 0)
    module = importlib.import_module(f"fastft.kernels.{problem.family}")
    entries = _config.table("default", problem.family)[problem.op]
    own = next(entry["config"] for entry in entries if entry["when"] == problem.when)
    assert module.config_for(problem.op, *args) == own


def test_sizes_of_full_problems_are_those_of_their_entries():
    full = op_problems.FULL
    for problem in op_problems.problems("sparse"):
        if work := problem.when.get("work"):
            assert work_per_million(full.n, full.k, op_problems.entries_of(work, full.n, full.k)) == work
    tokens = {problem.when["M"] for problem in op_problems.problems("grouped") if "M" in problem.when}
    assert max(tokens) <= full.tokens


def test_bytes_by_hand():
    (expand,) = (p for p in PROBLEMS if str(p) == "lora_expand_ dtypes=16/32 R=16")
    args = expand.make("cpu", 0)
    t, n = TINY.tokens, TINY.n
    assert op_problems.moved("lora_expand_", args, [args[0]]) == 2 * 2 * t * n + 4 * 16 * (t + n)
    x, index = torch.zeros(10, 64, dtype=torch.bfloat16), torch.tensor([0, 1, 40], dtype=torch.int32)
    assert op_problems.moved("gather_columns", (x, index), [torch.zeros(10, 3)]) == 10 * 2 * 32 + 12 + 120


def bench_of(name, **changes):
    problem = next(p for p in PROBLEMS if str(p) == name)
    used = _config.table("default", problem.family)[problem.op]
    used = next(entry["config"] for entry in used if entry["when"] == problem.when)
    return op_runs.Bench(problem, changes.get("launcher", getattr(lora, problem.op)), used, "cpu"), used


def test_candidates_are_checked_against_the_reference():
    """On the interpreter: what is right may be timed, what fails or is wrong is left out with the reason."""
    bench, used = bench_of("lora_expand_ dtypes=16/16 R=16")
    assert bench.why_not(used | {"BLOCK_M": 16}) is None
    assert "BLOCK_M" in bench.why_not({k: v for k, v in used.items() if k != "BLOCK_M"})

    def wrong(y, s, b, scale, *, config):
        lora.lora_expand_(y, s, b, scale * (1 if config["BLOCK_M"] == used["BLOCK_M"] else 1.05), config=config)

    bench, used = bench_of("lora_expand_ dtypes=16/16 R=16", launcher=wrong)
    assert bench.why_not(used) is None
    assert "wrong results" in bench.why_not(used | {"BLOCK_M": 16})


def test_a_configuration_in_use_that_is_wrong_ends_the_search():
    def nothing(y, s, b, scale, *, config):
        pass

    with pytest.raises(RuntimeError, match="the configuration in use is wrong"):
        bench_of("lora_expand_ dtypes=16/16 R=16", launcher=nothing)


def test_times_are_of_one_call_and_in_the_order_of_the_configurations(monkeypatch):
    """Calls stand in place of graphs, and each arm's sample is the sum of its blocks."""
    ran = []

    def launcher(*args, config):
        ran.append(config["BLOCK_M"])
        lora.lora_expand_(*args, config=config)

    def interleaved(runs, device, count):
        found = {}
        for name, (run,) in reversed(runs.items()):
            ran.clear()
            run()
            found[name] = [float(sum(ran))] * count
        return found

    bench, used = bench_of("lora_expand_ dtypes=16/16 R=16", launcher=launcher)
    monkeypatch.setattr(op_runs.graphs, "new_pool", lambda: None)
    monkeypatch.setattr(op_runs.graphs, "capture", lambda run, pool: run)
    monkeypatch.setattr(op_runs.rounds, "interleaved", interleaved)
    monkeypatch.setattr(bench, "_sets", lambda: [op_runs.copies(bench._args) for _ in range(3)])
    assert bench.times([used | {"BLOCK_M": m} for m in (16, 16, 64, 32)], 2) == [[16] * 2, [16] * 2, [64] * 2, [32] * 2]


def test_the_command_searches_writes_and_checks(tmp_path, monkeypatch, capsys):
    """All but the clock and the GPU: candidates of every op of a family run on the interpreter, checked."""
    small, clock = op_problems.problems, Clock(lambda config: 1.0 if config["num_warps"] == 8 else 2.0)
    monkeypatch.setattr(tune, "_no_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Made-Up 1")
    monkeypatch.setattr(op_problems, "problems", lambda family: small(family, TINY))
    monkeypatch.setattr(op_runs.Bench, "times", lambda self, configs, rounds: clock(configs, rounds))
    arguments = ["partial", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert tune.main(arguments) == 0
    table = json.loads((tmp_path / "default" / "partial.json").read_text())
    default = _config.table("default", "partial")
    assert [e["when"] for e in table["write_slice_"]] == [e["when"] for e in default["write_slice_"]]
    assert {op: entries[0]["config"]["num_warps"] for op, entries in table.items()} == dict.fromkeys(default, 8)
    assert tune.main([*arguments, "--check"]) == 0
    assert capsys.readouterr().out.count("    reproduced") == len(default)


def test_a_kernel_that_spills_is_left_out(monkeypatch):
    bench, used = bench_of("lora_expand_ dtypes=16/16 R=16")
    monkeypatch.setattr(
        op_runs, "compiled", lambda: nullcontext([SimpleNamespace(n_spills=0), SimpleNamespace(n_spills=24)])
    )
    assert bench.why_not(used) == "spills 24 registers"
