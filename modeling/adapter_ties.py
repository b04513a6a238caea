"""Tied embeddings under adapters: untied when an adapter is put on one of the two, so that merging is right.

peft merges an adapter by adding to the weight of the layer under it. Where head and embeddings are one tensor, that
changes the other one too, and what the merged model computes is not what was trained. Under adapters the base weights
are frozen, so that a copy of them computes the same; it costs one vocabulary of memory.
"""

import copy
from typing import Any

from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)


class UntiesUnderAdapters:
    """Notices when peft has put adapters into a model: it sets `peft_config` then."""

    @property
    def peft_config(self) -> Any:
        try:
            return self.__dict__["peft_config"]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no adapters of peft, and so no `peft_config`") from None

    @peft_config.setter
    def peft_config(self, value: Any) -> None:
        self.__dict__["peft_config"] = value
        untie_under_adapters(self)

    @peft_config.deleter
    def peft_config(self) -> None:
        del self.__dict__["peft_config"]


def untie_under_adapters(model: Any) -> None:
    """Give the head weights of its own where an adapter lies over it or over the embeddings and they share them."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embeddings is None:
        return
    bases = [_base(layer) for layer in (head, embeddings)]
    adapted = bases[0] is not head or bases[1] is not embeddings
    if not adapted or bases[0].weight is not bases[1].weight:
        return
    bases[0].weight = copy.deepcopy(bases[0].weight)
    logger.warning_once(
        "adapters over tied embeddings: the head has a copy of their weights from now on, so that merging an adapter "
        "into one of the two leaves the other as it was"
    )


def _base(layer: nn.Module) -> nn.Module:
    """The layer under peft's."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer  # pyright: ignore
