"""Each row draws for itself."""

import pytest
import torch

from fastft.serving import sampling
from fastft.serving.requests import Sampling
from fastft.serving.routes import StepBuffers
from fastft.serving.sampling import choose, draw, uniform


def logits(rows=1, vocabulary=13, seed=0):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def counted(row, temperature, top_p, n=20000):
    u = torch.tensor([uniform(seed, 3) for seed in range(n)])
    drawn = draw(row.expand(n, -1), torch.full((n,), temperature), torch.full((n,), top_p), u)
    return torch.bincount(drawn, minlength=row.shape[-1]) / n


def test_uniform_is_uniform_and_depends_on_seed_and_position():
    values = torch.tensor([uniform(seed, position) for seed in range(100) for position in range(100)])
    assert len(values.unique()) > 9900 and values.min() >= 0 and values.max() < 1
    counts = torch.histc(values, 20, 0, 1)
    assert ((counts - 500) ** 2 / 500).sum() < 45  # chi-square, 19 degrees: 1 in 1000
    assert abs(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]) < 0.04


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_are_the_softmax(temperature):
    row = logits()
    assert torch.allclose(counted(row, temperature, 1.0), torch.softmax(row[0] / temperature, -1), atol=0.015)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_top_p_keeps_the_smallest_set_that_has_it(top_p):
    row = logits(seed=1)
    p, order = torch.softmax(row[0], -1).sort(descending=True)
    kept = int((p.cumsum(0) < top_p).sum()) + 1
    expected = torch.zeros(13).index_copy(0, order[:kept], p[:kept] / p[:kept].sum())
    assert torch.allclose(counted(row, 1.0, top_p), expected, atol=0.015)


def test_the_short_way_to_the_cut_is_the_long_one(monkeypatch):
    scores, ones = logits(64, 600), torch.ones(64)
    u, top_p = torch.rand(64), torch.rand(64) * 0.98 + 0.02
    for flat in (False, True):  # flat: the first 256 don't have top_p
        x = scores * 1e-3 if flat else scores
        short = draw(x, ones, top_p, u)
        with monkeypatch.context() as patch:
            patch.setattr(sampling, "_FIRST", 10**9)
            assert torch.equal(short, draw(x, ones, top_p, u))
    assert torch.equal(draw(scores, ones, ones, u), draw(scores, ones, ones, u, nucleus=False))


def test_extreme_u_and_certain_rows():
    row = torch.tensor([[0.0, 30.0, -30.0, float("-inf")]])
    for u in (0.0, 1 - 2**-24):
        token = draw(row, torch.ones(1), torch.ones(1), torch.tensor([u]))
        assert token.item() in (0, 1, 2)
    certain = torch.tensor([[-1e9, 0.0, -1e9, -1e9]])
    assert draw(certain, torch.ones(1), torch.ones(1), torch.zeros(1)).item() == 1


@pytest.mark.parametrize("temperature,top_p", [(1e-39, 1.0), (1e-45, 0.5), (1e-30, 0.5), (1.0, 0.0), (0.5, 1e-45)])
def test_next_to_0_is_the_likeliest_token(temperature, top_p):
    scores = torch.tensor([[1.0, 30.0, 29.0], [-7e5, -8e5, -6e5]])
    knobs = torch.tensor([[temperature] * 2, [top_p] * 2, [0.5] * 2])  # in float32, where 1e-50 is 0
    assert choose(scores, knobs, True, False)[0].tolist() == [1, 2]


def test_rows_keep_their_tokens_whatever_is_beside_them():
    scores = logits(6)
    knobs = torch.tensor([[0.0, 0.7, 1.0, 0.0, 2.0, 0.3], [1.0, 0.9, 1.0, 1.0, 0.5, 1.0], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    tokens, logprobs = choose(scores, knobs, True, True)
    assert torch.equal(tokens[[0, 3]], scores[[0, 3]].argmax(-1))
    assert torch.allclose(logprobs, scores.log_softmax(-1).gather(-1, tokens[:, None])[:, 0], atol=1e-6)
    for i in range(6):
        alone = choose(scores[i : i + 1], knobs[:, i : i + 1], True, True)
        assert alone[0] == tokens[i] and alone[1] == logprobs[i]
    scores[2] = float("nan")
    again, checks = choose(scores, knobs, True, False)
    others = torch.arange(6) != 2
    assert torch.equal(again[others], tokens[others]) and 0 <= again[2] < 13
    assert torch.equal(checks.isnan(), ~others) and not checks[others].any()


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("wanted", [True, False])
def test_one_bad_logit_is_told(bad, wanted):
    scores = logits(3)
    scores[1, 5] = float(bad)
    _, checks = choose(scores, None, False, wanted)
    assert checks.isnan().tolist() == [False, True, False]


def test_every_row_gets_its_own_knobs_and_every_position_its_own_number():
    buffers, one = StepBuffers(2, 8, 4, torch.device("cpu")), Sampling(9, temperature=0.5, top_p=0.25, seed=7)
    buffers.sample([(one, 3), (None, 4), (one, 5), (Sampling(9), 6)])
    want = torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.25, 1.0, 0.25, 1.0], [uniform(7, 3), 0.0, uniform(7, 5), 0.0]])
    assert torch.equal(buffers.knobs(4), want) and buffers.drawn and buffers.nucleus
    buffers.sample([(Sampling(9), 3)])
    assert buffers.knobs(1) is None
