"""Chosen entries of a weight: what they are made of, and their set operations, against dense masks."""

import pytest
import torch

import fastft
from fastft.ops.entries import Entries
from tests.golden import devices

SHAPES = [(0, 0), (3, 0), (0, 4), (1, 1), (7, 13), (63, 129), (1, 1023), (100, 1)]


def draw(shape, share=0.4, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def assert_equal(got, want):
    assert got.shape == want.shape and got.starts.dtype == torch.int64 and got.columns.dtype == torch.int32
    assert torch.equal(got.starts, want.starts) and torch.equal(got.columns, want.columns)


@pytest.fixture(params=["reference", None])
def anywhere(request):
    with fastft.testing.use(request.param) if request.param else torch.no_grad():
        yield


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0, 0.4, 1])
def test_masks_and_positions_are_the_same_entries(shape, share):
    mask = draw(shape, share)
    entries = Entries.of_mask(mask)
    flat = mask.flatten().nonzero()[:, 0]
    assert len(entries) == len(flat) and entries.shape == shape
    assert torch.equal(entries.flat(), flat) and torch.equal(entries.mask(), mask)
    assert torch.equal(entries.rows(), mask.nonzero()[:, 0]) and torch.equal(entries.columns.long(), mask.nonzero()[:, 1])
    assert torch.equal(entries.starts.diff(), mask.sum(1)) and entries.starts[0] == 0
    shuffled = flat[torch.randperm(len(flat))]
    assert_equal(Entries.of_flat(shuffled, shape), entries)
    assert_equal(Entries.of_flat(shuffled.int(), list(shape)), entries)


def test_a_weight_of_more_than_two_billion_elements():
    shape, index = (70_000, 50_000), torch.tensor([3_499_999_999, 5, 2_147_483_648])
    entries = Entries.of_flat(index, shape)
    assert entries.flat().tolist() == [5, 2_147_483_648, 3_499_999_999]
    assert entries.columns.tolist() == [5, 2_147_483_648 % 50_000, 49_999]


@pytest.mark.parametrize(
    "index,message", [([0, 12], "entry 12 is out of range"), ([-1, 3], "entry -1 is out"), ([2, 3, 2], "2 is")]
)
def test_positions_outside_or_given_twice_are_refused(index, message):
    with pytest.raises(ValueError, match=message):
        Entries.of_flat(torch.tensor(index), (3, 4))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("shape", SHAPES)
def test_set_operations(anywhere, shape, device):
    for seed in range(3):
        a, b = draw(shape, 0.4, seed).to(device), draw(shape, 0.3, seed + 10).to(device)
        left, right = Entries.of_mask(a), Entries.of_mask(b)
        assert_equal(left.union(right), Entries.of_mask(a | b))
        assert_equal(left.minus(right), Entries.of_mask(a & ~b))
        assert_equal(left.union(left), left)
        assert len(left.minus(left)) == 0
        at = left.find(right)
        assert torch.equal(at >= 0, b[a]) and torch.equal(right.flat()[at[at >= 0]], left.flat()[at >= 0])
        keep = draw((len(left),), 0.5, seed).to(device)
        assert torch.equal(left.select(keep).flat(), left.flat()[keep])


def test_entries_of_other_shapes_are_no_operands():
    with pytest.raises(ValueError, match="are not each other's"):
        Entries.of_mask(draw((3, 4))).union(Entries.of_mask(draw((4, 3))))


def test_moving():
    entries = Entries.of_mask(draw((3, 4))).to("cpu")
    assert (
        entries.device == torch.device("cpu")
        and entries.to("meta").columns.is_meta
        and len(entries.to("meta")) == len(entries)
    )
