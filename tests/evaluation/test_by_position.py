"""Scores by position, against `evaluate_language_model` and against logits of whole windows."""

import pytest
import torch
from scored_models import full_logits, related_models, tiny_llama, token_windows

from ssm_zoo.evaluation import language_modeling
from ssm_zoo.evaluation.by_position import evaluate_by_position, position_bins
from ssm_zoo.evaluation.language_modeling import evaluate_language_model


@pytest.mark.parametrize(
    ("length", "first", "bins"),
    [
        pytest.param(2048, 512, [(0, 512), (512, 1024), (1024, 2048)], id="whole bins"),
        pytest.param(700, 128, [(0, 128), (128, 256), (256, 512), (512, 700)], id="a shorter last bin"),
        pytest.param(129, 128, [(0, 128), (128, 129)], id="one token over"),
        pytest.param(20, 128, [(0, 20)], id="less than a bin"),
    ],
)
def test_bins_double_up_to_the_length(length: int, first: int, bins: list[tuple[int, int]]) -> None:
    assert position_bins(length, first) == bins


@pytest.mark.parametrize("chunk", [3, 10_000], ids=["a few predictions at a time", "whole windows"])
def test_bins_weighted_by_their_predictions_give_the_mean(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = language_modeling.LOGITS_COPIES
    monkeypatch.setattr(language_modeling, "LOGITS_BYTES", chunk * 61 * 4 * copies)
    (model, teacher), windows = related_models(), token_windows(3, 21)
    found = evaluate_by_position({"student": model, "teacher": teacher}, windows, teacher="teacher", first=4)
    assert list(found) == ["student", "teacher"]
    rows = found["student"]
    assert [(row["start"], row["end"], row["tokens"]) for row in rows] == [
        (0, 4, 9),
        (4, 8, 12),
        (8, 16, 24),
        (16, 21, 15),
    ]
    whole = evaluate_language_model(model, windows, teacher=teacher, progress=False)
    for key in ("loss", "kl", "top1_agreement"):
        mean = sum(row[key] * row["tokens"] for row in rows) / whole["tokens"]
        assert mean == pytest.approx(whole[key], rel=1e-5), key
    theirs = sum(row["loss"] * row["tokens"] for row in found["teacher"]) / whole["tokens"]
    assert theirs == pytest.approx(whole["teacher_loss"], rel=1e-5)
    assert all(row["kl"] is None and row["top1_agreement"] is None for row in found["teacher"])


def test_a_bin_holds_the_predictions_of_its_own_tokens() -> None:
    (model, teacher), windows = related_models(), token_windows(3, 21)
    rows = evaluate_by_position({"a": model, "b": teacher}, windows, teacher="b", first=4)["a"]
    student, expected = full_logits(model, windows), full_logits(teacher, windows)
    for row in rows:
        predicted = slice(max(row["start"], 1), row["end"])
        before = slice(predicted.start - 1, predicted.stop - 1)
        q, p = student[:, before].log_softmax(-1), expected[:, before].log_softmax(-1)
        targets = windows[:, predicted]
        assert row["loss"] == pytest.approx(-q.gather(-1, targets[..., None]).mean().item(), rel=1e-5)
        assert row["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
        assert row["top1_agreement"] == pytest.approx((q.argmax(-1) == p.argmax(-1)).double().mean().item())


def test_models_without_a_teacher_are_not_compared_and_come_back_as_they_were() -> None:
    model = tiny_llama(0).train()
    rows = evaluate_by_position({"model": model}, token_windows())["model"]
    assert len(rows) == 1 and rows[0]["kl"] is None and rows[0]["tokens"] == 40
    assert model.training


def test_bad_input_is_refused() -> None:
    model, windows = tiny_llama(0), token_windows()
    with pytest.raises(ValueError, match=r"`teacher` must be the name of one of the models, a, got 'b'"):
        evaluate_by_position({"a": model}, windows, teacher="b")
    with pytest.raises(ValueError, match=r"`windows` must be int64 .*, got torch.int64 of shape \(9,\)"):
        evaluate_by_position({"a": model}, windows[0])
    with pytest.raises(ValueError, match=r"`first` must be at least 2, got 1"):
        evaluate_by_position({"a": model}, windows, first=1)
    with pytest.raises(ValueError, match=r"vocabularies of one size, got \{'a': 61, 'b': 64\}"):
        evaluate_by_position({"a": model, "b": tiny_llama(1, vocab_size=64)}, windows)
    with pytest.raises(ValueError, match="token ids of Llama"):
        evaluate_by_position({"a": model}, torch.full((1, 4), 61))
