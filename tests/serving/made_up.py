"""Made-up adapters for tests of the memory, whose every byte tells which adapter and version it is of."""

import hashlib
import json

import numpy
import torch

from fastft.ops.grouped import COLUMNS, ENTRIES, FIELDS, LOW_RANK, scale_bits
from fastft.serving.packed import PackedAdapter

PAGE = 4096
SITES = ("q", "o")


class Site:
    def __init__(self, name):
        self.name = name


def sites():
    return [Site(name) for name in SITES]


def write(root, name, *, version=0, pages=1, **more):
    """A folder that `Packer` understands."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"version": version, "pages": pages, **more})
    (folder / "adapter_config.json").write_text(text)
    return folder


def numbers(name, version, page, count):
    """`count` float32 that no other adapter, version or page has."""
    seed = int.from_bytes(hashlib.sha256(f"{name} {version} {page}".encode()).digest()[:8], "little")
    return numpy.random.default_rng(seed).random(count, dtype=numpy.float32)


class Packer:
    """Packs adapters of whole pages: each begins with an int64 table of the element addresses of its rows of 16 float32.

    The site "q" has one LOW_RANK piece over the tables of the first page and the last, "o" COLUMNS and ENTRIES. `reads` has
    the names that were asked for, `fail` what is raised for a name, `hook` is called with it first.
    """

    ROWS = 8
    WIDTH = 16

    def __init__(self):
        self.max_pieces = {"q": 1, "o": 2}
        self.reads = []
        self.fail = {}
        self.hook = lambda name: None

    def pack(self, folder, name):
        self.reads.append(name)
        self.hook(name)
        if name in self.fail:
            raise self.fail[name]
        config = json.loads((folder / "adapter_config.json").read_text())
        version, pages = config["version"], config["pages"]
        blob = numpy.zeros((pages, PAGE // 8), dtype=numpy.int64)
        runs = []
        for page in range(pages):
            blob[page].view(numpy.float32)[:] = numbers(name, version, page, PAGE // 4)
            # The rows lie behind the table, row r at element first + r * WIDTH of the blob.
            first = page * (PAGE // 4) + self.ROWS * 2
            blob[page, : self.ROWS] = first + self.WIDTH * numpy.arange(self.ROWS)
            runs.append((page * (PAGE // 8), self.ROWS, 1, 4))
        left, right = 0, (pages - 1) * (PAGE // 8)
        scale = scale_bits(version + 0.5)
        pieces = {
            "q": numpy.array([[LOW_RANK, self.ROWS, left, right, 0, self.WIDTH, 0, self.WIDTH, 0, scale]]),
            "o": numpy.array(
                [
                    [COLUMNS, self.ROWS, left, right, 0, self.WIDTH, 0, self.WIDTH, 0, scale],
                    [ENTRIES, 1, right, 12345, 0, self.WIDTH, 0, self.WIDTH, 0, scale],
                ]
            ),
        }
        assert pieces["q"].shape[1] == len(FIELDS)
        digest = digest_of(name, version)
        widths = {"q": self.ROWS, "o": 0}
        return PackedAdapter(name, digest, torch.from_numpy(blob.view(numpy.uint8).ravel()), pieces, runs, widths)


def digest_of(name, version):
    return hashlib.sha256(f"{name} {version}".encode()).hexdigest()


def check_content(memory, slot, name, version, pages):
    """Reads a slot as a kernel would, through pieces and tables, and compares it with what that version must be."""
    store, offsets = memory.store.cpu().numpy(), memory.offsets.cpu().numpy()
    q, o = memory.pieces["q"][slot].tolist(), memory.pieces["o"][slot].tolist()
    scale = scale_bits(version + 0.5)
    rest = [0, Packer.WIDTH, 0, Packer.WIDTH, 0, scale]
    assert [piece[0] for piece in (*q, *o)] == [LOW_RANK, COLUMNS, ENTRIES]
    assert all(piece[4:] == rest for piece in (*q, *o))
    assert q[0][1:4] == o[0][1:4] and o[1][2] == q[0][3] and o[1][3] == 12345
    for table, page in ((q[0][2], 0), (q[0][3], pages - 1)):
        wanted = numbers(name, version, page, PAGE // 4)[Packer.ROWS * 2 :]
        for row, at in enumerate(offsets[table : table + Packer.ROWS].tolist()):
            numpy.testing.assert_array_equal(
                store[at : at + Packer.WIDTH], wanted[row * Packer.WIDTH : (row + 1) * Packer.WIDTH], f"{name} {version}"
            )
