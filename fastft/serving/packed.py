"""An adapter as one blob of pages: what packing makes of a folder, and what the adapter memory holds and copies."""

from dataclasses import dataclass, field

import numpy
import torch


@dataclass
class PackedAdapter:
    """One adapter for the model's sites, at virtual addresses: byte v lies in page v // page_bytes of the blob.

    Wherever its pages come to lie in a pool, ``relocations`` and the tables' addresses in ``pieces`` say what must be
    rewritten for it. Rows, blocks of entries and tables are aligned to 64 bytes and never cross a page's boundary.

    Args:
        blob: uint8 [a whole number of pages], on the CPU.
        pieces: int64 [P, 10] by site name, as `fastft.ops.grouped` defines them; left and right are virtual, in int64s.
        relocations: runs of int64s in the blob that are addresses: (index of the first as int64, how many, distance in
            int64s, bytes that an address counts in).
        widths: columns of S that the adapter needs, by site name.
        digest: sha256 of the content, in hex.
    """

    name: str
    digest: str
    blob: torch.Tensor
    pieces: dict[str, numpy.ndarray]
    relocations: list[tuple[int, int, int, int]] = field(default_factory=list)
    widths: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return self.blob.numel()
