"""How launchers cut their work into tiles, slabs and chunks: arithmetic on sizes alone, without Triton.

Launchers launch what these functions say and `_traffic` counts by them.
"""

# Bytes of partial dS that lora_grad_sb keeps at a time: they are read back at once, so they should fit a GPU's L2.
WORKSPACE = 32 * 2**20


def cdiv(total: int, part: int) -> int:
    return -(-total // part)


def split(config: dict) -> tuple[dict, int]:
    """What a configuration fixes at compile time, and the number of programs that its launch should aim at."""
    constants = dict(config)
    return constants, constants.pop("programs", 1)


def slabs(n_tiles: int, n_others: int, programs: int) -> tuple[int, int]:
    """(slabs, tiles per slab) of a sum over `n_tiles` tiles, so that slabs * n_others comes near `programs`."""
    tiles = cdiv(n_tiles, max(1, min(n_tiles, programs // n_others)))
    return cdiv(n_tiles, tiles), tiles


def told_apart(ranks, p: float) -> tuple:
    """The ranks of the groups that a kernel must tell apart; without dropout they are one group."""
    return tuple(ranks) if p > 0 else (sum(ranks),)


def rank_tiles(groups, config: dict) -> int:
    """Rank tiles of the largest group; at least one, since shrink writes masks whatever the ranks."""
    return max(1, cdiv(max(groups, default=0), config["BLOCK_R"]))


def chunk_rows(T: int, strips: int, R: int, block: int) -> int:
    """Tokens, a multiple of `block`, whose partial dS of `strips` column strips fit the workspace."""
    return cdiv(min(T, max(1, WORKSPACE // (4 * strips * R))), block) * block
