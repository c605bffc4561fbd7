"""Bytes that each launcher's kernels load and store: a pure function of sizes and configuration, without Triton.

A model of times on a GPU needs both counts of `Moved`: what an op must read at least once, and how often its tiles read it
again, mostly from a cache.
"""

from dataclasses import dataclass, field

from . import _config, _tiles
from ._tiles import cdiv


@dataclass
class Traffic:
    """What one call of an op moves: name of a tensor -> (bytes of the tensor, how often all of it is moved).

    Names are those of the op's arguments and results; "partial" and "partial_db" are float32 workspaces.
    """

    loads: dict[str, tuple[int, int]] = field(default_factory=dict)
    stores: dict[str, tuple[int, int]] = field(default_factory=dict)
    kernels: int = 1

    def total(self) -> int:
        """Bytes loaded and stored, repeated ones included."""
        return sum(size * times for moved in (self.loads, self.stores) for size, times in moved.values())

    def once(self) -> int:
        """The same with every tensor loaded at most once and stored at most once."""
        return sum(size for moved in (self.loads, self.stores) for size, _ in moved.values())

    def _summed(self, name, slabs, size, width):
        """The kernels wrote `slabs` float32 parts of a result of `size` elements; `_launch.sum_slabs` makes it."""
        if slabs == 1 and width == 4:
            self.stores[name] = 4 * size, 1
            return
        workspace = "partial_db" if name == "db" else "partial"
        self.stores[workspace] = self.loads[workspace] = 4 * slabs * size, 1
        self.stores[name] = width * size, 1
        self.kernels += 1


def traffic(op, *, T, features, ranks=(0,), p=0.0, dtypes="16/16", device="default", bias=True, config=None) -> Traffic:
    """Bytes that one call of `op` moves, with elements past a tensor's edge and padding of tiles left out.

    Args:
        features: columns of the activation (K or N). ranks: of the groups; their sum is R. All sizes are positive.
        dtypes: "activation/adapter" bits, as in ``configs``; "16" or "32" for dora_grad_y.
        device: folder of ``configs``. config: instead of the one that the launcher would take there.
        bias: of dora_expand_.

    Raises:
        KeyError: unknown op. ValueError: an empty problem, for which nothing is launched.
    """
    if op not in ("lora_shrink", "lora_grad_a", "lora_grad_x_"):
        p = 0.0  # these don't touch x or dX
    groups = _tiles.told_apart(ranks, p)
    if not (T and features and (sum(groups) or op.startswith("dora"))):
        raise ValueError(f"{op}: nothing is launched for T={T}, features={features}, ranks={list(ranks)}")
    if config is None:
        sizes = {"T": T, "features": features, "R": max(groups), "G": len(groups)}
        config = _config.lookup(device, op.split("_")[0], op, dtypes=dtypes, **sizes)
    widths = [int(bits) // 8 for bits in dtypes.split("/")]
    masks = len(groups) * T * cdiv(features, 8) if p > 0 else 0
    return _COUNTS[op](T, features, sum(groups), groups, masks, widths[0], widths[-1], config, bias)


def _shrink(T, K, R, groups, masks, act, adapter, config, bias):
    constants, programs = _tiles.split(config)
    n_m, n_r = cdiv(T, constants["BLOCK_M"]), _tiles.rank_tiles(groups, constants)
    slabs, _ = _tiles.slabs(cdiv(K, constants["BLOCK_K"]), n_m * n_r, programs)
    moved = Traffic({"x": (T * K * act, n_r), "a": (R * K * adapter, n_m)})
    if masks:
        moved.loads["seed"] = 8 * len(groups), n_m * n_r * slabs
        moved.stores["mask"] = masks, 1
    moved._summed("s", slabs, T * R, 4)
    return moved


def _update(name, product):
    """out += s @ w: the tile of `out` goes through registers, s and w are read along its other axis."""

    def count(T, N, R, groups, masks, act, adapter, config, bias):
        n_m, n_n = cdiv(T, config["BLOCK_M"]), cdiv(N, config["BLOCK_N"])
        s, w = product
        moved = Traffic({name: (T * N * act, 1), s: (4 * T * R, n_n), w: (R * N * adapter, n_m)})
        moved.stores[name] = T * N * act, 1
        if masks:
            moved.loads["mask"] = masks, 1
        return moved

    return count


def _grad_sb(T, N, R, groups, masks, act, adapter, config, bias):
    constants, programs = _tiles.split(config)
    n_n, n_r = cdiv(N, constants["BLOCK_N"]), _tiles.rank_tiles(groups, constants)
    rows = _tiles.chunk_rows(T, n_n, R, constants["BLOCK_M"])
    chunks = cdiv(T, rows)
    slabs, _ = _tiles.slabs(rows // constants["BLOCK_M"], n_n * n_r, programs)
    moved = Traffic({"dy": (T * N * act, n_r), "s": (4 * T * R, n_n), "b": (N * R * adapter, slabs * chunks)})
    moved._summed("ds", n_n, T * R, 4)
    moved._summed("db", slabs, N * R, adapter)
    moved.kernels += (chunks - 1) * (2 if n_n > 1 else 1)
    if chunks > 1:  # what the first chunk stores, the others add to
        workspace = "partial_db" if "partial_db" in moved.stores else "db"
        size, again = 4 * slabs * N * R, moved.loads.get(workspace, (0, 0))[1]
        moved.stores[workspace], moved.loads[workspace] = (size, chunks), (size, chunks - 1 + again)
    return moved


def _grad_a(T, K, R, groups, masks, act, adapter, config, bias):
    constants, programs = _tiles.split(config)
    n_k, n_r = cdiv(K, constants["BLOCK_K"]), _tiles.rank_tiles(groups, constants)
    slabs, _ = _tiles.slabs(cdiv(T, constants["BLOCK_M"]), n_k * n_r, programs)
    moved = Traffic({"x": (T * K * act, n_r), "ds": (4 * T * R, n_k)})
    if masks:
        moved.loads["mask"] = masks, n_r
    moved._summed("da", slabs, R * K, adapter)
    return moved


def _dora_expand(T, N, R, groups, masks, act, adapter, config, bias):
    n_m = cdiv(T, config["BLOCK_M"])
    moved = _update("u", ("s", "b"))(T, N, R, groups, 0, act, adapter, config, bias)
    moved.loads["g"] = 4 * N, n_m
    if bias:
        moved.loads["bias"] = act * N, n_m
    moved.stores["y"] = T * N * act, 1
    return moved


def _dora_grad_y(T, N, R, groups, masks, act, adapter, config, bias):
    constants, programs = _tiles.split(config)
    slabs, _ = _tiles.slabs(cdiv(T, constants["BLOCK_M"]), cdiv(N, constants["BLOCK_N"]), programs)
    moved = Traffic({"dy": (T * N * act, 1), "u": (T * N * act, 1), "g": (4 * N, slabs)}, {"dyg": (T * N * act, 1)})
    moved._summed("dots", slabs, N, 4)
    return moved


_COUNTS = {
    "lora_shrink": _shrink,
    "lora_expand_": _update("y", ("s", "b")),
    "lora_grad_sb": _grad_sb,
    "lora_grad_a": _grad_a,
    "lora_grad_x_": _update("dx", ("ds", "a")),
    "dora_expand_": _dora_expand,
    "dora_grad_y": _dora_grad_y,
}
