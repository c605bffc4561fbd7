"""Tensors in pages of 2 MiB are tensors like others."""

import gc
import mmap
from pathlib import Path

import pytest
import torch
from torch import nn

from fastft.modules import huge_pages
from fastft.modules.packed import into_one
from fastft.serving.pool import AdapterPool

LARGE = 3 * huge_pages.PAGE // 4 + 1000  # float32
linux = pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages on this system")


def mapping(tensor):
    """What Linux says of the mapping in which a tensor lies: field -> text."""
    found, place = {}, tensor.data_ptr()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= place < end
        elif inside:
            found[first.rstrip(":")] = line.split(":", 1)[1].strip()
    return found


def resident(tensor) -> int:
    """How many of a tensor's pages are in memory. (A mapping's Rss may be its neighbours' too: Linux joins equal ones.)"""
    first, count = tensor.data_ptr() // mmap.PAGESIZE, tensor.nbytes // mmap.PAGESIZE
    with open("/proc/self/pagemap", "rb", buffering=0) as pages:
        pages.seek(8 * first)
        entries = torch.frombuffer(bytearray(pages.read(8 * count)), dtype=torch.int64)
    assert len(entries) == count > 0
    return int((entries < 0).sum())  # bit 63


@linux
def test_memory_asks_for_huge_pages():
    tensor = huge_pages.zeros(LARGE, dtype=torch.float32, device="cpu")
    assert tensor.data_ptr() % huge_pages.PAGE == 0
    assert "hg" in mapping(tensor)["VmFlags"].split()
    assert resident(tensor) == 0, "nothing is written before it is used"
    assert resident(tensor.fill_(1)) == tensor.nbytes // mmap.PAGESIZE
    assert "hg" not in mapping(torch.zeros(LARGE))["VmFlags"].split()


@pytest.mark.parametrize("shape", [(LARGE,), (3, LARGE // 3), (7,), (0, 5), (1, 1, LARGE)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_zeros(shape, dtype):
    tensor = huge_pages.zeros(*shape, dtype=dtype, device="cpu")
    assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous() and not tensor.any()
    assert tensor.untyped_storage().nbytes() == tensor.numel() * dtype.itemsize
    tensor.fill_(1)
    assert tensor.sum(dtype=torch.float64) == tensor.numel()


def test_cat_and_other_devices():
    parts = [torch.randn(LARGE // 2), torch.randn(5), torch.randn(LARGE)]
    assert torch.equal(huge_pages.cat(parts), torch.cat(parts))
    assert huge_pages.cat([torch.empty(4, 2, device="meta")] * 2).shape == (8, 2)
    assert huge_pages.zeros(LARGE, dtype=torch.float32, device="meta").is_meta


@linux
def test_memory_is_given_back():
    used = lambda: int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE  # noqa: E731
    huge_pages.zeros(LARGE, dtype=torch.float32, device="cpu")
    gc.collect()
    before = used()
    kept = [huge_pages.zeros(LARGE, dtype=torch.float32, device="cpu")[5:] for _ in range(20)]
    assert used() > before + 19 * 4 * LARGE
    del kept
    gc.collect()
    assert used() < before + 4 * LARGE


@linux
def test_packed_weights_and_adapters_lie_there():
    layers = [nn.Linear(600, 1000, bias=False) for _ in range(2)]
    before = [layer.weight.detach().clone() for layer in layers]
    packed = into_one([layer.weight for layer in layers])
    assert "hg" in mapping(packed)["VmFlags"].split() and layers[0].weight.data_ptr() == packed.data_ptr()
    assert all(torch.equal(layer.weight, own) for layer, own in zip(layers, before))
    memory = AdapterPool({"q": 1}, device="cpu", dtype=torch.float32, slots=1, pages=100, page_bytes=1 << 16)
    assert "hg" in mapping(memory.bytes)["VmFlags"].split() and resident(memory.bytes) == 0
