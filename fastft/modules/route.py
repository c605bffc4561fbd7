"""Where adapters act in a served model, and which rows of a batch have which."""

from dataclasses import dataclass

from torch import nn

from ..ops.registry import conditions
from .adapted_linear import features


@dataclass(frozen=True)
class Site:
    """One linear or several on one input. outputs: (module, first column, columns) of each member, in `members`' order."""

    name: str
    members: tuple[str, ...]
    in_features: int
    outputs: tuple[tuple[str, int, int], ...]

    @staticmethod
    def of(modules: dict[str, nn.Module]) -> "Site":
        """The site of these linears, by full name."""
        parents = {name.rpartition(".")[0] for name in modules}
        names, outputs, first = list(modules), [], 0
        if len(names) > 1 and len(parents) == 1:
            name = ".".join(filter(None, (*parents, "+".join(n.rpartition(".")[2] for n in names))))
        else:
            name = "+".join(names)
        for own, module in modules.items():
            outputs.append((own, first, features(module)[0]))
            first += outputs[-1][2]
        return Site(name, tuple(names), features(next(iter(modules.values())))[1], tuple(outputs))

    @property
    def out_features(self) -> int:
        return sum(width for _, _, width in self.outputs)


class BatchRoute:
    """Which adapters the rows of the running batch have, for all sites that see these rows."""

    __slots__ = ("active", "assignments", "conditions", "rows", "segments", "step")

    def __init__(self):
        self.active, self.segments, self.assignments, self.rows, self.step = False, None, None, 0, 0
        self.conditions: tuple | None = None

    def set(self, segments, assignments, active: bool, rows: int) -> None:
        """Before each forward.

        Args:
            segments: int32 [D, 3], assignments: int32 [M]: see `ops.grouped`, one assignment a token. They may be the same
                tensors every time, as a CUDA graph wants them; None where `active` is False.
            active: does any row have an adapter? If not, the sites compute the base alone.
            rows: how many rows the sites will see; another number is refused, since nobody knows whose rows they are.
        """
        self.segments, self.assignments, self.active, self.rows = segments, assignments, active, rows
        self.step += 1
        self.conditions = conditions() if active else None
