"""Which entries of a weight are chosen, row-compressed as `ops/sparse.py` takes them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .sparse import match_entries, rows_of


@dataclass(frozen=True, eq=False)
class Entries:
    """Chosen entries of a stored weight of `shape` (A, B): starts int64 [A + 1], columns int32 [E], ascending in a row.

    The constructor takes what it is given; `of_flat` and `of_mask` make the two.
    """

    starts: Tensor
    columns: Tensor
    shape: tuple[int, int]

    @staticmethod
    def of_flat(index: Tensor, shape) -> "Entries":
        """From row-major positions (integers [E], in any order).

        Raises:
            ValueError: a position outside the weight, or one given twice; no integers.
        """
        rows, width = shape
        if index.numel() and (index.dtype == torch.bool or index.is_floating_point()):
            raise ValueError(f"the indices are {index.dtype}, they must be integers")
        index = index.detach().flatten().long().sort().values
        if len(index) and (int(index[0]) < 0 or int(index[-1]) >= rows * width):
            wrong = int(index[0] if index[0] < 0 else index[-1])
            raise ValueError(f"entry {wrong} is out of range: a weight of shape {rows} x {width} has {rows * width}")
        twice = index[1:][index[1:] == index[:-1]]
        if len(twice):
            raise ValueError(f"entry {int(twice[0])} is given twice")
        return Entries._of_sorted(index, shape)

    @staticmethod
    def _of_sorted(index, shape):
        rows, width = shape
        begins = torch.arange(rows + 1, device=index.device) * width
        return Entries(torch.searchsorted(index, begins), index.remainder(max(width, 1)).int(), (rows, width))

    @staticmethod
    def of_mask(mask: Tensor) -> "Entries":
        """Where a bool [A, B] is true."""
        starts = torch.zeros(len(mask) + 1, dtype=torch.int64, device=mask.device)
        torch.cumsum(mask.sum(1), 0, out=starts[1:])
        return Entries(starts, mask.nonzero(as_tuple=True)[1].int(), tuple(mask.shape))

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def device(self) -> torch.device:
        return self.columns.device

    def copy(self) -> "Entries":
        return Entries(self.starts.clone(), self.columns.clone(), self.shape)

    def to(self, device) -> "Entries":
        return Entries(self.starts.to(device), self.columns.to(device), self.shape)

    def rows(self) -> Tensor:
        """int64 [E]: the row of each entry."""
        return rows_of(self.starts, self.columns)

    def flat(self) -> Tensor:
        """int64 [E]: row-major positions, ascending."""
        return self.rows() * self.shape[1] + self.columns

    def mask(self) -> Tensor:
        """bool [A, B]."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        mask.view(-1)[self.flat()] = True
        return mask

    def find(self, other: "Entries") -> Tensor:
        """int64 [E]: which entry of `other` each of these is, or -1.

        Raises:
            ValueError: `other` is of a weight of another shape.
        """
        if other.shape != self.shape:
            raise ValueError(f"entries of weights of shapes {self.shape} and {other.shape} are not each other's")
        return match_entries(self.starts, self.columns, other.starts, other.columns)

    def select(self, keep: Tensor) -> "Entries":
        """Those where a bool [E] is true."""
        before = torch.zeros(len(self) + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(keep, 0, out=before[1:])
        return Entries(before[self.starts], self.columns[keep], self.shape)

    def minus(self, other: "Entries") -> "Entries":
        """Those that `other` has not."""
        return self.select(self.find(other) < 0)

    def union(self, other: "Entries") -> "Entries":
        """These and those of `other`, each once."""
        index = torch.cat([self.flat(), other.minus(self).flat()]).sort().values
        return Entries._of_sorted(index, self.shape)
