"""`fastft serve` as a user meets it: what it refuses at once, what it says, and the whole of it with a small model."""

import contextlib
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import openai
import pytest
import torch
from typer.testing import CliRunner

import fastft
import fastft.serving
from fastft.cli import serve
from fastft.cli.errors import UserError
from fastft.cli.serve import Welcome, make_server_config
from fastft.cli.serve_config import ServeConfig

from .server_fixtures import ADMIN, KEY, TOKENIZER, FakeEngine, load_tokenizer, serving
from .tiny import llama


def key_file(path, key=KEY):
    path.write_text(key + "\n")
    path.chmod(0o600)
    return str(path)


@pytest.fixture
def command(monkeypatch):
    """Run `fastft serve ARGUMENTS`, which has to be refused before anything is loaded; its message."""
    from fastft.cli.app import app

    monkeypatch.setattr(serve, "load", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.delenv("FASTFT_API_KEY", raising=False)

    def run(*arguments):
        result = CliRunner().invoke(app, ["serve", *map(str, arguments)])
        assert result.exit_code == 2 and "Loading" not in result.stdout, result.output
        return result.stderr.removeprefix("fastft: ")

    return run


def test_wrong_options_are_refused_before_anything_is_loaded(command, tmp_path):
    model = ("--model", TOKENIZER)
    assert command().startswith("missing --model")
    assert "no such folder" in command("--model", tmp_path / "none")
    assert "--api-key-file or FASTFT_API_KEY" in command(*model, "--host", "0.0.0.0")
    assert "size such as 512MiB" in command(*model, "--device-memory", "lots")
    for slots in (0, 10**30):
        assert "slots must be positive" in command(*model, "--slots", slots)
    assert "size such as 512MiB" in command(*model, "--max-body", "9" * 400)
    assert "No such file" in command(*model, "--api-key-file", tmp_path / "none")
    assert "at least 16" in command(*model, "--api-key-file", key_file(tmp_path / "short", "secret"))
    both = key_file(tmp_path / "both")
    assert "also an API key" in command(*model, "--api-key-file", both, "--admin-token-file", both)
    assert "one admin token" in command(*model, "--admin-token-file", key_file(tmp_path / "two", f"{KEY}\n{ADMIN}"))
    for folder in ("/nowhere", ""):
        assert command(*model, "--adapters", folder, "--port", 0).startswith(f"adapters {folder}: no such folder")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        assert "Address already in use; try another --port" in command(*model, "--port", taken.getsockname()[1])


def test_a_base_of_4_bits(command, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    llama().save_pretrained(tmp_path)
    monkeypatch.setattr(serve, "load", lambda *_: load_tokenizer())
    engine, _ = serve.start_engine(config := ServeConfig(str(tmp_path), load_in_4bit=True), "base")
    with engine:
        assert type(engine.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
        shown = dict(Welcome(config, make_server_config(config), engine, 1).rows())["model"]
        assert shown.endswith(f"({sum(p.numel() for p in llama().parameters()):,} parameters, float32, base of 4 bits, cpu)")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a))
    assert 'needs bitsandbytes: pip install "fastft[qlora]"' in command("--model", TOKENIZER, "--load-in-4bit")


@pytest.mark.parametrize(
    "text,size", [("2GiB", 2 << 30), ("512M", 512 << 20), ("1.5 GB", 3 << 29), ("100", 100), ("4kib", 4096)]
)
def test_sizes(text, size):
    assert ServeConfig("m", device_memory=text).bytes_of("device_memory") == size


@pytest.mark.parametrize("text", ["", "0", "-1GiB", "1e9", "GiB", "1PiB", "1 2"])
def test_no_sizes(text):
    with pytest.raises(UserError, match="must be a size"):
        ServeConfig("m", device_memory=text)


def test_names_of_the_base_model():
    assert make_server_config(ServeConfig(str(TOKENIZER))).model == "model"
    assert make_server_config(ServeConfig("some-org/some.model")).model == "some-org/some.model"
    assert make_server_config(ServeConfig(str(TOKENIZER), name="mine")).model == "mine"
    with pytest.raises(UserError, match="--name"):
        make_server_config(ServeConfig(str(TOKENIZER), name="no spaces"))


def test_limits_that_go_together():
    """What the queue or the slots allow is not told to try again later because of another limit, or the other way round."""
    limits = make_server_config(ServeConfig(str(TOKENIZER), max_choices=16, max_waiting=4, slots=1000)).limits
    assert limits.choices == 4 and limits.adapters == 1000
    limits = make_server_config(ServeConfig(str(TOKENIZER))).limits
    assert limits.choices == ServeConfig.max_choices and limits.adapters == 256


def test_keys_come_from_files_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFT_API_KEY", KEY)
    config = make_server_config(
        ServeConfig(str(TOKENIZER), host="0.0.0.0", admin_token_file=key_file(tmp_path / "token", ADMIN))
    )
    assert config.api_keys == (KEY,) and config.admin_token == ADMIN and "FASTFT_API_KEY" not in os.environ
    from fastft.cli.app import app

    help = re.sub(r"\s+", " ", CliRunner().invoke(app, ["serve", "--help"]).stdout)
    assert "--api-key-file" in help and not re.search(r"--(api-key|admin-token|key|token) ", help)


def welcome(tmp_path, engine, url="http://127.0.0.1:8000", adapters=True, **options):
    engine.model = torch.nn.Linear(10, 10)
    engine.model.dtype, engine.model.device, engine.model.config = torch.float32, torch.device("cpu"), llama().config
    config = ServeConfig(str(TOKENIZER), adapters=str(tmp_path) if adapters else None, **options)
    return Welcome(config, make_server_config(config), engine, int(url.rpartition(":")[2]))


def test_the_welcome(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    names = [f"a{i}" for i in range(10)]
    for name in [*names, "bad name", "empty"]:
        (tmp_path / name).mkdir()
    engine = FakeEngine(load_tokenizer(), adapters=names)
    engine.adapters.stats = lambda: {"device_bytes": 2 << 30, "slots": 64, "host_cap": 1 << 30}
    welcome(tmp_path, engine).show(1.5)
    shown = capsys.readouterr().out
    for text in (
        "fastft serves model",
        "110 parameters, float32, cpu",
        "10 in",
        "a0, a1, a2, a3, a4, a5, a6, a7 and 2 more",
        "not served: 'bad name', names have 1 to 64 letters",
        "not served: 'empty', it has no adapter_config.json",
        "adapters up to 2.0 GiB in 64 slots",
        "http://127.0.0.1:8000/v1",
        "no key needed",
        "off (--admin-token-file)",
        "Ctrl-C",
    ):
        assert text in re.sub(r"\s*\n\s{5,}", " ", shown), text
    lines = [line for line in shown.splitlines() if line.startswith("curl ")]
    assert len(lines) == 1 and lines[0].endswith("}'")


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("keyed", [True, False])
def test_the_curl_line_can_be_pasted(tmp_path, template, keyed):
    engine = FakeEngine(load_tokenizer())
    if not template:
        engine.tokenizer.chat_template = None
    with serving(engine, api_keys=(KEY,) if keyed else ()) as (url, _):
        options = {"api_key_file": key_file(tmp_path / "the keys", f"# ours\n{KEY}")} if keyed else {}
        line = welcome(tmp_path, engine, url, adapters=False, **options).curl()
        line = line.replace('"model": "model"', '"model": "base"')
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=20)
    answer = json.loads(done.stdout)
    assert answer["object"] == ("chat.completion" if template else "text_completion"), done


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(model folder, adapters' folder with LoRA, S²FT and a damaged one)."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("served")
    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(root / "tiny")
    tokenizer.save_pretrained(root / "tiny")
    methods = {"lora": fastft.LoRA(r=4, target_modules="all-linear"), "s2ft": fastft.S2FT(down_ratio=0.1, o_ratio=0.5)}
    for name, method in methods.items():
        handle = fastft.attach(AutoModelForCausalLM.from_pretrained(root / "tiny"), method)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        handle.save(root / "adapters" / name)
    shutil.copytree(root / "adapters" / "lora", root / "adapters" / "damaged")
    (root / "adapters" / "damaged" / "adapter_model.safetensors").write_bytes(b"no tensors")
    return root / "tiny", root / "adapters"


@pytest.mark.parametrize("error", [MemoryError("too much"), OSError(12, "Cannot allocate memory")])
def test_memory_that_is_not_there_is_said_in_a_line(monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(serve, "load", lambda *_: None)
    monkeypatch.setattr(serve, "load_base", lambda *_: torch.nn.Linear(1, 1))
    monkeypatch.setattr(fastft.serving, "Engine", refuse)
    with pytest.raises(UserError, match="the engine can't be made: .*(too much|Cannot allocate)"):
        serve.start_engine(ServeConfig(str(TOKENIZER)), "base")
    engine = FakeEngine(load_tokenizer())
    engine.start, engine.close = refuse, lambda: None
    monkeypatch.setattr(fastft.serving, "Engine", lambda *_, **__: engine)
    with pytest.raises(UserError, match="the engine can't be started: .*(too much|Cannot allocate)"):
        serve.start_engine(ServeConfig(str(TOKENIZER)), "base")


@pytest.mark.parametrize("broken", ["logits", "call", "first step", "second step"])
def test_a_model_whose_first_tokens_fail_is_not_served(monkeypatch, broken):
    model, steps = llama(), []
    if broken == "logits":
        model.lm_head.weight.data.fill_(float("nan"))
    forward = model.forward

    @functools.wraps(forward)
    def break_down(**inputs):
        steps.append(None)
        if len(steps) == {"call": 1, "first step": 5, "second step": 6}.get(broken):  # four calls are what is compared with
            raise ArithmeticError("the step broke")
        return forward(**inputs)

    model.forward = break_down
    monkeypatch.setattr(serve, "load", lambda *_: None)
    monkeypatch.setattr(serve, "load_base", lambda *_: model)
    says = "is not finite" if broken == "logits" else "the step broke"
    with pytest.raises(UserError, match=f"the engine can't be started: LlamaForCausalLM can't be served, .*{says}"):
        serve.start_engine(ServeConfig(str(TOKENIZER), device="cpu"), "base")


def test_a_failed_engine_ends_the_command_with_1(monkeypatch, capsys):
    engine = FakeEngine(load_tokenizer())
    monkeypatch.setattr(serve, "start_engine", lambda config, name: (engine, engine.tokenizer))
    monkeypatch.setattr(serve.Welcome, "show", lambda *_: setattr(engine, "failure", ArithmeticError("the step broke")))
    with pytest.raises(SystemExit, match="the engine failed: .*the step broke"):
        serve.run(ServeConfig(str(TOKENIZER), port=0))


def expected(model, adapter, prompt):
    """Greedy tokens as text, from transformers' own generate."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model)
    if adapter is not None:
        fastft.load(model, adapter)
    tokenizer = load_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_whole_server(folders, tmp_path):
    model, adapters = folders
    arguments = [sys.executable, "-m", "fastft.cli.main", "serve", "--model", model, "--adapters", adapters, "--port", "0"]
    arguments += ["--access-log"]
    arguments += ["--api-key-file", key_file(tmp_path / "key"), "--admin-token-file", key_file(tmp_path / "token", ADMIN)]
    process = subprocess.Popen(
        list(map(str, arguments)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"},
    )
    try:
        shown = ""
        while "Ctrl-C stops it" not in shown:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            shown += line
        url = re.search(r"http://127\.0\.0\.1:\d+", shown)[0]
        assert "3 in" in shown and "damaged, lora, s2ft" in shown
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60) as sdk:
            assert [one.id for one in sdk.models.list()] == ["tiny", "damaged", "lora", "s2ft"]
            prompt, texts = "The file is read", {}
            for name in ("tiny", "lora", "s2ft"):
                answer = sdk.completions.create(model=name, prompt=prompt, max_tokens=12, temperature=0)
                texts[name] = answer.choices[0].text
                assert texts[name] == expected(model, None if name == "tiny" else adapters / name, prompt), name
            assert len(set(texts.values())) == 3
            stream = sdk.completions.create(model="lora", prompt=prompt, max_tokens=12, temperature=0, stream=True)
            assert "".join(chunk.choices[0].text for chunk in stream) == texts["lora"]
            chat = sdk.chat.completions.create(
                model="s2ft", messages=[{"role": "user", "content": "hello"}], max_tokens=5, logprobs=True, seed=1
            )
            assert len(chat.choices[0].logprobs.content) == 5 and chat.system_fingerprint
            with pytest.raises(openai.InternalServerError, match="damaged can't be loaded"):
                sdk.completions.create(model="damaged", prompt=prompt, max_tokens=5)
            with pytest.raises(openai.NotFoundError):
                sdk.completions.create(model="nope", prompt=prompt, max_tokens=5)
        with openai.OpenAI(base_url=f"{url}/admin", api_key=ADMIN, max_retries=0) as operator:
            freed = operator.post("/adapters/lora/unload", cast_to=object)
            assert freed["freed_bytes"] > 0
            listed = operator.get("/adapters", cast_to=object)["adapters"]
            assert {one["name"]: one["state"] for one in listed}["s2ft"] == "on_device"
            with pytest.raises(openai.UnprocessableEntityError, match="damaged"):
                operator.post("/adapters/damaged/load", cast_to=object)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0 and time.monotonic() - begun < 15
        rest = process.stdout.read()
        assert "Stopped." in rest and '"POST /v1/completions HTTP/1.1" 200' in rest  # --access-log's lines
    finally:
        process.kill()
        errors = process.communicate()[1]
    assert "Traceback" not in errors and KEY not in errors + shown, errors
