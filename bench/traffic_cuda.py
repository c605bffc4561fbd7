"""Bytes that the CUDA C++ kernels load and store, from their launch geometry: a pure function of sizes, without a GPU.

The twin of `kernels/_traffic.py` for csrc/cuda. Left out are a group's seed (8 bytes) and elements past a tensor's edge.
"""

from fastft.kernels._traffic import Traffic

# csrc/cuda: tile.cuh, groups.cuh, update.cuh, reduce.cuh, dora.cu
ROWS, COLS, WARP_RANKS, UPDATE_ROWS, STREAM_ROWS = 32, 128, 16, 64, 32
MULTIPROCESSORS, MAX_GROUPS, MAX_CHUNKS = 132, 64, 16


def traffic(op, *, T, features, ranks=(0,), p=0.0, dtypes="16/16", bias=True) -> Traffic:
    """Bytes that one call of `op` moves between global memory (caches included) and the multiprocessors.

    Args:
        features: columns of the activation (K or N). ranks: of the groups; their sum is R. All sizes are positive.
        dtypes: "activation/adapter" bits. bias: of dora_expand_.

    Raises:
        KeyError: unknown op. ValueError: an empty problem, for which nothing is launched.
    """
    if not (T and features and (sum(ranks) or op.startswith("dora"))):
        raise ValueError(f"{op}: nothing is launched for T={T}, features={features}, ranks={list(ranks)}")
    act, adapter = (int(bits) // 8 for bits in dtypes.split("/"))
    dropout = p > 0 and op in ("lora_shrink", "lora_grad_a", "lora_grad_x_")
    ranks = list(ranks) if dropout else [sum(ranks)]
    launches = [ranks[g : g + MAX_GROUPS] for g in range(0, len(ranks), MAX_GROUPS)]
    mask = T * _ceil(features, 8) if dropout else 0
    if op == "dora_expand_":
        return _update("u", T, features, launches, 0, act, adapter, ("s", "b"), bias)
    return _COUNTS[op](T, features, launches, mask, act, adapter)


def _ceil(a, b):
    return -(-a // b)


def _split(tiles, blocks, resident, least):
    """Parts that an inner dimension of `tiles` tiles is cut into (`split` in reduce.cuh)."""
    wanted = min(max(resident * MULTIPROCESSORS // max(blocks, 1), 1), _ceil(tiles, least))
    return _ceil(tiles, _ceil(tiles, wanted))


def _rank_tiles(launches):
    """For each launch its rank tiles, each the list of the groups that have ranks in it."""
    counts = [[max(_ceil(r, WARP_RANKS), 1) for r in ranks] for ranks in launches]
    total = sum(map(sum, counts))
    size = 1 if total <= 1 else 2 if total <= 2 else 4  # slots in a tile
    tiles, first = [], 0
    for slots in counts:
        groups = [first + g for g, n in enumerate(slots) for _ in range(n)]
        tiles.append([sorted(set(groups[i : i + size])) for i in range(0, len(groups), size)])
        first += len(slots)
    return tiles, _ceil(total, size)


def _resident(launches, parts):
    """Blocks that share a multiprocessor (`kStreaming` in lora_kernels.cuh). parts: of `Arithmetic` in tile.cuh."""
    slots = sum(max(_ceil(r, WARP_RANKS), 1) for ranks in launches for r in ranks)
    return 3 if slots <= 1 and parts > 0 else 2


def _parts(act, adapter):
    """Of `Arithmetic` in tile.cuh, for bfloat16 activations where they have 16 bits."""
    return 0 if act == 4 else 1 if adapter == 2 else 3


def _reduced(moved, workspace, parts, name, size, width):
    """Blocks write `parts` float32 results of `size` elements each; a second kernel adds them up."""
    moved.stores[workspace] = moved.loads[workspace] = 4 * parts * size, 1
    moved.stores[name] = width * size, 1
    moved.kernels += 1


def _shrink(T, K, launches, mask, act, adapter):
    R, (tiles, for_split), n_m = sum(map(sum, launches)), _rank_tiles(launches), _ceil(T, ROWS)
    parts = _split(_ceil(K, COLS), n_m * for_split, _resident(launches, _parts(act, adapter)), 4)
    moved = Traffic({"x": (T * K * act, sum(map(len, tiles))), "a": (R * K * adapter, n_m)}, kernels=len(launches))
    if mask:
        moved.stores["mask"] = mask * sum(map(len, launches)), 1
    _reduced(moved, "partial", parts, "s", T * R, 4)
    return moved


def _grad_a(T, K, launches, mask, act, adapter):
    R, (tiles, for_split), n_k = sum(map(sum, launches)), _rank_tiles(launches), _ceil(K, COLS)
    parts = _split(_ceil(T, ROWS), n_k * for_split, _resident(launches, _parts(act, adapter)), 4)
    moved = Traffic({"x": (T * K * act, sum(map(len, tiles))), "ds": (4 * T * R, n_k)}, kernels=len(launches))
    for groups in (tile for launch in tiles for tile in launch if mask):
        for g in groups:
            moved.loads[f"mask[{g}]"] = mask, moved.loads.get(f"mask[{g}]", (0, 0))[1] + 1
    _reduced(moved, "partial", parts, "da", R * K, adapter)
    return moved


def _grad_sb(T, N, launches, mask, act, adapter):
    R, n_r, n_n = sum(map(sum, launches)), _rank_tiles(launches)[1], _ceil(N, COLS)
    chunks = _ceil(n_n, max(_ceil(n_n, MAX_CHUNKS), 1))
    resident = _resident(launches, _parts(act, adapter)) if adapter == 2 else 2
    parts = _split(_ceil(T, ROWS), chunks * n_r, resident, 4)
    moved = Traffic({"dy": (T * N * act, n_r), "s": (4 * T * R, n_n), "b": (N * R * adapter, parts)})
    _reduced(moved, "partial", chunks, "ds", T * R, 4)
    _reduced(moved, "partial_db", parts, "db", N * R, adapter)
    moved.kernels -= 1  # both by one kernel
    if n_n > chunks:  # a block adds its further column tiles to what it stored for the first one
        moved.loads["partial, added to"] = moved.stores["partial, added to"] = 4 * T * R, n_n - chunks
    return moved


def _update(name, T, N, launches, mask, act, adapter, product, bias=None):
    """A tile of the activation goes through registers; s and w are read along its other axis."""
    R, n_m, n_n = sum(map(sum, launches)), _ceil(T, UPDATE_ROWS), _ceil(N, COLS)
    moved = Traffic({name: (T * N * act, len(launches))}, {name: (T * N * act, len(launches))}, kernels=len(launches))
    moved.loads |= {product[0]: (4 * T * R, n_n), product[1]: (R * N * adapter, n_m)}
    if mask:  # a group without ranks changes nothing
        moved.loads["mask"] = mask * sum(r > 0 for ranks in launches for r in ranks), 1
    if bias is not None:  # DoRA. The threads of a block share what they read of g and bias through its L1
        moved.loads["g"] = 4 * N, n_m
        moved.stores["y"] = T * N * act, 1
        if bias:
            moved.loads["bias"] = act * N, n_m
    return moved


def _dora_grad_y(T, N, launches, mask, act, adapter):
    parts = _split(_ceil(T, STREAM_ROWS), _ceil(N, COLS), 2, 4)
    moved = Traffic({"dy": (T * N * act, 1), "u": (T * N * act, 1), "g": (4 * N, parts)}, {"dyg": (T * N * act, 1)})
    _reduced(moved, "partial", parts, "dots", N, 4)
    return moved


_COUNTS = {
    "lora_shrink": _shrink,
    "lora_expand_": lambda *sizes: _update("y", *sizes, ("s", "b")),
    "lora_grad_sb": _grad_sb,
    "lora_grad_a": _grad_a,
    "lora_grad_x_": lambda *sizes: _update("dx", *sizes, ("ds", "a")),
    "dora_grad_y": _dora_grad_y,
}
