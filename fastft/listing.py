"""Lists of names in messages."""

from collections.abc import Collection


def listed(names: Collection[str], shown: int = 3) -> str:
    """The first of them, and how many there are besides: "q_proj, k_proj, v_proj and 1,021 more"."""
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(list(names)[:shown]) + more


def quoted(names: Collection[str], shown: int = 3) -> str:
    """The same, each in quotation marks."""
    return listed([repr(name) for name in names], shown)
