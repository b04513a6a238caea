"""The ranking losses: against sentence-transformers' own, written out, and with groups of different sizes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

from sentence_transformers.cross_encoder import CrossEncoder, losses

from ssm_zoo.training.ranking_losses import LOSSES

SIZES = (4, 6, 2)


class Scores(CrossEncoder):
    """A reranker whose scores are given in advance: the text of a document is its number."""

    def __init__(self, values: Tensor) -> None:
        nn.Module.__init__(self)
        self.values = values

    num_labels = 1  # pyright: ignore[reportAssignmentType]
    device = torch.device("cpu")  # pyright: ignore[reportAssignmentType]

    def preprocess(self, inputs: Any, **options: Any) -> dict[str, Any]:
        return {"which": torch.tensor([int(document) for _, document in inputs])}

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        return {"scores": self.values[features["which"]][:, None]}


def groups(seed: int = 0) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    scores = (3 * torch.randn(3, 6, generator=generator)).requires_grad_()
    present = torch.arange(6) < torch.tensor(SIZES)[:, None]
    labels = torch.randint(0, 4, (3, 6), generator=generator).float().masked_fill(~present, 0)
    labels[:, 0] = 3.0
    labels[:, 1] = 0.0
    teacher = torch.randn(3, 6, generator=generator)
    return SimpleNamespace(scores=scores, labels=labels, present=present, teacher=teacher)


def documents() -> list[list[str]]:
    return [[str(6 * row + column) for column in range(size)] for row, size in enumerate(SIZES)]


@pytest.mark.parametrize(
    ("name", "theirs"), [("listnet", losses.ListNetLoss), ("lambda", losses.LambdaLoss)], ids=["listnet", "lambda"]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_lists_are_those_of_sentence_transformers(name: str, theirs: Any, seed: int) -> None:
    of = groups(seed)
    labels = [row[:size] for row, size in zip(of.labels, SIZES, strict=True)]
    loss = LOSSES[name].mean(of.scores, of.labels, of.present, None)
    (gradient,) = torch.autograd.grad(loss, of.scores)
    expected = theirs(Scores(of.scores.flatten()))((["a", "b", "c"], documents()), labels)
    (theirs_gradient,) = torch.autograd.grad(expected, of.scores)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, theirs_gradient, rtol=1e-4, atol=1e-6)
    assert gradient[~of.present].abs().max() == 0 and gradient[of.present].abs().max() > 1e-3


def test_margins_and_binary_labels_are_those_of_sentence_transformers() -> None:
    of = groups()
    model = Scores(of.scores.flatten())
    columns = [[str(6 * row + column) for row in range(3)] for column in range(2)]  # two documents in each group
    two = of.present[:, :2]
    loss = LOSSES["margin_mse"].mean(of.scores[:, :2], of.labels[:, :2], two, of.teacher[:, :2])
    margins = of.teacher[:, 0] - of.teacher[:, 1]
    torch.testing.assert_close(loss, losses.MarginMSELoss(model)([["a", "b", "c"], *columns], margins))
    loss = LOSSES["binary"].mean(of.scores, of.labels, of.present, None)
    pairs = [text for row in documents() for text in row]
    binary = losses.BinaryCrossEntropyLoss(model)([["q"] * len(pairs), pairs], (of.labels[of.present] > 0).float())
    torch.testing.assert_close(loss, binary)


def test_the_contrastive_loss_is_the_positive_s_share_of_its_group() -> None:
    of = groups()
    expected = [-row[:size].log_softmax(0)[0] for row, size in zip(of.scores, SIZES, strict=True)]
    loss = LOSSES["lce"].mean(of.scores, of.labels, of.present, None)
    torch.testing.assert_close(loss, torch.stack(expected).mean())


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_missing_has_no_effect(name: str) -> None:
    of = groups()
    loss = LOSSES[name].mean(of.scores, of.labels, of.present, of.teacher)
    other = of.scores.detach().masked_fill(~of.present, 50.0).requires_grad_()
    changed = LOSSES[name].mean(other, of.labels, of.present, of.teacher.masked_fill(~of.present, -9.0))
    torch.testing.assert_close(changed, loss)
    (gradient,) = torch.autograd.grad(changed, other)
    assert bool(gradient.isfinite().all()) and gradient[~of.present].abs().max() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_parts_of_a_step_add_up_to_the_whole(name: str) -> None:
    """The groups have 4, 6 and 2 documents: means of the parts would weigh their terms differently."""
    of = groups()
    whole = LOSSES[name].mean(of.scores, of.labels, of.present, of.teacher)
    (expected,) = torch.autograd.grad(whole, of.scores)
    rows = (slice(0, 1), slice(1, 3))
    terms = [int(LOSSES[name].terms(of.labels[part], of.present[part])) for part in rows]
    parts = [LOSSES[name].total(of.scores[p], of.labels[p], of.present[p], of.teacher[p]) / sum(terms) for p in rows]
    assert terms[0] == {"lce": 1, "listnet": 1, "binary": 4, "margin_mse": 3}.get(name, terms[0])
    total = torch.stack(parts).sum()
    torch.testing.assert_close(total, whole)
    (gradient,) = torch.autograd.grad(total, of.scores)
    torch.testing.assert_close(gradient, expected)
