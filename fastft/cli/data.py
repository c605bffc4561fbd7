"""Training data as users have it: JSON lines with {"text"}, {"prompt", "completion"} or {"messages"}; tokens and labels."""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
from array import array
from collections import Counter
from dataclasses import dataclass
from typing import Any

from .errors import UserError

SCHEMAS = {"messages": ("messages",), "prompt/completion": ("prompt", "completion"), "text": ("text",)}
HALF = re.compile("[\ud800-\udfff]")  # of a UTF-16 pair
MARK = re.compile(r"\{%-?\s*generation\b")  # of an assistant's turn in a chat template
IGNORED = -100  # a label without loss (torch's cross entropy default)


@dataclass
class Record:
    """One line of the file: where it stands, what it is, what it says."""

    place: str
    schema: str
    fields: dict[str, Any]
    ignored: tuple[str, ...] = ()  # the line's other keys


def read_jsonl(path: str, digest: Any = None) -> list[Record]:
    """Read and check every line of a JSON lines file; empty lines are skipped. `digest` (of hashlib) is fed what is
    read: later the file may have grown, and a pipe can't be read again.

    Raises:
        UserError: no file, no records, or a line (named as file:line) that is not UTF-8, not JSON, of no schema or of two,
            or whose text no tokenizer takes.
    """
    records = []
    try:
        with open(os.path.expanduser(path), "rb") as file:
            for number, line in enumerate(file, 1):
                if digest is not None:
                    digest.update(line)
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if number == 1 and line.lstrip().startswith(b"["):
                    raise UserError(f"data {path} is a JSON array; write one object a line (JSON lines)")
                if line.strip():
                    records.append(_parse(line, f"{path}:{number}"))
    except OSError as error:
        raise UserError(f"data {path}: {error.strerror}") from None
    if not records:
        raise UserError(f"data {path} is empty")
    return records


def _parse(line: bytes, place: str) -> Record:
    try:
        value = json.loads(line.decode("utf-8").rstrip())  # a line break would be where a cut line ends
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{place}: nested too deeply; give an object of strings, or of messages") from None
    except ValueError:  # of Python's own, which reads no integer of more digits
        limit = sys.get_int_max_str_digits()
        raise UserError(f"{place}: a number has more than {limit:,} digits; shorten or quote it") from None
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected an object, got {type(value).__name__}")
    found = [name for name, keys in SCHEMAS.items() if all(key in value for key in keys)]
    wanted = '{"text"}, {"prompt", "completion"} or {"messages"}'
    if not found:
        raise UserError(f"{place}: expected {wanted}, got the keys {', '.join(value) or 'none'}")
    if len(found) > 1:
        raise UserError(f"{place}: has the keys of {' and of '.join(found)}; keep one of {wanted}")
    schema = found[0]
    if schema == "prompt/completion" and "system" in value:
        raise UserError(f"{place}: system beside a prompt is not read; write messages, or its text into the prompt")
    fields = {key: value[key] for key in SCHEMAS[schema]}
    if schema == "messages":
        _check_messages(fields["messages"], place)
        if "tools" in value:
            fields["tools"] = value["tools"]
    else:
        for key, text in fields.items():
            if not isinstance(text, str):
                raise UserError(f"{place}: {key} must be a string, not {type(text).__name__}")
            if not text and key != "prompt":
                raise UserError(f"{place}: {key} is empty")
            _check_text(text, key, place)
    return Record(place, schema, fields, tuple(key for key in value if key not in fields))


def _check_messages(messages: Any, place: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{place}: messages must be a list with at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UserError(f'{place}: messages[{i}] must be {{"role": string, "content": string}}')
        # Of OpenAI's files: 0 means no loss on this turn.
        if message.get("weight") is not None and (message["role"] != "assistant" or message["weight"] not in (0, 1)):
            raise UserError(f"{place}: messages[{i}].weight must be 0 or 1, and of an assistant turn")
        for key, text in message.items():
            if isinstance(text, str):
                _check_text(text, f"messages[{i}].{key}", place)
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{place}: messages has no assistant turn to learn from")


def _check_text(text: str, what: str, place: str) -> None:
    """JSON can escape one half of a UTF-16 pair alone, which is no character: tokenizers refuse it without saying where."""
    if half := HALF.search(text):
        raise UserError(f"{place}: {what} has \\u{ord(half[0]):04x} alone, which is no character; give both halves")


def split(records: list[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(train, held out): at least one record each, chosen by `seed` alone, both in the file's order."""
    if fraction == 0:
        return records, []
    if len(records) < 2:
        raise UserError(f"data has {len(records)} record, so nothing can be held out; give --eval-data or --eval-fraction 0")
    count = min(max(1, round(len(records) * fraction)), len(records) - 1)
    chosen = set(random.Random(seed).sample(range(len(records)), count))
    return [r for i, r in enumerate(records) if i not in chosen], [records[i] for i in sorted(chosen)]


@dataclass
class Tokenized:
    """`rows`: {"input_ids", "labels"}, lists of equal length ≤ max_length. `notes`: what the user should know about them."""

    rows: list[dict[str, list[int]]]
    notes: list[str]

    @property
    def tokens(self) -> int:
        return sum(len(row["input_ids"]) for row in self.rows)

    def digest(self) -> str:
        """Of all ids and labels."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(array("i", [len(row["input_ids"]), *row["input_ids"], *row["labels"]]).tobytes())
        return digest.hexdigest()


def tokenize(records: list[Record], tokenizer: Any, max_length: int, packing: bool = False, what: str = "") -> Tokenized:
    """Token ids and labels of every record: all tokens of a text, the completion only, or the assistant's turns.

    Every example ends in the end-of-text token (chat templates write their own). With `packing`, examples follow one another
    in rows of exactly `max_length` (the last may be shorter). Errors begin with `what`.

    Raises:
        UserError: messages without a chat template, a template that refuses a record, or no record with a token to learn.
    """
    encode = {"text": _encode_text, "prompt/completion": _encode_completion, "messages": _encode_messages}
    rows, cut, empty, covers = [], 0, 0, Counter()
    for record in records:
        ids, labels, covered = encode[record.schema](record, tokenizer)
        covers[record.schema, covered] += 1
        if len(ids) > max_length and not packing:
            cut += 1
            ids, labels = ids[:max_length], labels[:max_length]
        # The first label has nothing before it to be predicted from.
        if any(label != IGNORED for label in labels[1:]):
            rows.append({"input_ids": ids, "labels": labels})
        else:
            empty += 1
    order = list(SCHEMAS)
    covers = sorted(covers.items(), key=lambda item: order.index(item[0][0]))
    notes = [f"{n} {name} examples, loss on {covered}" for (name, covered), n in covers]
    ignored = {key for record in records for key in _ignored(record, tokenizer)}
    if ignored:
        notes.append(f"keys that are not read: {', '.join(sorted(ignored)[:5])}{' ...' if len(ignored) > 5 else ''}")
    if cut:
        notes.append(f"{cut} examples cut to {max_length} tokens")
    if empty:
        notes.append(f"{empty} examples dropped: no token to learn in the first {max_length}")
    if not rows:
        raise UserError(f"{what}no example has a token to learn in its first {max_length} tokens; raise --max-length")
    rows = _pack(rows, max_length) if packing else rows
    for row in rows:  # nothing predicts it, and Trainer would count it in the mean for models whose loss it can't look into
        row["labels"][0] = IGNORED
    return Tokenized(rows, notes)


def check_fit(model: Any, *sets: Tokenized) -> None:
    """Notes rows longer than the model was made for, where it takes them.

    Raises:
        UserError: a token without an embedding, or a row longer than a table of positions: both would stop the training.
    """
    import torch

    rows = [row["input_ids"] for one in sets for row in one.rows]
    embeddings = model.get_input_embeddings()
    if (largest := max(map(max, rows))) >= embeddings.num_embeddings:
        raise UserError(
            f"the tokenizer gives token {largest} and the model has embeddings for {embeddings.num_embeddings} tokens only; "
            "give a model together with its own tokenizer"
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if (longest := max(map(len, rows))) <= limit:
        return
    # Learned positions, of which OPT has two more than it uses, or GPT-J's computed ones: rotary ones go on without end.
    others = (module for module in model.modules() if isinstance(module, torch.nn.Embedding) and module is not embeddings)
    if any(limit <= module.num_embeddings <= limit + 2 for module in others) or any(
        name.endswith("embed_positions") for name, _ in model.named_buffers()
    ):
        raise UserError(f"a row has {longest} tokens and the model positions for {limit}; give --max-length {limit}")
    print(f"note: the longest row has {longest} tokens, more than the {limit} that the model was made for")


def _ignored(record: Record, tokenizer: Any) -> set[str]:
    """The keys of a line, and of its messages, that nothing reads."""
    ignored = set(record.ignored)
    if record.schema == "messages":
        template = _template(record, tokenizer)
        if record.fields.get("tools") and "tools" not in template:
            ignored.add("tools")
        keys = {key for message in record.fields["messages"] for key in message} - {"role", "content", "weight"}
        ignored |= {f"messages[].{key}" for key in keys if key not in template}
    return ignored


def _template(record: Record, tokenizer: Any) -> str:
    """The chat template of these messages: some tokenizers have another one for tools."""
    return tokenizer.get_chat_template(tools=record.fields.get("tools"))


# Of a record: its ids, their labels, and what has a loss, in words.
Encoded = tuple[list[int], list[int], str]


def _encode_text(record: Record, tokenizer: Any) -> Encoded:
    ids = _with_end(tokenizer(record.fields["text"], verbose=False)["input_ids"], tokenizer)
    return ids, list(ids), "all tokens"


def _encode_completion(record: Record, tokenizer: Any) -> Encoded:
    """Both are tokenized as the one text that they are: many tokenizers put a space before what they are given."""
    prompt, text = record.fields["prompt"], record.fields["prompt"] + record.fields["completion"]
    both = tokenizer(text, verbose=False, return_special_tokens_mask=True, return_offsets_mapping=tokenizer.is_fast)
    ids, added = both["input_ids"], both["special_tokens_mask"]
    closing = 0  # what the tokenizer itself closes a text with
    while closing < len(ids) and added[-1 - closing]:
        closing += 1
    ids = ids[: len(ids) - closing]
    alone = tokenizer(prompt, verbose=False)["input_ids"]
    alone = alone[: len(alone) - closing]
    begin, covered = len(alone), "the completion"
    if ids[:begin] != alone and tokenizer.is_fast:
        spans = both["offset_mapping"][: len(ids)]
        begin = next((i for i, (start, _) in enumerate(spans) if not added[i] and start >= len(prompt)), len(ids))
        if begin and spans[begin - 1][1] > len(prompt):
            covered += " but for its first token, which begins in the prompt (move a space at the prompt's end)"
    elif ids[:begin] != alone:
        begin = next((i for i, (one, other) in enumerate(zip(ids, alone)) if one != other), min(len(ids), begin) - 1) + 1
    ids = _with_end(ids, tokenizer)
    return ids, [IGNORED] * begin + ids[begin:], covered


def _encode_messages(record: Record, tokenizer: Any) -> Encoded:
    if not tokenizer.chat_template:
        raise UserError(
            f"{record.place}: messages need a chat template, and this model's tokenizer has none; "
            "use an instruct model or prompt/completion"
        )
    try:
        marked = MARK.search(_template(record, tokenizer)) is not None
        encoded = tokenizer.apply_chat_template(
            record.fields["messages"],
            tools=record.fields.get("tools"),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=marked,
            tokenizer_kwargs={"verbose": False},
        )
    except Exception as error:  # a template is a program and raises what it likes
        raise UserError(f"{record.place}: the chat template refuses these messages: {error}") from error
    ids = encoded["input_ids"]
    learn = encoded["assistant_masks"] if marked else [1] * len(ids)
    weights = [message.get("weight") for message in record.fields["messages"] if message["role"] == "assistant"]
    if 0 in weights:
        learn = _weighted(learn if marked else [], weights, record.place)
    labels = [token if keep else IGNORED for token, keep in zip(ids, learn)]
    return ids, labels, "assistant turns" if marked else "the whole conversation (the chat template marks no turns)"


def _weighted(learn: list[int], weights: list[Any], place: str) -> list[int]:
    """The mask without the turns of weight 0. Raises UserError if its runs are not the turns."""
    begins = [keep and not before for keep, before in zip(learn, [0, *learn])]
    if sum(begins) != len(weights):
        raise UserError(
            f"{place}: a weight of 0 needs a chat template that marks each assistant turn ({{% generation %}}), and this "
            "model's does not; leave such lines out, or add the marks to the template in the model's folder"
        )
    turns = itertools.accumulate(begins)
    return [keep and weights[turn - 1] != 0 for keep, turn in zip(learn, turns)]


def _with_end(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _pack(rows: list[dict[str, list[int]]], length: int) -> list[dict[str, list[int]]]:
    streams = {key: [token for row in rows for token in row[key]] for key in ("input_ids", "labels")}
    starts = range(0, len(streams["input_ids"]), length)
    packed = [{key: stream[i : i + length] for key, stream in streams.items()} for i in starts]
    return [row for row in packed if any(label != IGNORED for label in row["labels"][1:])]
