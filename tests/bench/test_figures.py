"""Figures from rows: which there are, that the same rows give the same file, and that what they say is in them."""

import io
import itertools
import re

import pytest

from fastft.bench import figures, lines, memory, methods, roofline, standings, tables
from fastft.bench.runner import Fact

from .test_results import ENV, FOUND, measurement, other, results, rows

pytest.importorskip("matplotlib")


def only(drawn, name):
    (found,) = (drawing for drawing in drawn if drawing.name == name)
    return found


def text_of(drawing) -> str:
    return " ".join(re.findall(r">([^<>]+)</(?:text|tspan)>", drawing.svg()))


def test_files_are_reproduced_and_old_ones_go(tmp_path):
    (tmp_path / "older-2t-lora.png").write_bytes(b"")
    (tmp_path / "keep.txt").write_text("")
    found = rows([*FOUND, measurement("addmm", 1.08, saved_bytes=6400)])
    written = figures.draw(found, tmp_path)
    bars = ["some-cpu-r-9-2t-toy.png", "some-cpu-r-9-2t-toy.svg"]
    assert [path.name for path in written] == [*bars, "some-cpu-r-9-2t-memory.png", "some-cpu-r-9-2t-memory.svg"]
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in written} | {"keep.txt"}
    assert written[0].read_bytes().startswith(b"\x89PNG")
    first = [path.read_bytes() for path in written]
    figures.draw(found, tmp_path)
    assert [path.read_bytes() for path in written] == first
    assert figures.draw(rows([measurement("fastft", 1.0, "void")]), tmp_path / "none") == []


def test_small_markers_keep_their_hues_in_the_palette():
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from PIL import Image

    hues = list(dict.fromkeys([*figures.OURS.values(), *figures.OTHERS]))

    def dots():
        figure = Figure(figsize=(6, 9), facecolor="white")
        for i in range(40):
            figure.text(0.1, i / 40, f"line {i} of text, which has most pixels", color=figures.INK)
        axes = figure.add_axes((0.7, 0.1, 0.2, 0.8))
        for i, hue in enumerate(hues):
            axes.plot(i, i, color=hue, marker=figures.MARKERS[i % len(figures.MARKERS)], ms=6)
            axes.axhline(i, color=hue, alpha=0.3)
        return figure

    drawn = Image.open(io.BytesIO(figures.Drawing("CPU", "2", "dots", "Dots", dots).png())).convert("RGB")
    there = [colour for _, colour in drawn.getcolors(1 << 24)]
    assert drawn.getpixel((0, 0)) == (255, 255, 255)
    for hue in hues:
        wanted = [round(255 * part) for part in to_rgb(hue)]
        assert min(max(abs(a - b) for a, b in zip(wanted, colour)) for colour in there) <= 8, hue


def test_bars_say_their_numbers_and_cut_what_would_dwarf_them():
    step = other("step down 3 %", [measurement("fastft", 1.019, target=1.02), measurement("full", 1.8)], "s2ft")
    switch = [measurement("fastft", 0.08), measurement("lora-exchange", 1.1)]
    drawn = figures.drawings(step + other("switch down 3 % vs PEFT merge", switch, "s2ft"))
    assert [drawing.name for drawing in drawn] == ["s2ft", "s2ft-vs-peft-merge"]
    cut, over = map(text_of, drawn)
    assert "full fine-tuning" in cut and "+80.0 % ▸" in cut and "+1.9 %" in cut and "target" in cut and "Some CPU" in cut
    assert "time over that of PEFT merge" in over and "0.08×" in over and "1.10×" in over and "▸" not in over


def sparse(densities, peer=1.5):
    found = []
    for density in densities:
        arms = [measurement("fastft", 1 + density / 10, target=1.15), measurement("plain", peer)]
        found += other(f"layer {density:g} %", arms, "sparse")
    return found


def test_lines_need_three_points_and_hold_the_other_parameters():
    drawn = figures.drawings(sparse((5, 0.1, 1)) + other("layer 2 % T=1", [measurement("fastft", 1.0)], "sparse"))
    said = text_of(only(drawn, "by-density"))
    assert "Cost against density" in said and "plain PyTorch" in said and "entries that train, %" in said
    series = lines.series(standings.counted(sparse((5, 0.1, 1))), "density")
    assert [(key.case, list(points)) for key, points in series.items()] == [("layer", [0.1, 1, 5])]
    assert all(not drawing.name.startswith("by-") for drawing in figures.drawings(sparse((1, 5))))


@pytest.mark.parametrize(
    ("parameter", "case"), [("rank", "layer r={}"), ("tokens", "step T={}"), ("adapters", "decode D={}")]
)
def test_lines_of_each_parameter(parameter, case):
    found = [row for n in (1, 4, 16) for row in other(case.format(n), [measurement("fastft", 1 + n)], "toy")]
    axes = only(figures.drawings(found), f"by-{parameter}").figure.axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "4", "16"]
    assert axes.get_yscale() == "log", "1 to 17 times"


def calibration(**rates):
    base = dict.fromkeys(results.FIELDS, "") | ENV | {"family": "calibration", "implementation": "machine", "status": "ok"}
    found = [base | {"case": "copy", "metric": "bandwidth", "value": "2e10", "unit": "B/s"}]
    gemm = {"case": "gemm", "metric": "gemm_rate", "unit": "FLOP/s"}
    return found + [base | gemm | {"dtype": dtype, "value": f"{rate}"} for dtype, rate in rates.items()]


def test_roofline_needs_a_calibration_and_takes_the_latest():
    assert "roofline" not in [drawing.name for drawing in figures.drawings(rows(FOUND))]
    older = [row | {"date": "2020", "value": "1"} for row in calibration(fp32=1)]
    found = calibration(fp32=3e11, bf16=5e11) + older
    assert roofline.roofs(found) == {("Some CPU (R) 9", "2"): (2e10, {"fp32": 3e11, "bf16": 5e11})}
    drawing = only(figures.drawings(rows(FOUND) + found), "roofline")
    said = text_of(drawing)
    assert "fp32 300 GFLOP/s" in said and "bf16" not in said, "roofs are of dtypes that have points"
    assert "copy 20 GB/s" in said and "best peer" in said
    points = [line.get_xydata()[0].tolist() for line in drawing.figure.axes[0].lines if len(line.get_xdata()) == 1]
    # Operations over bytes, and over seconds: ours and the peer's, and the floor's own.
    assert sorted(points) == [pytest.approx(p) for p in sorted([[11 / 12, 11 / 1.031], [11 / 12, 11 / 1.09], [1 / 2, 1.0]])]
    without = [row | {"moved": "0"} for row in rows(FOUND)]
    assert "roofline" not in [drawing.name for drawing in figures.drawings(without + found)], "no bytes, no point"


def test_memory_has_a_panel_for_each_metric_and_zero_has_a_place():
    facts, twice = [Fact("state_bytes", 20.0, "B/entry")], [Fact("state_bytes", 40.0, "B/entry")]
    arms = [
        measurement("floor2", 1.0, saved_bytes=0),
        measurement("fastft", 1.1, saved_bytes=640, peak_bytes=2000, facts=facts),
    ]
    arms += [measurement("peft", 1.2, saved_bytes=64000, peak_bytes=90000, facts=twice)]
    drawing = only(figures.drawings(other("layer r=16", arms)), "memory")
    assert [axes.get_title(loc="left") for axes in drawing.figure.axes] == list(memory.METRICS.values())
    saved = drawing.figure.axes[0]
    assert saved.get_xticklabels()[0].get_text() == "0" and "the floor" in text_of(drawing)
    nothing = other("forward", [measurement("fastft", 1.1, saved_bytes=0)])
    nothing += other("decode", [measurement("floor2", 1.0, peak_bytes=820), measurement("fastft", 1.1, peak_bytes=900)])
    assert "memory" not in [drawing.name for drawing in figures.drawings(nothing)], "no case has two dots apart"


def test_nothing_of_the_memory_figure_overlaps_or_is_cut():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    facts, less = [Fact("state_bytes", 20.0, "B/entry")], [Fact("state_bytes", 12.0, "B/entry")]
    arms = [measurement("floor2", 1.0, saved_bytes=0, peak_bytes=16_777_216)]
    arms += [measurement("fastft", 1.1, saved_bytes=640, peak_bytes=33_849_344, facts=facts)]
    arms += [measurement("peft", 1.2, saved_bytes=592_000_000, peak_bytes=622_940_504, facts=less)]
    figure = only(figures.drawings(other("accelerated step r=16 p=0.05", arms)), "memory").figure
    canvas = FigureCanvasAgg(figure)
    rows_of_text = [[axes._left_title for axes in figure.axes]]
    rows_of_text += [[label for axes in figure.axes for label in axes.get_xticklabels()]]
    figure.draw(canvas.get_renderer())
    for texts in rows_of_text:
        boxes = [text.get_window_extent() for text in texts]
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes)), [text.get_text() for text in texts]
        assert boxes[-1].x1 <= figure.bbox.x1


def quality(**runs):
    base = dict.fromkeys(results.FIELDS, "") | ENV | {"family": "quality", "case": "functions 60 steps", "status": "ok"}
    base |= {"shape": "demo", "size": "9 of 99 numbers", "rounds": "5", "unit": "s"}
    found = []
    for name, (loss, ratio) in runs.items():
        own = base | {"implementation": name.replace("_", ":")}
        found.append(own | {"metric": "held_out_loss", "value": loss, "ratio": ratio, "lo": ratio, "hi": ratio})
        late = {"value": "", "note": "90% of PEFT's: not reached in 2 of 5 rounds"} if ratio == "1.20000" else {"value": "9"}
        found.append(own | {"metric": "seconds_to_loss", "ratio": "" if late["value"] == "" else ratio} | late)
        found[-1] |= {"lo": found[-1]["ratio"], "hi": found[-1]["ratio"]}
    return found


def test_training_runs_have_a_table_and_a_figure():
    found = quality(fastft_LoRA=("4.1", "0.99000"), fastft_S2FT=("4.3", "1.20000"), peft=("4.2", "1.00000"))
    older = [row | {"date": "2020", "value": "77"} for row in found]
    ((where, (table,)),) = methods.tables(found + older).items()
    assert where == ("Some CPU (R) 9", "2") and "77" not in table
    assert table.splitlines()[4:] == [
        "| fastft's LoRA | 4.1 (0.990×, 0.990 … 0.990) | 9 (0.990×, 0.990 … 0.990) | - |",
        "| fastft's S²FT | 4.3 (1.200×, 1.200 … 1.200) | not reached in 2 of 5 rounds | - |",
        "| PEFT's LoRA | 4.2 (1.000×, 1.000 … 1.000) | 9 (1.000×, 1.000 … 1.000) | - |",
    ]
    assert methods.sentences(found)[0] == (
        where,
        "Training at equal size, functions 60 steps: fastft's LoRA: held-out loss 4.1 (0.990×, 0.990 … 0.990), "
        "seconds to a given loss 9 (0.990×, 0.990 … 0.990).",
    )
    said = text_of(only(figures.drawings(found), "quality-functions-60-steps"))
    assert "fastft's S²FT" in said and "not reached" in said and "0.990×" in said and "5 seeds" in said
    assert table in tables.full(found) and "## Some CPU (R) 9, 2 threads" in tables.full(found)


def test_colours_stay_the_same_and_differ():
    known = figures.colours(["fastft", "peft", "new", "newer"])
    assert known["peft"] == figures.colours(["peft"])["peft"] and len(set(known.values())) == 4
