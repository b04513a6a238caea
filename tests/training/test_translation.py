"""Training to translate: rows and losses by hand, tokenizers, schedules, and whole runs of tiny models."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import VOCAB, make_encoder_decoder, make_model
from peft import PeftModel
from safetensors.torch import load_file
from tiny_checkpoints import save_tokenizer
from tiny_trainings import stop_in
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ssm_zoo.evaluation.translation import translate
from ssm_zoo.evaluation.translation_format import TranslationFormat, translation_format
from ssm_zoo.training.heldout import heldout_loss
from ssm_zoo.training.packing import RowCollator
from ssm_zoo.training.parallel_text import ParallelText
from ssm_zoo.training.residual_dropout import add_residual_dropout
from ssm_zoo.training.translation import finetune_translation
from ssm_zoo.training.translation_data import (
    PackedPairCollator,
    PackedPairs,
    make_translation_rows,
)
from ssm_zoo.training.translation_settings import parse_translation_settings
from ssm_zoo.training.translation_tokenizer import fit_embeddings, learn_joint_vocabulary, set_separator
from ssm_zoo.training.translation_trainer import smoothed_loss

TEXTS = ParallelText(
    ["ab cd", "e", "fgh i", "abc", "cd cd cd", "ef"], ["ba dc", "e", "hgf i", "cba", "dc dc dc", "fe"], [6]
)
REQUIRED = {"model": "zoo", "train": ["t.tsv"], "heldout": ["t.tsv"]}
NEW = {"train_tokenizer": 262, "steps": 3, "max_tokens": 60, "row_tokens": 150, "batch_size": 2}
BYTES = {**NEW, "train_tokenizer": 260}
# Of bytes, the longest pair has 8 and 8 tokens, with separator or end 9 and 9, in one sequence 18.
BOUNDED = (
    "hidden_size: 16\nintermediate_size: 16\nnum_hidden_layers: 1\nnum_attention_heads: 2\nlearned_positions: true\n"
)
CONFIG = "model_type: zoo_mamba2\nhidden_size: 16\nnum_hidden_layers: 1\nstate_size: 4\nhead_dim: 8\nnum_heads: 4\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model "zoo" with a tokenizer of characters, pairs in "t.tsv", and a configuration."""
    folder = tmp_path_factory.mktemp("translation")
    make_model("mamba2-full").save_pretrained(folder / "zoo")
    save_tokenizer(folder / "zoo")
    pairs = zip(TEXTS.sources, TEXTS.targets, strict=True)
    (folder / "t.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in pairs))
    (folder / "zoo.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def form(folder: Path) -> TranslationFormat:
    tokenizer = AutoTokenizer.from_pretrained(folder / "zoo")
    tokenizer.add_special_tokens({"sep_token": "!"})
    return translation_format(tokenizer, make_model("mamba2").config)


def rows_of(form: TranslationFormat, pairs: ParallelText = TEXTS, vocab_size: int = VOCAB, **changes: Any) -> Any:
    packed = {"row_tokens": 40} if changes.get("packing", True) else {}
    settings = parse_translation_settings({**REQUIRED, "max_tokens": 10, **packed, **changes})
    return make_translation_rows(pairs, form, settings, vocab_size, "train")


def by_hand(model: Any, form: TranslationFormat, epsilon: float = 0.0) -> tuple[Tensor, int]:
    """The sum of the losses of every target token and end, pair by pair without padding, and their number."""
    total, count = torch.zeros(()), 0
    for source, target in zip(*(form.encode(side) for side in (TEXTS.sources, TEXTS.targets)), strict=True):
        ids = [*source, form.after, *target, form.end]
        logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(len(source), len(ids) - 1):  # from the separator on
            probable = logs[place, ids[place + 1]]
            total = total - (1 - epsilon) * probable - epsilon * logs[place].mean()
            count += 1
    return total, count


def test_only_the_target_and_its_end_have_labels(form: TranslationFormat) -> None:
    ids, labels = form.example([5, 6], [7, 8, 9])
    assert ids.tolist() == [5, 6, form.after, 7, 8, 9, form.end]
    assert labels.tolist() == [-100, -100, -100, 7, 8, 9, form.end]
    ids, labels = form.example([5], [7], ends=False)
    assert (ids.tolist(), labels.tolist()) == ([5, form.after, 7], [-100, -100, 7])
    started = replace(form, before=(3,))
    assert started.example([5], [7])[0].tolist() == [3, 5, form.after, 7, form.end]
    both = replace(form, is_encoder_decoder=True, after=form.end)
    ids, labels = both.example([5, 6], [7])
    assert (ids.tolist(), labels.tolist()) == ([5, 6, form.end], [7, form.end])


def test_a_beginning_of_text_that_the_tokenizer_puts_first_is_kept(folder: Path) -> None:
    from tokenizers import processors

    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "zoo")
    tokenizer.add_special_tokens({"sep_token": "!", "bos_token": "?"})
    assert translation_format(tokenizer, make_model("mamba2").config).before == ()
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="? $A", pair="? $A $B", special_tokens=[("?", start)]
    )
    made = translation_format(tokenizer, make_model("mamba2").config)
    assert made.before == (start,) and made.prompt(made.encode(["ab"])[0])[0] == start


@pytest.mark.parametrize("packing", [True, False])
def test_rows_give_the_loss_and_the_gradients_of_separate_pairs(form: TranslationFormat, packing: bool) -> None:
    rows = rows_of(form, packing=packing)
    model: Any = make_model("mamba2-full").train()
    expected, count = by_hand(model, form)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert rows.rows.targets == count and len(rows) == (2 if packing else 6)
    total = torch.zeros(())
    for start in range(0, len(rows), 2):
        batch = RowCollator()([rows.rows[index] for index in range(start, start + 2)])
        total = total + model(**batch, num_items_in_batch=1).loss
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    total.backward()
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-4)
    held = heldout_loss(model, rows.rows, RowCollator(), 2)
    assert held["tokens"] == count and held["loss"] == pytest.approx(expected.item() / count, rel=1e-5)


def test_label_smoothing_is_the_mixture_with_the_uniform_distribution(form: TranslationFormat) -> None:
    rows, model = rows_of(form), make_model("mamba2-full")
    batch = RowCollator()([rows.rows[index] for index in range(len(rows))])
    labels = batch.pop("labels")
    outputs, config = model(**batch), model.config
    expected, count = by_hand(model, form, epsilon=0.3)
    mean = smoothed_loss(outputs, labels, epsilon=0.3, config=config)
    torch.testing.assert_close(mean, expected / count, rtol=1e-5, atol=1e-6)
    share = smoothed_loss(outputs, labels, epsilon=0.3, config=config, num_items_in_batch=torch.tensor(7))
    torch.testing.assert_close(share, expected / 7, rtol=1e-5, atol=1e-5)
    # An encoder-decoder's labels are not shifted.
    both: Any = SimpleNamespace(is_encoder_decoder=True)
    logits = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[4, -100, 1]])
    logs = logits.log_softmax(-1)
    expected = -(0.9 * (logs[0, 0, 4] + logs[0, 2, 1]) + 0.1 * (logs[0, 0].mean() + logs[0, 2].mean())) / 2
    torch.testing.assert_close(
        smoothed_loss(SimpleNamespace(logits=logits), labels, epsilon=0.1, config=both), expected
    )


def test_a_decoder_reads_the_start_and_its_labels_but_the_last() -> None:
    items = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9]), ([1], [2])]
    pairs = [(torch.tensor(ids), torch.tensor(labels)) for ids, labels in items]
    rows = PackedPairs(pairs, 4, packing=True)
    assert (len(rows), rows.tokens, rows.targets) == (2, 11, 6)
    batch = PackedPairCollator(pad_token_id=0, start=11)([rows[0], rows[1]])
    assert {key: tensor.tolist() for key, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3, 1], [6, 0, 0, 0]],
        "seq_idx": [[0, 0, 0, 1], [0, -1, -1, -1]],
        "labels": [[4, 5, 2], [7, 8, 9]],
        "decoder_input_ids": [[11, 4, 11], [11, 7, 8]],
        "decoder_seq_idx": [[0, 0, 1], [0, 0, 0]],
    }
    alone = PackedPairs(pairs, 4, packing=False)
    assert [alone[index]["labels"].tolist() for index in range(3)] == [labels for _, labels in items]


@pytest.mark.parametrize("packing", [True, False])
def test_rows_of_an_encoder_decoder_give_the_gradients_of_separate_pairs(
    form: TranslationFormat, packing: bool
) -> None:
    both = replace(form, is_encoder_decoder=True, after=form.end, start=2)
    rows = rows_of(both, packing=packing)
    model: Any = make_encoder_decoder("mixed", pad_token_id=form.padding, eos_token_id=form.end).double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for source, target in zip(*(both.encode(side) for side in (TEXTS.sources, TEXTS.targets)), strict=True):
        ids, written = torch.tensor([[*source, form.end]]), [*target, form.end]
        logs = model(input_ids=ids, decoder_input_ids=torch.tensor([[2, *target]])).logits[0].log_softmax(-1)
        total = total - logs[torch.arange(len(written)), torch.tensor(written)].sum()
        count += len(written)
    total.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert rows.rows.targets == count
    batch = PackedPairCollator(form.padding, 2)([rows.rows[index] for index in range(len(rows))])
    loss = model(**batch, num_items_in_batch=1).loss
    torch.testing.assert_close(loss.double(), total, rtol=1e-5, atol=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-4)
    held = heldout_loss(model, rows.rows, PackedPairCollator(form.padding, 2), 4)
    assert held["tokens"] == count and held["loss"] == pytest.approx(total.item() / count, rel=1e-5)


def test_pairs_that_are_too_long_are_left_out_or_cut_and_counted(form: TranslationFormat) -> None:
    pairs = ParallelText(["ab", "abcdef", "ab", "abcdef"], ["a", "a", "abcdef", "abcdef"], [4])
    left = rows_of(form, pairs, max_tokens=3)
    assert left.counts == {"pairs": 1, "dropped": 3, "cut": 0, "source_tokens": 2, "target_tokens": 1}
    cut = rows_of(form, pairs, max_tokens=3, overlong="truncate", packing=False)
    assert cut.counts == {"pairs": 4, "dropped": 0, "cut": 3, "source_tokens": 2.5, "target_tokens": 2}
    ends = [cut.rows[index]["labels"][-1].item() == form.end for index in range(4)]
    assert ends == [True, True, False, False]  # a target that was cut does not end here
    assert [len(cut.rows[index]["input_ids"]) for index in range(4)] == [5, 6, 6, 7]
    with pytest.raises(ValueError, match=r"train: every pair has a side of more than 1 tokens. Raise `max_tokens`"):
        rows_of(form, ParallelText(["ab"], ["abc"], [1]), max_tokens=1)


def test_a_text_with_the_separator_is_refused(form: TranslationFormat) -> None:
    """An existing token may be the separator, and texts that contain it could be cut anywhere."""
    with pytest.raises(ValueError, match=r"train: the text 'b!' contains '!', .* Give another `separator`"):
        rows_of(form, ParallelText(["a"], ["b!"], [1]))


def test_a_new_vocabulary_has_the_studys_special_ids_and_normalises() -> None:
    tokenizer = learn_joint_vocabulary(["low lower lowest", "bas plus bas"] * 4, 270, progress=False)
    assert [tokenizer.convert_tokens_to_ids(token) for token in ("<pad>", "</s>", "<sep>", "<s>")] == [0, 1, 2, 3]
    ids = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id]
    assert ids == [0, 1, 2, 3] and len(tokenizer) == 270
    assert tokenizer("\ufb01x \uff12")["input_ids"] == tokenizer("fix 2")["input_ids"]
    text = "någon Ω 中文 low"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    again = learn_joint_vocabulary(["low lower lowest", "bas plus bas"] * 4, 270, progress=False)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_an_added_separator_gets_one_row_and_nothing_else_changes(folder: Path, tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "zoo")
    before = tokenizer("abc xyz")["input_ids"]
    model = make_model("mamba2-full", tie_word_embeddings=False)
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    separator = set_separator(tokenizer, None)
    assert (separator.token, separator.id, separator.added) == ("<sep>", VOCAB, True)
    fit_embeddings(model, separator)
    assert model.config.vocab_size == VOCAB + 1
    assert tokenizer("abc xyz")["input_ids"] == before
    grown = 0
    for name, tensor in model.state_dict().items():
        if tensor.shape != old[name].shape:
            grown += 1
            assert torch.equal(tensor[:-1], old[name])
            torch.testing.assert_close(tensor[-1], old[name].mean(0))
        else:
            assert torch.equal(tensor, old[name])
    assert grown == 2  # embedding and head
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).sep_token_id == VOCAB
    # A row that no token has is used, and a token that there is changes nothing.
    spare = make_model("mamba2-full", vocab_size=VOCAB + 7)
    fit_embeddings(spare, separator)
    assert spare.config.vocab_size == VOCAB + 7
    with pytest.raises(ValueError, match=f"ids must be below the model's vocab_size, 20, got {VOCAB - 1}"):
        fit_embeddings(make_model("mamba2-full", vocab_size=20), separator)  # the tokenizer of another model
    own: Any = AutoTokenizer.from_pretrained(folder / "zoo")
    there = set_separator(own, "!")
    assert (there.id, there.added, own.sep_token_id) == (own.get_vocab()["!"], False, there.id)
    with pytest.raises(ValueError, match="`separator` must not be the tokenizer's `eos_token`, got '</s>'"):
        set_separator(own, "</s>")


def test_residual_dropout_acts_in_training_only_and_keeps_the_mean() -> None:
    model = make_model("mamba2-full")
    ids = torch.arange(12).view(1, 12)
    expected = model(input_ids=ids).logits
    assert add_residual_dropout(model, 0.0) == 0
    assert add_residual_dropout(model, 0.4) == sum(len(list(_added(block))) for block in model.backbone.layers)
    assert torch.equal(model(input_ids=ids).logits, expected)
    model.train()
    torch.manual_seed(0)
    assert not torch.allclose(model(input_ids=ids).logits, expected)
    mixer, seen = model.backbone.layers[0].mixer, []
    mixer.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
    model(input_ids=ids)
    assert 0.2 < float((seen[0] == 0).float().mean()) < 0.6
    with pytest.raises(ValueError, match=r"`residual_dropout` must be 0 for Linear, which has no blocks, got 0.1"):
        add_residual_dropout(torch.nn.Linear(2, 2), 0.1)


def _added(block: Any) -> Any:
    return (name for name, _ in block.named_children() if name in ("mixer", "mlp"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_tokenizer": 400, "method": "lora"}, "`method` must be 'full' with `train_tokenizer`"),
        ({"train_tokenizer": 400, "separator": "|"}, "`separator` has no effect with `train_tokenizer`, got '|'"),
        ({"train_tokenizer": 259}, "`train_tokenizer` must be at least 260, got 259"),
        ({"overrides": ["a=1"]}, "`overrides` has no effect without `train_tokenizer`"),
        ({"packing": False, "row_tokens": 900}, "`row_tokens` has no effect without `packing`, got 900"),
        ({"warmup": 0}, "`warmup` must be above 0 with schedule 'inverse_sqrt'"),
        ({"warmup": 0.6}, "`warmup` must be a whole number of steps, or a share from 0.0 to 0.5, got 0.6"),
        ({"label_smoothing": 1.0}, "`label_smoothing` must be below 1, got 1.0"),
        ({"method": "full", "dropout": 0.1}, "`dropout` has no effect with method 'full'"),
        ({"concatenate": 0}, "`concatenate` must be at least 1, got 0"),
        ({"overlong": "keep"}, "`overlong` must be 'drop' or 'truncate', got 'keep'"),
    ],
)
def test_settings_that_contradict_or_have_no_effect_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_translation_settings({**REQUIRED, **values})


def test_rows_have_room_for_the_longest_pair_in_the_sequences_of_the_model(form: TranslationFormat) -> None:
    both, started = replace(form, is_encoder_decoder=True, after=form.end), replace(form, before=(3,))
    side = [5] * 600
    for made, longest in ((form, 1202), (started, 1203), (both, 601)):
        assert made.longest(600) == longest == max(map(len, made.example(side, side)))
    default = parse_translation_settings({**REQUIRED, "max_tokens": 600})
    assert [default.check_row_tokens(number).row_tokens for number in (1202, 601)] == [1202, 1024]
    given = parse_translation_settings({**REQUIRED, "max_tokens": 600, "row_tokens": 700})
    assert given.check_row_tokens(601) is given
    with pytest.raises(ValueError, match=r"`row_tokens` must be at least 1202, .* `max_tokens` 600 a side .* got 700"):
        given.check_row_tokens(1202)


def test_defaults_depend_on_what_is_trained() -> None:
    new = parse_translation_settings({**REQUIRED, "train_tokenizer": 400, "packing": False})
    assert (new.method, new.peak_learning_rate, new.batch_size) == ("full", 1e-3, 64)
    tuned = parse_translation_settings(REQUIRED)
    assert (tuned.method, tuned.peak_learning_rate, tuned.batch_size) == ("lora", 2e-4, 4)
    assert parse_translation_settings({**REQUIRED, "warmup": 7}).warmup_steps(20) == 7
    assert tuned.warmup_steps(3) == 1


def test_a_new_model_learns_and_its_card_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(shutil.copytree(folder, tmp_path / "work"))
    how = {
        **NEW,
        "model": "zoo.yaml",
        "overrides": ["hidden_size=24", "num_heads=6"],
        "steps": 120,
        "evaluate_every": 50,
        "warmup": 10,
    }
    settings = parse_translation_settings({**REQUIRED, **how, "learning_rate": 0.02, "reverse": True})
    report = finetune_translation(settings, "out")
    before, *_, after = [evaluation["loss"] for evaluation in report["evaluations"]]
    assert after < before - 1 and [e["step"] for e in report["evaluations"]] == [0, 50, 100, 120]
    # The curve has the rate of the step that was taken, which is 0 for the first.
    rates = [0.02 * step / 10 if step < 10 else 0.02 * (10 / step) ** 0.5 for step in range(120)]
    assert [point["learning_rate"] for point in report["history"]] == pytest.approx(rates)
    assert report["model"]["config"]["hidden_size"] == 24 and report["base"] is None
    assert [report["data"][part][key] for part in ("train", "heldout") for key in ("read", "pairs")] == [6] * 4
    assert report["data"]["heldout"]["in_training"] == 6 and "in_training" not in report["data"]["train"]
    assert report["tokenizer"] | {"entries": 0} == {
        "entries": 0,
        "prompt_starts": [],
        "separator": "<sep>",
        "separator_added": False,
    }
    assert json.loads(Path("out/report.json").read_text()) == report and Path("out/plots/loss.png").is_file()
    tokenizer: Any = AutoTokenizer.from_pretrained("out/model")
    model: Any = AutoModelForCausalLM.from_pretrained("out/model")
    assert isinstance(tokenizer, PreTrainedTokenizerFast) and tokenizer.sep_token_id == 2
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (1, 0)
    assert model.generation_config.max_new_tokens == 61 and model.config.eos_token_id == 1
    card = Path("out/model/README.md").read_text()
    assert (
        "6 of them are also trained on." in card and "pipeline_tag: translation" in card and str(tmp_path) not in card
    )
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    printed: list[str] = []
    exec(snippet.replace("<this repository>", "out/model"), {"print": printed.append})
    form = translation_format(tokenizer, model.config)
    ours = translate(model, form, ["A text to translate."], max_new_tokens=61)
    assert [text.strip() for text in printed] == ours.texts
    # It has learnt its six pairs by heart, in the direction that was asked for.
    for beams in (1, 4):
        assert translate(model, form, TEXTS.targets, beams=beams, max_new_tokens=20).texts == TEXTS.sources


def test_adapters_are_merged_with_the_separator_they_were_trained_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(shutil.copytree(folder, tmp_path / "work"))
    how = {"max_tokens": 20, "row_tokens": 60, "steps": 4, "learning_rate": 0.05, "rank": 3}
    # As a chat model has it: kept, it would make translations random.
    Path("zoo/generation_config.json").write_text('{"do_sample": true, "temperature": 0.7, "bos_token_id": 4}')
    report = finetune_translation(parse_translation_settings({**REQUIRED, **how}), "out")
    assert report["coverage"]["dead"] == [] and report["base"]["source"] == "zoo"
    assert report["tokenizer"]["separator"] == "<sep>" and report["tokenizer"]["separator_added"]
    model: Any = AutoModelForCausalLM.from_pretrained("out/model")
    tokenizer: Any = AutoTokenizer.from_pretrained("out/model")
    saved = json.loads(Path("out/model/generation_config.json").read_text())
    assert not saved.get("do_sample") and "temperature" not in saved
    assert (saved["bos_token_id"], saved["eos_token_id"], saved["max_new_tokens"]) == (4, tokenizer.eos_token_id, 21)
    assert not isinstance(model, PeftModel) and model.config.vocab_size == VOCAB + 1 == tokenizer.sep_token_id + 1
    form = translation_format(tokenizer, model.config)
    rows = rows_of(form, vocab_size=VOCAB + 1, max_tokens=20, row_tokens=60)
    measured = heldout_loss(model, rows.rows, RowCollator(), 4)
    assert measured["loss"] == pytest.approx(report["evaluations"][-1]["loss"], rel=1e-5)
    assert report["evaluations"][-1]["loss"] < report["evaluations"][0]["loss"]
    assert "was added to it" in Path("out/model/README.md").read_text()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_interrupted_run_resumes_to_the_same_bits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    """With all weights, batches of similar lengths; with adapters, packed rows and an added separator."""
    monkeypatch.chdir(shutil.copytree(folder, tmp_path / "work"))
    how = {"method": method, "residual_dropout": 0.2, "concatenate": 2, "max_tokens": 40, "batch_size": 1, "seed": 3}
    how |= {"steps": 5, "checkpoint_every": 3, "learning_rate": 0.02}
    how |= {"packing": False} if method == "full" else {"row_tokens": 83, "dropout": 0.1}
    settings = parse_translation_settings({**REQUIRED, **how})
    finetune_translation(settings, "whole")
    with monkeypatch.context() as patch:
        stop_in(5, patch)
        with pytest.raises(KeyboardInterrupt):
            finetune_translation(settings, "run")
    assert {path.name for path in Path("run/checkpoints").iterdir()} == {"checkpoint-3"}
    report = finetune_translation(settings, "run")
    whole = json.loads(Path("whole/report.json").read_text())
    assert report["evaluations"] == whole["evaluations"]
    ours, theirs = (load_file(f"{run}/model/model.safetensors") for run in ("run", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    with pytest.raises(ValueError, match=r"run holds a run of another recipe \(seed: 3 there, 4 here"):
        finetune_translation(settings.model_copy(update={"seed": 4}), "run")


def test_a_mistake_writes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(shutil.copytree(folder, tmp_path / "work"))
    Path("bad.tsv").write_text("a\tb\nc\n")
    mistakes = {
        "heldout: 'bad.tsv', line 2 must have two texts": {"heldout": ["bad.tsv"]},
        "`model` must be a causal language model or an encoder-decoder of the zoo": {"model": "llama"},
        "config: `vocab_size` must be at least 262": {**NEW, "model": "zoo.yaml", "overrides": ["vocab_size=100"]},
        "`row_tokens` must be at least 202, ": {"max_tokens": 100, "row_tokens": 201},
        "`warmup` must be shorter than the run, got 9 steps in a run of 3": {"steps": 3, "warmup": 9},
        "`revision` must be left out for the folder zoo": {"revision": "v1"},
        "model: a text must have at most 17 tokens": {**BYTES, "model": "hybrid.yaml"},
        "model: a text must have at most 8 tokens, since the model has weights for as many positions "
        "(max_position_embeddings), got 9. Lower `max_tokens`.": {**BYTES, "model": "encdec.yaml"},
        "model: a text must have at most 7 tokens": {
            **BYTES,
            "model": "encdec.yaml",
            "overrides": ["encoder={max_position_embeddings: 7}", "max_position_embeddings=9"],
        },
        "`residual_dropout` must be 0 for a model with its own hidden_dropout, 0.1, got 0.2": {
            **BYTES,
            "model": "encdec.yaml",
            "overrides": ["encoder={hidden_dropout: 0.1}", "max_position_embeddings=9"],
            "residual_dropout": 0.2,
        },
        "model: `pad_mode` must be 'shift' for this training": {"model": "mixer"},
        "config: `prefix_bidirectional` must be False, got True": {
            **NEW,
            "model": "zoo.yaml",
            "overrides": ["prefix_bidirectional=true"],
        },
    }
    Path("hybrid.yaml").write_text(f"model_type: zoo_hybrid\nmax_position_embeddings: 17\n{BOUNDED}")
    Path("encdec.yaml").write_text(f"model_type: zoo_encdec\nmax_position_embeddings: 8\n{BOUNDED}")
    make_model("mixer", pad_mode="as_trained", pad_token_id=0, eos_token_id=0).save_pretrained("mixer")
    save_tokenizer(Path("mixer"))
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=VOCAB).save_pretrained("llama")
    for message, values in mistakes.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            finetune_translation(parse_translation_settings({**REQUIRED, **values}), "out")
        assert not Path("out").exists()
