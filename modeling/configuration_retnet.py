"""Configuration of `zoo_retnet`."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .mixer import check_heads, check_sizes, complete_heads
from .prefix import check_prefix_option

RETNET_MLP_TYPES = ("gated", "plain")


def torchscale_rope_theta(head_dim: int) -> float:
    """Return the base with which Llama's rotary embedding has torchscale's frequencies.

    For pair i of P / 2, torchscale has 10000^(-i / (P/2 - 1)), from 1 to 1/10000, where Llama has base^(-i / (P/2)).
    """
    pairs = head_dim // 2
    return 10000.0 ** (pairs / (pairs - 1)) if pairs > 1 else 10000.0


# Options of attention in other families, which the mixer would read.
_OF_ATTENTION = ("attention_bias", "attention_output_bias", "qk_norm", "position_types", "query_pre_attn_scalar")


@strict
class ZooRetNetConfig(PreTrainedConfig):
    """RetNet (arXiv 2307.08621). Defaults are torchscale's `retnet_base`.

    Args:
        vocab_size: rows of the embedding. The sizes of the paper and of torchscale do not include it; the default is
            that of flash-linear-attention's checkpoints.
        hidden_size: D, model width.
        intermediate_size: width of the MLP.
        num_hidden_layers: blocks.
        num_attention_heads: H, heads of retention.
        num_key_value_heads: heads of keys and values; H if not given.
        head_dim: P, width of a key head; `hidden_size / num_attention_heads` if not given.
        v_head_dim: V, width of a value head; `2 * head_dim` if not given.
        hidden_act: activation of the MLP. The gate of retention has silu.
        mlp_type: "gated", as in the official code, or "plain", as in the paper; neither has biases.
        rms_norm_eps: epsilon of every norm.
        use_output_gate: multiply the normed output of retention by silu(W_G x).
        normalize_scores: the paper's score normalisation, which torchscale has and flash-linear-attention does not.
        elementwise_affine: give the norm of the heads a weight, as flash-linear-attention does.
        embedding_multiplier: factor of the token embeddings: 1, or the square root of D in torchscale's models with
            scaled embeddings.
        max_position_embeddings: longest text in training; longer ones are read too.
        rope_parameters: rotary embedding, as in transformers, of the type "default". If not given, its frequencies are
            torchscale's.
        bidirectional: every token sees its whole document, with decays by the distance. Such an encoder has no cache
            and no causal head; a causal checkpoint holds every weight it needs.
        prefix_bidirectional: the tokens of a prefix (`prefix_mask`) see all of it, with decays by the distance, and all
            others are causal (`prefix.py`); the weights are those of a causal model.
        initializer_range: standard deviation of embedding, MLP and head at initialisation; retention has torchscale's.
    """

    model_type = "zoo_retnet"

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        name: {
            "hidden_size": width,
            "v_head_dim": inner // heads,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        }
        for name, (width, inner, layers, heads) in {
            "retnet-base": (512, 864, 6, 2),
            "retnet-medium": (1024, 1728, 16, 4),
            "retnet-xl": (2048, 3456, 24, 8),
            "retnet-3b": (2560, 4280, 32, 10),
            "retnet-7b": (4096, 6912, 32, 16),
            "retnet-13b": (5120, 8560, 40, 20),
            "retnet-65b": (8192, 13824, 64, 32),
        }.items()
    } | {
        "mt-retnet": {
            "hidden_size": 512,
            "v_head_dim": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 12,
            "num_attention_heads": 4,
            "rms_norm_eps": 1e-5,
            "embedding_multiplier": 512**0.5,
        }
    }

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 864
    num_hidden_layers: int = 6
    num_attention_heads: int = 2
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    hidden_act: str = "silu"
    mlp_type: str = "gated"
    rms_norm_eps: float = 1e-6
    use_output_gate: bool = True
    normalize_scores: bool = True
    elementwise_affine: bool = False
    embedding_multiplier: float | int = 1.0
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None
    bidirectional: bool = False
    prefix_bidirectional: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        complete_heads(self)
        if self.v_head_dim is None and self.head_dim is not None:
            self.v_head_dim = 2 * self.head_dim
        if not kwargs.get("rope_scaling"):
            theta = kwargs.pop("rope_theta", None)
            given = {"rope_type": "default"} if theta is None else {"rope_type": "default", "rope_theta": theta}
            self.rope_parameters = {
                "rope_theta": torchscale_rope_theta(int(self.head_dim or 0)),
                **given,
                **(self.rope_parameters or {}),
            }
        unused = sorted(name for name in _OF_ATTENTION if kwargs.get(name) not in (None, False))
        if unused:
            raise ValueError(f"{unused[0]} must be left out: zoo_retnet has no such option, got {kwargs[unused[0]]!r}")
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """Return the kind of cache layer of each block."""
        return ["zoo_retention"] * self.num_hidden_layers

    def validate_layer_type(self) -> None:
        """Skip transformers' check: `layer_types` is derived and names cache layers of this project."""

    def validate_architecture(self) -> None:
        """Raise ValueError where the sizes or choices contradict each other."""
        check_sizes(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "v_head_dim")
        check_heads(self)
        check_prefix_option(self)
        if int(self.head_dim or 0) % 2:
            raise ValueError(f"head_dim must be even, for the rotary embedding, got {self.head_dim}")
        if self.mlp_type not in RETNET_MLP_TYPES:
            raise ValueError(f"mlp_type must be one of {', '.join(RETNET_MLP_TYPES)}, got {self.mlp_type!r}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be an activation of transformers, got {self.hidden_act!r}")
        for name in ("rms_norm_eps", "embedding_multiplier"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        rotary = self.rope_parameters or {}
        if rotary.get("rope_type", "default") != "default":
            raise ValueError(f"rope_parameters['rope_type'] must be 'default', got {rotary['rope_type']!r}")
        part = rotary.get("partial_rotary_factor", 1.0)
        if part != 1:
            raise ValueError(f"rope_parameters['partial_rotary_factor'] must be 1, heads are rotated whole, got {part}")


__all__ = ["ZooRetNetConfig"]
