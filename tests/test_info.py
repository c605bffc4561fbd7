"""`fastft info`: the report fits terminals, and loses nothing of it in any."""

import pytest

from fastft import info


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
