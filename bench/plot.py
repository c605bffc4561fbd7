"""Figures and tables from ``bench/results/*.csv`` and nothing else.

``python -m fastft.bench.plot`` draws the figures (PNG and SVG, in bench/results/figures); ``--readme`` rewrites README's
summary, the table of losses in bench/README.md, and bench/results/README.md, which has every table and shows every figure.
Only rows that count are read: not quick, void, wrong or skipped ones.
"""

import argparse
import sys
from pathlib import Path

from . import figures, losses, results, tables
from .standings import counted

BEGIN, END = "<!-- numbers:begin -->", "<!-- numbers:end -->"
LOSSES = "<!-- losses:begin -->", "<!-- losses:end -->"
FOLDER = results.ROOT / "bench" / "results"
FIGURES = "figures"
HEAD = """# Every number

Written by `python -m fastft.bench.plot --readme` from the CSV files beside it; how each number is made is in
[bench/README.md](../README.md). `fastft bench --html` makes a page of them that can be sorted and filtered.
"""


def with_table(text: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """README's text with the part between the markers replaced.

    Raises:
        ValueError: a marker is missing, repeated or out of order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"README needs one {begin} followed by one {end}")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def readme(text: str, rows) -> str:
    """README's text with the summary of these rows."""
    return with_table(text, tables.summary(rows, "bench/results/README.md"))


def method(text: str, rows) -> str:
    """bench/README.md's text with the table of where these rows are behind."""
    return with_table(text, losses.markdown(rows), *LOSSES)


def every_number(rows) -> str:
    """The text of bench/results/README.md: the tables, and under each device's heading its figures."""
    shown: dict[tuple[str, str], list[str]] = {}
    for drawing in figures.drawings(rows):
        path = f"{FIGURES}/{drawing.stem}"
        image = f'<a href="{path}.svg"><img src="{path}.png" width="49%" alt="{drawing.title}"></a>'
        shown.setdefault((drawing.device, drawing.threads), []).append(image)
    return f"{HEAD}\n{tables.full(rows, shown)}\n"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastft.bench.plot", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=FOLDER, metavar="DIR", help=f"folder of the CSVs ({FOLDER})")
    parser.add_argument("--readme", action="store_true", help="rewrite the tables of the READMEs")
    args = parser.parse_args(argv)
    rows = results.read(sorted(args.results.glob("*.csv")), check=True)
    if args.readme:
        for path, written in ((results.ROOT / "README.md", readme), (results.ROOT / "bench" / "README.md", method)):
            path.write_text(written(path.read_text(), rows))
            print(f"wrote {path}")
        path = args.results / "README.md"
        path.write_text(every_number(rows))
        print(f"wrote {path}")
    elif counted(rows):
        print("\n".join(map(str, figures.draw(rows, args.results / FIGURES))))
    else:
        print("no rows that count: nothing to draw")
    return 0


if __name__ == "__main__":
    sys.exit(main())
