"""The figures of the results, and the look that they share: legible at half of a README's width, and on a dark page."""

import io
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from . import results, standings
from .standings import LABELS

WIDTH = 6.4  # inches: at half of a README's width a point of type is a screen's pixel
INK, MUTED, GRID = "#1f2328", "#6e7781", "#8c959f"
OURS = {
    "fastft": "#0969da",
    "fastft:cuda": "#54aeff",
    "fastft:triton": "#8fa8ff",
    "fastft:ungrouped": "#80ccff",
    "fastft:liger": "#0550ae",
}
PEERS = {
    "peft": "#e16f24",
    "shira": "#e16f24",
    "addmm": "#8c959f",
    "plain": "#8c959f",
    "bmm": "#8c959f",
    "peft-compile": "#bf3989",
    "compile": "#8250df",
    "unsloth": "#2da44e",
    "liger": "#2da44e",
    "vllm": "#2da44e",
    "published": "#8250df",
    "permuted": "#bf3989",
    "loop": "#bf3989",
    "csr": "#9a6700",
    "padded": "#9a6700",
    "full": "#57606a",
}
OTHERS = ("#2da44e", "#9a6700", "#bf3989", "#8250df", "#57606a", "#cf222e")
MARKERS = "osD^vPX*<>"
STYLE = {
    "font.size": 10,
    "font.family": ["DejaVu Sans"],
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    # The same rows give the same file, whose text stays text.
    "svg.hashsalt": "fastft",
    "svg.fonttype": "none",
}


@dataclass
class Drawing:
    """A figure of one device, not yet drawn: `make` draws it, which needs matplotlib."""

    device: str
    threads: str
    name: str
    title: str
    make: Callable[[], Any]

    @property
    def stem(self) -> str:
        return "-".join(filter(None, (results.slug(self.device), self.threads and f"{self.threads}t", self.name)))

    @cached_property
    def figure(self):
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return self.make()

    def svg(self, transparent: bool = False) -> str:
        return self._saved("svg", metadata={"Date": None}, transparent=transparent).decode()

    def png(self) -> bytes:
        from PIL import Image  # matplotlib's own requirement

        data = io.BytesIO()
        drawn = Image.open(io.BytesIO(self._saved("png", dpi=150))).convert("RGB")
        # A palette takes a third of the bytes. Median cut, the default, gives it to colours with many pixels and mixed those
        # of small markers, up to 79 of 255 levels off; with the octree the worst in all our figures is 8.
        drawn = drawn.quantize(96, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        palette, paper = drawn.getpalette(), drawn.getpixel((0, 0))
        palette[3 * paper : 3 * paper + 3] = 255, 255, 255  # it was averaged with the greys nearest to it
        drawn.putpalette(palette)
        drawn.save(data, "png", optimize=True)
        return data.getvalue()

    def _saved(self, kind: str, **options) -> bytes:
        import matplotlib

        data = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(data, format=kind, **options)
        return data.getvalue()


def drawings(rows) -> list[Drawing]:
    """Every figure that the rows give, in the order of their devices."""
    from . import bars, lines, memory, methods, roofline

    cases = standings.counted(rows)
    found = [drawing for kind in (bars, lines, roofline, memory, methods) for drawing in kind.drawings(rows, cases)]
    # Stable: kinds stay in their order.
    return sorted(found, key=lambda drawing: (drawing.device, int(drawing.threads or 0)))


def draw(rows, folder: Path) -> list[Path]:
    """Write every figure as PNG and SVG into a folder of its own, and delete what was drawn there from older rows."""
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for drawing in drawings(rows):
        for kind, content in (("png", drawing.png()), ("svg", drawing.svg().encode())):
            path = folder / f"{drawing.stem}.{kind}"
            path.write_bytes(content)
            written.append(path)
    for path in folder.iterdir():
        if path.suffix in (".png", ".svg") and path not in written:
            path.unlink()
    return written


def colours(names) -> dict[str, str]:
    """The colour of each implementation, the same in all figures for those that are named above."""
    spare = iter(OTHERS * len(names))
    known = OURS | PEERS
    return {name: known.get(name) or next(spare) for name in names}


def label(name: str) -> str:
    return LABELS.get(name, name)


def canvas(title: str, subtitle: str, height: float, handles: dict[str, Any], below: float = 0.55):
    """A figure with a heading, its legend under it, and room for axes below these.

    Args:
        height: of the room in inches, without the x axis' labels, for which there is `below`.
        handles: of the legend.

    Returns:
        The figure, and a function that makes axes from (left, bottom, width, height) in inches, from the lower left corner
        of the room.
    """
    from matplotlib.figure import Figure

    lines, under = _flowing(handles), textwrap.wrap(subtitle, 96)
    above_keys = 0.35 + 0.17 * len(under)
    head = above_keys + 0.25 * len(lines) + 0.1
    total = head + height + below
    figure = Figure(figsize=(WIDTH, total), facecolor="white")
    figure.text(0.12 / WIDTH, 1 - 0.1 / total, title, fontsize=12, weight="bold", va="top")
    figure.text(0.12 / WIDTH, 1 - 0.36 / total, "\n".join(under), fontsize=9, color=MUTED, va="top", linespacing=1.3)
    for i, line in enumerate(lines):
        figure.legend(
            list(line.values()),
            list(line),
            loc="upper left",
            bbox_to_anchor=(0.04 / WIDTH, 1 - (above_keys + 0.25 * i) / total),
            ncols=len(line),
            borderpad=0.25,
            borderaxespad=0,
            handlelength=1.3,
            columnspacing=1.4,
            handletextpad=0.5,
        )

    def axes(left, bottom, width, tall):
        return figure.add_axes((left / WIDTH, (bottom + below) / total, width / WIDTH, tall / total))

    return figure, axes


def wide(text: str, points: float) -> float:
    """About how many inches a line of text takes."""
    return len(text) * points * 0.0083


def _flowing(handles: dict[str, Any]) -> list[dict[str, Any]]:
    """The legend's keys in lines that fit."""
    lines, used = [], WIDTH
    for text, handle in handles.items():
        needs = wide(text, 9.5) + 0.5
        if used + needs > WIDTH:
            lines, used = [*lines, {}], 0.0
        lines[-1][text] = handle
        used += needs
    return lines
