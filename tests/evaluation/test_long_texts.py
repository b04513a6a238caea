"""Long texts by position, against windows that one forward reads."""

from typing import Any

import pytest
import torch
from families import make_model
from scored_models import tiny_llama, token_windows

from ssm_zoo.evaluation.by_position import evaluate_by_position
from ssm_zoo.evaluation.long_texts import evaluate_long_texts
from ssm_zoo.reports.length_plot import draw_length


@pytest.mark.parametrize("chunk", [1, 5, 64], ids=["single tokens", "chunks", "whole bins"])
@pytest.mark.parametrize("make", [lambda: tiny_llama(0), lambda: make_model("all-four")], ids=["transformers", "zoo"])
def test_chunks_give_the_losses_of_whole_windows(make: Any, chunk: int) -> None:
    model, windows = make().train(), token_windows(2, 21)
    rows = evaluate_long_texts(model, windows, chunk=chunk, first=4, progress=False)
    expected = evaluate_by_position({"model": model}, windows, first=4, progress=False)["model"]
    for row, other in zip(rows, expected, strict=True):
        assert [row[key] for key in ("start", "end", "tokens")] == [other[key] for key in ("start", "end", "tokens")]
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert row["read"] == 2 * (row["end"] - row["start"])
        assert row["seconds"] > 0 and row["memory_bytes"] > 2**20
    assert model.training


def test_the_cache_of_a_recurrent_model_does_not_grow() -> None:
    windows = token_windows(1, 64)
    found = {
        name: [row["cache_bytes"] for row in evaluate_long_texts(model, windows, chunk=8, first=8, progress=False)]
        for name, model in {"mamba2": make_model("mamba2"), "llama": tiny_llama(0)}.items()
    }
    assert len(found["mamba2"]) == 4 and len(set(found["mamba2"])) == 1
    assert found["llama"] == [found["llama"][0] * factor for factor in (1, 2, 4, 8)]


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="`chunk` must be at least 1, got 0"):
        evaluate_long_texts(tiny_llama(0), token_windows(), chunk=0)
    with pytest.raises(ValueError, match="token ids of Llama"):
        evaluate_long_texts(tiny_llama(0), torch.full((1, 4), 61))


def test_losses_that_are_not_finite_are_no_result() -> None:
    model: Any = make_model("mamba2")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(3e38)
    with pytest.raises(ValueError, match="`model` must compute finite losses, which it does not"):
        evaluate_long_texts(model, token_windows(1, 8), progress=False)


def test_the_picture_has_a_line_for_each_model_and_no_empty_panel() -> None:
    row = {"end": 128, "loss": 2.0, "read": 128, "seconds": 0.5, "cache_bytes": 2**20, "memory_bytes": 2**22}
    figure = draw_length({"a": [row, row | {"end": 256}], "b": [row]})
    assert [axes.get_title() for axes in figure.axes] == [
        "Loss by position",
        "Reading",
        "Cache",
        "Memory of the process",
    ]
    assert [line.get_ydata()[0] for line in figure.axes[1].lines] == [256.0, 256.0]
    assert len(draw_length({"a": [row | {"loss": None}]}).axes) == 3
    with pytest.raises(ValueError, match="1 to 8 models, got 0"):
        draw_length({})
