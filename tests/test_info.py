"""`fastft info`: the report fits terminals, and loses nothing of it in any."""

import subprocess
import sys

import pytest

from fastft import info, testing


def words(lines, column):
    return "".join("".join(line[column[0] : column[1]].split()) for line in lines)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_report_fits(width):
    lines = info.lines(width)
    assert max(map(len, lines)) <= width
    text = "".join("".join(line.split()) for line in lines)
    for name, value in {**info.versions(), **info.machine()}.items():
        assert name.replace(" ", "") in text and value.replace(" ", "") in text, name
    header = next(line for line in lines if line.startswith("op "))
    starts = [header.index(name) for name in info.KERNEL_BACKENDS]
    table = lines[lines.index(header) + 1 :]
    for column, name in zip(zip(starts, [*starts[1:], None]), info.KERNEL_BACKENDS):
        cells = words(table, column)
        assert all(row[name].replace(" ", "") in cells for row in info.table())


def test_what_needs_no_kernel_for_gpus_is_not_called_built():
    cells = {row["op"]: (row["triton"], row["cuda"]) for row in info.table()}
    assert all(cell.startswith("None: it is other ops") for op in ("lora_add_", "grouped_add_") for cell in cells[op])
    assert not any(cell.startswith("None") for cell in cells["lora_shrink"])


def test_a_forced_backend_is_shown():
    assert "forced backend" not in info.machine()
    with testing.use("reference"):
        assert info.machine()["forced backend"] == "reference"
    with testing.use("npu"):
        assert "unknown backend 'npu'" in info.machine()["forced backend"]


def test_a_reader_may_stop_reading():
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read(); from fastft import info; info.main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    process.stdin.close()
    assert (process.wait(), process.stderr.read()) == (0, "")
