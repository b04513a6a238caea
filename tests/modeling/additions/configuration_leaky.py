"""Configuration of `leaky`."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class LeakyConfig(PreTrainedConfig):
    """A stack of leaky sums."""

    model_type = "leaky"

    presets: ClassVar[dict[str, dict[str, Any]]] = {"leaky-small": {"hidden_size": 32}}

    vocab_size: int = 100
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @property
    def layer_types(self) -> list[str]:
        """Kind of cache layer of each block."""
        return ["zoo_recurrent"] * self.num_hidden_layers

    def validate_layer_type(self) -> None:
        """Nothing to check: `layer_types` is derived."""


__all__ = ["LeakyConfig"]
