"""The loss on held-out rows, and the means of what models with selective layers return beside it."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..modeling.selective_attention import without_attention
from .packing import Row


class SelectionMeans:
    """Means of the auxiliary outputs of a model with selective layers, over several forward passes.

    The outputs of such a model (Taipan, arXiv 2410.18572) have an `aux_loss`, a scalar that is part of the training
    `loss` (`add_aux_loss` of `modeling/outputs.py`), and a `selection_rate`, the share of tokens that each selective
    layer selects. For other models this class has no effect.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weight = 0.0

    def add(self, outputs: Any, weight: float = 1.0) -> None:
        """Add the outputs of a forward pass.

        Args:
            outputs: outputs of the model; `aux_loss` is () and `selection_rate` (layers,) or a tuple of ().
            weight: weight of this pass in the mean.
        """
        self._weight += weight
        for name in ("aux_loss", "selection_rate"):
            value = getattr(outputs, name, None)
            if value is not None:
                tensor = torch.stack(tuple(value)) if isinstance(value, list | tuple) else value
                part = weight * tensor.detach().double()
                self._sums[name] = self._sums[name] + part if name in self._sums else part

    def take(self, reduce: Callable[[Tensor], Any] = lambda tensor: tensor) -> dict[str, Any]:
        """Return the means and start again from zero.

        Args:
            reduce: computes the mean of a tensor over the processes.

        Returns:
            "aux_loss", a number, and "selection_rate", a list of numbers in [0, 1], one for each selective layer; empty
            for a model without such layers.
        """
        means = {name: reduce(total / self._weight).tolist() for name, total in self._sums.items()}
        self._sums, self._weight = {}, 0.0
        return means


class Rows(Protocol):
    """Rows of a data set, and the number of tokens that they predict."""

    @property
    def targets(self) -> int: ...
    def __len__(self) -> int: ...


def heldout_loss(model: nn.Module, rows: Rows, collator: Callable[..., Row], batch_size: int) -> dict[str, Any]:
    """Compute the mean loss over all predictions of some rows, in evaluation mode.

    Args:
        model: a causal language model or an encoder-decoder, or one with adapters.
        rows: the packed documents, or other rows.
        collator: collator of the rows.
        batch_size: rows in one forward pass.

    Returns:
        "loss" in nats per token, "perplexity", its exponential (None if that overflows), and "tokens", the number of
        predictions; for a model with selective layers also the means of `SelectionMeans` over the tokens, and
        "loss_without_attention", the loss when no token attends: what attention is worth is the difference.
    """
    training, selection = model.training, SelectionMeans()
    device = next(model.parameters()).device

    def total(selection: SelectionMeans) -> float:
        # With its own generator, so that an evaluation does not change the random numbers of a training.
        batches: Any = DataLoader(
            rows,  # pyright: ignore[reportArgumentType]
            batch_size=batch_size,
            collate_fn=collator,
            generator=torch.Generator(),
        )
        sums = 0.0
        for batch in batches:
            batch = {key: tensor.to(device) for key, tensor in batch.items()}
            # With this argument the loss is the sum over the targets.
            outputs = model(**batch, num_items_in_batch=1)
            sums += float(outputs.loss.double())
            selection.add(outputs, weight=int((batch["seq_idx"] >= 0).sum()))
        return sums

    found: dict[str, Any] = {}
    model.eval()
    with torch.no_grad():
        loss = total(selection) / rows.targets
        with without_attention(model) as layers:
            if layers:
                found["loss_without_attention"] = total(SelectionMeans()) / rows.targets
    model.train(training)
    perplexity = math.exp(loss) if loss < 700 else None
    return {"loss": loss, "perplexity": perplexity, "tokens": rows.targets, **selection.take(), **found}
