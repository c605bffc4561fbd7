"""The trace through the server, tiny: what loads adapters gives right tokens, and the check sees wrong ones."""

from collections import Counter
from dataclasses import replace

import pytest

from fastft.bench import results, serve_trace, shapes, standings, tables
from fastft.bench.clients import BASE, NEW, PROMPT, Trace, tokens_of

pytest.importorskip("openai")
pytest.importorskip("fastapi")
TINY, ADAPTERS = shapes.MODELS["tiny-llama"], 6
ENV = {"date": "2030-01-01T00:00:00+00:00", "commit": "abc", "device": "Some CPU", "threads": "1", "torch": "2.13.0"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trace")


@pytest.fixture(scope="module")
def report(folder):
    sizes = {"adapters": ADAPTERS, "slots": 2, "threads": 1, "seconds": 2.0, "block": 1.0, "clients": 3}
    return serve_trace.run(folder, TINY, **sizes, host_memory="1MiB")


@pytest.fixture(scope="module")
def given(report):
    return serve_trace.answers(report.pairs)


def wrong(folder, given):
    return serve_trace.count_wrong(folder / "model", folder / "adapters", given)


def test_adapters_are_loaded_while_others_answer_and_no_token_is_wrong(report, given):
    assert report.status == "ok", (report.errors[:3], report.wrong)
    assert report.moved("loads", "loads_total") > 0 and report.moved("loads", "evictions_total") > 0
    assert report.moved("resident", "loads_total") == 0
    assert len({answer.model for answer in given}) > 2
    assert all(len(a.arrivals) == len(a.tokens) == a.new and a.arrivals == sorted(a.arrivals) for a in given)
    assert report.ratio.lo <= report.ratio.median <= report.ratio.hi


def test_another_adapter_and_a_single_wrong_token_are_seen(folder, report, given):
    assert report.caught > 0.9
    assert sum(wrong(folder, given)) == 0
    own = [answer for answer in given if answer.model != BASE][:3]
    assert all(wrong(folder, [replace(answer, model=BASE) for answer in own]))
    last = [replace(a, tokens=[*a.tokens[:-1], (a.tokens[-1] + 1) % TINY.vocab]) for a in own]
    assert wrong(folder, last) == [1] * len(own)


def test_rows_and_the_sentence_in_readme(report, tmp_path):
    rows = serve_trace.rows(report, ENV, "tiny-llama", "6 adapters", "2 s", "ok")
    results.append(tmp_path / "some-cpu.csv", rows)
    back = results.read([tmp_path / "some-cpu.csv"])
    assert {row["metric"] for row in back if row["target"]} == {"inter_token_p99", "wrong_tokens", "errors"}
    assert {row["implementation"] for row in back} == {"fastft", "floor"}
    sentence = tables.summary(back + [row | {"status": "quick", "date": "2031"} for row in back], "x.md")
    assert "6 adapters" in sentence and " 0 wrong tokens, 0 errors." in sentence and "target ≤ 2.00×" in sentence
    assert standings.counted(back) == {}  # no case of its own in the tables and figures


def test_the_trace_is_the_same_each_time_and_follows_zipf():
    trace = Trace(ADAPTERS, TINY.vocab)
    drawn = [trace.request(i, "x") for i in range(2000)]
    assert drawn == [Trace(ADAPTERS, TINY.vocab).request(i, "x") for i in range(2000)]
    other = trace.request(5, "y")
    assert other[1] != drawn[5][1] and (other[0], len(other[1]), other[2]) == (drawn[5][0], len(drawn[5][1]), drawn[5][2])
    counts = Counter(adapter for adapter, _, _ in drawn)
    assert 150 < counts[None] < 250 and 1.5 < counts[0] / counts[1] < 2.6 and counts[5] > 50
    assert {len(prompt) for _, prompt, _ in drawn} == set(range(PROMPT[0], PROMPT[1] + 1))
    assert {new for *_, new in drawn} == set(range(NEW[0], NEW[1] + 1))
    assert tokens_of("0001200003") == [12, 3]
