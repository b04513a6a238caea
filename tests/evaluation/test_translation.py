"""Translations: scores recomputed without cache, batches that do not matter, entities and corpus scores by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import make_encoder_decoder, make_model
from tiny_checkpoints import save_tokenizer
from transformers import AutoTokenizer

from ssm_zoo.evaluation.translation import translate
from ssm_zoo.evaluation.translation_format import TranslationCollator, TranslationFormat, translation_format
from ssm_zoo.evaluation.translation_scores import count_entities, score_translations, shared_entities

SOURCES = ["a cat", "the small dog sat", "x", "two of them ran away fast", "no", "on it"]


def make_format(folder: Any) -> TranslationFormat:
    """The format of a tiny tokenizer with one token a character; "</s>" is 0 and "!" separates."""
    save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"sep_token": "!"})
    return translation_format(tokenizer, make_model("mamba2").config)


@pytest.fixture(scope="module")
def form(tmp_path_factory: pytest.TempPathFactory) -> TranslationFormat:
    return make_format(tmp_path_factory.mktemp("tokenizer"))


def make_translator(name: str) -> Any:
    """A model with an untied random head that ends some of its texts before the limit."""
    model: Any = make_model(name)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(3)))

    def prefer_the_end(_module: Any, _inputs: Any, outputs: Any) -> Any:
        outputs.logits = outputs.logits + 6.0 * (torch.arange(outputs.logits.shape[-1]) == 0)
        return outputs

    model.register_forward_hook(prefer_the_end)
    return model.eval()


def log_probability(model: Any, form: TranslationFormat, source: str, written: list[int]) -> float:
    """The sum over the written tokens, from one forward pass without cache or padding."""
    prompt = form.prompt(form.encode([source])[0])
    ids = torch.tensor([prompt + written])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    predicted = logits[0, len(prompt) - 1 : -1]
    return float(predicted.gather(1, ids[0, len(prompt) :, None]).sum())


@pytest.mark.parametrize(
    ("name", "penalty"), [("mamba", 0.0), ("mamba", 0.5), ("mamba2-full", None), ("mamba2-full", 0.5)]
)
def test_beam_scores_count_the_generated_tokens_alone(
    form: TranslationFormat, name: str, penalty: float | None
) -> None:
    """The prompts of a batch differ in length and are padded on the left: neither may enter the score."""
    model = make_translator(name)
    found = translate(model, form, SOURCES, beams=4, length_penalty=penalty, max_new_tokens=9, scores=True)
    assert found.scores is not None and len(set(map(len, found.ids))) > 1
    assert any(found.finished)
    exponent = 1.0 if penalty is None else penalty
    for source, ids, score in zip(SOURCES, found.ids, found.scores, strict=True):
        expected = log_probability(model, form, source, ids) / len(ids) ** exponent
        assert score == pytest.approx(expected, abs=2e-4)


def test_an_encoder_decoder_writes_after_its_start_in_batches_that_do_not_matter(form: TranslationFormat) -> None:
    model = make_encoder_decoder("mixed", pad_token_id=5, bos_token_id=2, eos_token_id=0)
    both = replace(form, is_encoder_decoder=True, after=form.end, start=2)
    assert translation_format(form.tokenizer, model.config) == both
    found = translate(model, both, SOURCES, beams=3, length_penalty=0.5, max_new_tokens=7, scores=True)
    assert found.scores is not None and len({tuple(ids) for ids in found.ids}) > 1
    for source, ids, score in zip(SOURCES, found.ids, found.scores, strict=True):
        prompt = torch.tensor([both.prompt(both.encode([source])[0])])
        with torch.no_grad():
            logits = model(input_ids=prompt, decoder_input_ids=torch.tensor([[2, *ids[:-1]]])).logits[0]
        logs = logits.double().log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
        assert score == pytest.approx(float(logs.sum()) / len(ids) ** 0.5, abs=2e-4)
    again = translate(model, both, SOURCES, beams=3, length_penalty=0.5, max_new_tokens=7, batch_size=2)
    assert (again.ids, again.texts) == (found.ids, found.texts)


@pytest.mark.parametrize("beams", [1, 3])
def test_results_do_not_depend_on_batches_and_keep_their_order(form: TranslationFormat, beams: int) -> None:
    model = make_translator("mamba2-full")
    options: Any = {"beams": beams, "max_new_tokens": 8}
    whole = translate(model, form, SOURCES, batch_size=6, **options)
    for size in (1, 4):
        again = translate(model, form, SOURCES, batch_size=size, **options)
        assert (again.ids, again.texts, again.finished) == (whole.ids, whole.texts, whole.finished)
    turned = translate(model, form, SOURCES[::-1], batch_size=4, **options)
    assert turned.ids == whole.ids[::-1]
    assert len({tuple(ids) for ids in whole.ids}) > 1
    assert whole.scores is None and whole.tokens == sum(len(ids) for ids in whole.ids) and whole.seconds > 0
    for ids, finished in zip(whole.ids, whole.finished, strict=True):
        assert finished == (ids[-1] == form.end) and ids.count(form.end) == finished
        assert finished or len(ids) == 8


def test_greedy_takes_the_most_likely_token_each_time(form: TranslationFormat) -> None:
    model = make_translator("mamba2-full")
    found = translate(model, form, SOURCES[:2], beams=1, max_new_tokens=5)
    for source, written in zip(SOURCES, found.ids, strict=False):
        ids = form.prompt(form.encode([source])[0])
        for token in written:
            with torch.no_grad():
                assert int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_the_models_own_generation_settings_neither_matter_nor_change(form: TranslationFormat) -> None:
    model = make_translator("mamba2-full")
    expected = translate(model, form, SOURCES, max_new_tokens=5).ids
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    model.train()
    assert translate(model, form, SOURCES, max_new_tokens=5).ids == expected
    assert model.generation_config.repetition_penalty == 5.0 and model.training


def test_settings_without_effect_and_texts_that_cannot_be_translated_are_refused(form: TranslationFormat) -> None:
    model = make_translator("mamba2-full")
    with pytest.raises(ValueError, match=r"`length_penalty` has no effect with one beam, got 0.5"):
        translate(model, form, SOURCES, beams=1, length_penalty=0.5)
    with pytest.raises(ValueError, match="`beams` must be at least 1, got 0"):
        translate(model, form, SOURCES, beams=0)
    with pytest.raises(ValueError, match="no token for the text ''"):
        translate(model, form, ["a", ""])
    model.config.max_position_embeddings = 30
    with pytest.raises(ValueError, match=r"fit into the max_position_embeddings of the model, 30, .* 26 tokens and 5"):
        translate(model, form, SOURCES, max_new_tokens=5)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the logits are not finite"):
        translate(model, form, SOURCES, max_new_tokens=2)


def test_a_tokenizer_without_separator_or_end_is_refused(tmp_path: Any) -> None:
    save_tokenizer(tmp_path)
    tokenizer, config = AutoTokenizer.from_pretrained(tmp_path), make_model("mamba2").config
    with pytest.raises(ValueError, match=r"must have a `sep_token` .*got none. Train the model with `ssm-zoo finetune"):
        translation_format(tokenizer, config)
    tokenizer.sep_token = tokenizer.eos_token
    with pytest.raises(ValueError, match="got its `eos_token`"):
        translation_format(tokenizer, config)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="must have an `eos_token`"):
        translation_format(tokenizer, config)


def test_a_text_with_the_name_of_a_special_token_is_read_letter_by_letter(form: TranslationFormat) -> None:
    tokenizer = form.tokenizer
    assert tokenizer.convert_tokens_to_ids("!") == form.after
    (ids,) = form.encode(["a</s>b"])
    assert form.end not in ids and len(ids) == 6


def test_prompts_are_padded_before_and_references_behind() -> None:
    batch = TranslationCollator(padding=9)([[1, 2, 3], [4]], [[5], [6, 7]])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["labels"].tolist() == [[5, -100], [6, 7]]
    encoder = TranslationCollator(padding=9, is_encoder_decoder=True)([[1, 2, 3], [4]])
    assert encoder["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]] and "labels" not in encoder
    assert encoder["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    with pytest.raises(ValueError, match="`references` must be as many as `prompts`, 2, got 1"):
        TranslationCollator(padding=9)([[1], [2]], [[1]])


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("Boston won 3 games, said Anna.", "Boston gewann 3 Spiele, sagte Anna.", ["3", "Anna"]),
        ("NASA says so", "NASA sagt es", ["NASA"]),
        ("In it: `os.path` and my_name, see", "In ihm: `os.path` und my_name !", ["os.path", "my_name"]),
        ("we met Tom and Tom", "Tom! wir trafen Tom", []),
        ("a man on a hat", "a man on a hat", []),
        ("see I there", "da I sehe", []),
        ("the 4x4 of Rome", "das 4x4 von Rom", ["4x4"]),
    ],
)
def test_entities_stand_in_both_texts(source: str, target: str, expected: list[str]) -> None:
    assert shared_entities(source, target) == expected


def test_entities_are_counted_in_pairs_that_have_them_on_both_sides() -> None:
    sources, targets = (
        ["to Paris Paris", "to Paris", "Paris 7", "to (Paris)"],
        ["nach Paris", "hin", "Paris 8", "Paris"],
    )
    assert count_entities(sources, targets, [["Paris", "7"], ["Rome"]]) == {"7": 0, "Paris": 3, "Rome": 0}


def test_scores_are_those_of_the_corpus_and_of_its_bins() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    sources = ["we saw Rome", "one two three four five of Bonn", "a b c d e f g 12"]
    references = ["wir sahen Rome", "eins zwei drei vier fuenf von Bonn", "a b c d e f h 12"]
    hypotheses = ["wir sahen Rom", "eins zwei drei vier sechs von Bonn", "a b c d e f h 12"]
    counts = {"Rome": 0, "Bonn": 15, "12": 16}
    found = score_translations(hypotheses, sources, references, training_counts=counts, lengths=[4, 8, 20])
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references]).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(hypotheses, [references]).score)
    assert "tok:13a" in found["bleu_signature"] and found["chrf_signature"].startswith("nrefs:1")
    assert [(row["from"], row["to"], row["texts"]) for row in found["by_length"]] == [(1, 3, 1), (4, 7, 1), (8, 19, 1)]
    assert found["by_length"][2]["bleu"] == pytest.approx(100)
    assert found["by_length"][1]["chrf"] == pytest.approx(
        sacrebleu.corpus_chrf(hypotheses[1:2], [references[1:2]]).score
    )
    assert found["entities"] == {
        "recall": pytest.approx(2 / 3),
        "entities": 3,
        "unseen": {"recall": 0.0, "entities": 1},
        "regular": {"recall": 1.0, "entities": 1},
        "frequent": {"recall": 1.0, "entities": 1},
    }
    # Not kept: a number in another one, and a name in a longer word.
    inside = score_translations(["von 1957 in Bonner (Rom), 5"], ["in 7 Bonn Rom 5"], ["7 of Bonn in Rom 5"])
    assert inside["entities"] == {"recall": 0.5, "entities": 4}
    # Of the copied sources nothing is lost, whatever they are worth as translations.
    copied = score_translations(sources, sources, references, training_counts={}, lengths=[4])
    assert copied["entities"]["recall"] == 1 and copied["entities"]["frequent"] == {"recall": None, "entities": 0}
    assert not math.isnan(copied["bleu"]) and copied["bleu"] < found["bleu"]
    assert score_translations(["x"], ["x"], ["y"])["entities"] == {"recall": None, "entities": 0}
    with pytest.raises(ValueError, match="`lengths` must be ascending numbers of at least 2, got \\[5, 5\\]"):
        score_translations(hypotheses, sources, references, lengths=[5, 5])
    with pytest.raises(ValueError, match="must be equally many, got 1, 3 and 3"):
        score_translations(["x"], sources, references)
