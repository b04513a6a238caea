"""Losses of scores within groups: a query with M documents, of which some may be missing.

All take (G, M) scores, labels and a mask and return () in float32: the sum over their terms, which are groups,
documents or pairs. The loss is this sum divided by the number of terms. A step of several batches or processes divides
by the number of all its terms, so that the loss does not depend on how the groups are split. sentence-transformers has
the same losses, but computes the scores inside them, pair by pair in padded rows; here they come from packed rows. The
tests compare the values with its losses.

Symbols: G groups, M documents of the largest group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_FAR = -1e16


class RankingLoss(NamedTuple):
    """A loss as the sum over its terms.

    Attributes:
        total: sum of the terms, from scores, labels, mask and the teacher's scores or None.
        terms: number of the terms, from labels and mask: () int64.
    """

    total: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    terms: Callable[[Tensor, Tensor], Tensor]

    def mean(self, scores: Tensor, labels: Tensor, present: Tensor, teacher: Tensor | None) -> Tensor:
        """Return the () loss of groups that are not part of a larger step; 0 without a term."""
        return self.total(scores, labels, present, teacher) / self.terms(labels, present).clamp(min=1)


def localised_contrastive(scores: Tensor, labels: Tensor, present: Tensor, teacher: Tensor | None) -> Tensor:
    """Return the sum over the groups of -log softmax of the first document's score (LCE, arXiv 2101.08751).

    Args:
        scores: (G, M), the positive first.
        labels: not read.
        present: (G, M) False where a group has no document.
        teacher: not read.
    """
    return -_logs(scores, present)[:, 0].sum()


def binary(scores: Tensor, labels: Tensor, present: Tensor, teacher: Tensor | None) -> Tensor:
    """Return the sum over all documents of the binary cross-entropy; a label above 0 is relevant.

    Args:
        scores: (G, M) logits.
        labels: (G, M) grades.
        present: (G, M) False where a group has no document.
        teacher: not read.
    """
    relevant = (labels > 0).float()[present]
    return F.binary_cross_entropy_with_logits(scores.float()[present], relevant, reduction="sum")


def margin_mse(scores: Tensor, labels: Tensor, present: Tensor, teacher: Tensor | None) -> Tensor:
    """Return the sum of squared differences between our margins and the teacher's (MarginMSE, arXiv 2010.02666).

    A margin is the score of the first document minus that of another.

    Args:
        scores: (G, M), the positive first.
        labels: not read.
        present: (G, M) False where a group has no document.
        teacher: (G, M) scores of the teacher.
    """
    assert teacher is not None
    ours, theirs = (values.float()[:, :1] - values.float()[:, 1:] for values in (scores, teacher))
    return (ours - theirs)[present[:, 1:]].square().sum()


def listnet(scores: Tensor, labels: Tensor, present: Tensor, teacher: Tensor | None) -> Tensor:
    """Return the sum over the groups of the cross-entropy from softmax of the labels to softmax of the scores.

    ListNet with the top-one probabilities (Cao et al., ICML 2007).

    Args:
        scores: (G, M).
        labels: (G, M) grades.
        present: (G, M) False where a group has no document.
        teacher: not read.
    """
    wanted = labels.float().masked_fill(~present, -math.inf).softmax(-1)
    return -(wanted * _logs(scores, present)).sum()


def lambda_loss(scores: Tensor, labels: Tensor, present: Tensor, teacher: Tensor | None) -> Tensor:
    """Return LambdaLoss with the weights of NDCG-Loss2++ (Wang et al., CIKM 2018), mu = 10, sigma = 1.

    It is the sum, over the pairs of a group whose labels differ, of -log2 of the probability of the right order, times
    the pair's weight: the difference of their gains, by that of discounts of the distance of their ranks and of the
    ranks themselves. The ranks are those by the scores.

    Args:
        scores: (G, M).
        labels: (G, M) grades of at least 0.
        present: (G, M) False where a group has no document.
        teacher: not read.
    """
    ranked, order = scores.float().masked_fill(~present, _FAR).sort(descending=True, dim=-1, stable=True)
    grades, there = labels.float().gather(1, order), present.gather(1, order)
    rank = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    discount = torch.log2(1.0 + rank)
    powers = (2.0**grades - 1).masked_fill(~there, 0)
    ideal = (powers.sort(descending=True, dim=-1).values / discount).sum(-1, keepdim=True).clamp(min=1e-10)
    gain = powers / ideal
    distance = (rank[:, None] - rank[None, :]).abs()
    inverse = 1 / discount
    # Loss2 bounds a pair's change of DCG by the discounts at the distance of the ranks and one above it.
    loss2 = (inverse[(distance - 1).clamp(min=0)] - inverse[distance]).abs().masked_fill(distance == 0, 0)
    weight = (10 * loss2 + (1 / discount[:, None] - 1 / discount[None, :]).abs()) * (
        gain[:, :, None] - gain[:, None, :]
    ).abs()
    above = (grades[:, :, None] > grades[:, None, :]) & there[:, :, None] & there[:, None, :]
    losses = weight * F.logsigmoid(ranked[:, :, None] - ranked[:, None, :]) / math.log(2)
    return -losses.masked_fill(~above, 0).sum()


def _logs(scores: Tensor, present: Tensor) -> Tensor:
    """Return the (G, M) log softmax over the present documents, finite at the others."""
    return scores.float().masked_fill(~present, _FAR).log_softmax(-1).masked_fill(~present, 0)


def _groups(labels: Tensor, present: Tensor) -> Tensor:
    return present.any(-1).sum()


def _documents(labels: Tensor, present: Tensor) -> Tensor:
    return present.sum()


def _margins(labels: Tensor, present: Tensor) -> Tensor:
    return present[:, 1:].sum()


def _pairs(labels: Tensor, present: Tensor) -> Tensor:
    """Return the number of pairs of documents in a group whose labels differ."""
    above = labels[:, :, None] > labels[:, None, :]
    return (above & present[:, :, None] & present[:, None, :]).sum()


LOSSES: dict[str, RankingLoss] = {
    "lce": RankingLoss(localised_contrastive, _groups),
    "binary": RankingLoss(binary, _documents),
    "margin_mse": RankingLoss(margin_mse, _margins),
    "listnet": RankingLoss(listnet, _groups),
    "lambda": RankingLoss(lambda_loss, _pairs),
}
LISTWISE = ("listnet", "lambda")
"""Losses that read a list of graded documents, the others one positive and its negatives."""
