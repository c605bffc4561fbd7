"""Text that every Python carries: prose to pretrain the demo model, code to fine-tune it on.

`prose()` is documentation: the language reference of `pydoc_data.topics`, docstrings, comment blocks of the library.
`functions()` is code: functions of the standard library without docstrings and comments (`ast.unparse` drops them), so a
model pretrained on the prose has not seen a line of it. `capitals()` and `imports()` are two more ways to write. All are
deterministic for one Python version.

    python -m demo.data OUT.jsonl [N [functions | capitals | imports]]      writes N texts as {"text": ...} lines
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import random
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

STDLIB = Path(sysconfig.get_paths()["stdlib"])
SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "__pycache__",
    "lib2to3",
    "config",
}


def sources(root: Path = STDLIB) -> Iterator[tuple[str, ast.Module]]:
    """(source text, syntax tree) of each standard library file in a fixed order."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED.isdisjoint(relative.parts):
            try:
                text = path.read_text(encoding="utf-8")
                yield text, ast.parse(text)
            except (SyntaxError, UnicodeDecodeError):
                continue


def _comment_blocks(text: str) -> Iterator[str]:
    """Runs of at least three comment lines on consecutive lines, without their hashes."""
    block: list[str] = []
    last = -2
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1:
                if len(block) > 2:
                    yield "\n".join(block)
                block = []
            block.append(re.sub(r"^#+ ?", "", token.string))
            last = token.start[0]
    if len(block) > 2:
        yield "\n".join(block)


def prose() -> list[str]:
    """Documents of English documentation, without duplicates, in a fixed order."""
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    for name in sorted(sys.builtin_module_names):
        if name.startswith("__"):
            continue
        module = __import__(name)
        for member in sorted(vars(module)):
            value = getattr(module, member)
            documents += [inspect.getdoc(value) or ""] if callable(value) else []
    for text, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                documents.append(ast.get_docstring(node) or "")
        documents += _comment_blocks(text)
    return [d.strip() for d in dict.fromkeys(documents) if len(d.strip()) > 60]


def functions(limit: int | None = None, seed: int = 0) -> list[str]:
    """Source of standard library functions of 200 to 1500 characters, shuffled by `seed`."""
    found: dict[str, None] = {}
    for _, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                if ast.get_docstring(node) is not None:
                    node.body = node.body[1:] or [ast.Pass()]
                code = ast.unparse(node)
                if 200 <= len(code) <= 1500 and code.isascii():
                    found[code] = None
    codes = list(found)
    random.Random(seed).shuffle(codes)
    return codes[:limit]


def capitals(limit: int | None = None, seed: int = 0) -> list[str]:
    """Paragraphs of the prose in capital letters."""
    found = [part.upper() for text in prose() for part in text.split("\n\n") if 200 <= len(part) <= 1000]
    found = list(dict.fromkeys(found))
    random.Random(seed).shuffle(found)
    return found[:limit]


def imports(limit: int | None = None, seed: int = 0) -> list[str]:
    """What each file of the standard library imports, one name a line."""
    found = []
    for _, tree in sources():
        lines = [ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        found += ["\n".join(lines)] if len(lines) > 2 else []
    random.Random(seed).shuffle(found)
    return found[:limit]


KINDS = {"functions": functions, "capitals": capitals, "imports": imports}


def main(out: str, count: str = "2000", kind: str = "functions") -> None:
    lines = [json.dumps({"text": text}) + "\n" for text in KINDS[kind](int(count))]
    Path(out).write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} texts ({kind}) of Python {sys.version.split()[0]} -> {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
