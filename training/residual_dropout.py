"""Dropout on what mixers and MLPs add to the residual stream, for any family, while a model is trained.

The models have no dropout of their own: it is a choice of a training and not part of a checkpoint. Hooks apply it, so
neither weights nor configuration of the saved model know of it.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

_ADDED = {"mixer", "attention", "cross_attention", "mlp"}
"""Names of the modules of a block whose outputs are added to the residual stream."""


def add_residual_dropout(model: nn.Module, share: float) -> int:
    """Drop a share of the outputs of all mixers and MLPs in training mode; in evaluation mode nothing changes.

    What is left is scaled by 1 / (1 - share), as in torch's dropout.

    Args:
        model: a model of the zoo, with adapters or without.
        share: probability with which an entry becomes 0, below 1; 0 changes nothing.

    Returns:
        The number of modules whose outputs are dropped.

    Raises:
        ValueError: if the model has no such module.
    """
    if share == 0:
        return 0
    found = 0
    for blocks in (module for name, module in model.named_modules() if name.rpartition(".")[2] == "layers"):
        for block in blocks.children():
            for name, module in block.named_children():
                if name in _ADDED:
                    module.register_forward_hook(_Drop(share))
                    found += 1
    if not found:
        raise ValueError(f"`residual_dropout` must be 0 for {type(model).__name__}, which has no blocks, got {share}.")
    return found


class _Drop:
    """A forward hook; a class, so that a model with hooks can be copied and pickled."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, module: nn.Module, _: Any, output: Any) -> Any:
        if not module.training:
            return None
        if isinstance(output, Tensor):
            return F.dropout(output, self.share)
        return (F.dropout(output[0], self.share), *output[1:])
