"""Without PEFT: `accelerate` says what to install, and what needs no PEFT works."""

import subprocess
import sys

CODE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "peft":
            raise ModuleNotFoundError("No module named 'peft'", name="peft")

sys.meta_path.insert(0, Absent())
import torch, fastft
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
print(len(fastft.report(model)))
fastft.attach(model, fastft.LoRA(r=2, target_modules="0"))
print(fastft.report(fastft.restore(model))["0"].path)
try:
    fastft.accelerate(model)
except ImportError as error:
    print(error)
"""


def test_without_peft():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, path, told = done.stdout.splitlines()
    assert (rows, path) == ("0", "fused") and "not installed: pip install 'fastft[peft]'" in told
