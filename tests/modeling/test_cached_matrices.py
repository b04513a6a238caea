"""`output_attentions` with a cache: the rows of the new tokens in the matrix of the whole row."""

from typing import Any

import pytest
import torch
from families import FAMILIES, draw_ids, make_model
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ssm_zoo.modeling.cache import CACHE_FIELD, RecurrentLayer
from ssm_zoo.modeling.rollback import restore, snapshot
from tolerances import TOLERANCES

PIECES = [(0, 6), (6, 7), (7, 9), (9, 10)]
IDS = draw_ids(2, 10)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    rtol, atol = TOLERANCES[torch.float32]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def padding() -> Tensor:
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    mask[1, 4:7] = 0
    return mask


@torch.no_grad()
def rows(model: Any, ids: Tensor, mask: Tensor | None, cache: Any, begin: int, end: int) -> tuple[Tensor | None, ...]:
    """Every layer's matrix of a forward over columns `begin` to `end`."""
    mask = None if mask is None else mask[:, :end]
    return model(ids[:, begin:end], attention_mask=mask, cache=cache, use_cache=True, output_attentions=True).attentions


@pytest.mark.parametrize("mask", [None, padding()], ids=["whole", "padded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_with_a_cache_are_those_without(name: str, mask: Tensor | None) -> None:
    model = make_model(name)
    with torch.no_grad():
        expected = model(IDS, attention_mask=mask, use_cache=False, output_attentions=True).attentions
    cache = DynamicCache(config=model.config)
    for begin, end in PIECES:
        actual = rows(model, IDS, mask, cache, begin, end)
        for piece, matrix in zip(actual, expected, strict=True):
            if matrix is None:
                assert piece is None
                continue
            assert piece is not None
            assert piece.shape == (*matrix.shape[:2], end - begin, end)
            real = 1 if mask is None else mask[:, None, begin:end, None]
            assert_close(piece * real, matrix[:, :, begin:end, :end] * real)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_generate_returns_the_rows_of_each_step(name: str, beams: int) -> None:
    model = make_model(name)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    result = model.generate(
        IDS, attention_mask=padding(), output_attentions=True, return_dict_in_generate=True, **options
    )
    assert len(result.attentions) == 3
    for step, layers in enumerate(result.attentions):
        assert len(layers) == model.config.num_hidden_layers
        for matrix in layers:
            new, columns = (1 if step else 10), 10 + step
            assert matrix is None or (matrix.shape[0], *matrix.shape[2:]) == (2 * beams, new, columns)
    if beams == 1:
        mask = torch.nn.functional.pad(padding(), (0, 2), value=1)
        with torch.no_grad():
            whole = model(result.sequences[:, :-1], attention_mask=mask, use_cache=False, output_attentions=True)
        for matrix, expected in zip(result.attentions[-1], whole.attentions, strict=True):
            assert expected is None or torch.allclose(matrix, expected[:, :, -1:], atol=1e-5)


@pytest.mark.parametrize("name", ["mamba", "mamba2-full", "all-four", "taipan", "mixer"])
def test_recurrent_layers_have_no_rows_over_tokens_for_which_none_were_asked(name: str) -> None:
    model = make_model(name)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :6], cache=cache, use_cache=True)
        expected = model(IDS, use_cache=False, output_attentions=True).attentions
    for layer, matrix, whole in zip(cache.layers, rows(model, IDS, None, cache, 6, 10), expected, strict=True):
        if layer._layer_type == RecurrentLayer._layer_type:  # the class is that of whichever code was loaded last
            assert matrix is None
        else:
            assert matrix is not None
            assert_close(matrix, whole[:, :, 6:])


@pytest.mark.parametrize("name", ["mamba", "mamba2", "discrete"])
def test_what_matrices_are_made_of_follows_the_rows_of_the_cache(name: str) -> None:
    model = make_model(name)
    turned = torch.tensor([1, 0])
    cache = DynamicCache(config=model.config)
    rows(model, IDS, None, cache, 0, 6)
    saved = snapshot(cache)
    cache.reorder_cache(turned)
    actual = rows(model, IDS[turned], None, cache, 6, 8)
    restore(cache, saved)
    for matrix, expected in zip(actual, rows(model, IDS, None, cache, 6, 8), strict=True):
        assert matrix is not None and expected is not None
        assert_close(matrix[turned], expected)
    cache.reset()
    assert all(layer.factors is None for layer in cache.layers)


def test_a_forward_that_asks_for_no_matrix_keeps_nothing_for_it() -> None:
    model = make_model("mamba2")
    with torch.no_grad():
        cache = model(IDS, use_cache=True)[CACHE_FIELD]
    assert all(layer.factors is None for layer in cache.layers)
