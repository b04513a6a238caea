"""Configuration of `zoo_mamba2`."""

import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .prefix import check_prefix_option


@strict
class ZooMamba2Config(PreTrainedConfig):
    """Mamba-2 (arXiv 2405.21060). Keys are those of transformers' `Mamba2Config`, defaults the 130M size of the paper.

    Args:
        vocab_size: V, rows of the embedding.
        hidden_size: D, model width.
        num_hidden_layers: blocks.
        state_size: N, state channels of a head.
        expand: E / D, the inner width over the model width.
        num_heads: H; `expand * hidden_size / head_dim` if not given.
        head_dim: P, width of a head.
        n_groups: G, groups of heads that share B and C; divides H.
        conv_kernel: K, width of the short convolution, at least 2.
        use_bias: bias in `in_proj` and `out_proj`.
        use_conv_bias: bias in the convolution.
        layer_norm_epsilon: epsilon of every RMSNorm.
        residual_in_fp32: keep the residual stream in float32.
        bidirectional: scan every document in both directions, so that a token sees all of it. Such an encoder has no
            cache and no causal head.
        prefix_bidirectional: scan the tokens of a prefix (`prefix_mask`) in both directions, with the parameters that
            an encoder has for the second one, and all other tokens forwards (`prefix.py`).
        time_step_min: smallest step size at initialisation.
        time_step_max: largest step size at initialisation.
        time_step_floor: step sizes at initialisation are clamped to at least this.
        time_step_limit: range that step sizes are clamped to when the model runs.
        A_init_bounds: bounds of the decay rate -A at initialisation, which is uniform between them. `A_init_range`, the
            name in state-spaces' configurations and in our older ones, is read as well. (transformers' shared tests
            expect a field whose name contains `init_range` to be one number.)
        initializer_range: standard deviation of the embedding at initialisation; the paper's by default. It applies to
            a tied head as well, and matters in a short training of a small model: 3 M parameters, 300 steps
            of 512 tokens, rate 6e-3 (`benchmarks/claims/from_scratch.py`), held-out loss in nats for 0.025, 0.05, 0.1,
            0.2: 4.82, 4.75, 4.63, 4.91.
    """

    model_type = "zoo_mamba2"
    attribute_map = {"A_init_range": "A_init_bounds"}

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "mamba2-130m": {"hidden_size": 768, "num_hidden_layers": 24},
        "mamba2-370m": {"hidden_size": 1024, "num_hidden_layers": 48},
        "mamba2-780m": {"hidden_size": 1536, "num_hidden_layers": 48},
        "mamba2-1.3b": {"hidden_size": 2048, "num_hidden_layers": 48},
        "mamba2-2.7b": {"hidden_size": 2560, "num_hidden_layers": 64},
        "mt-mamba2": {"vocab_size": 32000, "hidden_size": 512, "num_hidden_layers": 36},
    }

    vocab_size: int = 50288
    hidden_size: int = 768
    num_hidden_layers: int = 24
    state_size: int = 128
    expand: int = 2
    num_heads: int | None = None
    head_dim: int = 64
    n_groups: int = 1
    conv_kernel: int = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    bidirectional: bool = False
    prefix_bidirectional: bool = False
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: list[float] | tuple[float, ...] = (0.0, math.inf)
    A_init_bounds: list[float] | tuple[float, ...] = (1.0, 16.0)
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0

    def __post_init__(self, **kwargs) -> None:
        if self.num_heads is None and self.head_dim > 0:
            self.num_heads = self.expand * self.hidden_size // self.head_dim
        super().__post_init__(**kwargs)

    @property
    def intermediate_size(self) -> int:
        """Return E, the inner width."""
        return self.expand * self.hidden_size

    @property
    def layer_types(self) -> list[str]:
        """Return the kind of cache layer of each block."""
        return ["zoo_recurrent"] * self.num_hidden_layers

    def validate_layer_type(self) -> None:
        """Skip transformers' check: `layer_types` is derived and names cache layers of this project."""

    def validate_architecture(self) -> None:
        """Raise ValueError where the sizes contradict each other."""
        sizes = ["vocab_size", "hidden_size", "num_hidden_layers", "state_size", "expand", "head_dim", "n_groups"]
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads is None or self.num_heads * self.head_dim != self.intermediate_size:
            raise ValueError(
                f"num_heads * head_dim ({self.num_heads} * {self.head_dim}) must equal expand * hidden_size "
                f"({self.expand} * {self.hidden_size})"
            )
        if self.num_heads % self.n_groups:
            raise ValueError(f"n_groups must divide num_heads ({self.num_heads}), got {self.n_groups}")
        check_prefix_option(self)
        if self.conv_kernel < 2:
            raise ValueError(f"conv_kernel must be at least 2, got {self.conv_kernel}")
        if self.layer_norm_epsilon <= 0:
            raise ValueError(f"layer_norm_epsilon must be positive, got {self.layer_norm_epsilon}")
        for name in ("time_step_limit", "A_init_bounds"):
            value = getattr(self, name)
            if len(value) != 2 or not 0 <= value[0] <= value[1] or value[1] == 0:
                raise ValueError(f"{name} must be (low, high) with 0 <= low <= high and 0 < high, got {value}")
        if not 0 < self.time_step_min <= self.time_step_max:
            raise ValueError(
                f"time_step_min and time_step_max must satisfy 0 < min <= max, got {self.time_step_min} and "
                f"{self.time_step_max}"
            )


__all__ = ["ZooMamba2Config"]
