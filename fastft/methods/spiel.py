"""SpIEL, sparse fine-tuning of entries that come and go (Ansell et al. 2024, arXiv:2401.16405)."""

import math
import warnings
import zlib
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from ..modules.sparse import SparseEntries
from ..ops.entries import Entries
from ..ops.sparse import sampled_product_
from ..optim.sparse import SparseAdamW, SparseSM3, migrate
from .entry_selection import budget, largest, outer, product, random_entries
from .processes import from_first, mean, rank, several
from .sparse import Counts, SparseMethod, stored_shape
from .targets import match, parameter_count

SELECTIONS = ("accumulated", "momentum")
POLICIES = ("linear", "cosine")


@dataclass(frozen=True)
class SpIEL(SparseMethod):
    """Options of SpIEL: random entries train first; then, every `reselection_steps` updates, those that moved least are
    dropped (they return to their pretrained values) and as many grow where the gradient is large.

    Args:
        density: entries that train, as a fraction of the model's parameters; divided among the modules by their sizes.
        selection: "accumulated" (SpIEL-AG): candidates are the largest entries of the gradient of one micro-batch; their
            gradients are summed over `selection_accumulation_steps` updates, and those with the largest |sum| grow.
            "momentum" (SpIEL-MA): those with the largest product of SM3's row and column accumulators grow, and SM3
            (`fastft.optim.sparse.SparseSM3`) trains instead of AdamW.
        reselection_steps: updates between two choices.
        selection_accumulation_steps: updates of such a cycle after which the choice is made.
        initial_reselection_rate: the fraction of entries that a choice replaces, at the start; it falls to 0 over the run.
        policy: "linear": rate · (1 - t / T), and all entries are replaced at the first choice (the paper's); "cosine":
            rate · (1 + cos(π t / T)) / 2 from the first on.
        total_steps: T, the updates of the run. A Trainer with `Handle.callback` and `fastft train` tell it themselves. For
            another run with the same adapter call ``handle.new_run(total_steps)``, which they do, too.
        seed: of the first, random entries; the same on every rank and machine.
        target_modules and the other options of `TargetOptions`; by default all linear layers but the output head.

    Call ``handle.step()`` after every optimizer step (`Handle.callback` does). Ages, first and second moments of entries
    that stay are kept; of those that grow they start from what was seen of their gradients.

    Deviations from the authors' code (github.com/AlanAnsell/peft) where it deviates from the paper: entries that grow have
    had as many updates as their sums (there the first step was 1.045 times too large), ages advance for every dtype of the
    moments, sums are of whole updates (there of micro-batches, so that seeds were too small under gradient accumulation),
    every cycle sums over the same number of updates, all ranks choose the same entries, equal scores go to the first entry,
    and no dense gradient or mask exists: a block of rows at a time. Under DistributedDataParallel the first update of a
    cycle in which rank 0 uses a module only finds its candidates. What is seen of them is clipped and unscaled as
    the gradients are.

    Of a module that a forward calls several times the candidates are found in one call's gradient; their sums are of all.

    Averages of weights over updates (`torch.optim.swa_utils.AveragedModel`) would mix the deltas of different entries, and
    fail where their number changes: average merged weights instead.
    """

    peft_type: ClassVar[str] = "SPIEL"
    scheduled: ClassVar[bool] = True
    needs_weights: ClassVar[str | None] = None
    in_files: ClassVar[tuple[str, ...]] = (
        "density", "selection", "reselection_steps", "selection_accumulation_steps", "initial_reselection_rate", "policy",
        "total_steps", "seed",
    )  # fmt: skip

    density: float = 0.01
    selection: str = "accumulated"
    reselection_steps: int = 20
    selection_accumulation_steps: int = 5
    initial_reselection_rate: float = 0.2
    policy: str = "linear"
    total_steps: int | None = None
    seed: int = 0
    target_modules: str | list[str] | None = "all-linear"
    # The random entries of the start by module, in the CPU's memory: drawing a million takes a second, at every choice.
    firsts: dict[str, Entries] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        super().__post_init__()
        for name in ("density", "initial_reselection_rate"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r}; it must be a fraction in [0, 1]")
        if self.density == 0:
            raise ValueError("density is 0, so nothing would train")
        for name, known in (("selection", SELECTIONS), ("policy", POLICIES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported; supported: {', '.join(known)}")
        for name, least in (("reselection_steps", 1), ("selection_accumulation_steps", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}; it must be an integer of at least {least}")
        if self.selection_accumulation_steps > self.reselection_steps:
            raise ValueError(
                f"selection_accumulation_steps={self.selection_accumulation_steps} is more than "
                f"reselection_steps={self.reselection_steps}"
            )
        if self.total_steps is not None and (not isinstance(self.total_steps, int) or self.total_steps < 1):
            raise ValueError(f"total_steps={self.total_steps!r}; it must be a positive integer or None")

    def bind(self, model):
        if self.selection == "accumulated" and self.selection_accumulation_steps < 2 and several():
            raise ValueError(
                "selection_accumulation_steps=1 on several processes: the first update of a cycle only finds the candidates "
                "there, so nothing would ever be chosen; give at least 2"
            )
        targets = match(model, self).targets
        numels = {name: math.prod(stored_shape(module)) for name, module in targets.items()}
        total, held = parameter_count(model), sum(numels.values())
        wanted = int(total * self.density)
        if wanted > held:
            raise ValueError(
                f"density={self.density} of {total:,} parameters is more than the {held:,} of the target modules"
            )
        numbers = budget(list(numels.values()), wanted)
        if not any(numbers):
            raise ValueError(
                f"density={self.density} of {total:,} parameters is no entry in any module, so nothing would train"
            )
        return replace(self, counts=dict(zip(numels, map(Counts, numbers))), history=[])

    def choose(self, name, module):
        return self._first(name, module)

    def _first(self, name, module) -> Entries:
        """The random entries of the start."""
        if name not in self.firsts:
            # Of a generator's seed the CPU's takes 32 bits.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
            self.firsts[name] = random_entries(stored_shape(module), self.counts[name].entries, generator)
        return self.firsts[name]

    def observer(self):
        if self.selection == "momentum":
            return None
        return Candidates(self.reselection_steps, self.selection_accumulation_steps)

    @property
    def learning_rate(self):
        return 1e-3 if self.selection == "momentum" else super().learning_rate

    def optimizer(self, handle, lr, weight_decay, **options):
        trained = self._trained(handle)
        if self.selection == "momentum":
            return SparseSM3(*trained, lr=lr, weight_decay=weight_decay, **options)
        return SparseAdamW(*trained, lr=lr, weight_decay=weight_decay, **options)

    def new_run(self, handle, total_steps):
        return replace(super().new_run(handle, total_steps), total_steps=total_steps)

    # ---- the schedule

    def rate(self, updates: int, total: int) -> float:
        """The fraction of entries that the choice after so many updates replaces."""
        if self.policy == "cosine":
            return self.initial_reselection_rate * (1 + math.cos(math.pi * min(1, updates / total))) / 2
        if updates == self.selection_accumulation_steps < total:  # what comes in at the end would never train
            return 1.0
        return self.initial_reselection_rate * max(0.0, 1 - updates / total)

    def schedule(self, handle, updates):
        total = self.total_steps or handle.total_steps
        if total is None:
            raise RuntimeError(
                "SpIEL replaces fewer and fewer entries until the run's end: give SpIEL(total_steps=...), for another run "
                "handle.new_run(total_steps=...), or the Trainer handle.callback()"
            )
        if updates == total + 1:
            warnings.warn(
                f"adapter {handle.name!r}: SpIEL's run of {total} updates is over, so no entries are chosen any more. If "
                "another run begins, call handle.new_run(total_steps=...) before it",
                stacklevel=4,
            )
        at = updates % self.reselection_steps or self.reselection_steps
        if self.selection == "accumulated" and at <= self.selection_accumulation_steps:
            for module in handle.targets.values():
                see_update(module.sparse[handle.name])
        due = updates - updates % self.reselection_steps + self.selection_accumulation_steps
        for module in handle.targets.values():
            held = module.sparse[handle.name]
            held.observer = self.observer() if due < total else None
            if due >= total:  # nothing will be chosen of what is seen
                held.consider(None)
        if at == self.selection_accumulation_steps and updates <= total:
            changes = self._reselect(handle, self.rate(updates, total))
            self.history.append({"update": updates, **changes})

    def at_update(self, handle):
        for module in handle.targets.values():
            module.sparse[handle.name].note_update()

    def after_skipped(self, handle):
        # A GradScaler that met an overflow makes no step, and what was seen in that backward counts as little. (Here, before
        # it gets into a file, and in `watch_gradient`, for those who call handle.step() after steps alone.)
        gradients = [p.grad for p in handle.parameters() if p.grad is not None]
        if not any(g.any() for g in gradients) or not all(g.isfinite().all() for g in gradients):
            for module in handle.targets.values():
                if module.sparse[handle.name].candidates is not None:
                    module.sparse[handle.name].candidate_pending.zero_()

    def _reselect(self, handle, rate) -> dict[str, Any]:
        optimizer = handle.last_optimizer()
        changed = overlap = count = 0
        for name, module in handle.targets.items():
            held = module.sparse[handle.name]
            grown, again = (
                choose_growth(held, rate) if self.selection == "accumulated" else by_momentum(name, held, rate, optimizer)
            )
            if len(grown) and held.delta.requires_grad:  # what is frozen keeps what it has learnt
                self._exchange(handle.name, module, grown, again, optimizer)
                changed += len(grown)
            held.consider(None)
            overlap += int((held.entries.find(self._first(name, module).to(held.columns.device)) >= 0).sum())
            count += len(held.entries)
        return {"changed": changed, "entries": count, "overlap_with_first": overlap}

    def _exchange(self, name, module, grown, again, optimizer):
        """Entries `grown` come in; as many of those that moved least go out, but none of `again` (bool [E])."""
        held = module.sparse[name]
        old, delta = held.entries.copy(), held.delta.detach().clone()
        order = smallest_first(delta)
        stay = torch.ones(len(old), dtype=torch.bool, device=delta.device)
        stay[order[~again[order]][: len(grown)]] = False
        new = old.select(stay).union(grown)
        found = new.find(old)
        seeds = seeds_of(held, new, optimizer) if self.selection == "accumulated" else {}
        migrate(optimizer, held.delta, found, **seeds)
        values = torch.where(found >= 0, delta[found.clamp(min=0)], 0)
        module.change_entries(name, lambda held: held.choose(new, values))


@dataclass(frozen=True)
class Candidates:
    """Sees gradients of whole weights in backward, in the updates in which SpIEL-AG prepares a choice."""

    reselection_steps: int
    accumulation_steps: int

    def __call__(self, held: SparseEntries, left, right):
        if held.updates % self.reselection_steps >= self.accumulation_steps:
            return
        if held.candidates is None:
            if several() and rank() > 0:  # rank 0 says which
                return
            gradient = product((left.t(), right))
            try:
                chosen, sizes = largest(gradient, len(held.entries), held.shape, left.device, what="the gradient")
            except FloatingPointError:  # an overflow, for which a GradScaler skips the step: the next micro-batch will do
                return
            if not sizes.any():  # of no tokens (an expert's), or all of them masked: the next micro-batch will do
                return
            held.consider(chosen)
            held.proposed = several()
        held.watch_gradient()
        entries = held.candidates
        sampled_product_(held.candidate_pending, left, right, entries.starts, entries.columns, True)


def see_update(held: SparseEntries) -> None:
    """The gradients of one update are complete."""
    changed = held.changed_since(mean)
    if several() and (held.candidates is None or held.proposed):
        return agree(held)
    if held.candidates is None:  # the module took no part in any backward
        return
    mean(held.candidate_pending)
    held.candidate_pending *= changed
    held.candidate_pending.nan_to_num_(0, 0, 0)  # an overflow that met candidates alone
    held.candidate_sum += held.candidate_pending
    held.candidate_square.addcmul_(held.candidate_pending, held.candidate_pending)
    held.candidate_pending.zero_()
    held.observed += 1


def agree(held: SparseEntries) -> None:
    """All ranks take over rank 0's candidates, if it has any: an expert may have got no tokens there, or only there."""
    count = torch.tensor([-1 if held.candidates is None else len(held.candidates)], device=held.delta.device)
    from_first(count)
    if int(count) < 0:
        return
    if held.candidates is None:
        held.consider(Entries(torch.zeros_like(held.starts), held.columns.new_empty(int(count)), held.shape))
    from_first(held.candidate_starts, held.candidate_columns)
    held.candidate_pending.zero_()  # what rank 0 saw alone
    held.proposed = False


def smallest_first(delta):
    """The order of deltas that moved least; of equal ones the first."""
    return torch.sort(delta.detach().abs(), stable=True).indices


def choose_growth(held: SparseEntries, rate: float) -> tuple[Entries, torch.Tensor]:
    """The candidates that grow, at most ``int(rate · E)`` and none that stays anyway; and which entries (bool [E]) would be
    dropped but are among the best candidates, and so are left as they are."""
    entries, again = held.entries, torch.zeros(len(held.entries), dtype=torch.bool, device=held.columns.device)
    if held.candidates is None or not held.observed:
        return Entries.of_flat(held.columns[:0], held.shape), again
    candidates, most = held.candidates, int(rate * len(entries))
    dropped = torch.zeros_like(again)
    dropped[smallest_first(held.delta)[:most]] = True
    at = candidates.find(entries)
    stays = (at >= 0) & ~dropped[at.clamp(min=0)]
    order = torch.sort(torch.where(stays, -1.0, held.candidate_sum.abs()), descending=True, stable=True).indices
    best = torch.zeros(len(candidates), dtype=torch.bool, device=again.device)
    best[order[: min(most, len(candidates) - int(stays.sum()))]] = True
    again[at[best & (at >= 0)]] = True
    return candidates.select(best & (at < 0)), again


def by_momentum(name: str, held: SparseEntries, rate: float, optimizer) -> tuple[Entries, torch.Tensor]:
    """The ``int(rate · E)`` inactive entries with the largest product of SM3's accumulators; of the active ones none is
    spared."""
    if not isinstance(optimizer, SparseSM3):
        raise RuntimeError('selection="momentum" reads the accumulators of SM3: train with handle.optimizer()')
    state, none = optimizer.state.get(held.delta), torch.zeros_like(held.columns, dtype=torch.bool)
    if not state:  # the module took no part in any update
        return Entries.of_flat(held.columns[:0], held.shape), none
    most = min(int(rate * len(held.entries)), math.prod(held.shape) - len(held.entries))
    scores = outer(state["row_max"], state["column_max"])
    what = f"SM3's accumulators of {name!r}"
    grown, _ = largest(scores, most, held.shape, held.delta.device, exclude=held.entries, what=what)
    return grown, none


def seeds_of(held: SparseEntries, new: Entries, optimizer) -> dict[str, torch.Tensor]:
    """What the state of entries that grow starts with, [E] for `new`: means of what was seen, such that AdamW's bias
    correction returns them."""
    at, seen = new.find(held.candidates), held.observed
    state = optimizer.state.get(held.delta) or {}
    group = next((g for g in optimizer.param_groups if any(p is held.delta for p in g["params"])), {})
    beta1, beta2 = group.get("betas", (0.0, 0.0))
    age = seen if "age" in state else int(state.get("step", seen))
    value = {
        "exp_avg": held.candidate_sum / seen * (1 - beta1**age),
        "exp_avg_sq": held.candidate_square / seen * (1 - beta2**age),
        "age": torch.full_like(held.candidate_sum, seen),
    }
    return {name: torch.where(at >= 0, one[at.clamp(min=0)], 0) for name, one in value.items()}
