"""Adapter folders: what is read, and what is refused."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastft
from fastft.checkpoint import files
from fastft.checkpoint.files import CONFIG, WEIGHTS, AdapterFileError
from tests.methods.models import assert_same, llama, randomize, snapshot, tokens

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def folder(tmp_path):
    handle = fastft.attach(llama(), fastft.LoRA(r=4, target_modules=["q_proj", "v_proj"]))
    randomize(handle)
    handle.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder, tensors=None, **config):
    if tensors is not None:
        weights = load_file(folder / WEIGHTS)
        tensors(weights)
        save_file({key: value.contiguous() for key, value in weights.items()}, folder / WEIGHTS)
    old = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**old, **config}))


def refuse(folder, match, error=AdapterFileError):
    model = llama()
    before = snapshot(model)
    with pytest.raises(error, match=match):
        fastft.load(model, folder)
    assert_same(before, snapshot(model))


def test_round_trip_and_restore(folder):
    model = llama()
    handle = fastft.load(model, folder, "other")
    state = torch.get_rng_state()
    fastft.load(llama(), folder)
    assert torch.equal(state, torch.get_rng_state())  # loading draws no random numbers
    values = [parameter.clone() for parameter in handle.parameters()]
    saved = load_file(folder / WEIGHTS)
    for name, parameter in handle.named_parameters():
        assert torch.equal(parameter, saved["base_model.model." + name.replace(".other", ".weight")])
    randomize(handle, seed=8)
    handle.merge()
    handle.restore(folder)
    assert all(torch.equal(one, two) for one, two in zip(values, handle.parameters(), strict=True))
    merged = model(tokens()).logits
    handle.unmerge()
    torch.testing.assert_close(merged, model(tokens()).logits, rtol=1e-5, atol=1e-5)
    change(folder, lora_alpha=3)
    with pytest.raises(AdapterFileError, match=r"the scale of 'model.layers.0.self_attn.q_proj' is 0.75"):
        handle.restore(folder)
    change(folder, use_qalora=True)
    with pytest.raises(AdapterFileError, match="use_qalora"):
        handle.restore(folder)


def test_saved_twice_is_the_same_file(folder, tmp_path):
    fastft.load(llama(), folder).save(tmp_path / "again")
    for name in (CONFIG, WEIGHTS):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_patterns_keep_their_order(tmp_path):
    """Of those that match a module the first counts."""
    options = {"rank_pattern": {"q_proj": 2, "layers.0.self_attn.q_proj": 8}, "alpha_pattern": {"q_proj": 4, "0.*q_proj": 9}}
    handle = fastft.attach(llama(), fastft.LoRA(target_modules=["q_proj"], **options))
    handle.save(tmp_path)
    again = fastft.load(llama(), tmp_path)
    assert [again.method.scale(name) for name in again.targets] == [handle.method.scale(name) for name in handle.targets]
    handle.restore(tmp_path)


def test_damaged_files(folder):
    whole = (folder / WEIGHTS).read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:size])
        refuse(folder, rf"adapter_model.safetensors is damaged \({size} bytes\)")
    (folder / WEIGHTS).write_bytes(b"\xff" * 64)
    refuse(folder, "damaged")
    (folder / WEIGHTS).write_bytes(whole)
    deep = "[" * 100_000
    for text, match in (("{", "not JSON"), ("[1]", "holds a list"), (b"\xff\xfe", "not JSON"), (deep, "not JSON")):
        (folder / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
        refuse(folder, match)


def test_headers_that_lie(folder):
    """Sizes are refused before anything of them is read."""
    whole = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])

    def written(change):
        new = json.loads(json.dumps(header))
        change(new)
        text = json.dumps(new).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])

    for change in (
        lambda h: h[KEY].update(data_offsets=[0, 1 << 40]),
        lambda h: h[KEY].update(data_offsets=[0]),
        lambda h: h[KEY].update(shape=3),
        lambda h: h[KEY].pop("dtype"),
        lambda h: h.update({KEY: "x"}),
        lambda h: h[KEY].update(data_offsets=next(h[k]["data_offsets"] for k in h if k not in (KEY, "__metadata__"))),
    ):
        written(change)
        refuse(folder, "is damaged")
    (folder / WEIGHTS).write_bytes((1 << 62).to_bytes(8, "little") + whole[8:])
    refuse(folder, "is damaged")
    for text in (b"[" * 100_000, b"[]"):
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text)
        refuse(folder, "is damaged")
    (folder / WEIGHTS).write_bytes(whole)
    with open(folder / CONFIG, "ab") as file:
        file.truncate(1 << 30)  # a hole that takes no disk
    refuse(folder, r"has more than [\d,]+ bytes")


def test_what_is_no_file(folder):
    """Not waited for, and not read: pipes, devices, folders."""
    for name in (WEIGHTS, CONFIG):
        for put in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink(path, path)):
            whole = (folder / name).read_bytes()
            (folder / name).unlink()
            put(folder / name)
            refuse(folder, f"{name} can't be read: ")
            (folder / name).rmdir() if put is os.mkdir else (folder / name).unlink()
            (folder / name).write_bytes(whole)


def test_messages_are_cut_and_can_be_printed(folder):
    change(folder, alpha_pattern={"\ud800\n": None})
    refuse(folder, r"\\ud800\\n=None; it must be a finite number")
    change(folder, alpha_pattern={})
    change(folder, an_option_of_tomorrow="x" * 100_000)
    with pytest.raises(AdapterFileError, match="an_option_of_tomorrow.*supported: alpha_pattern") as caught:
        fastft.load(llama(), folder)
    assert len(str(caught.value)) < 2100


def test_missing_files(folder, tmp_path):
    refuse(tmp_path / "nowhere", "no adapter folder", FileNotFoundError)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    refuse(folder, "adapter_model.bin is a pickle, which can run code", FileNotFoundError)
    (folder / CONFIG).unlink()
    refuse(folder, "adapter_config.json", FileNotFoundError)


def test_tensors_that_do_not_fit(folder, tmp_path):
    good = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}

    def check(tensors, match, **config):
        for name, data in good.items():
            (folder / name).write_bytes(data)
        change(folder, tensors, **config)
        refuse(folder, match)

    check(lambda w: w.pop(KEY), rf"1 tensors are missing: {KEY}")
    check(lambda w: w.clear(), r"8 tensors are missing: (\S+, ){4}\S+ and 3 more$")
    check(lambda w: w.update(extra=torch.zeros(1)), "1 tensors are not expected by this model and config: extra")
    check(lambda w: w.update({KEY: w[KEY].t()}), rf"of the wrong shape: {KEY} \[16, 4\] \(want \[4, 16\]\)")
    check(None, r"of the wrong shape", r=5)
    check(lambda w: w.update({KEY: w[KEY].to(torch.int64)}), "the lora_A of .* is torch.int64; it must be a floating-point")
    check(lambda w: w.update({KEY: w[KEY].to(torch.complex64)}), rf"unsupported dtype: {KEY} \(C64\)")
    for bad in (float("nan"), float("inf")):
        check(lambda w, bad=bad: w[KEY].view(-1)[5].fill_(bad), rf"not finite: {KEY}")


def test_configs_that_are_not_supported(folder):
    good = (folder / CONFIG).read_text()
    for config, match in (
        ({"use_qalora": True}, r"not supported: {'use_qalora': True}; supported: alpha_pattern, bias, .*rank_pattern"),
        ({"use_dora": True}, r"4 tensors are missing: .*\.lora_magnitude_vector"),
        ({"lora_bias": True}, r"4 tensors are missing: .*\.lora_B\.bias"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"an_option_of_tomorrow": 1}, "an_option_of_tomorrow"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changed the base weights"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"peft_type": "IA3"}, r"peft_type 'IA3' is not supported; supported: \['LIFT', 'LORA', 'S2FT'"),
        ({"peft_type": None}, "peft_type None"),
        ({"peft_type": ["LORA"]}, r"peft_type \['LORA'\] is not supported"),
        ({"r": "8"}, "rank r='8'"),
        ({"lora_dropout": 2.0}, "lora_dropout"),
    ):
        (folder / CONFIG).write_text(good)
        change(folder, **config)
        refuse(folder, match)
    change(folder, **{**json.loads(good), "target_modules": ["query"]})
    refuse(folder, "no module matches", ValueError)


def test_a_model_that_does_not_fit(folder):
    model = llama(hidden_size=8, num_attention_heads=1)
    with pytest.raises(AdapterFileError, match="6 tensors are of the wrong shape"):
        fastft.load(model, folder)
    model = llama()
    fastft.load(model, folder)
    with pytest.raises(ValueError, match="attached already"):
        fastft.load(model, folder)


def rewritten(folder, change, more=0):
    """The file with another header, and a hole of `more` bytes at its end, which takes no disk."""
    whole = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    change(header, len(data))
    text = json.dumps(header).encode()
    with open(folder / WEIGHTS, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + data)
        file.truncate(file.tell() + more)


def counting(monkeypatch):
    """How many bytes are read of weights' files."""
    read = []

    def counted(file, at, dtype, count):
        read.append(count * dtype.itemsize)
        return numbers(file, at, dtype, count)

    numbers = files._numbers
    monkeypatch.setattr(files, "_numbers", counted)
    return read


def test_a_file_is_as_large_as_its_tensors(folder, monkeypatch):
    """Or nothing but its header is read: the rest can be of any size."""
    read = counting(monkeypatch)
    rewritten(folder, lambda header, size: None, more=1 << 30)
    refuse(folder, "damaged .*its header is no list of its tensors: tensors of")
    assert not read


def test_copies_that_nobody_wants_are_not_read(folder, monkeypatch):
    read, more = counting(monkeypatch), 1 << 30

    def add(header, size):
        header["base_model.model.x.original_module.bias"] = {
            "dtype": "F32",
            "shape": [more // 4],
            "data_offsets": [size, size + more],
        }

    wanted = sum(tensor.nbytes for tensor in load_file(folder / WEIGHTS).values())
    rewritten(folder, add, more)
    fastft.load(llama(), folder)
    assert sum(read) == wanted


@pytest.mark.parametrize("compared", [files._COMPARED, 100])
def test_an_output_heads_own_weight(tmp_path, monkeypatch, compared):
    """PEFT writes it beside the head's adapter, which says nothing as long as it is the model's own."""
    monkeypatch.setattr(files, "_COMPARED", compared)
    handle = fastft.attach(llama(), fastft.LoRA(r=4, target_modules=["q_proj", "lm_head"]))
    randomize(handle)
    handle.save(tmp_path)
    key = "base_model.model.lm_head.base_layer.weight"
    own = llama().lm_head.weight.detach()
    for same in (own, own.bfloat16(), own.double()):
        change(tmp_path, lambda weights, same=same: weights.update({key: same}))
        model = llama()
        fastft.load(model, tmp_path)
        torch.testing.assert_close(model(tokens()).logits, handle.model(tokens()).logits)
    other = own.clone()
    other[-1, -1] += 1
    change(tmp_path, lambda weights: weights.update({key: other}))
    refuse(tmp_path, f"1 tensors are of a base model with other values: {key}; load the adapter on the model that")
    change(tmp_path, lambda weights: weights.update({key: own[1:]}))
    refuse(tmp_path, f"of the wrong shape: {key}")
    elsewhere = "base_model.model.model.embed_tokens.base_layer.weight"
    change(tmp_path, lambda weights: (weights.pop(key), weights.update({elsewhere: own})))
    refuse(tmp_path, f"not expected by this model and config: {elsewhere}; save with .*save_embedding_layers=False")
