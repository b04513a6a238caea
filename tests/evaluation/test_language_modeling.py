"""Scores of language models against a plain computation with full logits in float64."""

import math
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB
from scored_models import full_logits, related_models, tiny_llama, token_windows
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

from ssm_zoo.evaluation import language_modeling
from ssm_zoo.evaluation.language_modeling import evaluate_language_model, generation_sample, repeat_loss, repeated_share

WORDS = [f"w{index}" for index in range(VOCAB)]


def expected_scores(model: Any, windows: Tensor, teacher: Any = None) -> dict[str, float]:
    """The definition of every score, from logits of all windows at once."""

    def loss(logits: Tensor) -> float:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()

    student = full_logits(model, windows)
    scores: dict[str, float] = {"loss": loss(student), "tokens": windows.shape[0] * (windows.shape[1] - 1)}
    scores["perplexity"] = torch.tensor(scores["loss"], dtype=torch.float64).exp().item()
    if teacher is not None:
        logits = full_logits(teacher, windows)
        scores["teacher_loss"] = loss(logits)
        scores["teacher_perplexity"] = torch.tensor(scores["teacher_loss"], dtype=torch.float64).exp().item()
        p, log_p, log_q = logits.softmax(-1), logits.log_softmax(-1), student.log_softmax(-1)
        terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
        scores["kl"] = terms.sum(-1).mean().item()
        scores["top1_agreement"] = (logits.argmax(-1) == student.argmax(-1)).double().mean().item()
    return scores


def assert_scores(actual: dict[str, float], expected: dict[str, float], rel: float = 1e-5) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value, rel=rel, abs=rel), name


@pytest.mark.parametrize("chunk", [1, 3, 10_000], ids=["one prediction at a time", "ragged chunks", "whole batches"])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_scores_equal_the_definition(batch_size, chunk, monkeypatch):
    monkeypatch.setattr(language_modeling, "LOGITS_BYTES", chunk * VOCAB * 4 * language_modeling.LOGITS_COPIES)
    (model, teacher), windows = related_models(), token_windows()
    expected = expected_scores(model, windows, teacher)
    assert 0 < expected["top1_agreement"] < 1
    assert expected["kl"] > 0.1
    actual = evaluate_language_model(model, windows, teacher=teacher, batch_size=batch_size, progress=False)
    assert_scores(actual, expected)
    alone = evaluate_language_model(model, windows, batch_size=batch_size, progress=False)
    assert_scores(alone, expected_scores(model, windows))
    assert isinstance(alone["tokens"], int)


def test_a_model_agrees_with_itself_exactly():
    model, windows = tiny_llama(0), token_windows()
    scores = evaluate_language_model(model, windows, teacher=model, progress=False)
    assert scores["kl"] == 0.0
    assert scores["top1_agreement"] == 1.0
    assert scores["loss"] == scores["teacher_loss"]


def test_divergence_has_a_direction():
    sharp, flat, windows = tiny_llama(0, head_scale=12.0), tiny_llama(1, head_scale=0.5), token_windows()
    one = evaluate_language_model(flat, windows, teacher=sharp, progress=False)["kl"]
    other = evaluate_language_model(sharp, windows, teacher=flat, progress=False)["kl"]
    assert one == pytest.approx(expected_scores(flat, windows, sharp)["kl"], rel=1e-5)
    assert other == pytest.approx(expected_scores(sharp, windows, flat)["kl"], rel=1e-5)
    assert other > 2 * one


@pytest.mark.parametrize("family", FAMILIES)
def test_zoo_models_are_scored(family):
    torch.manual_seed(0)
    entry = FAMILIES[family]
    model = entry.causal_lm(entry.config()).eval()
    teacher, windows = tiny_llama(1), token_windows()
    actual = evaluate_language_model(model, windows, teacher=teacher, batch_size=2, progress=False)
    assert_scores(actual, expected_scores(model, windows, teacher), rel=1e-4)


def test_bfloat16_models_are_scored_in_float32():
    (model, teacher), windows = [model.bfloat16() for model in related_models()], token_windows()
    actual = evaluate_language_model(model, windows, teacher=teacher, batch_size=5, progress=False)
    assert_scores(actual, expected_scores(model, windows, teacher))


def test_float64_models_are_scored_in_float64():
    (model, teacher), windows = [model.double() for model in related_models()], token_windows()
    actual = evaluate_language_model(model, windows, teacher=teacher, progress=False)
    # The rotary angles stay in float32 for a batch of any size, so only the order of sums differs.
    assert_scores(actual, expected_scores(model, windows, teacher), rel=1e-12)


def test_very_sure_models_give_finite_scores_and_no_overflow():
    model, teacher, windows = tiny_llama(0, head_scale=4000.0), tiny_llama(1, head_scale=4000.0), token_windows()
    actual = evaluate_language_model(model, windows, teacher=teacher, progress=False)
    assert actual["loss"] > 710
    assert actual["perplexity"] == math.inf
    assert actual["kl"] == pytest.approx(expected_scores(model, windows, teacher)["kl"], rel=1e-5)


def test_tokens_that_both_rule_out_do_not_count():
    pair = tiny_llama(0), tiny_llama(1)
    for model in pair:
        bias = torch.zeros(VOCAB)
        bias[-4:] = -math.inf
        model.lm_head.bias = torch.nn.Parameter(bias)
    windows = token_windows(vocabulary=VOCAB - 4)
    actual = evaluate_language_model(pair[0], windows, teacher=pair[1], progress=False)
    assert_scores(actual, expected_scores(pair[0], windows, pair[1]))


class AliveLogits(TorchDispatchMode):
    """Highest number of bytes, at the end of any operation, in tensors (any, V) that it made."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.peak, self.made = vocabulary, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.ndim == 2 and tensor.shape[1] == self.vocabulary:
                self.made.append(weakref.ref(tensor))
        alive = {}
        for reference in self.made:
            if (tensor := reference()) is not None:
                alive[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        self.peak = max(self.peak, sum(alive.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_logits_alive_at_one_time_are_bounded(dtype, monkeypatch):
    vocabulary, bound = 1009, 200_000
    monkeypatch.setattr(language_modeling, "LOGITS_BYTES", bound)
    model = tiny_llama(0, vocab_size=vocabulary).to(dtype)
    teacher = tiny_llama(1, vocab_size=vocabulary).to(dtype)
    windows = token_windows(4, 33, vocabulary)
    with AliveLogits(vocabulary) as alive:
        scores = evaluate_language_model(model, windows, teacher=teacher, batch_size=4, progress=False)
    # Full logits of the batch would be 128 rows of 4 kB, for two models: over 1 MB. The bound is also made use of.
    assert bound / 3 < alive.peak <= bound
    assert_scores(scores, expected_scores(model, windows, teacher))


def test_models_come_back_as_they_were():
    model, teacher, windows = tiny_llama(0, attention_dropout=0.5), tiny_llama(1), token_windows()
    expected = expected_scores(model, windows, teacher)
    model.train()
    model.model.norm.eval()
    hooks = [len(m._forward_pre_hooks) for m in (*model.modules(), *teacher.modules())]
    scores = evaluate_language_model(model, windows, teacher=teacher, progress=False)
    assert_scores(scores, expected)
    with pytest.raises(ValueError, match="windows"):
        evaluate_language_model(model, windows + VOCAB, teacher=teacher, progress=False)
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.norm.training
    assert not teacher.training
    assert [len(m._forward_pre_hooks) for m in (*model.modules(), *teacher.modules())] == hooks


def test_scoring_leaves_no_graph_and_no_inference_tensors():
    # Rotary angles that are computed anew, and kept in the model, once a text is longer than 4 tokens.
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_llama(0, max_position_embeddings=4, rope_parameters=rope)
    evaluate_language_model(model, token_windows(), progress=False)
    assert not any(buffer.is_inference() for buffer in model.buffers())
    model(input_ids=token_windows(), labels=token_windows()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Capped(LlamaForCausalLM):
    """Changes its logits after the head, as soft-capping models do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * torch.tanh(output.logits / 2)
        return output


class HeadUnused(LlamaForCausalLM):
    """Makes logits from the weight, past the head module."""

    def forward(self, input_ids: Any = None, **_: Any) -> Any:
        return self.model(input_ids).last_hidden_state @ self.lm_head.weight.T


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"windows": torch.zeros(5).long()},
            r"`windows` must be int64 .*, got torch.int64 of shape \(5,\)",
            id="one row",
        ),
        pytest.param({"windows": torch.zeros(0, 5).long()}, r"`windows` must .* of shape \(0, 5\)", id="none"),
        pytest.param(
            {"windows": torch.zeros(5, 1).long()}, r"`windows` must .* of shape \(5, 1\)", id="nothing to predict"
        ),
        pytest.param({"windows": torch.zeros(5, 4)}, r"`windows` must be int64 .*, got torch.float32", id="floats"),
        pytest.param(
            {"windows": torch.tensor([[0, VOCAB]])}, rf"token ids of Llama.*, 0 to 60, got 0 to {VOCAB}", id="id"
        ),
        pytest.param({"windows": torch.tensor([[-100, 1]])}, r"`windows` must .* got -100 to 1", id="label"),
        pytest.param({"batch_size": 0}, r"`batch_size` must be at least 1, got 0", id="batch size"),
        pytest.param({"device": "meta"}, r"`device` must be that of the models, cpu, got meta", id="device"),
        pytest.param(
            {"teacher": partial(tiny_llama, 1, vocab_size=VOCAB + 3)},
            r"`teacher` must have the model's vocabulary of 61 tokens, got 64",
            id="teacher",
        ),
        pytest.param(
            {"model": partial(tiny_llama, 0, model_class=Capped)},
            r"`model` must not change its logits .* as Capped does",
            id="capped",
        ),
        pytest.param(
            {"model": partial(tiny_llama, 0, model_class=HeadUnused)},
            r"must call its output head as a module, which HeadUnused does not",
            id="head unused",
        ),
        pytest.param(
            {"model": partial(tiny_llama, 0, model_class=LlamaModel)},
            r"LlamaModel has no output head",
            id="no head",
        ),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {"model": partial(tiny_llama, 0), "windows": token_windows(), **change}
    arguments = {name: value() if isinstance(value, partial) else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        evaluate_language_model(**arguments, progress=False)


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def greedy_words(model: Any, prompt: str, count: int) -> list[str]:
    """Greedy decoding by its definition: the whole text again for every token."""
    ids = [WORDS.index(word) for word in prompt.split()]
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return [WORDS[index] for index in ids[start:]]


def test_samples_are_greedy_whatever_the_generation_config_says():
    model = tiny_llama(0)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, num_beams=3, repetition_penalty=50.0, no_repeat_ngram_size=1
    )
    before = model.generation_config.to_dict()
    model.train()
    prompts = ["w1 w2 w3", "w7", "w9 w9 w9 w9 w9"]
    samples = generation_sample(model, word_tokenizer(), prompts, 12)
    assert len({sample["completion"] for sample in samples}) == 3
    assert model.training
    assert model.generation_config.to_dict() == before
    model.eval()
    assert [sample["prompt"] for sample in samples] == prompts
    for sample in samples:
        words = greedy_words(model, sample["prompt"], 12)
        assert sample["completion"].split() == words
        assert sample["repetition"] == repeated_share([WORDS.index(word) for word in words])


@pytest.mark.parametrize("place", ["model", "list", "tokenizer"])
def test_samples_end_at_the_end_token(place):
    model = tiny_llama(0)
    words = greedy_words(model, "w1 w2 w3", 12)
    end = next(word for word in words[2:] if word != words[0])
    unwritten = next(word for word in WORDS if word not in words)
    tokenizer = word_tokenizer(**({"eos_token": end} if place == "tokenizer" else {}))
    if place != "tokenizer":
        index = WORDS.index(end)
        model.generation_config.eos_token_id = index if place == "model" else [WORDS.index(unwritten), index]
    sample = generation_sample(model, tokenizer, ["w1 w2 w3"], 12)[0]
    assert sample["completion"].split() == words[: words.index(end)]
    assert 0 < words.index(end) < 12


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        pytest.param("w1", 3, r"`prompts` must be a list of texts, got the text 'w1'", id="text for a list"),
        pytest.param(["w1", ""], 3, r"`prompts` must be texts of at least one token, got ''", id="empty prompt"),
        pytest.param(["w1"], 0, r"`max_new_tokens` must be at least 1, got 0", id="no tokens"),
    ],
)
def test_bad_prompts_are_refused(prompts, count, message):
    with pytest.raises(ValueError, match=message):
        generation_sample(tiny_llama(0), word_tokenizer(), prompts, count)


@pytest.mark.parametrize(
    ("tokens", "n", "share"),
    [
        pytest.param([], 4, 0.0, id="nothing"),
        pytest.param([1, 2, 3], 4, 0.0, id="shorter than an n-gram"),
        pytest.param([1, 2, 3, 4], 4, 0.0, id="one n-gram"),
        pytest.param([1, 2, 3, 4, 5, 6], 4, 0.0, id="all different"),
        pytest.param([5] * 13, 4, 0.9, id="one token over and over"),
        pytest.param([1, 2, 1, 2, 1, 2, 1], 4, 0.5, id="two in turn"),
        pytest.param([1, 2, 1], 1, 1 / 3, id="single tokens"),
    ],
)
def test_repeated_share(tokens, n, share):
    assert repeated_share(tokens, n) == pytest.approx(share)


def test_the_repeat_loss_is_that_of_the_repetition_of_a_passage() -> None:
    model = tiny_llama(0)
    ids = torch.randint(0, VOCAB, (400,), generator=torch.Generator().manual_seed(1))
    expected = 0.0
    for start in (0, 122, 244):  # 400 - 96 - 60 = 244
        text = torch.cat([ids[start : start + 156], ids[start : start + 96]])
        with torch.no_grad():
            logits = model(text[None]).logits[0, -89:-1].double()
        expected += float(torch.nn.functional.cross_entropy(logits, text[-88:])) / 3
    assert repeat_loss(model, ids, 60) == pytest.approx(expected, rel=1e-5)
    assert repeat_loss(model, ids[:155], 60) is None
