"""An engine that starts gives the model's own answers: the trial before its first request, on models of many kinds."""

import pytest
import torch

from fastft.cli import serve
from fastft.cli.loading import UserError
from fastft.cli.serve_config import ServeConfig
from fastft.serving import Engine, trial
from tests.serving.tiny import llama, prompt, redraw, transformers

SMALL = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def made(kind, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind.removesuffix('LMHead')}Config")(pad_token_id=0, **{**SMALL, **options})
    return redraw(getattr(transformers, f"{kind}Model" if kind.endswith("LMHead") else f"{kind}ForCausalLM")(config).eval())


def test_models_whose_answers_would_be_wrong_are_refused():
    bart = {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96}
    for model in (made("Bart", **bart), made("BertLMHead"), made("DiffLlama", num_key_value_heads=2)):
        attention = model.config._attn_implementation
        engine = Engine(model)
        with pytest.raises(ValueError, match=f"{type(model).__name__} can't be served: log-probabilities .* off by up to"):
            engine.start()
        assert model.config._attn_implementation == attention
        engine.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_wrong_positions_show_where_the_likeliest_token_is_always_the_same(dtype):
    """PLBart counts positions by itself, among embeddings 8 times as large: it says one word again and again."""
    sizes = {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96}
    model = made("PLBart", is_decoder=True, is_encoder_decoder=False, max_position_embeddings=256, **sizes).to(dtype)
    with (
        pytest.raises(ValueError, match="PLBartForCausalLM can't be served: log-probabilities .* off by up to"),
        Engine(model),
    ):
        pass


def test_a_model_that_sees_what_comes_later_is_refused_and_not_if_it_does_not():
    """RoCBert's small difference between both, against none."""
    with pytest.raises(ValueError, match="RoCBertForCausalLM can't be served: log-probabilities .* off by up to"):
        Engine(made("RoCBert", is_decoder=False)).start()
    with Engine(made("RoCBert", is_decoder=True)) as engine:
        assert engine.generate([prompt(5, 1)], max_tokens=2)[0].tokens


def test_layers_with_a_state_are_refused():
    mamba = made("Mamba", state_size=8)
    with pytest.raises(ValueError, match="MambaForCausalLM has layers of the types linear_attention, whose state"):
        Engine(mamba)
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_heads": 4, "num_hidden_layers": 2}
    xlstm = transformers.xLSTMForCausalLM(transformers.xLSTMConfig(**sizes))
    with pytest.raises(ValueError, match="xLSTMForCausalLM has no num_attention_heads"):
        Engine(xlstm)


def test_a_model_that_fails_is_refused():
    model = llama()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="can't be served, a trial request failed: .*finite"), Engine(model):
        pass
    heads = {"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16}
    sizes = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    for model in (made("MiniCPM3", **heads, **sizes), made("StableLm", num_key_value_heads=2)):
        with pytest.raises(ValueError, match="a trial request failed"), Engine(model):
            pass


def test_nothing_of_it_is_counted_and_it_is_made_once(monkeypatch):
    runs = []
    monkeypatch.setattr(trial, "run", lambda *args, run=trial.run: runs.append(args) or run(*args))
    engine = Engine(llama())
    with engine:
        stats = engine.stats()
        assert stats["steps_total"] == stats["tokens_total"] == stats["longest_wait_seconds"] == 0
        engine.stop()
        engine.start()
        assert engine.generate([prompt(5, 1)], max_tokens=1)[0].tokens and [len(answers) for _, answers, _ in runs] == [4, 0]


def test_it_can_be_left_out():
    model = made("BertLMHead")
    with Engine(model, trial=False) as engine:
        assert len(engine.generate([prompt(5, 1)], max_tokens=2)[0].tokens) == 2


@pytest.mark.parametrize("dtype, right", [(torch.float32, 0), (torch.float16, 1), (torch.bfloat16, 1)])
def test_a_few_answers_may_be_off_by_chance(dtype, right):
    """Of 16-bit models one of four (an expert chosen otherwise), but not two; of others a token or so."""
    model = llama(dtype=dtype)
    answers = trial.expected(model, 256)

    def alter(answer, tokens):
        for i in range(tokens):
            answer.logprobs[i, answer.tokens[i]] -= 5

    with Engine(model, trial=False) as engine:
        start = lambda request: engine._enqueue(request, engine._manager)  # noqa: E731
        for answer in answers[:right]:
            alter(answer, 4)
        alter(answers[right], 3)
        trial.run(model, answers, start)
        answers[right].logprobs[3, answers[right].tokens[3]] -= 5
        with pytest.raises(ValueError, match="off by up to .* of 16 by more than rounding"):
            trial.run(model, answers, start)


def test_float32_whose_products_are_coarser_may_round_as_they_do():
    model, products = llama(), torch.backends.mkldnn.matmul
    before = products.fp32_precision
    assert trial._unit(model) == torch.finfo(torch.float32).eps
    try:
        for precision, like in (("tf32", torch.float16), ("bf16", torch.bfloat16), ("ieee", torch.float32)):
            products.fp32_precision = precision
            assert trial._unit(model) == torch.finfo(like).eps
    finally:
        products.fp32_precision = before
    model.hf_quantizer = object()
    assert trial._unit(model) == torch.finfo(torch.bfloat16).eps


def test_the_command_says_it_in_a_line(monkeypatch):
    model = made("BertLMHead")
    monkeypatch.setattr(serve, "load", lambda *_, **__: None)
    monkeypatch.setattr(serve, "load_base", lambda *_, **__: model)
    with pytest.raises(UserError, match=r"(?s)can't be started: BertLMHeadModel.*--no-trial"):
        serve.start_engine(ServeConfig("/tmp", device="cpu"), "base")
    engine, _ = serve.start_engine(ServeConfig("/tmp", device="cpu", no_trial=True), "base")
    engine.close()
