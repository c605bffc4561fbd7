"""Reads an adapter's folder and packs it for the sites of a served model.

Served are LoRA (PEFT's files and fastft's: rsLoRA, ranks and alphas by pattern), fastft's S²FT, and single entries of
weights: fastft's SpIEL, LIFT and SparseMask, PEFT's SHiRA and the SpIEL authors' files. What would change more than linears'
outputs by such a delta (DoRA, trained biases, embeddings or heads, `modules_to_save`) is refused by name.
"""

import hashlib
import json
from pathlib import Path

import torch

from ..checkpoint.files import AdapterFileError
from ..methods import lift, sparse_foreign, spiel  # noqa: F401  (their files are known once they are imported)
from ..methods.base import read_folder
from ..methods.lora import LoRA
from ..methods.name_patterns import is_name
from ..methods.s2ft import S2FT
from ..methods.sparse import SparseMethod, stored_shape
from ..methods.sparse_files import unpack_index
from ..modules.adapted_linear import features, is_transposed
from ..modules.merging import pristine
from ..modules.quantized import quantization
from ..modules.slices import SliceSettings
from ..ops.entries import Entries
from ..ops.partial_linear import slice_dim
from ..ops.registry import KERNEL_DTYPES
from .layout import ALIGNMENT, Layout
from .packed import PackedAdapter
from .patterns import MOST_TRIES, slow_because, slow_together_because

SERVED = "LoRA (rsLoRA too), S²FT and deltas of single entries (SpIEL, LIFT, SparseMask, SHiRA) on linear layers"
# The parts that say what an adapter computes; the others are for training.
_COMPUTED = {"lora_A", "lora_B", "slice_delta", "slice_units", "delta", "index", "value", "kept_delta", "kept_index"}


class Packer:
    """Packs adapters for one model.

    Args:
        model: as it is served, before or after its sites were installed; it is only looked at.
        sites: of `find_sites` or `RoutedModel.sites`.
        dtype: of the adapters in memory: the activations' or float32. Values are rounded to it once.
        page_bytes: a multiple of 64; at least as much as a row of any weight's inputs has.
        max_rank: larger ranks are refused. max_bytes: larger files of tensors are.
    """

    def __init__(self, model, sites, *, dtype, page_bytes: int = 262144, max_rank: int = 512, max_bytes: int = 16 << 30):
        if dtype not in KERNEL_DTYPES:
            raise TypeError(f"adapters are held in {', '.join(map(str, KERNEL_DTYPES))}, not {dtype}")
        if page_bytes < 1024 or page_bytes % ALIGNMENT:
            raise ValueError(f"page_bytes={page_bytes}; it must be a multiple of {ALIGNMENT}, at least 1024")
        self.model, self.dtype, self.page_bytes, self.max_rank, self.max_bytes = (
            model,
            dtype,
            page_bytes,
            max_rank,
            max_bytes,
        )
        # module -> its site and first column there
        self.places = {name: (site.name, first) for site in sites for name, first, _ in site.outputs}
        layout = Layout(dtype, page_bytes)
        # The most pieces that one adapter can have at a site: one an output, more where rows are longer than pages.
        self.max_pieces = {
            site.name: sum(max(len(layout.windows(n)), len(layout.windows(n, 16))) for _, _, n in site.outputs)
            for site in sites
        }

    def pack(self, folder, name: str | None = None) -> PackedAdapter:
        """The adapter in `folder`. Can be called by several threads at once.

        Raises:
            FileNotFoundError: no such folder or files. AdapterFileError: damaged, not for this model, or not served.
        """
        try:
            method, matched, values = read_folder(self.model, folder, _look, self._accept, self.max_bytes)
            layout = Layout(self.dtype, self.page_bytes)
            tensors = {own: method.tensors_of(own, module, values) for own, module in matched.targets.items()}
            for own, module in matched.targets.items():
                _add(layout, self.places[own], method, own, module, tensors[own])
            blob, pieces, relocations = layout.build()
        except AdapterFileError:
            raise
        except (ValueError, TypeError, OverflowError) as error:
            raise AdapterFileError(f"{folder}: {error}") from error
        widths = {site: layout.widths[site] for site in pieces}
        own = Path(folder).name if name is None else name
        return PackedAdapter(own, digest(method, tensors), blob, pieces, relocations, widths)

    def _accept(self, method, matched) -> None:
        """Before tensors are read."""
        if not isinstance(method, LoRA | S2FT | SparseMethod):
            raise ValueError(f"adapters of {type(method).__name__} can't be served; served are {SERVED}")
        if isinstance(method, LoRA):
            for option in ("use_dora", "lora_bias"):
                if getattr(method, option):
                    raise ValueError(f"{option} can't be served; served are {SERVED}")
        for name, module in matched.targets.items():
            if name not in self.places:
                raise ValueError(f"{name!r} can't have adapters while it is served (see fastft.serving.sites.find_sites)")
            if isinstance(method, LoRA) and method.rank(name) > self.max_rank:
                raise ValueError(
                    f"the rank of {name!r} is {method.rank(name)}; at most {self.max_rank} is served (max_rank)"
                )
            if isinstance(method, SparseMethod) and method.absolute and quantization(module) is not None:
                raise ValueError(
                    f"it holds absolute values of {name!r}, whose weight is quantised here; save it without `absolute`"
                )


def _look(config) -> None:
    """Before the config's names and patterns are matched with anything."""
    for option in ("modules_to_save", "bias"):
        if config.get(option) not in (None, "none", []):
            raise ValueError(
                f"{option}={config[option]!r}: it replaces tensors that all requests share; served are {SERVED}"
            )
    for option in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        given = config.get(option)
        patterns = (
            [given] if isinstance(given, str) else given if isinstance(given, dict) or option == "layers_pattern" else []
        )
        strings = [pattern for pattern in patterns or () if isinstance(pattern, str)]
        expressions = [pattern for pattern in strings if not is_name(pattern)]
        for pattern in expressions if len(expressions) <= MOST_TRIES else ():  # more are refused unseen
            if reason := slow_because(pattern):
                raise ValueError(
                    f"{option}: {pattern[:100]!r} may take very long to match: {reason}; list the modules instead"
                )
        if reason := slow_together_because(strings):
            raise ValueError(f"{option} may take very long to match: {reason}; give the modules' full names instead")


def _add(layout: Layout, place, method, name, module, tensors) -> None:
    """One module's delta."""
    n, k = features(module)
    if isinstance(method, LoRA):
        if method.scale(name):
            layout.low_rank(*place, tensors["lora_A"], tensors["lora_B"], method.scale(name))
    elif isinstance(method, S2FT):
        one, delta = method.chosen[name], tensors["slice_delta"]
        index = SliceSettings(one.kind, one.size, one.offset).index(tensors["slice_units"])
        delta = delta if slice_dim(one.kind, is_transposed(module)) == 0 else delta.t()
        add, features_there = (layout.rows, n) if one.kind == "rows" else (layout.columns, k)
        if len(index):
            add(*place, index, delta, features_there)
    else:
        starts, columns, deltas = _entries(module, tensors)
        layout.entries(*place, starts, columns, deltas, k)


def _entries(module, tensors):
    """(starts [N + 1], columns, deltas) of the delta [N, K], whatever way the weight is stored."""
    shape, found = stored_shape(module), []
    for index, value in (("index", "delta" if "delta" in tensors else "value"), ("kept_index", "kept_delta")):
        if index in tensors:
            entries, delta = unpack_index(tensors[index], shape), tensors[value]
            if value == "value":  # the weight's own is subtracted in float32, which rounds by 2⁻²⁴ of the value
                base = pristine(module, "weight").detach()[entries.rows(), entries.columns.long()]
                delta = delta.float() - base.cpu().float()
            found.append((entries, delta))
    if len(found) == 1 and not is_transposed(module):
        ((entries, delta),) = found
        return entries.starts, entries.columns, delta
    flat = torch.cat([entries.flat() for entries, _ in found])
    deltas = torch.cat([delta for _, delta in found])
    if is_transposed(module):
        shape, flat = shape[::-1], flat % shape[1] * shape[0] + flat // shape[1]
    order = flat.argsort()
    entries = Entries.of_flat(flat[order], shape)
    return entries.starts, entries.columns, deltas[order]


def digest(method, tensors) -> str:
    """sha256 of what the adapter computes: its kind, and for each module its scale or place and its tensors. What only tells
    how it was trained does not count."""
    content = hashlib.sha256(f"{method.peft_type} {getattr(method, 'absolute', False)}".encode())
    for name in sorted(tensors):
        where = method.placement(name)
        content.update(json.dumps([name, getattr(where, "__dict__", where)], sort_keys=True).encode())
        for part in sorted(_COMPUTED & tensors[name].keys()):
            tensor = tensors[name][part].contiguous()
            content.update(f"{part} {tensor.dtype} {list(tensor.shape)}".encode())
            content.update(tensor.flatten().view(torch.uint8).numpy())
    return content.hexdigest()
