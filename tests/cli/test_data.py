import pytest
import torch
import transformers

from fastft.cli.data import IGNORED, Record, Tokenized, check_fit, read_jsonl, split, tokenize
from fastft.cli.errors import UserError

from .conftest import TOKENIZER


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


def learned(row, tokenizer):
    return tokenizer.decode([token for token in row["labels"] if token != IGNORED])


def test_text_learns_all_but_the_first_token(write_jsonl, tokenizer):
    tokenized = tokenize(read_jsonl(write_jsonl({"text": "def f(x): pass", "id": 3})), tokenizer, 64)
    (row,) = tokenized.rows
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]] and learned(row, tokenizer) == " f(x): pass<|endoftext|>"
    assert tokenized.notes == ["1 text examples, loss on all tokens", "keys that are not read: id"]


def test_completion_learns_the_completion(write_jsonl, tokenizer):
    (row,) = tokenize(read_jsonl(write_jsonl({"prompt": "2 + 2 =", "completion": " 4"})), tokenizer, 64).rows
    assert tokenizer.decode(row["input_ids"]) == "2 + 2 = 4<|endoftext|>"
    assert learned(row, tokenizer) == " 4<|endoftext|>"


def byte_level(**options):
    """The demo's tokenizer with other options, or with what it adds to a text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    added = options.pop("adds", None)
    other = AutoTokenizer.from_pretrained(TOKENIZER, **options)
    if added:
        special = [(other.eos_token, other.eos_token_id)]
        other.backend_tokenizer.post_processor = TemplateProcessing(
            single=added.replace("E", other.eos_token), special_tokens=special
        )
    return other


def spaced(merges=()):
    """One like SentencePiece's: a text begins with a space, and each character is a token but for what is merged."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["</s>", "\u2581", *"xabc:", *map("".join, merges)]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, list(merges)))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def completion(write_jsonl, tokenizer, prompt, text):
    """(tokens, those of them that are learned, notes) of one example."""
    found = tokenize(read_jsonl(write_jsonl({"prompt": prompt, "completion": text})), tokenizer, 64)
    (row,) = found.rows
    learned = [token for token in row["labels"] if token != IGNORED]
    assert row["labels"][len(row["labels"]) - len(learned) :] == learned
    return *(tokenizer.convert_ids_to_tokens(ids) for ids in (row["input_ids"], learned)), found.notes


def test_a_completion_is_tokenized_as_it_follows_its_prompt(write_jsonl):
    ids, learned, notes = completion(write_jsonl, spaced(), "a:", "bc")
    assert ids == ["\u2581", "a", ":", "b", "c", "</s>"] and learned == ["b", "c", "</s>"]
    assert notes == ["1 prompt/completion examples, loss on the completion"]
    ids, learned, notes = completion(write_jsonl, spaced([("a", "b")]), "xa", "bc")
    assert ids == ["\u2581", "x", "ab", "c", "</s>"] and learned == ["c", "</s>"]
    assert notes[0].endswith(
        "loss on the completion but for its first token, which begins in the prompt (move a space at the prompt's end)"
    )
    ids, learned, notes = completion(write_jsonl, spaced([("a", "b"), (":", "a")]), "x:a", "bc")  # the first merge wins
    assert ids == ["\u2581", "x", ":", "ab", "c", "</s>"] and learned == ["c", "</s>"]


@pytest.mark.parametrize("adds", [None, "$A E", "E $A"])
def test_only_what_the_tokenizer_closes_a_prompt_with_is_taken_off(adds, write_jsonl):
    tokenizer = byte_level(adds=adds)
    end = tokenizer.eos_token
    begins = [end] if adds == "E $A" else []
    ids, learned, _ = completion(write_jsonl, tokenizer, f"Hi{end}", "Yes")
    assert ids[: len(begins)] == begins and "".join(ids[len(begins) :]) == f"Hi{end}Yes{end}"
    assert "".join(learned) == f"Yes{end}"
    ids, learned, _ = completion(write_jsonl, tokenizer, "", f"Yes{end}")
    assert ids[: len(begins)] == begins and "".join(ids) == "".join(begins) + f"Yes{end}"
    ids, learned, _ = completion(write_jsonl, tokenizer, "Hi", " there")
    assert "".join(learned) == f"\u0120there{end}"


CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you"},
    ]
}


def test_messages_learn_marked_assistant_turns(write_jsonl, tokenizer):
    tokenized = tokenize(read_jsonl(write_jsonl(CHAT)), tokenizer, 64)
    assert learned(tokenized.rows[0], tokenizer) == "Hello<|endoftext|>See you<|endoftext|>"
    assert tokenized.notes == ["1 messages examples, loss on assistant turns"]


def test_tools_are_the_templates(write_jsonl, tokenizer):
    other = type(tokenizer).from_pretrained(TOKENIZER)
    records = read_jsonl(write_jsonl({**CHAT, "tools": [{"name": "clock"}]}))
    other.chat_template = "{{ tools[0]['name'] }}: {{ messages[2]['content'] }}"
    tokenized = tokenize(records, other, 64)
    assert other.decode(tokenized.rows[0]["input_ids"]) == "clock: Hello" and len(tokenized.notes) == 1
    assert "keys that are not read: tools" in tokenize(records, tokenizer, 64).notes


def test_several_chat_templates(write_jsonl, tokenizer):
    both = byte_level()
    both.chat_template = {
        "default": tokenizer.chat_template,
        "tool_use": "{{ tools[0]['name'] }}: {{ messages[2]['content'] }}",
    }
    tokenized = tokenize(read_jsonl(write_jsonl(CHAT, {**CHAT, "tools": [{"name": "clock"}]})), both, 64)
    assert learned(tokenized.rows[0], both) == "Hello<|endoftext|>See you<|endoftext|>"
    assert both.decode(tokenized.rows[1]["input_ids"]) == "clock: Hello"
    assert tokenized.notes == [
        "1 messages examples, loss on assistant turns",
        "1 messages examples, loss on the whole conversation (the chat template marks no turns)",
    ]


def weighted(*weights):
    turns = iter(weights)
    return {"messages": [m | {"weight": next(turns)} if m["role"] == "assistant" else m for m in CHAT["messages"]]}


def test_turns_of_weight_0_have_no_loss(write_jsonl, tokenizer):
    lines = [weighted(0, 1), weighted(1, 0), weighted(0, None), weighted(0, 0)]
    tokenized = tokenize(read_jsonl(write_jsonl(*lines)), tokenizer, 64)
    first, last = "Hello<|endoftext|>", "See you<|endoftext|>"
    assert [learned(row, tokenizer) for row in tokenized.rows] == [last, first, last]
    assert tokenized.notes[1:] == ["1 examples dropped: no token to learn in the first 64"]
    plain = byte_level()
    plain.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(UserError, match=r"data.jsonl:1: a weight of 0 needs a chat template that marks each"):
        tokenize(read_jsonl(write_jsonl(weighted(0, 1))), plain, 64)
    assert tokenize(read_jsonl(write_jsonl(weighted(1, 1))), plain, 64).rows


def test_keys_of_messages_that_the_template_does_not_read(write_jsonl, tokenizer):
    line = {"messages": [{"role": "user", "content": "a", "name": "Eve"}, {"role": "assistant", "content": "b"}]}
    assert "keys that are not read: messages[].name" in tokenize(read_jsonl(write_jsonl(line)), tokenizer, 64).notes
    named = byte_level()
    named.chat_template = "{% for m in messages %}{{ m.get('name', '') + ': ' + m['content'] }}{% endfor %}"
    assert len(tokenize(read_jsonl(write_jsonl(line)), named, 64).notes) == 1


def test_messages_without_marks_learn_everything_and_say_so(write_jsonl, tokenizer):
    plain = type(tokenizer).from_pretrained(TOKENIZER)
    plain.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    tokenized = tokenize(read_jsonl(write_jsonl(CHAT)), plain, 64)
    assert tokenized.rows[0]["labels"][1:] == tokenized.rows[0]["input_ids"][1:]
    assert "marks no turns" in tokenized.notes[0]


def test_messages_without_template_or_refused(write_jsonl, tokenizer):
    plain = type(tokenizer).from_pretrained(TOKENIZER)
    path = write_jsonl(CHAT)
    plain.chat_template = None
    with pytest.raises(UserError, match=r"data.jsonl:1: messages need a chat template"):
        tokenize(read_jsonl(path), plain, 64)
    plain.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(UserError, match=r"data.jsonl:1: the chat template refuses .* no system turns"):
        tokenize(read_jsonl(path), plain, 64)


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "a"', "data.jsonl:3: not JSON: .* at column 13"),
        (b'{"text": "\xff"}', "data.jsonl:3: not UTF-8"),
        (b'["text"]', "data.jsonl:3: expected an object, got list"),
        ({"txt": "a"}, "data.jsonl:3: expected .* got the keys txt"),
        ({"prompt": "a"}, "data.jsonl:3: expected .* got the keys prompt"),
        ({"text": "a", "prompt": "b", "completion": "c"}, "data.jsonl:3: has the keys of prompt/completion and of text"),
        ({"prompt": "a", "completion": "c", "system": "s"}, "data.jsonl:3: system beside a prompt is not read"),
        ({"text": 3}, "data.jsonl:3: text must be a string, not int"),
        ({"text": ""}, "data.jsonl:3: text is empty"),
        ({"prompt": "a", "completion": ""}, "data.jsonl:3: completion is empty"),
        ({"messages": []}, "data.jsonl:3: messages must be a list"),
        ({"messages": [{"role": "user"}]}, r"data.jsonl:3: messages\[0\] must be"),
        (weighted(0.5, 1), r"data.jsonl:3: messages\[2\].weight must be 0 or 1, and of an assistant turn"),
        (
            {"messages": [{"role": "user", "content": "a", "weight": 0}]},
            r"data.jsonl:3: messages\[0\].weight must be 0 or 1",
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, "data.jsonl:3: messages has no assistant turn"),
        (b'{"text": "a\\ud800b"}', r"data.jsonl:3: text has \\ud800 alone"),
        (b'{"prompt": "a", "completion": "\\udc00"}', r"data.jsonl:3: completion has \\udc00 alone"),
        (
            b'{"messages": [{"role": "assistant", "content": "\\udbff"}]}',
            r"data.jsonl:3: messages\[0\].content has \\udbff alone",
        ),
        (b'{"text": "a", "n": ' + b"1" * 6000 + b"}", "data.jsonl:3: a number has more than .* digits"),
        (b'{"text": ' + b"[" * 100_000, "data.jsonl:3: nested too deeply"),
    ],
)
def test_bad_lines_are_named(write_jsonl, line, message):
    with pytest.raises(UserError, match=message):
        read_jsonl(write_jsonl({"text": "good"}, b"", line))


def test_both_halves_of_a_pair_are_a_character(write_jsonl):
    (record,) = read_jsonl(write_jsonl(b'{"text": "\\ud83d\\ude00"}'))
    assert record.fields["text"] == "\U0001f600"


def test_where_files_are_and_no_records(write_jsonl, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl({"text": "a"})
    assert len(read_jsonl("~/data.jsonl")) == 1
    with pytest.raises(UserError, match="No such file"):
        read_jsonl("nowhere.jsonl")
    with pytest.raises(UserError, match="is empty"):
        read_jsonl(write_jsonl(b"", b"  "))


def test_cutting_and_dropping(write_jsonl, tokenizer):
    path = write_jsonl(
        {"text": "one two three four five six seven eight"},
        {"prompt": "one two three four five six seven eight", "completion": "x"},
    )
    tokenized = tokenize(read_jsonl(path), tokenizer, 6)
    assert [len(row["input_ids"]) for row in tokenized.rows] == [6]
    assert "2 examples cut to 6 tokens" in tokenized.notes and tokenized.notes[-1].startswith("1 examples dropped")
    with pytest.raises(UserError, match="^held out: no example .* raise --max-length"):
        tokenize(read_jsonl(path)[1:], tokenizer, 6, what="held out: ")


def test_packing_keeps_every_token_in_order(write_jsonl, tokenizer):
    records = read_jsonl(write_jsonl(*({"text": f"line {i} of the text"} for i in range(9))))
    apart = tokenize(records, tokenizer, 64)
    packed = tokenize(records, tokenizer, 16, packing=True)
    assert [t for row in packed.rows for t in row["input_ids"]] == [t for row in apart.rows for t in row["input_ids"]]
    assert {len(row["input_ids"]) for row in packed.rows[:-1]} == {16}
    assert all(row["labels"] == [IGNORED, *row["input_ids"][1:]] for row in packed.rows)  # nothing predicts the first


def test_split_is_deterministic_and_disjoint():
    records = [Record(str(i), "text", {"text": "a"}) for i in range(20)]
    train, held_out = split(records, 0.2, seed=3)
    assert (train, held_out) == split(records, 0.2, seed=3) and len(held_out) == 4
    assert sorted(train + held_out, key=lambda r: int(r.place)) == records
    assert split(records, 0.2, seed=4)[1] != held_out
    assert split(records, 0.0, seed=3) == (records, [])
    assert len(split(records[:2], 0.001, seed=3)[1]) == 1
    with pytest.raises(UserError, match="--eval-fraction 0"):
        split(records[:1], 0.5, seed=3)


def test_a_byte_order_mark_is_skipped_and_an_array_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "caf\xc3\xa9"}\n')
    assert [record.fields["text"] for record in read_jsonl(str(path))] == ["café"]
    path.write_text('[{"text": "a"},\n {"text": "b"}]')
    with pytest.raises(UserError, match="is a JSON array; write one object a line"):
        read_jsonl(str(path))


SIZES = {"vocab_size": 50, "max_position_embeddings": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "architecture, config, takes_more",
    [
        ("LlamaForCausalLM", transformers.LlamaConfig(**SIZES, intermediate_size=16), True),
        ("GPT2LMHeadModel", transformers.GPT2Config(**SIZES), False),
        ("OPTForCausalLM", transformers.OPTConfig(**SIZES, ffn_dim=16, word_embed_proj_dim=16), False),
        ("GPTJForCausalLM", transformers.GPTJConfig(**SIZES, rotary_dim=4), False),
    ],
)
def test_rows_that_the_model_cannot_take(architecture, config, takes_more, capsys):
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    good, foreign, long = (Tokenized([{"input_ids": ids, "labels": ids}], []) for ids in ([49] * 8, [0, 50], [1] * 9))
    check_fit(model, good, Tokenized([], []))
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="gives token 50 and the model has embeddings for 50 tokens only"):
        check_fit(model, good, foreign)
    if takes_more:
        check_fit(model, good, long)
        assert "the longest row has 9 tokens, more than the 8 that" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match="a row has 9 tokens and the model positions for 8; give --max-length 8"):
            check_fit(model, good, long)
