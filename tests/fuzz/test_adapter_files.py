"""Damaged adapters: a clear error, or they were good after all. No crash, no hang, and a refused one changes nothing."""

import copy

import pytest
import torch
from hypothesis import given

import fastft
from fastft.checkpoint.files import CONFIG, WEIGHTS, AdapterFileError
from fastft.cli import merge
from fastft.cli.errors import UserError
from fastft.serving.folder import AdapterFolder
from fastft.serving.memory import AdapterMemory
from fastft.serving.packing import Packer
from fastft.serving.requests import UnknownAdapter
from fastft.serving.sites import find_sites
from tests.fuzz.adapter_corpus import ELSE, damaged, good_folders
from tests.lengths import drawn
from tests.methods.models import assert_same, llama, logits, snapshot

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]
REFUSED = (ValueError, FileNotFoundError)  # AdapterFileError is a ValueError


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return good_folders(tmp_path_factory.mktemp("good"))


def clear(error):
    """Is a message short, and in one piece?"""
    message = str(error)
    assert 20 < len(message) < 3000 and message.isprintable(), ascii(message[:3000])


def load(model, folder):
    """Whether it was loaded; afterwards the model is what it was."""
    before = snapshot(model)
    try:
        handle = fastft.load(model, folder)
    except REFUSED as error:
        assert type(error) in (AdapterFileError, FileNotFoundError) or type(error) is ValueError
        clear(error)
        handle = None
    else:
        assert logits(model).shape == (2, 7, 50)
        handle.detach()
    assert_same(before, snapshot(model))
    return handle is not None


def test_good_ones_are_loaded(good, tmp_path):
    for kind, folder in good.items():
        assert load(llama(), folder.write(tmp_path / kind)), kind


@pytest.mark.parametrize("kind", ["lora", "dora", "copies", "s2ft", "spiel", "lift", "mask", "sft", "shira"])
def test_damaged_ones_are_refused(good, tmp_path, kind):
    model = llama()

    @drawn(12)
    @given(damaged(good, kind))
    def check(one):
        load(copy.deepcopy(model), one[1].write(tmp_path / "adapter"))

    check()


def test_the_server_refuses_them_too(good, tmp_path):
    """What the adapter memory's thread does with a folder: it tells of the files, or there are pieces to serve."""
    model = llama()
    packer, folder = Packer(model, find_sites(model), dtype=torch.float32, page_bytes=4096), AdapterFolder(tmp_path)

    @drawn(30)
    @given(damaged(good))
    def check(one):
        one[1].write(tmp_path / "adapter")
        try:
            packed = packer.pack(folder.path("adapter"))
        except (AdapterFileError, FileNotFoundError, UnknownAdapter) as error:
            clear(error)
        else:
            assert packed.blob.numel() % 4096 == 0

    check()


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("put", ELSE, ids=lambda put: put.__name__)
def test_what_is_no_file(good, tmp_path, file, put):
    path = good["lora"].write(tmp_path / "adapter") / file
    path.unlink()
    put(path)
    assert not load(llama(), path.parent)
    with pytest.raises((AdapterFileError, FileNotFoundError, UnknownAdapter)) as caught:
        model = llama()
        Packer(model, find_sites(model), dtype=torch.float32).pack(AdapterFolder(tmp_path).path("adapter"))
    clear(caught.value) if caught.type is not UnknownAdapter else None


def test_a_server_goes_on_with_the_good_ones(good, tmp_path):
    """Every folder of the corpus in one adapter memory: each refused, and the good one loaded before and after."""
    good["lora"].write(tmp_path / "good")
    for put in ELSE:
        for file in (CONFIG, WEIGHTS):
            path = good["lora"].write(tmp_path / f"{put.__name__}-{file.partition('.')[0]}") / file
            path.unlink()
            put(path)
    model = llama()
    with AdapterMemory(find_sites(model), model=model, device="cpu", dtype=torch.float32, adapter_dir=tmp_path) as memory:
        digest = memory.load("good", timeout=60)
        for path in sorted(tmp_path.iterdir()):
            if path.name == "good":
                continue
            with pytest.raises((AdapterFileError, UnknownAdapter)) as caught:
                memory.load(path.name, timeout=60)
            clear(caught.value) if caught.type is not UnknownAdapter else None
        assert memory.update("good", timeout=60) == digest
        assert [one.name for one in memory.residents()] == ["good"]


def test_merge_refuses_them(good, tmp_path):
    """`fastft merge`: an error for its user and nothing written, or a checkpoint."""
    from transformers import AutoTokenizer

    from tests.cli.conftest import TOKENIZER

    llama().save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "model")
    out = tmp_path / "merged"

    @drawn(8)
    @given(damaged(good, "lora"))
    def check(one):
        one[1].write(tmp_path / "adapter")
        try:
            merge.run(str(tmp_path / "model"), str(tmp_path / "adapter"), str(out), overwrite=True)
        except UserError as error:
            clear(error)
            assert not out.exists()
        else:
            assert (out / "config.json").is_file()
            for file in out.iterdir():
                file.unlink()
            out.rmdir()

    check()
