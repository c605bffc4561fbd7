"""LIFT, training the entries that matter most to a weight's low-rank part (Liu et al. 2025, arXiv:2506.00772)."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..modules.merging import pristine
from ..ops.entries import Entries
from ..optim.sparse import SparseAdamW, migrate
from .entry_selection import largest, product
from .low_rank import low_rank
from .processes import from_first
from .sparse import Counts, SparseMethod, stored_shape
from .targets import match


@dataclass(frozen=True)
class LIFT(SparseMethod):
    """Options of LIFT: of each weight those entries train that are largest in its rank-`filter_rank` approximation; they are
    chosen anew every `update_interval` updates. What an entry has learnt stays when it stops training.

    Args:
        rank_budget: each weight [A, B] trains as many entries as a LoRA of this rank, min((A + B) · rank_budget, A · B).
        density: instead, this fraction of each weight.
        filter_rank: of the approximation.
        update_interval: updates between two choices.
        target_modules and the other options of `TargetOptions`; by default all linear layers but the output head.

    Call ``handle.step()`` after every optimizer step (`Handle.callback` does). First and second moments of entries that stay
    are kept, new ones start at 0; all share one step count. The paper's AdamW has betas (0.9, 0.95) and eps 1e-6.

    The approximation comes from a few products with the weight instead of an SVD (`low_rank`), and its entries are ranked a
    block of rows at a time. The authors' released configurations take the smallest entries (github.com/zihanghliu/LIFT); the
    paper's are the largest. Deltas are float32, so that steps below a 16-bit weight's resolution add up, and weight decay
    acts on them, so towards the pretrained weight; there it had no effect.

    Averages of weights over updates (`torch.optim.swa_utils.AveragedModel`) would mix the deltas of different entries, and
    fail where their number changes: average merged weights instead.
    """

    peft_type: ClassVar[str] = "LIFT"
    scheduled: ClassVar[bool] = True
    remembers_first: ClassVar[bool] = True
    in_files: ClassVar[tuple[str, ...]] = ("rank_budget", "density", "filter_rank", "update_interval")

    rank_budget: int | None = None
    density: float | None = None
    filter_rank: int = 128
    update_interval: int = 200
    target_modules: str | list[str] | None = "all-linear"

    def __post_init__(self):
        super().__post_init__()
        if self.rank_budget is not None and self.density is not None:
            raise ValueError("give rank_budget or density, not both")
        if self.rank_budget is None and self.density is None:
            object.__setattr__(self, "rank_budget", 128)
        for name in ("rank_budget", "filter_rank", "update_interval"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r}; it must be a positive integer")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density={self.density!r}; it must be a fraction in (0, 1]")

    def budget(self, shape) -> int:
        """How many entries of a weight train."""
        rows, columns = shape
        wanted = (rows + columns) * self.rank_budget if self.density is None else int(self.density * rows * columns)
        return min(wanted, rows * columns)

    def bind(self, model):
        targets = match(model, self).targets
        # Quantised layers are refused by attach, in words of its own.
        budgets = {name: self.budget(stored_shape(module)) for name, module in targets.items()}
        if budgets and not any(budgets.values()):
            raise ValueError(
                f"density={self.density} of each weight is no entry in any module, so nothing would train; give more, or a "
                "rank_budget"
            )
        return replace(self, counts={name: Counts(count) for name, count in budgets.items()}, history=[])

    def choose(self, name, module):
        weight = pristine(module, "weight")
        return self._largest(name, weight, self.budget(weight.shape))

    def _largest(self, name, weight, count) -> Entries:
        what = f"the weight of {name!r}"
        left, right = low_rank(weight, self.filter_rank, what=what)
        scores = product((left, right.t()))
        entries, _ = largest(scores, count, weight.shape, weight.device, what=what)
        from_first(entries.starts, entries.columns)
        return entries

    def optimizer(self, handle, lr, weight_decay, **options):
        options = {"betas": (0.9, 0.95), "eps": 1e-6, "ages": False, **options}
        return SparseAdamW(*self._trained(handle), lr=lr, weight_decay=weight_decay, **options)

    def schedule(self, handle, updates):
        if updates % self.update_interval == 0:
            self.history.append({"update": updates, **self._reselect(handle)})

    def _reselect(self, handle) -> dict[str, Any]:
        optimizer = handle.last_optimizer()
        changed = overlap = count = 0
        chosen = {}  # all before the first changes: a weight may hold NaN
        for name, module in handle.targets.items():
            weight = module.weight if handle.name in module.standing() else self.whole(module, handle.name)
            chosen[name] = self._largest(name, weight.detach(), len(module.sparse[handle.name].entries))
        for name, module in handle.targets.items():
            held = module.sparse[handle.name]
            left = self._exchange(handle.name, module, chosen.pop(name), optimizer)
            changed += left
            overlap += held.of_first()
            count += len(held.entries)
        return {"changed": changed, "entries": count, "overlap_with_first": overlap}

    def whole(self, module, name):
        """The weight with the adapter's deltas."""
        weight = pristine(module, "weight").detach().clone()
        union, value = self._values(module, name)
        weight[union.rows(), union.columns.long()] = value
        return weight

    def _exchange(self, name, module, new, optimizer) -> int:
        """Entries `new` train; what others have learnt is kept. Returns how many others there are."""
        held = module.sparse[name]
        found = new.find(held.entries)
        migrate(optimizer, held.delta, found)
        module.change_entries(name, lambda held: held.succeed(new))
        return int((found < 0).sum())
