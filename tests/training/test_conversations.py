"""Conversations and completions: which tokens are learnt, the loss of a run by hand, parquet, mistakes."""

import json
import socket
from pathlib import Path
from typing import Any, NoReturn

import pyarrow
import pytest
import torch
from datasets import config
from families import make_model
from pyarrow import parquet
from tiny_checkpoints import save_tokenizer
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ssm_zoo.harness.text_files import read_json_lines_of
from ssm_zoo.training.adapters import load_base, load_tokenizer
from ssm_zoo.training.conversations import encode_examples, read_examples
from ssm_zoo.training.language_model import finetune_language_model
from ssm_zoo.training.packing import IGNORED, PackedDocuments, RowCollator
from ssm_zoo.training.settings import parse_settings
from ssm_zoo.training.texts import read_documents

# What a model is asked with ends in "a "; an answer ends with ".".
TEMPLATE = (
    "{% for message in messages %}{{ 'q ' if message.role == 'user' else 'a ' }}{{ message.content }}. {% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message.role == 'user' %}q {{ message.content }}. {% else %}a "
    "{%- generation %} {{ message.content }}.{% endgeneration %} {% endif %}{% endfor %}"
)
# Drops what an earlier answer thought.
FORGETFUL = (
    "{% for message in messages %}{{ message.role[0] }} {% if loop.last %}{{ message.content }}{% endif %}{% endfor %}"
)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


ROWS = [
    {"messages": turns("hi", "ho", "you", "me and all"), "id": 1},
    {"messages": turns("name", "none")},
    {"messages": turns("count", "one two three four five six seven")},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of characters and a chat template, and rows in both kinds of files."""
    made = tmp_path_factory.mktemp("conversations")
    make_model("mamba2").save_pretrained(made / "model")
    save_tokenizer(made / "model", TEMPLATE)
    (made / "chat.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), made / "chat[1].parquet")
    return made


@pytest.fixture
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder / "model", trust_remote_code=False)


def examples(folder: Path, kind: str, *rows: dict[str, Any]) -> list[Any]:
    path = folder / f"{kind}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return read_examples([str(path)], "train", kind)


def learnt(tokenizer: PreTrainedTokenizerBase, document: tuple[torch.Tensor, torch.Tensor]) -> str:
    """The text of a document with "_" for every token that is not learnt."""
    ids, labels = document
    assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])
    parts = zip(tokenizer.convert_ids_to_tokens(ids.tolist()), labels.tolist(), strict=True)
    return "".join("_" * len(token) if label == IGNORED else token for token, label in parts)


# Which tokens are learnt


def test_every_answer_of_a_conversation_is_learnt(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = examples(tmp_path, "messages", ROWS[0])
    (document,) = encode_examples(rows, tokenizer, progress=False)
    text = tokenizer.apply_chat_template(ROWS[0]["messages"], tokenize=False)
    assert text == "q hi. a ho. q you. a me and all. "
    assert learnt(tokenizer, document) == "________ho. _________me and all. "
    whole: Any = tokenizer.apply_chat_template(ROWS[0]["messages"], return_dict=True)
    assert document[0].tolist() == whole["input_ids"]


def test_a_template_that_marks_answers_is_obeyed(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = MARKED
    (document,) = encode_examples(examples(tmp_path, "messages", ROWS[0]), tokenizer, progress=False)
    assert learnt(tokenizer, document) == "_______ ho._________ me and all._"


def test_a_completion_is_learnt_and_its_end(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = examples(
        tmp_path,
        "prompt_completion",
        {"prompt": "two and ", "completion": "two"},
        {"prompt": "", "completion": "all"},
        {"prompt": turns("hi", "ho", "you"), "completion": [{"role": "assistant", "content": "me"}]},
    )
    documents = encode_examples(rows, tokenizer, progress=False)
    found = [learnt(tokenizer, document) for document in documents]
    assert found == ["________two</s>", "all</s>", "_____________________me. "]


def test_a_token_over_the_border_is_learnt_if_it_ends_in_the_answer(tmp_path: Path) -> None:
    vocabulary = {"</s>": 0, "a": 1, "b": 2, "c": 3, "ab": 4}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    rows = examples(tmp_path, "prompt_completion", {"prompt": "ca", "completion": "bc"})
    (document,) = encode_examples(rows, tokenizer, progress=False)
    assert learnt(tokenizer, document) == "_abc</s>"


# Rows of a training


def test_a_packed_row_keeps_the_labels_and_pieces_without_an_answer_are_left_out() -> None:
    ids = torch.arange(10, 30)
    labels = ids.clone()
    labels[:12] = IGNORED
    rows = PackedDocuments([(ids, labels), (ids[:4], ids[:4])], 8)
    # Pieces 10 to 17, 17 to 24 and 24 to 29; the first has no answer, and of the second 22 to 24.
    batch = RowCollator()([rows[index] for index in range(len(rows))])
    kept = batch["labels"]
    assert sorted(kept[kept != IGNORED].tolist()) == [11, 12, 13, *range(22, 30)]
    assert (rows.tokens, rows.targets) == (8 + 6 + 4, 3 + 5 + 3)


@pytest.mark.parametrize("name", ["chat.jsonl", "chat[1].parquet"])
def test_the_loss_of_a_run_is_that_of_the_answers_by_hand(folder: Path, tmp_path: Path, name: str) -> None:
    values = {
        "model": str(folder / "model"),
        "train": [str(folder / name)],
        "heldout": [str(folder / name)],
        "examples": "messages",
        "row_tokens": 24,
        "batch_size": 2,
        "steps": 4,
        "learning_rate": 1e-2,
        "method": "full",
    }
    settings = parse_settings(values)
    report = finetune_language_model(settings, tmp_path / "run")
    model: Any = load_base(settings).eval()
    tokenizer = load_tokenizer(settings)
    total = targets = 0.0
    for row in ROWS:
        text, answers, end = "", [], 0
        for message in row["messages"]:
            text += f"{'q' if message['role'] == 'user' else 'a'} {message['content']}. "
            start, end = end, len(text)
            if message["role"] == "assistant":
                answers += range(start + len("a "), end)
        ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(text)))  # a token a character
        # A row of 24 tokens begins with the last token of the one before.
        for cut in range(0, len(ids) - 1, 23):
            wanted = [place for place in answers if cut < place < min(cut + 24, len(ids))]
            if wanted:
                with torch.no_grad():
                    scores = model(input_ids=ids[None, cut : cut + 24]).logits[0].double().log_softmax(-1)
                total -= sum(float(scores[place - cut - 1, ids[place]]) for place in wanted)
                targets += len(wanted)
    before, after = report["evaluations"]
    assert (before["tokens"], before["loss"]) == (targets, pytest.approx(total / targets, abs=1e-5))
    assert after["loss"] < before["loss"] - 0.1
    assert report["settings"]["examples"] == "messages"
    assert report["history"][-1]["tokens"] > 0


def test_a_run_on_text_is_recognised_by_what_earlier_versions_wrote() -> None:
    values = {"model": "m", "train": ["a.txt"], "heldout": ["b.txt"]}
    assert "examples" not in parse_settings(values).identity
    assert parse_settings({**values, "examples": "messages"}).identity["examples"] == "messages"


# Sources


def test_a_local_file_is_read_without_the_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "three"}]), folder / "text.parquet")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", folder / "cache")
    sources = [f"datasets:{folder / 'data'},train", str(folder / "text.parquet")]
    assert read_documents(sources, "train") == ["one", "two", "three"]
    both = (read_examples([str(folder / name)], "train", "messages") for name in ("chat.jsonl", "chat[1].parquet"))
    ours, theirs = ([example.completion for example in found] for found in both)
    assert ours == theirs == [row["messages"] for row in ROWS]


MISTAKES: list[Any] = [
    pytest.param("messages", {"text": "a"}, "`messages` is missing; the row has 'text'", id="no-messages"),
    pytest.param(
        "messages", {"messages": "a"}, "`messages` must be a non-empty list of messages, got 'a'", id="no-list"
    ),
    pytest.param(
        "messages", {"messages": []}, r"`messages` must be a non-empty list of messages, got \[\]", id="empty"
    ),
    pytest.param("messages", {"messages": ["a"]}, "`messages.0` must be an object, got 'a'", id="no-object"),
    pytest.param("messages", {"messages": [{"role": "user"}]}, "`messages.0.content` is missing", id="no-content"),
    pytest.param(
        "messages", {"messages": [{"role": "user", "content": 5}]}, "`messages.0.content` must be a text, got 5", id="5"
    ),
    pytest.param(
        "messages", {"messages": turns("a")}, "`messages` must have a message of the role 'assistant'", id="no-answer"
    ),
    pytest.param("prompt_completion", {"prompt": "a"}, "`completion` is missing; the row has 'prompt'", id="half"),
    pytest.param("prompt_completion", {"prompt": 1, "completion": "a"}, "`prompt` must be a text, got 1", id="number"),
    pytest.param(
        "prompt_completion", {"prompt": "a", "completion": ""}, "`completion` must not be empty", id="nothing"
    ),
    pytest.param(
        "prompt_completion",
        {"prompt": turns("a"), "completion": "b"},
        "`completion` must be a non-empty list",
        id="mixed",
    ),
    pytest.param(
        "prompt_completion",
        {"prompt": turns("a"), "completion": turns("b")},
        "`completion` must have a message of the role 'assistant'",
        id="no-completion",
    ),
    pytest.param(
        "messages", {"messages": turns("a", "")}, "`messages.1.content` must not be empty in an answer", id="no-words"
    ),
]
RIGHT = {"messages": ROWS[0], "prompt_completion": {"prompt": "a", "completion": "b"}}


@pytest.mark.parametrize(("kind", "row", "message"), MISTAKES)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_mistake_is_named_with_its_file_row_and_field(
    tmp_path: Path, kind: str, row: dict[str, Any], message: str, suffix: str
) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, (RIGHT[kind], row))))
        place = "line 2"
    else:  # whose columns have one type
        parquet.write_table(pyarrow.Table.from_pylist([row]), path)
        place = "row 1"
    with pytest.raises(ValueError, match=f"train: '.*rows{suffix}', {place}: {message}"):
        read_examples([str(path)], "train", kind)


def test_what_a_tokenizer_or_its_template_cannot_do_is_said(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = examples(tmp_path, "messages", ROWS[0])
    for template, message in (
        (None, "model: the tokenizer has no chat template, which train: '.*', line 1 needs"),
        (FORGETFUL, "line 1: `messages.1`: the tokenizer's chat template renders a message differently"),
        ("{{ raise_exception('no') }}", "line 1: the tokenizer's chat template does not accept the messages: no"),
        ("{{ 1 + messages[0].content }}", "line 1: the tokenizer's chat template does not accept the messages: unsup"),
        ("{% generation %}{{ messages.x.y }}{% endgeneration %}", "template does not accept the messages: .* no attr"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=message):
            encode_examples(rows, tokenizer, progress=False)


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
@pytest.mark.parametrize("role", ["human", " "])
def test_roles_that_a_template_would_drop_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, template: str, role: str
) -> None:
    tokenizer.chat_template = template
    answer = {"role": "assistant", "content": "ho"}
    rows = examples(tmp_path, "messages", {"messages": [{"role": role, "content": "hi"}, answer]})
    with pytest.raises(ValueError, match=rf"line 1: `messages.0.role` must be 'system', .* names, got '{role}'\."):
        encode_examples(rows, tokenizer, progress=False)
    rows = examples(tmp_path, "prompt_completion", {"prompt": [{"role": role, "content": "a"}], "completion": [answer]})
    with pytest.raises(ValueError, match=rf"line 1: `prompt.0.role` must be 'system', .* names, got '{role}'\."):
        encode_examples(rows, tokenizer, progress=False)
    if role.strip():
        tokenizer.chat_template = template.replace("'user'", f"'{role}'")
        assert encode_examples(rows, tokenizer, progress=False)


def test_a_conversation_that_begins_with_an_answer_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = examples(tmp_path, "messages", {"messages": [{"role": "assistant", "content": "ho"}]})
    tokenizer.chat_template = "{% if not messages %}{{ raise_exception('none') }}{% endif %}" + TEMPLATE
    with pytest.raises(ValueError, match=r"line 1: `messages.0` is an answer to nothing, .* Begin with a message of"):
        encode_examples(rows, tokenizer, progress=False)


def test_sources_and_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`train` must be a \.jsonl or \.parquet file, .* with examples 'messages', got 'a\.txt'"
    ):
        read_examples(["a.txt"], "train", "messages")
    (tmp_path / "bad.parquet").write_bytes(b"nothing of the sort")
    with pytest.raises(ValueError, match=r"train: '.*bad\.parquet' cannot be read as parquet"):
        read_examples([str(tmp_path / "bad.parquet")], "train", "messages")
    (tmp_path / "latin.jsonl").write_bytes(b'\xef\xbb\xbf{"messages": 1}\n' + '"caf\u00e9"\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.jsonl', line 1: `messages` must be a non-empty list"):
        read_examples([str(tmp_path / "latin.jsonl")], "train", "messages")
    with pytest.raises(ValueError, match=r"train: '.*latin\.jsonl' is not UTF-8 text \(byte 23: "):
        list(read_json_lines_of(tmp_path / "latin.jsonl", "train"))
    with pytest.raises(ValueError, match=r"train: there is no file 'none\.parquet'"):
        read_examples(["none.parquet"], "train", "messages")
    values = {"model": "m", "train": ["a.jsonl"], "heldout": ["b.jsonl"], "examples": "messages"}
    with pytest.raises(ValueError, match=r"^`separator` has no effect with examples 'messages', got 'x'$"):
        parse_settings({**values, "separator": "x"})
    with pytest.raises(ValueError, match=r"^`text_field` has no effect with examples 'messages', got 'x'$"):
        parse_settings({**values, "text_field": "x"})
