"""Configuration of `zoo_hybrid`."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .configuration_mamba import ZooMambaConfig
from .configuration_mamba2 import ZooMamba2Config
from .configuration_masked_mixer import REPEATS, MaskedMixerConfig, check_position_mixing
from .configuration_taipan import check_selective_attention

MIXER_TYPES = (
    "full_attention",
    "sliding_attention",
    "selective_attention",
    "mamba",
    "mamba2",
    "discrete_mamba2",
    "masked_mixing",
    "none",
)
MLP_TYPES = ("gated", "none")
FEATURE_MAPS = ("identity", "softplus")


@strict
class ZooHybridConfig(PreTrainedConfig):
    """A Llama-shaped decoder whose token mixer is chosen layer by layer.

    Args:
        vocab_size: V, rows of the embedding.
        hidden_size: D, model width.
        intermediate_size: width of the gated MLP; 0 only where no block has one.
        num_hidden_layers: blocks.
        mixer_types: token mixer of each block: "full_attention", "sliding_attention", "selective_attention", "mamba",
            "mamba2", "discrete_mamba2", "masked_mixing" or "none"; all "full_attention" if not given.
        mlp_types: channel mixer of each block: "gated" or "none"; all "gated" if not given. A block has a token mixer,
            an MLP, or both, and a norm for each.
        num_attention_heads: H, heads of attention and of discrete Mamba-2.
        num_key_value_heads: key and value heads of attention; H if not given.
        head_dim: P, width of an attention or discrete Mamba-2 head; `hidden_size / num_attention_heads` if not
            given.
        hidden_act: activation of the MLP.
        rms_norm_eps: epsilon of every RMSNorm.
        attention_conv_kernel: K, width of a causal convolution of the queries, keys and values of "full_attention", at
            least 2; 0: none.
        attention_bias: bias in the projections of attention and in `in_proj` of discrete Mamba-2.
        mlp_bias: bias in the MLP.
        max_position_embeddings: context that the rotary embedding was made for; with "masked_mixing" the positions that
            there are weights for, which no document may exceed.
        rope_parameters: rotary embedding, as in transformers. Its `partial_rotary_factor` is the part of a head's
            channels that is turned, the first ones: 1 if not given, 0 for attention without positions.
        sliding_window: tokens that a query of sliding or selective attention sees, itself included.
        attention_capacity: share of the tokens that selective attention is to choose, as in `TaipanConfig`, which also
            explains the next four.
        gumbel_tau: temperature of the gate's choice while training.
        router_aux_loss_coef: weight of the capacity loss while training.
        sal_key_source: "all" or "selected".
        sal_dense_training: attend for all tokens while training.
        state_size: N, state channels of a Mamba-1 channel, or of a Mamba-2 or discrete Mamba-2 head; `head_dim` if not
            given.
        conv_kernel: K, width of the short convolution, at least 2.
        feature_map: map on B and C of discrete Mamba-2: "identity", or "softplus" (positive features).
        normalize: divide each output of discrete Mamba-2 by its row sum, as softmax does; needs positive features.
        ssm_rotary: apply the rotary embedding to B and C of discrete Mamba-2, as attention does to k and q.
        expand: inner over model width of Mamba-1 and Mamba-2.
        mamba_head_dim: P of Mamba-2.
        n_groups: groups of Mamba-2 heads that share B and C.
        mamba_proj_bias: bias in `in_proj` and `out_proj` of Mamba-1 and Mamba-2.
        mamba_conv_bias: bias in the convolution of Mamba-1 and Mamba-2.
        time_step_limit: range that step sizes of Mamba-2 are clamped to.
        time_step_rank: R, rank of Mamba-1's projection to the step sizes; D / 16, rounded up, if not given.
        mixer_rms_eps: epsilon of RMSNorms on the low-rank step sizes, B and C of Mamba-1; no such norms if not given.
        mixer_rms_weight: these norms have weights, as Jamba's.
        mixing: what the matrix of "masked_mixing" is, as in `MaskedMixerConfig`, which also explains the next four.
        mixing_heads: its heads.
        mixing_kernel: neighbouring channels that are mixed too.
        mixing_projections: a linear layer before and one after it; where there is more than one head if not given.
        mixing_decay: repeats have learned decays.
        initializer_range: standard deviation of projections and embedding at initialisation.
    """

    model_type = "zoo_hybrid"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "aux_loss", "router_logits", "selection_rate"]

    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    mixer_types: list[str] | None = None
    mlp_types: list[str] | None = None
    num_attention_heads: int = 9
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    attention_conv_kernel: int = 0
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int = 8192
    rope_parameters: dict[str, Any] | None = None
    sliding_window: int = 256
    attention_capacity: float = 0.15
    gumbel_tau: float = 1.0
    router_aux_loss_coef: float = 1.0
    sal_key_source: str = "all"
    sal_dense_training: bool = False
    state_size: int | None = None
    conv_kernel: int = 4
    feature_map: str = "identity"
    normalize: bool = False
    ssm_rotary: bool = False
    expand: int = 2
    mamba_head_dim: int = 64
    n_groups: int = 1
    mamba_proj_bias: bool = False
    mamba_conv_bias: bool = True
    time_step_limit: list[float] | tuple[float, ...] = (0.0, math.inf)
    time_step_rank: int | None = None
    mixer_rms_eps: float | None = None
    mixer_rms_weight: bool = False
    mixing: str = "dense"
    mixing_heads: int = 1
    mixing_kernel: int = 1
    mixing_projections: bool | None = None
    mixing_decay: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.mixer_types is None:
            self.mixer_types = ["full_attention"] * self.num_hidden_layers
        if self.mlp_types is None:
            self.mlp_types = ["gated"] * self.num_hidden_layers
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size must be a multiple of num_attention_heads ({self.num_attention_heads}) if "
                    f"head_dim is not given, got {self.hidden_size}"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.state_size is None:
            self.state_size = self.head_dim
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """Kind of cache layer of each block."""
        kinds = {"full_attention": "zoo_convolved_attention" if self.attention_conv_kernel else "full_attention"}
        kinds |= {"sliding_attention": "zoo_window", "selective_attention": "zoo_window"}
        kinds["masked_mixing"] = "zoo_state" if self.mixing in REPEATS else "zoo_history"
        return [kinds.get(mixer, "zoo_recurrent") for mixer in self.mixer_types or []]

    @property
    def mamba(self) -> ZooMambaConfig:
        """Sizes of the Mamba-1 mixers."""
        return ZooMambaConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            state_size=int(self.state_size or 0),
            expand=self.expand,
            time_step_rank=self.time_step_rank,
            conv_kernel=self.conv_kernel,
            use_bias=self.mamba_proj_bias,
            use_conv_bias=self.mamba_conv_bias,
            mixer_rms_eps=self.mixer_rms_eps,
            mixer_rms_weight=self.mixer_rms_weight,
        )

    @property
    def mamba2(self) -> ZooMamba2Config:
        """Sizes of the Mamba-2 mixers."""
        return ZooMamba2Config(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            state_size=int(self.state_size or 0),
            expand=self.expand,
            head_dim=self.mamba_head_dim,
            n_groups=self.n_groups,
            conv_kernel=self.conv_kernel,
            use_bias=self.mamba_proj_bias,
            use_conv_bias=self.mamba_conv_bias,
            time_step_limit=self.time_step_limit,
            layer_norm_epsilon=self.rms_norm_eps,
        )

    @property
    def masked_mixer(self) -> MaskedMixerConfig:
        """Sizes of the masked mixers."""
        return MaskedMixerConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            max_position_embeddings=self.max_position_embeddings,
            mixing=self.mixing,
            num_heads=self.mixing_heads,
            kernel_size=self.mixing_kernel,
            use_projections=self.mixing_projections,
            use_decay=self.mixing_decay,
        )

    def validate_layer_type(self) -> None:
        """Nothing to check: `layer_types` is derived, and names this project's own cache layers."""

    def validate_architecture(self) -> None:
        """Raise ValueError where the sizes or choices contradict each other."""
        mixers, mlps = self.mixer_types or [], self.mlp_types or []
        sizes = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
        sizes += ["head_dim", "state_size", "sliding_window", "expand", "n_groups"]
        if "gated" in mlps or self.intermediate_size != 0:
            sizes.append("intermediate_size")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, kinds, accepted in (("mixer_types", mixers, MIXER_TYPES), ("mlp_types", mlps, MLP_TYPES)):
            if len(kinds) != self.num_hidden_layers:
                raise ValueError(f"{name} must name {self.num_hidden_layers} mixers, got {len(kinds)}")
            for index, kind in enumerate(kinds):
                if kind not in accepted:
                    raise ValueError(f"{name}[{index}] must be one of {', '.join(accepted)}, got {kind!r}")
        for index, kinds in enumerate(zip(mixers, mlps, strict=True)):
            if set(kinds) == {"none"}:
                raise ValueError(f"mlp_types[{index}] must be 'gated' where mixer_types[{index}] is 'none', got 'none'")
        if self.num_attention_heads % int(self.num_key_value_heads or 1):
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads ({self.num_attention_heads}), "
                f"got {self.num_key_value_heads}"
            )
        if int(self.head_dim or 1) % 2:
            raise ValueError(f"head_dim must be even, for the rotary embedding, got {self.head_dim}")
        part = (self.rope_parameters or {}).get("partial_rotary_factor", 1.0)
        if not 0 <= part <= 1 or int(int(self.head_dim or 0) * part) % 2:
            raise ValueError(
                "rope_parameters['partial_rotary_factor'] must be between 0 and 1 and give an even number of the "
                f"{self.head_dim} channels of a head, got {part}"
            )
        if self.ssm_rotary and self.state_size != self.head_dim:
            raise ValueError(f"ssm_rotary needs state_size equal to head_dim ({self.head_dim}), got {self.state_size}")
        if self.attention_conv_kernel < 0 or self.attention_conv_kernel == 1:
            raise ValueError(f"attention_conv_kernel must be 0 or at least 2, got {self.attention_conv_kernel}")
        if self.conv_kernel < 2:
            raise ValueError(f"conv_kernel must be at least 2, got {self.conv_kernel}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be an activation of transformers, got {self.hidden_act!r}")
        if self.rms_norm_eps <= 0:
            raise ValueError(f"rms_norm_eps must be positive, got {self.rms_norm_eps}")
        if self.feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, got {self.feature_map!r}")
        if self.normalize and self.feature_map == "identity":
            raise ValueError("normalize=True needs positive features: feature_map must be 'softplus', got 'identity'")
        if "selective_attention" in mixers:
            check_selective_attention(self)
        if "masked_mixing" in mixers:
            check_position_mixing(self, "mixing_heads", "mixing_kernel")
        if "mamba" in mixers:
            _ = self.mamba  # checks itself
        if "mamba2" in mixers:
            _ = self.mamba2  # checks itself


__all__ = ["ZooHybridConfig"]
