"""Text as it grows: complete characters only, nothing of a stop string, and in the end the text of all tokens."""

import codecs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from fastft.serving.api.output import LEAST_LOGPROB, Output
from fastft.serving.api.text import Detokenizer, StopStrings

from .fakes import ByteTokenizer
from .server_fixtures import load_tokenizer

TEXTS = [
    "plain words",
    "héllo wörld",
    "价格是 5 €",
    "a😀b👩‍👩‍👧c",
    " leading",
    "trailing ",
    "two\n\nlines\t",
    "\ufffd counts",
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def byte_fallback():
    """As in sentencepiece's models: words begin with ▁, which the first one loses; unknown characters are bytes."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Hello", "▁world"]
    vocabulary = {piece: at for at, piece in enumerate(pieces)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", unk_token="<unk>"), pieces.index


def pieces_of(tokenizer, ids, prompt=()):
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


def whole(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_and_hold_no_half_characters(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == text
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")
    assert len([piece for piece in pieces if piece]) > 1  # it does come in pieces


def test_characters_of_several_tokens_are_held_back(tokenizer):
    ids = tokenizer("a😀b", verbose=False)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    assert len(ids) > 3 and "😀" in pieces and "" in pieces


@given(st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_text(text):
    tokenizer = load_cached()
    ids = tokenizer(text, verbose=False)["input_ids"]
    assert "".join(pieces_of(tokenizer, ids)) == whole(tokenizer, ids)


@given(st.lists(st.integers(0, 2047), max_size=30))
@settings(max_examples=150, deadline=None)
def test_any_tokens(ids):
    tokenizer = load_cached()
    assert "".join(pieces_of(tokenizer, ids)) == whole(tokenizer, ids)


_cached = []


def load_cached():
    if not _cached:
        _cached.append(load_tokenizer())
    return _cached[0]


def test_byte_fallback_and_leading_spaces(byte_fallback):
    tokenizer, at = byte_fallback
    hello, world, euro = at("▁Hello"), at("▁world"), [at("<0xE2>"), at("<0x82>"), at("<0xAC>")]
    assert pieces_of(tokenizer, [hello, world]) == ["Hello", " world", ""]
    assert pieces_of(tokenizer, [world], prompt=[hello]) == [" world", ""]  # a continuation keeps its space
    assert pieces_of(tokenizer, [world, *euro, world]) == ["world", "", "", "€", " world", ""]
    assert pieces_of(tokenizer, [world, *euro[:2]]) == ["world", "", "", "\ufffd\ufffd"]  # never completed
    assert pieces_of(tokenizer, euro[1:], prompt=[hello, euro[0]])[-2:] == ["€", ""]  # begun in the prompt


def test_special_tokens_have_no_text(tokenizer):
    end = tokenizer.eos_token_id
    ids = tokenizer("one")["input_ids"] + [end] + tokenizer(" two")["input_ids"] + [end] * 50
    assert "".join(pieces_of(tokenizer, ids)) == "one two"


def test_a_tokenizers_own_way_to_decode_is_kept(tokenizer):
    class Loud(type(tokenizer)):
        def decode(self, ids, **options):
            return super().decode(ids, **options).upper()

    loud = Loud(tokenizer_object=tokenizer.backend_tokenizer)
    assert "".join(pieces_of(loud, tokenizer("some words")["input_ids"])) == "SOME WORDS"


def test_endless_bytes_are_given_out(tokenizer):
    """A model that only writes halves of characters is not decoded from its start for every token."""
    half = tokenizer("😀", verbose=False)["input_ids"][0]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(half) for _ in range(200)]
    assert len("".join(pieces)) > 150
    assert len(detokenizer._ids) < 80


@pytest.mark.parametrize(
    "pieces,stops,expected",
    [
        (["one ", "two"], ["two"], ["one ", ""]),
        (["one t", "wo three"], ["two"], ["one ", ""]),
        (["a", "b", "c", "d"], ["bcx"], ["a", "", "", "bcd"]),
        (["ab", "ab", "c"], ["ababc"], ["", "", ""]),
        (["aab", "aabaa", "c"], ["aabaac"], ["", "aab", ""]),
        (["x\n", "\n", "y"], ["\n\n"], ["x", "", ""]),
        (["x\n", "y"], ["\n\n"], ["x", "\ny"]),
        (["stop here"], ["here", "op"], ["st"]),
        (["all of it"], [], ["all of it"]),
    ],
)
def test_stop_strings_across_pieces(pieces, stops, expected):
    stopper = StopStrings(stops)
    assert [stopper.push(piece) for piece in pieces] == expected
    assert (stopper.matched in stops) == any(stop in "".join(pieces) for stop in stops)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.randoms())
def test_stop_strings_as_if_the_text_were_whole(text, stops, random):
    stopper, out, at = StopStrings(stops), "", 0
    while at < len(text):
        size = random.randint(1, 4)
        out += stopper.push(text[at : at + size])
        at += size
    out += stopper.flush()
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert out == text[: min(found)[1] if found else len(text)]


def test_tokens_go_out_with_their_text(tokenizer):
    ids = tokenizer("so 😀 STOP never", verbose=False)["input_ids"]
    output, deltas = Output(tokenizer, [], ["STOP"]), []
    for at, token in enumerate(ids):
        deltas.append(output.push(token, -float(at)))
        if deltas[-1].finish_reason:
            break
    text = "".join(delta.text for delta in deltas)
    tokens = [token for delta in deltas for token in delta.tokens]
    assert text == "so 😀 " and deltas[-1].finish_reason == "stop" and output.count == len(deltas) < len(ids)
    assert "".join(token.text for token in tokens).startswith(text) and "STOP" not in "".join(t.text for t in tokens)
    assert [token.logprob for token in tokens] == [-float(at) for at in range(len(tokens))]
    assert all("".join(t.text for t in tokens)[token.offset :].startswith(token.text) for token in tokens)


def test_the_end_gives_out_what_was_held(tokenizer):
    output = Output(tokenizer, [], ["never this"])
    text = "".join(output.push(token).text for token in tokenizer("I never th", verbose=False)["input_ids"])
    last = output.finish("length")
    assert text == "I " and last.text == "never th" and last.finish_reason == "length"


def test_logprobs_are_numbers(tokenizer):
    output = Output(tokenizer, [], [])
    token = tokenizer("word")["input_ids"][0]
    values = [output.push(token, value).tokens[0].logprob for value in (-1.5, float("-inf"), float("nan"))]
    assert values == [-1.5, LEAST_LOGPROB, LEAST_LOGPROB]


@pytest.mark.parametrize("prompt", ["def\ufffd", "\ufffd\ufffd", "a😀", "", "€\ufffd"])
def test_what_the_prompt_ends_with_is_not_repeated(tokenizer, byte_fallback, prompt):
    """U+FFFD is a character like others; only halves of one are what decoders write it for."""
    rest = tokenizer(" x", verbose=False)["input_ids"]
    assert "".join(pieces_of(tokenizer, rest, tokenizer(prompt, verbose=False)["input_ids"])) == " x"
    fallback, at = byte_fallback
    ids = [at("▁Hello"), *(at(f"<0x{byte:02X}>") for byte in prompt.encode())]
    assert "".join(pieces_of(fallback, [at("▁world")], ids)) == " world"


def test_characters_begun_in_the_prompt(tokenizer):
    two = tokenizer("😀👩", verbose=False)["input_ids"]
    other = tokenizer("x")["input_ids"]
    assert len(two) == 8
    for count in range(1, 8):
        begun = "😀👩" if count < 4 else "👩"
        assert "".join(pieces_of(tokenizer, two[count:], two[:count])) == begun
        if count != 4:  # nothing completes it: one character that is none
            assert "".join(pieces_of(tokenizer, other, two[:count])) == "\ufffdx"
            assert pieces_of(tokenizer, [], two[:count]) == [""]


@given(st.lists(st.sampled_from([*"ab€\ufffd😀".encode(), 0x80, 0xE0, 0xF0]), max_size=24), st.integers(0, 24))
@settings(max_examples=300, deadline=None)
def test_any_prompt_of_bytes(data, split):
    """As Python's own decoder does it, which knows what is complete."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(bytes(data[:split]))
    expected = decoder.decode(bytes(data[split:]), final=True) if data[split:] else ""
    assert "".join(pieces_of(ByteTokenizer(), data[split:], data[:split])) == expected


def test_byte_fallback_begun_in_the_prompt(byte_fallback):
    """Its decoder takes a row of bytes for wrong as a whole, whichever of them is."""
    tokenizer, at = byte_fallback
    data = [at(f"<0x{byte:02X}>") for byte in "😀€😀€".encode()]
    for count in range(len(data)):
        said = "😀€😀€".encode()[:count].decode(errors="ignore")
        assert "".join(pieces_of(tokenizer, data[count:], [at("▁Hello"), *data[:count]])) == "😀€😀€"[len(said) :]
