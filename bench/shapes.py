"""Named shapes: the only place in the benchmarks with literal sizes.

A `Linear` is one matrix product's T tokens, K in-features and N out-features. A `Model` yields the distinct linears of
its decoder layer as ``<model>/<projection>``; ``<model>`` alone names all of them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """T tokens through a layer of K in- and N out-features."""

    tokens: int
    k: int
    n: int
    bias: bool = False

    def __str__(self):
        return f"{self.tokens}x{self.k}x{self.n}"


@dataclass(frozen=True)
class Model:
    """A Llama-style decoder: sizes in elements; `batch` x `length` tokens are one training step."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int
    batch: int
    length: int
    qkv_bias: bool = False

    def linears(self) -> dict[str, Linear]:
        """The distinct linears of one decoder layer; v has k's shape and up has gate's."""
        tokens, q, kv = self.batch * self.length, self.heads * self.head_dim, self.kv_heads * self.head_dim
        linears = {
            "q_proj": Linear(tokens, self.hidden, q, self.qkv_bias),
            "k_proj": Linear(tokens, self.hidden, kv, self.qkv_bias),
            "o_proj": Linear(tokens, q, self.hidden),
            "gate_proj": Linear(tokens, self.hidden, self.intermediate),
            "down_proj": Linear(tokens, self.intermediate, self.hidden),
        }
        if linears["o_proj"] == linears["q_proj"]:
            del linears["o_proj"]
        return linears

    def groups(self) -> list[tuple[int, list[int]]]:
        """(in-features, out-features of each projection) of the linears of one decoder layer that share their input."""
        q, kv, hidden, wide = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden, self.intermediate
        return [(hidden, [q, kv, kv]), (q, [hidden]), (hidden, [wide, wide]), (wide, [hidden])]


MODELS = {
    "llama3-8b": Model(4096, 14336, 32, 8, 128, 32, 128256, batch=2, length=2048),
    "llama3.2-1b": Model(2048, 8192, 32, 8, 64, 16, 128256, batch=2, length=2048),
    "qwen2.5-7b": Model(3584, 18944, 28, 4, 128, 28, 152064, batch=2, length=2048, qkv_bias=True),
    # Small enough for a whole training step on a CPU.
    "llama-6l": Model(768, 2048, 12, 4, 64, 6, 4096, batch=4, length=256),
    # Small enough to be served on a CPU: a decode step of 32 rows.
    "llama-8l": Model(512, 1408, 8, 4, 64, 8, 4096, batch=32, length=1),
    # The same at layers of the size that models have.
    "llama3.2-1b-4l": Model(2048, 8192, 32, 8, 64, 4, 4096, batch=32, length=1),
    # One layer around a square down_proj, for what is done to weights alone.
    "square2048-1l": Model(2048, 2048, 4, 4, 64, 1, 64, batch=1, length=16),
    "square4096-1l": Model(4096, 4096, 4, 4, 64, 1, 64, batch=1, length=16),
    "tiny-llama": Model(32, 48, 4, 2, 8, 2, 64, batch=2, length=8),  # as "tiny" below
}

LINEARS = {
    "tiny": Linear(24, 40, 56),  # checks that a benchmark runs; its numbers mean nothing
    "square2048": Linear(1024, 2048, 2048),
    "square4096": Linear(512, 4096, 4096),
    **{f"{name}/{proj}": linear for name, model in MODELS.items() for proj, linear in model.linears().items()},
}

DEFAULT = {"cpu": ("square2048", "square4096"), "cuda": ("llama3-8b",)}
RANK = 16


def resolve(names) -> dict[str, Linear]:
    """The linears behind shape or model names, in the order given.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    found = {}
    for name in names:
        matches = {k: v for k, v in LINEARS.items() if k == name or k.startswith(f"{name}/")}
        if not matches:
            raise ValueError(f"unknown shape {name!r}; known: {', '.join([*MODELS, *LINEARS])}")
        found.update(matches)
    return found
