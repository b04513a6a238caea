"""Configuration of `retrieval_mixer`."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


@strict
class RetrievalMixerConfig(PreTrainedConfig):
    """The retrieval mixer (arXiv 2409.01482): scores of a few candidate texts for a query, from embeddings.

    Args:
        hidden_size: D, width of the embeddings.
        num_hidden_layers: blocks.
        max_position_embeddings: N, the query and at most N - 1 candidates.
        intermediate_size: width of the MLP; `4 * hidden_size` if not given.
        hidden_act: activation of the MLP.
        norm_eps: epsilon of every norm.
    """

    model_type = "retrieval_mixer"

    hidden_size: int = 512
    num_hidden_layers: int = 8
    max_position_embeddings: int = 32
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    norm_eps: float = 1e-5

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raise ValueError where a size is out of range."""
        for name, least in (
            ("hidden_size", 1),
            ("num_hidden_layers", 1),
            ("intermediate_size", 1),
            ("max_position_embeddings", 2),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be an activation of transformers, got {self.hidden_act!r}")
        if not 0 < self.norm_eps < math.inf:
            raise ValueError(f"norm_eps must be positive, got {self.norm_eps}")


__all__ = ["RetrievalMixerConfig"]
