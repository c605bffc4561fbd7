"""A tiny random Llama with the demo's tokenizer, and helpers to run the command line."""

import json
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

TOKENIZER = Path(__file__).parents[2] / "demo" / "model"


def adapter(out):
    return load_file(out / "adapter" / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def trained(out, options):
    """The result of `fastft train` into `out`, which has to succeed."""
    from fastft.cli.app import app

    result = CliRunner().invoke(app, ["train", *map(str, options), "--out", str(out)])
    assert result.exit_code == 0, result.output
    return result


def stopped(expected, out, last):
    """A copy of a finished run as if it had been killed before its checkpoint of step `last`."""
    shutil.copytree(expected, out)
    shutil.rmtree(out / f"checkpoint-{last}")
    shutil.rmtree(out / "adapter")
    (out / "summary.json").unlink()
    return out


def assert_same_run(expected, out, *more):
    """Same adapter, bit for bit, and same losses."""
    assert same(adapter(expected), adapter(out))
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in (expected, out))
    for key in ("train_curve", "held_out_loss", *more):
        assert a[key] == b[key], key


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def text_data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    words = ["the", "file", "is", "read", "once", "and", "its", "lines", "are", "kept", "in", "a", "list"]
    lines = [{"text": " ".join(words[i % 7 : i % 7 + 3 + i % 5])} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def write_jsonl(tmp_path):
    def write(*lines) -> str:
        path = tmp_path / "data.jsonl"
        path.write_bytes(
            b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
        )
        return str(path)

    return write


@pytest.fixture
def largest_file():
    """A context in which files of this process end at so many bytes, as if the disk were full."""

    @contextmanager
    def limited(size):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limited


@pytest.fixture
def fastft_command():
    """Run `fastft ARGUMENTS` in this process: an object with exit_code, stdout, stderr."""
    from fastft.cli.app import app

    def run(*arguments):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run
