"""Imports go downward, third parties stay in their places, and the core needs little."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The package's folders and files, lowest layer first.
LAYERS = [
    {"_native", "__init__", "listing"},
    {"kernels"},
    {"ops"},
    {"modules", "optim", "testing", "info"},
    {"methods", "checkpoint"},
    {"integrations"},
    {"serving", "cli", "bench", "tune"},  # tune times and checks with the bench's means
]
OPS_ONLY = {"testing", "info"}
THIRD_PARTIES = {"peft", "transformers", "accelerate", "trl", "vllm", "datasets"}
CORE = {"torch", "safetensors", "triton"}
EXTRAS = {"typer", "rich", "yaml", "matplotlib", "psutil", "tqdm", "tokenizers", "numpy"}
EXTRAS |= {"fastapi", "starlette", "uvicorn", "pydantic", "anyio", "prometheus_client", "openai"}


def sources():
    return list(_sources())


def _sources():
    for path in sorted((ROOT / "fastft").rglob("*.py")):
        parts = path.relative_to(ROOT / "fastft").parts
        yield path, parts[0].removesuffix(".py"), parts
    for folder in ("kernels", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not path.name.startswith(("test_", "conftest")):
                yield path, folder, (folder, *path.relative_to(ROOT / folder).parts)


def layer(name):
    for number, names in enumerate(LAYERS):
        if name in names:
            return number
    raise AssertionError(f"fastft/{name} is in no layer of tests/test_layers.py")


def imports(path, parts):
    """(absolute module name, whether at module level) of every import in a file."""
    tree = ast.parse(path.read_text())
    top = set()
    for node in tree.body:
        # A try/except or `if TYPE_CHECKING` at module level still runs at import.
        top |= {id(n) for n in ast.walk(node)} if not isinstance(node, ast.FunctionDef | ast.ClassDef) else set()
    package = ("fastft", *parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module or "")))
            names = [f"{module}.{a.name}" for a in node.names] if module in ("fastft", "") or not node.module else [module]
            for name in names:
                yield name, id(node) in top


@pytest.mark.parametrize("path,name,parts", sources(), ids=lambda v: "/".join(v) if isinstance(v, tuple) else None)
def test_imports_go_downward(path, name, parts):
    own = layer(name)
    for module, _ in imports(path, parts):
        words = module.split(".")
        if words[0] != "fastft" or len(words) == 1:
            continue
        if words[1] in ("LoRALinear", "LoRA", "attach", "load", "__version__"):
            target = {"LoRALinear": "modules", "__version__": "__init__"}.get(words[1], "methods")
        else:
            target = words[1]
        if target == "__init__" or target == name:
            continue
        # `fastft info` and friends are shown by the cli; the cli may use everything.
        assert layer(target) <= own, f"{path.relative_to(ROOT)} (layer {own}) imports {module} (layer {layer(target)})"
        if name in OPS_ONLY:
            assert target in {"ops", "_native"}, f"{name} may import ops only, imports {module}"


@pytest.mark.parametrize("path,name,parts", sources(), ids=lambda v: "/".join(v) if isinstance(v, tuple) else None)
def test_third_parties_stay_in_their_places(path, name, parts):
    for module, at_import in imports(path, parts):
        root = module.split(".")[0]
        if root in THIRD_PARTIES:
            assert not at_import, f"{path.relative_to(ROOT)} imports {root} at module level"
            assert layer(name) >= layer("methods"), f"{path.relative_to(ROOT)} may not import {root}"
        elif root not in CORE | {"fastft"} and root not in sys.stdlib_module_names and at_import:
            assert root in EXTRAS and layer(name) >= layer("integrations"), f"{path.relative_to(ROOT)} needs {root}"


def test_kernels_has_no_init():
    """A top-level kernels/__init__.py would shadow Hugging Face's `kernels` package for users at the repository's root."""
    assert not list((ROOT / "kernels").rglob("__init__.py")) and not list((ROOT / "bench").rglob("__init__.py"))
    assert (ROOT / "fastft" / "kernels").resolve() == ROOT / "kernels"


def test_transformers_imports_beside_a_kernels_package(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.1'\nhere = True\n")
    code = (
        "import sys; sys.path[:0] = ['', sys.argv[1]]; import kernels; assert kernels.here, kernels.__path__;"
        "import transformers; transformers.LlamaConfig(); import fastft.kernels"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_core_needs_torch_and_safetensors_only():
    blocked = sorted(THIRD_PARTIES | EXTRAS - {"numpy"} | {"triton"})
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}:
            raise ImportError(name + ' is not installed', name=name)
sys.meta_path.insert(0, Refuse())
import torch, fastft
layer = fastft.LoRALinear(8, 8, r=2)
layer(torch.randn(3, 8)).sum().backward()
fastft.attach(torch.nn.Sequential(torch.nn.Linear(8, 8)), fastft.LoRA(r=2, target_modules=['0']))
from fastft.cli.main import main
sys.argv = ['fastft', 'info']
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "lora_shrink" in done.stdout
