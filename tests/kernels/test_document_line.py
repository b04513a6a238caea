"""Documents of packed rows as rows of their own, and back."""

import pytest
import torch

from ssm_zoo.kernels.position_mix_torch import DocumentLines


def test_documents_of_about_one_length_share_a_table() -> None:
    seq_idx = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, -1], [-1, 5, 5, 5, -1, 5, 7, 8, 8]])
    lines = DocumentLines(seq_idx)
    assert lines.longest == 4
    assert lines.sizes == [(2, 1), (1, 2), (3, 4)]
    tokens = torch.arange(18.0).view(2, 9, 1)
    ones, two, fours = (table.squeeze(-1).tolist() for table in lines.lay_out(tokens))
    assert ones == [[3], [15]]
    assert two == [[16, 17]]
    assert fours == [[0, 1, 2, 0], [4, 5, 6, 7], [10, 11, 12, 14]]


@pytest.mark.parametrize("length", [1, 2, 3, 17, 64])
def test_no_more_than_twice_as_many_places_as_tokens(length: int) -> None:
    """One long document among many short ones, in rows that are twice as long as it."""
    seq_idx = torch.cat([torch.zeros(length, dtype=torch.long), torch.arange(1, length + 1)]).expand(3, -1)
    lines = DocumentLines(seq_idx)
    assert sum(documents * longest for documents, longest in lines.sizes) <= 2 * seq_idx.numel()


@pytest.mark.usefixtures("poisoned_empty")
def test_there_and_back() -> None:
    generator = torch.Generator().manual_seed(0)
    seq_idx = torch.randint(0, 3, (4, 30), generator=generator).cumsum(1)
    seq_idx[torch.rand(4, 30, generator=generator) < 0.3] = -1
    lines = DocumentLines(seq_idx)
    x = torch.randn(4, 30, 2, 3, generator=generator).requires_grad_()
    y = lines.gather_back(lines.lay_out(x))
    assert torch.equal(lines.real, seq_idx >= 0)
    assert torch.equal(y, x.masked_fill((seq_idx < 0)[..., None, None], 0))
    (dx,) = torch.autograd.grad(y.square().sum() / 2, x)
    assert torch.equal(dx, y)


def test_what_stands_at_padding_goes_nowhere() -> None:
    seq_idx = torch.tensor([[-1, 0, 0, -1, 1]])
    lines = DocumentLines(seq_idx)
    x = torch.full((1, 5, 1), torch.nan)
    x[0, [1, 2, 4]] = 1.0
    assert all(table.isfinite().all() for table in lines.lay_out(x))


def test_gradients_are_those_of_a_copy() -> None:
    lines = DocumentLines(torch.tensor([[0, 0, 1, -1], [2, 2, 2, 2]]))
    x = torch.randn(2, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lines.gather_back([3 * table for table in lines.lay_out(x)]), (x,))


@pytest.mark.parametrize(
    ("seq_idx", "whole"),
    [
        ([[0] * 7, [3] * 7], True),
        ([[0] * 7, [-1] + [3] * 6], False),
        ([[0] * 7, [3] * 6 + [4]], False),
        ([[0] * 6 + [-1], [3] * 6 + [-1]], False),
        ([[-1] * 7, [0] * 4 + [1] * 3], False),
    ],
)
def test_rows_that_are_one_document_each(seq_idx: list[list[int]], whole: bool) -> None:
    assert DocumentLines(torch.tensor(seq_idx)).whole == whole


def test_no_document_at_all() -> None:
    lines = DocumentLines(torch.full((2, 3), -1))
    assert (lines.longest, lines.sizes, lines.real.any().item()) == (0, [], False)
