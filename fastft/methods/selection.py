"""Which coupled units train (S²FT): scores of units, and the choice of the best ones over a whole model.

One ranking orders the units of a family over all layers, so that the layers get different numbers, and what a smaller
ratio chooses is a part of what a larger one does.
"""

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..modules.adapted_linear import is_transposed
from .calibration import mean_squared_inputs, visit_gradients
from .units import Coupled, UnitSlice

SELECTORS = ("random", "weight", "activation", "product", "gradient")
ROLES = {"down": "ffn", "up": "ffn", "gate": "ffn", "o": "attention", "v": "attention"}


# ---- the choice


def wanted_slices(structures: list[Coupled], ratios: dict[str, float]) -> dict[str, UnitSlice]:
    """Module name -> the slice in whose terms `choose` counts the module's units.

    It is the slice whose ratio is positive. A fused layer may have two of those (up and gate): then it is one from the first
    of them on, and the units of the second go on counting where it begins.
    """
    wanted: dict[str, UnitSlice] = {}
    for structure in structures:
        for slice in _asked(structure, ratios).values():
            first = wanted.setdefault(slice.module, slice)
            if slice.offset < first.offset:
                wanted[slice.module] = slice
    return wanted


def choose(
    structures: list[Coupled],
    ratios: dict[str, float],
    scores: dict[str, Tensor] | None,
    *,
    largest: bool,
    multiple: int,
    seed: int,
) -> dict[str, Tensor]:
    """Module name -> ids of the units that train, int64, ascending; modules without any are absent.

    `ratios` says for each role in ROLES which fraction of the units takes part, counted over all structures that have a
    slice with a positive ratio of that family: k = round(ratio · units). The k best train: those with the largest or the
    smallest `scores` (by `Coupled.key`, [count]), ties going to the first; without scores, the first of a permutation
    that depends on `seed` alone. What the ids count is in `wanted_slices`.

    With `multiple` m > 1 each structure's count is a multiple of m, and the total the largest multiple of m within k, or
    what fits: of the n units that a structure has among the k best it gets ⌊n / m⌋ · m, and what is then left goes to the
    largest remainders of n / m, ties to the first, m units at a time. The roles of one family are apportioned from the
    largest ratio to the smallest, each within the one before, so that they stay nested.

    Raises:
        ValueError: a ratio that isn't one, or that yields no unit; scores that are missing, not finite or of another shape.
    """
    check_ratios(ratios)
    if type(multiple) is not int or multiple < 1:
        raise ValueError(f"multiple={multiple!r}; it must be an integer of at least 1")
    start = wanted_slices(structures, ratios)
    parts: dict[str, list[Tensor]] = {}
    for family in ("ffn", "attention"):
        members = [s for s in structures if s.family == family and _asked(s, ratios)]
        order = _ranking(members, scores, largest, seed)
        room = [s.count // multiple * multiple for s in members]
        roles = [role for role in ROLES if ROLES[role] == family and ratios.get(role, 0) > 0]
        for role in sorted(roles, key=lambda role: -ratios[role]):
            here, counts = _apportion(members, order, round(ratios[role] * len(order)), multiple, room)
            if not any(count and role in s.slices for count, s in zip(counts, members)):
                raise ValueError(_nothing(role, ratios[role], members, order, multiple))
            room = counts
            for structure, best, count in zip(members, here, counts):
                slice = structure.slices.get(role)
                if slice is not None and count:
                    shift = (slice.offset - start[slice.module].offset) // slice.size
                    parts.setdefault(slice.module, []).append(best[:count] + shift)
    return {module: torch.cat(units).sort().values for module, units in parts.items()}


def check_ratios(ratios: dict[str, float]) -> None:
    for role, ratio in ratios.items():
        if role not in ROLES:
            raise ValueError(f"a ratio for {role!r}; there are {', '.join(ROLES)}")
        if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 <= ratio <= 1:
            raise ValueError(f"the ratio for {role!r} is {ratio!r}; it must be a fraction in [0, 1]")


def _asked(structure: Coupled, ratios) -> dict[str, UnitSlice]:
    return {role: slice for role, slice in structure.slices.items() if ratios.get(role, 0) > 0}


def _ranking(members, scores, largest, seed) -> Tensor:
    """Positions among the units of all members, one member's after the other's; the best first."""
    if scores is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(sum(s.count for s in members), generator=generator)
    values = []
    for structure in members:
        value = scores.get(structure.key)
        if value is None or value.shape != (structure.count,):
            shape = "missing" if value is None else f"of shape {list(value.shape)}"
            raise ValueError(f"the scores of {structure.key!r} are {shape}; [{structure.count}] are needed")
        if not value.isfinite().all():
            raise ValueError(f"the scores of {structure.key!r} are not finite")
        values.append(value.detach().cpu().double())
    values = torch.cat(values) if values else torch.empty(0)
    return values.argsort(descending=largest, stable=True)


def _apportion(members, order, k, multiple, room) -> tuple[list[Tensor], list[int]]:
    """(each member's units from best to worst, how many of them are among the k best after rounding to multiples)."""
    sizes = torch.tensor([s.count for s in members], dtype=torch.int64)
    ends = sizes.cumsum(0)
    owner = torch.bucketize(order, ends, right=True)
    by_owner = owner.argsort(stable=True)
    here = list((order - (ends - sizes)[owner])[by_owner].split(sizes.tolist()))
    asked = torch.bincount(owner[:k], minlength=len(members)).tolist()
    if multiple == 1:
        return here, asked
    counts = [min(n // multiple * multiple, most) for n, most in zip(asked, room)]
    left = k // multiple * multiple - sum(counts)
    by_remainder = sorted(range(len(members)), key=lambda i: (-(asked[i] % multiple), i))
    while left > 0 and (fitting := [i for i in by_remainder if counts[i] < room[i]]):
        for i in fitting[: left // multiple]:
            counts[i] += multiple
            left -= multiple
    return here, counts


def _nothing(role, ratio, members, order, multiple) -> str:
    having = [i for i, s in enumerate(members) if role in s.slices]
    if not having:
        by_group = "; with grouped-query attention the units must be KV groups for that" if role == "v" else ""
        return f"{role}: {ratio}, but there are no units with a {role!r} slice{by_group}"
    if all(members[i].count < multiple for i in having):
        most = max(members[i].count for i in having)
        return f"{role}: {ratio} with multiple={multiple} yields no unit at all: no layer has more than {most}"
    owner = torch.bucketize(order, torch.tensor([s.count for s in members]).cumsum(0), right=True)
    first = int(torch.isin(owner, torch.tensor(having)).nonzero()[0])
    least = (max(first + 1, multiple) - 0.5) / len(order)
    digits = 3 - math.floor(math.log10(least))
    least = (math.floor(least * 10**digits) + 1) / 10**digits  # above the half, which would be rounded to even
    step = "one" if multiple == 1 else f"multiple={multiple}"
    return f"{role}: {ratio} of {len(order)} units is less than {step}; the smallest ratio that gives one is {least}"


# ---- scores


def unit_scores(
    model: nn.Module, structures: list[Coupled], ratios: dict[str, float], select: str, calibration
) -> dict[str, Tensor] | None:
    """`Coupled.key` -> scores of its units, float32 [count] on the CPU, for structures of which some slice has a ratio > 0.

    The W_u of a unit u are its slices with a positive ratio, x_u what the block's read-out (down or o) reads of it:

        weight      √ Σ ‖W_u‖²                      Frobenius norms of the weights as they are stored
        activation  √ (mean over tokens ‖x_u‖²)     tokens of the calibration that reach the read-out, but for masked ones
        product     weight · activation
        gradient    √ Σ ‖∂loss/∂W_u‖²               also summed over the batches of the calibration

    and nothing (None) for "random". `calibration` is an iterable of batches, read once: mappings of keyword arguments, a
    tuple or list of positional ones, or a tensor; they are moved to the device of the model's first parameter. Their
    attention_mask is [batch, tokens]; of an encoder-decoder, decoder_attention_mask is meant for the decoder. "gradient"
    needs the model to return a scalar or something with a scalar `loss`; one dense dW at a time is held for it.
    The model runs in evaluation mode, and is left as it was, also by an error. Ranks that see different batches get
    different scores: give every rank the same ones.

    Raises:
        ValueError: no calibration where one is needed; no loss; padding that can't be told from tokens; scores that aren't
            finite, by the module's name.
        TypeError: one batch in place of many.
    """
    check_ratios(ratios)
    if select not in SELECTORS:
        raise ValueError(f"select={select!r} is not supported; supported: {', '.join(SELECTORS)}")
    if select == "random":
        return None
    structures = [s for s in structures if _asked(s, ratios)]
    if select != "weight":
        if calibration is None:
            raise ValueError(f"select={select!r} needs calibration: an iterable of batches for the model")
        if isinstance(calibration, (Tensor, Mapping, str)):
            raise TypeError(f"calibration is a {type(calibration).__name__}; put the one batch into a list")
    squares = {s.key: torch.ones(s.count, dtype=torch.float64) for s in structures}
    if select in ("weight", "product"):
        _multiply(squares, _weight(model, structures, ratios))
    if select in ("activation", "product"):
        _multiply(squares, _activation(model, structures, calibration))
    if select == "gradient":
        _multiply(squares, _gradient(model, structures, ratios, calibration))
    return {key: value.sqrt().float() for key, value in squares.items()}


def _multiply(squares, factors):
    for key, value in factors.items():
        squares[key] *= value


def _weight(model, structures, ratios) -> dict[str, Tensor]:
    totals = _zeros(structures)
    for structure in structures:
        for slice in _asked(structure, ratios).values():
            module = model.get_submodule(slice.module)
            totals[structure.key] += _norms(module, module.weight.detach(), slice, structure.count)
    return totals


def _activation(model, structures, calibration) -> dict[str, Tensor]:
    read_outs = {s.key: s.read_out or s.slices.get("down") or s.slices["o"] for s in structures}
    means = mean_squared_inputs(model, [slice.module for slice in read_outs.values()], calibration)
    return {s.key: _by_unit(means[read_outs[s.key].module], read_outs[s.key], s.count) for s in structures}


def _gradient(model, structures, ratios, calibration) -> dict[str, Tensor]:
    totals, places = _zeros(structures), defaultdict(list)
    for structure in structures:
        for slice in _asked(structure, ratios).values():
            places[slice.module].append((structure, slice))

    def visit(name, grad):
        for structure, slice in places[name]:
            totals[structure.key] += _norms(model.get_submodule(name), grad, slice, structure.count)

    visit_gradients(model, list(places), calibration, visit)
    return totals


def _zeros(structures) -> dict[str, Tensor]:
    return {s.key: torch.zeros(s.count, dtype=torch.float64) for s in structures}


def _norms(module, tensor: Tensor, slice: UnitSlice, count: int) -> Tensor:
    """Squared norms of each unit's slice of a tensor that is stored like the module's weight."""
    dim = int((slice.kind == "rows") != is_transposed(module))
    norms = torch.linalg.vector_norm(tensor, dim=dim, dtype=torch.promote_types(tensor.dtype, torch.float32))
    return _by_unit(norms.square(), slice, count)


def _by_unit(values: Tensor, slice: UnitSlice, count: int) -> Tensor:
    """Sums over each unit's features: values [features of the layer] -> float64 [count] on the CPU."""
    values = values[slice.offset : slice.offset + count * slice.size].cpu().double().view(count, slice.size).sum(1)
    if not values.isfinite().all():
        raise ValueError(f"the scores of {slice.module!r} are not finite")
    return values
