"""Attention rollout: how much of each token reaches each position through all layers and residual connections.

Source: Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (arXiv 2005.00928), section 3. A layer passes on
half of its input by the residual connection and half by attention, averaged over the heads.

Signed matrices become shares of absolute weights first (`attention_statistics.row_shares`), each head for itself. The
code of Ali et al. (arXiv 2403.01590; AmeenAli/HiddenMambaAttn@064fe08, `vim/xai_utils.py`) averages the signed weights
of the channels instead, whose rows may cancel or sum to less than nothing.

Symbols: L length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["attention_rollout"]


def attention_rollout(layers: Sequence[Tensor | None]) -> Tensor:
    """Multiply `0.5 A + 0.5 I` over the layers, with rows scaled to sum to 1.

    Args:
        layers: for each layer, from the first on, the (L, L) mean of its heads' shares; rows are non-negative. A row of
            zeros, of a token that the layer leaves out, passes on its input alone. None: a layer without a mixer.

    Returns:
        (L, L) float64, rows sum to 1: the share of each input token in each output.

    Raises:
        ValueError: if there is no layer with a matrix, a matrix is not square or of another size, or has a negative
            weight.
    """
    matrices = [shares for shares in layers if shares is not None]
    if not matrices:
        raise ValueError("layers must have at least one matrix, got none.")
    length = matrices[0].shape[-1]
    identity = torch.eye(length, dtype=torch.float64, device=matrices[0].device)
    rollout = identity
    for shares in matrices:
        if tuple(shares.shape) != (length, length):
            raise ValueError(f"layers must be matrices of shape {(length, length)}, got {tuple(shares.shape)}.")
        if bool((shares < 0).any()):
            raise ValueError("layers must be non-negative, got a negative weight. Pass shares (`row_shares`).")
        mixed = 0.5 * shares.double() + 0.5 * identity
        rollout = (mixed / mixed.sum(-1, keepdim=True)) @ rollout
    return rollout
