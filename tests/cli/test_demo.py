"""The demo's model and data: small enough to ship, English before fine-tuning, code to fine-tune on."""

import subprocess
import sys

import pytest
import torch

from demo import compare, data
from demo.data import STDLIB, capitals, functions, imports
from demo.run import MODEL, PROMPTS, ROOT, interval


def test_model_is_small_and_has_learnt_english():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 6e6
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)

    def loss(text):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            return model(input_ids=ids, labels=ids).loss.item()

    english = "If the file does not exist, it is created. The default value is the name of the current directory."
    assert loss(english) < 4.5  # a uniform guess costs 7.6
    assert loss(english) < loss(" ".join(reversed(english.split()))) - 1
    assert all(tokenizer.decode(tokenizer(prompt).input_ids) == prompt for prompt in PROMPTS)


@pytest.fixture
def library(monkeypatch):
    """A few packages of the standard library: to parse all of it takes many seconds."""
    read, packages = data.sources, ("asyncio", "email", "http", "multiprocessing", "unittest", "xml")
    monkeypatch.setattr(data, "sources", lambda: (file for name in packages for file in read(STDLIB / name)))


def test_functions_are_code_without_prose(library):
    codes = functions(200)
    assert len(codes) == 200 and codes == functions(200)
    assert all(code.startswith(("def ", "@")) and "\n    #" not in code for code in codes)


def test_a_failed_run_of_the_comparison_says_why(tmp_path):
    with pytest.raises(SystemExit, match=r"No such file[^$]*LoRA: fastft train ended with 2"):
        compare.train("LoRA", tmp_path / "nowhere.jsonl", tmp_path / "out", 1, 1e-3)


def test_an_arm_says_nothing_of_torchao():
    pytest.importorskip("torchao")
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import demo.arm"], cwd=ROOT, capture_output=True, text=True
    )
    assert (said.returncode, said.stderr) == (0, "")


def test_interval_brackets_the_median():
    low, high = interval([1.0, 1.1, 0.9, 1.05, 0.95, 1.02, 0.98])
    assert 0.9 <= low < 1.0 < high <= 1.1


def test_capitals_and_imports_are_two_more_ways_to_write(library):
    assert len(capitals(50)) == len(imports(50)) == 50
    assert all(text == text.upper() for text in capitals(50))
    assert all(line.startswith(("import ", "from ")) for text in imports(50) for line in text.split("\n"))
