"""Configuration of `zoo_mamba`."""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .prefix import check_prefix_option


@strict
class ZooMambaConfig(PreTrainedConfig):
    """Mamba (arXiv 2312.00752). Keys are those of transformers' `MambaConfig`, defaults the 130M size of the paper.

    Args:
        vocab_size: V, rows of the embedding.
        hidden_size: D, model width.
        num_hidden_layers: blocks.
        state_size: N, states of an inner channel.
        expand: E / D, the inner width over the model width.
        time_step_rank: R, rank of the projection to the step sizes; D / 16, rounded up, if "auto" or not given.
        conv_kernel: K, width of the short convolution, at least 2.
        use_bias: bias in `in_proj` and `out_proj`.
        use_conv_bias: bias in the convolution.
        layer_norm_epsilon: epsilon of the blocks' norms and of the last one.
        mixer_rms_eps: epsilon of the RMSNorms on the outputs of `x_proj` (low-rank step sizes, B and C), as in
            FalconMamba and Jamba; no such norms if not given.
        mixer_rms_weight: give these norms weights, as in Jamba but not in FalconMamba.
        residual_in_fp32: keep the residual stream in float32.
        bidirectional: scan every document in both directions, so that a token sees all of it. Such an encoder has no
            cache and no causal head.
        prefix_bidirectional: scan the tokens of a prefix (`prefix_mask`) in both directions, with the parameters that
            an encoder has for the second one, and all other tokens forwards (`prefix.py`).
        time_step_min: smallest step size at initialisation.
        time_step_max: largest step size at initialisation.
        time_step_floor: step sizes at initialisation are clamped to at least this.
        initializer_range: standard deviation of the embedding at initialisation; the paper's by default. It applies to
            a tied head as well, and matters in a short training of a small model: 3 M parameters, 80 steps
            of 512 tokens, rate 3e-3 (`benchmarks/claims/from_scratch.py`), held-out loss in nats for 0.0125, 0.025,
            0.05, 0.1, 0.2: 5.40, 5.34, 5.39, 6.00, 6.10.
        num_attention_heads: must be 1. There is no attention, but peft's prompt learning divides by this number.
    """

    model_type = "zoo_mamba"

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "mamba-130m": {"hidden_size": 768, "num_hidden_layers": 24},
        "mamba-370m": {"hidden_size": 1024, "num_hidden_layers": 48},
        "mamba-790m": {"hidden_size": 1536, "num_hidden_layers": 48},
        "mamba-1.4b": {"hidden_size": 2048, "num_hidden_layers": 48},
        "mamba-2.8b": {"hidden_size": 2560, "num_hidden_layers": 64},
        "mt-mamba": {"vocab_size": 32000, "hidden_size": 610, "num_hidden_layers": 24},
    }

    vocab_size: int = 50280
    hidden_size: int = 768
    num_hidden_layers: int = 24
    state_size: int = 16
    expand: int = 2
    time_step_rank: int | Literal["auto"] | None = None
    conv_kernel: int = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    layer_norm_epsilon: float = 1e-5
    mixer_rms_eps: float | None = None
    mixer_rms_weight: bool = False
    residual_in_fp32: bool = True
    bidirectional: bool = False
    prefix_bidirectional: bool = False
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    initializer_range: float = 0.02
    num_attention_heads: int = 1
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0

    def __post_init__(self, **kwargs) -> None:
        if self.time_step_rank in (None, "auto"):
            self.time_step_rank = -(-self.hidden_size // 16)
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
        """Raise ValueError where a size or a bound is out of its range."""
        sizes = ["vocab_size", "hidden_size", "num_hidden_layers", "state_size", "expand", "time_step_rank"]
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_prefix_option(self)
        if self.conv_kernel < 2:
            raise ValueError(f"conv_kernel must be at least 2, got {self.conv_kernel}")
        for name in ("layer_norm_epsilon", "mixer_rms_eps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.num_attention_heads != 1:
            raise ValueError(f"num_attention_heads must be 1, as there is no attention, got {self.num_attention_heads}")
        if self.mixer_rms_weight and self.mixer_rms_eps is None:
            raise ValueError("mixer_rms_eps must be given with mixer_rms_weight=True, got None")
        if not 0 < self.time_step_min <= self.time_step_max:
            raise ValueError(
                f"time_step_min and time_step_max must satisfy 0 < min <= max, got {self.time_step_min} and "
                f"{self.time_step_max}"
            )


__all__ = ["ZooMambaConfig"]
