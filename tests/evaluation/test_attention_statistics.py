"""Statistics, distances and rollout of matrices, against values by hand."""

import math

import numpy as np
import pytest
import torch

from ssm_zoo.evaluation.attention_matrices import LayerAttention
from ssm_zoo.evaluation.attention_report import describe_stack
from ssm_zoo.evaluation.attention_rollout import attention_rollout
from ssm_zoo.evaluation.attention_statistics import first_row, head_distances, head_statistics, row_shares

SIGNED = torch.tensor([[[2.0, 0.0, 0.0], [-1.0, 3.0, 0.0], [1.0, -1.0, 2.0]]])
OTHER = torch.tensor([[[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])


def test_shares_are_absolute_weights_over_their_sum() -> None:
    expected = torch.tensor([[[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.25, 0.25, 0.5]]], dtype=torch.float64)
    assert torch.equal(row_shares(SIGNED), expected)
    assert torch.equal(row_shares(torch.zeros(2, 3)), torch.zeros(2, 3, dtype=torch.float64))
    assert row_shares(torch.full((1, 2), 1e-40)).tolist() == [[0.5, 0.5]]


def test_statistics_by_hand() -> None:
    found = head_statistics(row_shares(SIGNED), first_row(SIGNED))
    assert found["distance"].tolist() == [(0.25 + (2 * 0.25 + 0.25)) / 2]
    assert found["first"].tolist() == [0.25]
    rows = [-0.25 * math.log(0.25) - 0.75 * math.log(0.75), 1.5 * math.log(2)]
    assert found["entropy"].tolist() == pytest.approx([sum(rows) / 2])
    # A query without weights, as in selective attention, does not count; a head without any has no value.
    gated = SIGNED.clone()
    gated[0, 1] = 0
    assert head_statistics(row_shares(gated), 1)["first"].tolist() == [0.25]
    assert head_statistics(torch.zeros(1, 3, 3), 1)["entropy"].isnan().all()
    assert first_row(SIGNED) == 1 and first_row(SIGNED.mT) == 0 and first_row(SIGNED[:, :2]) == 0
    assert "distance" not in head_statistics(row_shares(SIGNED[:, :2]))


def test_distances_by_hand() -> None:
    student, teacher = row_shares(SIGNED), row_shares(OTHER)
    found = head_distances(student, teacher, 1)

    def js(p: list[float], q: list[float]) -> float:
        mixture = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        return sum(0.5 * a * math.log2(a / m) for each in (p, q) for a, m in zip(each, mixture, strict=True) if a > 0)

    expected = [js([0.25, 0.75, 0], [1, 0, 0]), js([0.25, 0.25, 0.5], [0, 0, 1])]
    assert found["js"].tolist() == pytest.approx([sum(expected) / 2])
    assert found["kl"].tolist() == pytest.approx([(math.log(4) + math.log(2)) / 2])
    assert found["same_top"].tolist() == [0.5]
    assert found["top_mass"].tolist() == [0.375]
    assert head_distances(teacher, student, 1)["kl"].tolist() == [math.inf]
    assert head_distances(teacher, teacher.flip(-1), 1)["js"].tolist() == [1.0]
    same = head_distances(student, student)
    assert [same[key].item() for key in ("js", "kl", "same_top")] == [0.0, 0.0, 1.0]
    assert head_distances(student, torch.zeros_like(student))["js"].isnan().all()


def test_an_infinite_divergence_has_no_number_in_the_report() -> None:
    def layer(matrix: torch.Tensor) -> LayerAttention:
        shares = row_shares(matrix)
        return LayerAttention(0, "any", 1, (0,), matrix, shares[0], 1, head_statistics(shares, 1))

    class Stack:
        name, num_layers = "layers", 1

        def __init__(self, matrix: torch.Tensor) -> None:
            self.layers = (layer(matrix),)

    (row,) = describe_stack(Stack(OTHER), Stack(SIGNED))["layers"]
    assert row["to_teacher"]["kl"] == {"mean": None, "heads": [None]}
    assert row["to_teacher"]["of"] == "heads" and 0 < row["to_teacher"]["js"]["mean"] < 1


def test_rollout_is_the_product_over_the_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [row_shares(torch.rand(5, 5, generator=generator).tril()) for _ in range(3)]
    expected = np.eye(5)
    for shares in layers:
        expected = (0.5 * shares.numpy() + 0.5 * np.eye(5)) @ expected
    rollout = attention_rollout([layers[0], None, *layers[1:]])
    np.testing.assert_allclose(rollout.numpy(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(rollout.sum(-1), torch.ones(5, dtype=torch.float64))
    # A token that a layer leaves out passes on itself.
    layers[1][3] = 0
    torch.testing.assert_close(attention_rollout(layers[:2])[3], attention_rollout(layers[:1])[3])


def test_rollout_refuses_what_are_no_shares() -> None:
    with pytest.raises(ValueError, match="layers must have at least one matrix, got none"):
        attention_rollout([None])
    with pytest.raises(ValueError, match="layers must be non-negative"):
        attention_rollout([SIGNED[0]])
    with pytest.raises(ValueError, match=r"layers must be matrices of shape \(3, 3\), got \(2, 2\)"):
        attention_rollout([OTHER[0], OTHER[0, :2, :2]])
