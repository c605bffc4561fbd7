"""Models that an engine refuses before it starts, and one whose weights are quantised."""

import pytest
import torch

import fastft
from fastft.cli.loading import load_base
from fastft.serving import Engine
from tests.serving.tiny import llama, prompt, save_adapter, transformers, worst_gap


def test_a_model_on_several_devices_is_refused():
    spread = llama()
    spread.model.layers[1].to("meta")  # as offloading leaves it, and in place of another GPU
    with pytest.raises(ValueError, match=r"lies on several devices \(cpu, meta\).*serves one that lies on one"):
        Engine(spread)
    mapped = llama()
    mapped.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "lm_head": 1}
    with pytest.raises(ValueError, match=r"lies on several devices \(0, 1, cpu\).*device_map=\{'': 0\}"):
        Engine(mapped)
    mapped.hf_device_map = {"": "cpu"}
    Engine(mapped).close()


def test_a_quantised_model_serves_what_the_same_model_gives_with_each_adapter(tmp_path):
    pytest.importorskip("bitsandbytes")
    llama().save_pretrained(tmp_path / "base")
    kinds = {"low-rank": "lora16", "entries": "spiel"}
    for name, kind in kinds.items():
        save_adapter(tmp_path / "adapters" / name, kind, seed=1)

    def base():
        return load_base(str(tmp_path / "base"), "cpu", torch.float32, bits=4).eval()

    assert type(base().model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    names = [None, *kinds] * 2
    with Engine(base(), adapter_dir=tmp_path / "adapters") as engine:
        found = engine.generate([prompt(9, i) for i in range(len(names))], adapters=names, max_tokens=8)
    for name, completion in zip(names, found):
        model = base()
        if name is not None:
            fastft.load(model, tmp_path / "adapters" / name)
        assert worst_gap(model.eval(), completion) < 1e-3, name
    assert len({tuple(completion.tokens) for completion in found}) == len(found)


KINDS_OF_THEIR_OWN = {
    "GPTJ": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 256},
    "Bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "Falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False},
}


def of_its_own_kind(kind):
    options = {"vocab_size": 128, "bos_token_id": None, "eos_token_id": None, **KINDS_OF_THEIR_OWN[kind]}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")
    return model(getattr(transformers, f"{kind}Config")(**options)).eval()


@pytest.mark.parametrize("kind", KINDS_OF_THEIR_OWN)
def test_a_model_that_does_not_read_the_paged_cache_is_refused(kind):
    """Its tokens would see no past, and some other requests' prompts."""
    with pytest.raises(ValueError, match=rf"{kind}ForCausalLM doesn't attend through transformers' AttentionInterface"):
        Engine(of_its_own_kind(kind))


def test_a_model_whose_attention_is_not_set_is_refused_when_it_is_switched(monkeypatch):
    """As the text model inside of another, of which transformers only warns."""
    model = llama()
    monkeypatch.setattr(model, "set_attn_implementation", lambda name: None)
    with pytest.raises(ValueError, match="LlamaForCausalLM doesn't attend through"), Engine(model):
        pass


def test_a_step_that_read_no_cache_ends_the_engine(monkeypatch):
    """Of a class whose source looks to transformers as if it did."""
    model = of_its_own_kind("Bloom")
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: True))
    monkeypatch.setattr(model, "_check_and_adjust_attn_implementation", lambda name, **_: name)
    with pytest.raises(
        ValueError, match="BloomForCausalLM can't be served, a trial request failed: .*doesn't attend through"
    ):
        Engine(model).start()
    with Engine(model, trial=False) as engine:
        [done] = engine.generate([prompt(5, 1)], max_tokens=3)
        assert done.finish_reason == "error" and not done.tokens
        assert "BloomForCausalLM doesn't attend through" in str(engine.failure) and "BloomForCausalLM" in str(done.error)


def long_rope(nested):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4, "factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    model = llama(rope_parameters=rope)
    if nested:  # by layer type, as models with several ropes have it (this one can't compute so)
        model.config.rope_parameters = {"full_attention": rope, "other": {"rope_type": "default", "rope_theta": 1e4}}
    return model


@pytest.mark.parametrize("nested", [False, True])
def test_longrope_is_served_with_its_short_factors(nested):
    """The library turns all rows of a step by one set of factors, that of the longest: keys in the cache, by whichever was
    the set when they came."""
    engine = Engine(long_rope(nested), max_batch_tokens=64, max_running=4, trial=not nested)
    assert engine.max_length == 64
    why = "65 prompt .* more than 64 together, as the model's longrope has other factors beyond 64, which are not served"
    with engine, pytest.raises(ValueError, match=why):
        engine.submit(prompt(65, 1), max_tokens=1)
    engine = Engine(long_rope(nested), num_blocks=2, page_size=16, trial=not nested)
    with engine, pytest.raises(ValueError, match=r"more than 32 together$"):  # the cache is what is too small
        engine.submit(prompt(65, 1), max_tokens=1)


def test_phi3s_longrope():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4}
    options = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "pad_token_id": None}
    lengths = {"original_max_position_embeddings": 32, "max_position_embeddings": 128}
    config = transformers.Phi3Config(**options, num_attention_heads=4, rope_parameters=rope, **lengths)
    with Engine(transformers.Phi3ForCausalLM(config)) as engine:
        assert engine.max_length == 32


def test_settings_of_the_model_that_are_not_applied_are_told_of(caplog):
    model = llama()
    model.generation_config.update(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05, min_length=0)
    Engine(model).close()
    assert [record.message.split(", which")[0] for record in caplog.records] == [
        "the model's generation_config has repetition_penalty 1.05"
    ]
    caplog.clear()
    model.generation_config.update(do_sample=True, repetition_penalty=1.0, suppress_tokens=[3])
    Engine(model).close()
    assert "generation_config has suppress_tokens [3], top_k 20, which fastft does not apply" in caplog.text
    caplog.clear()
    model.generation_config.update(top_k=50, suppress_tokens=None)
    Engine(model).close()
    assert not caplog.records
