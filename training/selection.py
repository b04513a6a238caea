"""What a model with selective layers says of itself: its auxiliary loss, and how many tokens each layer selects.

Such a model (Taipan, arXiv 2410.18572) gives beside its logits `aux_loss`, a scalar that is in its `loss` while
training (`add_aux_loss` of `modeling/outputs.py`), and `selection_rate`, the share of the tokens that each selective
layer selects. Other models give neither, and nothing here has an effect then.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SelectionMeans:
    """Means of auxiliary loss and selection rates over several forwards."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weight = 0.0

    def add(self, outputs: Any, weight: float = 1.0) -> None:
        """Count a forward.

        Args:
            outputs: of the model; `aux_loss` is () and `selection_rate` (layers,), or a tuple of () for each.
            weight: of this forward in the mean.
        """
        self._weight += weight
        for name in ("aux_loss", "selection_rate"):
            value = getattr(outputs, name, None)
            if value is not None:
                tensor = torch.stack(tuple(value)) if isinstance(value, list | tuple) else value
                part = weight * tensor.detach().double()
                self._sums[name] = self._sums[name] + part if name in self._sums else part

    def take(self, reduce: Callable[[Tensor], Any] = lambda tensor: tensor) -> dict[str, Any]:
        """The means, and begin anew.

        Args:
            reduce: takes the mean of a tensor over the processes.

        Returns:
            "aux_loss", a number, and "selection_rate", a list with one in [0, 1] for each selective layer, as far as
            the model gave them.
        """
        means = {name: reduce(total / self._weight).tolist() for name, total in self._sums.items()}
        self._sums, self._weight = {}, 0.0
        return means
