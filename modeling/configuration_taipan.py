"""Configuration of `taipan`."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_mamba2 import ZooMamba2Config
from .mixer import check_heads, check_sizes, complete_heads
from .selective_attention import check_selective_attention

FUSIONS = ("convex", "residual")


@strict
class TaipanConfig(PreTrainedConfig):
    """Taipan (arXiv 2410.18572): Mamba-2 blocks, and selective attention after every `sal_every` of them.

    The paper gives the ratio, window, capacity and vocabulary, but not the sizes of the models, the form of the gate,
    its temperature, the heads or the MLP's width. Defaults are those of the 190M model, inferred from its number of
    parameters, and of the official Mamba-2.

    Args:
        vocab_size: V, rows of the embedding.
        hidden_size: D, model width.
        num_hidden_layers: blocks, those of selective attention included.
        sal_every: Mamba-2 blocks before each block of selective attention; an incomplete last group has no attention.
        sal_layer_idx: indices of the blocks of selective attention, to place them elsewhere.
        num_attention_heads: H, heads of attention; `hidden_size / 64` if not given.
        num_key_value_heads: key and value heads of attention; H if not given.
        head_dim: P, width of an attention head; `hidden_size / num_attention_heads` if not given.
        sliding_window: tokens that a query sees, itself included. There is no positional embedding.
        attention_capacity: C, share of the tokens that a layer selects; in (0, 1].
        gumbel_tau: temperature of the gate's choice in training, positive; only gradients depend on it if
            `sal_selection` is "capacity".
        router_aux_loss_coef: weight of the capacity loss, which is added to the loss in training, with "gumbel" only.
        sal_selection: "capacity": a threshold, which follows the gate's scores in training and is saved with the
            model, selects the share C; the share of a single row may be another. "gumbel": the paper's choice with
            noise, where the capacity loss alone pulls the rate to C, and that with the noise: in evaluation, without,
            a token is selected if the gate finds that more likely than not, and a gate that is sure of no token
            selects none if C is below one half. Look at `selection_rate`.
        sal_warmup_steps: forward passes in training in which the share falls from all tokens to C, so that attention
            can learn before the gate has to choose; with "capacity" only. Several passes that are one step of an
            optimizer count each.
        sal_key_source: "all": a query sees all tokens of its window; "selected": only selected tokens, the others have
            no keys.
        sal_fusion: "convex": the output of attention replaces a share of the residual stream (equation 5); "residual":
            it is added.
        sal_dense_training: compute attention for all tokens in training, as a layer with a sliding window does. The
            gate's straight-through gradient is then exact; otherwise tokens that are not selected give it none. Needs
            `sal_key_source="all"`. If not given, it is so with `sal_selection="capacity"` where the keys allow it:
            trained without, such a gate selected no query in an experiment (docs/results.md).
        intermediate_size: width of the MLP of the selective attention blocks; 8/3 `hidden_size`, rounded up to a
            multiple of 256, if not given.
        state_size: N, state channels of a Mamba-2 head.
        expand: inner width over model width of Mamba-2.
        mamba_head_dim: width of a Mamba-2 head.
        n_groups: groups of Mamba-2 heads that share B and C.
        conv_kernel: K, width of the short convolution, at least 2.
        rms_norm_eps: epsilon of every RMSNorm.
        residual_in_fp32: keep the residual stream in float32.
        initializer_range: standard deviation of embedding, attention, gate and MLP at initialisation; not of Mamba-2.
    """

    model_type = "taipan"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "aux_loss", "router_logits", "selection_rate"]

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "taipan-190m": {"hidden_size": 768, "num_hidden_layers": 21},
        "taipan-450m": {"hidden_size": 1024, "num_hidden_layers": 42},
        "taipan-1.3b": {"hidden_size": 2048, "num_hidden_layers": 35},
    }

    vocab_size: int = 128256
    hidden_size: int = 768
    num_hidden_layers: int = 21
    sal_every: int = 6
    sal_layer_idx: list[int] | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    sliding_window: int = 2048
    attention_capacity: float = 0.15
    gumbel_tau: float = 1.0
    router_aux_loss_coef: float = 1.0
    sal_selection: str = "capacity"
    sal_warmup_steps: int = 0
    sal_key_source: str = "all"
    sal_fusion: str = "convex"
    sal_dense_training: bool | None = None
    intermediate_size: int | None = None
    state_size: int = 128
    expand: int = 2
    mamba_head_dim: int = 64
    n_groups: int = 1
    conv_kernel: int = 4
    rms_norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_attention_heads is None:
            self.num_attention_heads = max(self.hidden_size // 64, 1)
        complete_heads(self)
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // (3 * 256)) * 256
        if self.sal_layer_idx is None and self.sal_every > 0:
            self.sal_layer_idx = list(range(self.sal_every, self.num_hidden_layers, self.sal_every + 1))
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """Return the kind of cache layer of each block."""
        attends = set(self.sal_layer_idx or [])
        return ["zoo_window" if index in attends else "zoo_recurrent" for index in range(self.num_hidden_layers)]

    @property
    def mamba2(self) -> ZooMamba2Config:
        """Return the configuration of the Mamba-2 blocks."""
        return ZooMamba2Config(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            state_size=self.state_size,
            expand=self.expand,
            head_dim=self.mamba_head_dim,
            n_groups=self.n_groups,
            conv_kernel=self.conv_kernel,
            layer_norm_epsilon=self.rms_norm_eps,
            residual_in_fp32=self.residual_in_fp32,
        )

    def validate_layer_type(self) -> None:
        """Skip transformers' check: `layer_types` is derived and names cache layers of this project."""

    def validate_architecture(self) -> None:
        """Raise ValueError where the sizes or choices contradict each other."""
        check_sizes(self, "vocab_size", "hidden_size", "num_hidden_layers", "sal_every", "intermediate_size")
        check_sizes(self, "state_size", "expand", "mamba_head_dim", "n_groups")
        check_heads(self)
        attends = self.sal_layer_idx or []
        if not attends:
            raise ValueError(
                f"sal_layer_idx must name a block of selective attention, got {attends}: with sal_every = "
                f"{self.sal_every} there is none among {self.num_hidden_layers} blocks. Set sal_every to at most "
                f"{self.num_hidden_layers - 1}, or list the blocks"
            )
        if sorted(set(attends)) != list(attends) or attends[0] < 0 or attends[-1] >= self.num_hidden_layers:
            raise ValueError(
                f"sal_layer_idx must be increasing, from at least 0 to at most num_hidden_layers - 1 "
                f"({self.num_hidden_layers - 1}), got {attends}"
            )
        if self.sal_fusion not in FUSIONS:
            raise ValueError(f"sal_fusion must be one of {', '.join(FUSIONS)}, got {self.sal_fusion!r}")
        if self.rms_norm_eps <= 0:
            raise ValueError(f"rms_norm_eps must be positive, got {self.rms_norm_eps}")
        check_selective_attention(self)
        if self.expand * self.hidden_size % self.mamba_head_dim:
            raise ValueError(
                f"mamba_head_dim must divide expand * hidden_size ({self.expand * self.hidden_size}), "
                f"got {self.mamba_head_dim}"
            )
        _ = self.mamba2  # its constructor checks the other sizes


__all__ = ["TaipanConfig"]
