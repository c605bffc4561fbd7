"""The page of all results: what is in it, and that a browser sorts and filters it."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from fastft.bench import page, run

from .test_results import FOUND, measurement, other, rows

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
MODELS = [
    {"status": "modelled", "gpu": gpu, "family": "lora", "case": "layer r=16 p=0", "shape": "tiny", "dtype": "fp32",
     "backend": "cuda", "us": "5", "ratio": "1.031"}
    for gpu in ("H200", "A100")
]  # fmt: skip
GPU = {"device": "NVIDIA H200", "capability": "sm_90", "threads": "16"}


class Page(HTMLParser):
    """The cells of the table of all numbers, row by row, the tags, and whatever would be fetched."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags, self.fetched, self._cell = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        self.fetched += [given[a] for a in ("src", "href", "xlink:href") if not given.get(a, "#").startswith("#")]
        if tag == "tr" and given.get("role") == "row":
            self.rows.append([])
        if given.get("role") == "cell":
            self._cell = ""

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data

    def handle_endtag(self, tag):
        if tag == "td" and self._cell is not None:
            self.rows[-1].append(self._cell)
            self._cell = None


@pytest.fixture(scope="module")
def results_rows():
    gpu = [measurement("floor2", 1.0), measurement("fastft", 1.9, target=1.5, met=False), measurement("bmm", 1.2)]
    cpu = [measurement("fastft", 1.02, target=1.05, met=True, saved_bytes=65536, peak_bytes=2)]
    cpu += [measurement("peft", 10.5, saved_bytes=131072)]
    found = rows(FOUND) + other("layer r=16 p=0", cpu, "lora") + other("layer r=16 p=0", gpu, "lora", **GPU)
    return [row | {"roofline": "0.42" if row["implementation"] == "fastft" else ""} for row in found]


@pytest.fixture(scope="module")
def text(results_rows):
    return page.render(results_rows, MODELS)


def test_every_row_that_counts_and_the_models_are_in_the_table(text):
    read = Page(text)
    columns = [column[0] for column in page.COLUMNS]
    found = [dict(zip(columns, cells, strict=True)) for cells in read.rows if cells]
    assert [(r["device"], r["implementation"], r["ratio"], r["kind"]) for r in found] == [
        ("NVIDIA H200", "fastft", "1.900×", "measured"),
        ("NVIDIA H200", "two batched products", "1.200×", "measured"),
        ("NVIDIA H200", "fastft:cuda", "1.031×", "model"),
        ("Some CPU 9, 2 threads", "fastft", "1.020×", "measured"),
        ("Some CPU 9, 2 threads", "PEFT", "10.500×", "measured"),
        ("Some CPU 9, 2 threads", "fastft", "1.031×", "measured"),
        ("Some CPU 9, 2 threads", "PEFT", "1.090×", "measured"),
        ("A100", "fastft:cuda", "1.031×", "model"),
    ]
    assert (found[0]["interval"], found[0]["target"], found[0]["met"], found[0]["roofline"], found[0]["seconds"]) == (
        "1.896 … 1.906", "≤ 1.500×", "missed", "42 %", "1.9 s",
    )  # fmt: skip
    assert [(r["saved_bytes"], r["peak_bytes"]) for r in found[3:6]] == [
        ("65.54 KB", "2 B"),
        ("131.1 KB", ""),
        ("640 B", ""),
    ]
    assert found[2]["seconds"] == "5 µs" and found[2]["commit"] == ""


def test_it_needs_nothing_from_elsewhere_and_can_be_operated_by_keyboard(text):
    read = Page(text)
    assert read.fetched == [] and "default-src 'none'" in text
    assert not re.search(r"(?:url\(|@import|fetch\(|import )\s*['\"]?(?!#)[a-z]+:", text)
    heads = [given for tag, given in read.tags if tag == "th" and given.get("role") == "columnheader"]
    assert len(heads) == len(page.COLUMNS) and {given["aria-sort"] for given in heads} == {"none"}
    assert text.count("</button></th>") == len(page.COLUMNS)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_figures_take_the_pages_ink_and_have_ids_of_their_own(text):
    pytest.importorskip("matplotlib")
    read = Page(text)
    ids = [given["id"] for _, given in read.tags if "id" in given]
    assert len(ids) == len(set(ids))
    drawn = [given["aria-label"] for tag, given in read.tags if tag == "svg"]
    assert "LoRA layer: cost over the frozen model, NVIDIA H200" in drawn and "Memory, Some CPU 9, 2 threads" in drawn
    assert page.figures.INK not in text.split("</style>", 1)[1] and "<metadata>" not in text


def test_what_rows_say_is_text_not_markup(results_rows):
    bad = [row | {"case": "<script>alert(1)</script>"} for row in results_rows]
    assert "<script>alert" not in re.sub(r"<svg.*?</svg>", "", page.render(bad), flags=re.DOTALL)


def test_written_from_a_folder_to_a_file_or_a_folder(tmp_path, results_rows):
    (tmp_path / "modelled").mkdir()
    page.results.append(
        tmp_path / "some.csv", [{k: v for k, v in r.items() if k in page.results.FIELDS} for r in results_rows]
    )
    header = ",".join(MODELS[0])
    (tmp_path / "modelled" / "lora.csv").write_text(f"{header}\n{','.join(MODELS[0].values())}\n")
    (tmp_path / "modelled" / "other.csv").write_text("gpu,ratio\nH200,1.1\n")  # of no case: not a row
    assert page.write(str(tmp_path / "x" / "all.html"), tmp_path) == tmp_path / "x" / "all.html"
    assert page.write(str(tmp_path), tmp_path).name == page.DEFAULT
    for folder in ("new.d/", "plain"):
        assert page.write(f"{tmp_path}/{folder}", tmp_path) == tmp_path / folder / page.DEFAULT
    assert (tmp_path / page.DEFAULT).read_text().count('data-kind="model"') == 1


def test_the_command_writes_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(page.figures, "drawings", lambda rows: [])  # which test_figures draws
    assert run.main(["--html", "--out", str(tmp_path / "all.html")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'all.html'}\n"
    assert "AMD EPYC" in (tmp_path / "all.html").read_text(), "the results that are committed"


def test_without_rows():
    assert "0 rows" in page.render([])


DRIVE = """
<script>
const visible = column => [...body.rows].filter(r => !r.hidden).map(r => r.cells[column].textContent);
const column = name => heads.findIndex(h => h.textContent === name);
const click = name => heads[column(name)].firstElementChild.click();
const choose = (field, value) => {
  const select = selects.find(s => s.dataset.field === field);
  select.value = value; select.dispatchEvent(new Event("input", { bubbles: true }));
};
const log = {};
click("Ratio"); log.up = visible(column("Ratio")); log.sorted = heads[column("Ratio")].getAttribute("aria-sort");
click("Ratio"); log.down = visible(column("Ratio"));
click("Target"); log.targets = visible(column("Target"));
click("Target"); log.targetsDown = visible(column("Target"));
log.others = heads.filter(h => h.getAttribute("aria-sort") !== "none").length;
choose("device", "NVIDIA H200"); log.device = visible(column("Implementation")).sort();
log.places = places.filter(p => !p.hidden).map(p => p.dataset.device);
choose("kind", "model"); log.model = visible(column("Implementation"));
log.count = document.getElementById("count").textContent;
form.reset();
setTimeout(() => {
  log.reset = visible(0).length;
  search.value = "lora some PEFT"; search.dispatchEvent(new Event("input", { bubbles: true }));
  log.search = visible(column("Implementation"));
  const out = document.createElement("pre");
  out.id = "log"; out.textContent = JSON.stringify(log); document.body.append(out);
}, 50);
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed, which would open the page")
def test_a_browser_sorts_and_filters(text, tmp_path):
    import json

    path = tmp_path / "page.html"
    path.write_text(text.replace("</body>", DRIVE + "</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="log">(.*?)</pre>', done.stdout)
    assert found, "the page's script did not run to its end"
    log = json.loads(found[1])
    by_value = ["1.020×", "1.031×", "1.031×", "1.031×", "1.090×", "1.200×", "1.900×", "10.500×"]
    assert log["up"] == by_value and log["down"] == by_value[::-1] and log["sorted"] == "ascending"
    blank = [""] * 5
    assert log["targets"] == ["≤ 1.050×", "≤ 1.050×", "≤ 1.500×", *blank], "what is empty comes last"
    assert log["targetsDown"] == ["≤ 1.500×", "≤ 1.050×", "≤ 1.050×", *blank]
    assert log["others"] == 1, "one column is sorted"
    assert log["device"] == ["fastft", "fastft:cuda", "two batched products"] and log["places"] == ["NVIDIA H200"]
    assert log["model"] == ["fastft:cuda"] and log["count"] == "1 of 8 rows"
    assert log["reset"] == 8 and log["search"] == ["PEFT"], (
        "families are found by the name that the command line has for them"
    )
