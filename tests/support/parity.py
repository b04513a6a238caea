"""Checks that a model of transformers and one of ours with its weights are the same."""

from collections.abc import Callable
from typing import Any

import torch
from families import draw_ids
from torch import Tensor


def close(actual: Tensor, expected: Tensor, name: str = "logits") -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5, msg=lambda text: f"{name}: {text}")


def check_logits(pair: tuple[Any, Any], length: int) -> None:
    theirs, ours = pair
    ids = draw_ids(2, length)
    with torch.no_grad():
        expected = theirs(ids).logits
        assert expected.std() > 0.3
        close(ours(ids).logits, expected)


def check_left_padded_batch(pair: tuple[Any, Any]) -> None:
    """Of recurrent models: the batch, and each row by itself."""
    theirs, ours = pair
    ids, mask = draw_ids(3, 17), torch.ones(3, 17, dtype=torch.long)
    mask[0, :9] = mask[1, :15] = 0
    with torch.no_grad():
        actual = ours(ids, attention_mask=mask).logits
        if not theirs.config.use_bias:  # with it, transformers' padding leaks through the bias of in_proj
            close(actual[mask == 1], theirs(ids, attention_mask=mask).logits[mask == 1])
        for i, row in enumerate(ids):
            close(actual[i, mask[i] == 1], theirs(row[None, mask[i] == 1]).logits[0])


def check_gradients(pair: tuple[Any, Any], renamed: Callable[[str], str] = str) -> dict[str, Tensor]:
    """The loss and the gradient of every parameter.

    Args:
        pair: theirs and ours.
        renamed: from their names of parameters to ours, which it leaves alone.

    Returns:
        Their gradients by name, to see that they are worth comparing.
    """
    losses, gradients = [], []
    ids = draw_ids(2, 19)
    for model in pair:
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({renamed(name): parameter.grad for name, parameter in model.named_parameters()})
    close(losses[1], losses[0], "loss")
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient, name)
    return gradients[0]
