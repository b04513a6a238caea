"""Configuration of `masked_mixer`."""

import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .masked_mixing import REPEATS, check_choice, check_position_mixing
from .mixer import check_heads, check_sizes, complete_heads

ATTENTIONS = ("none", "series", "parallel")
NORMS = ("layer_norm", "rms_norm")
MLPS = ("plain", "gated")
PAD_MODES = ("shift", "as_trained")
OVERFLOWS = ("error", "window")


def _preset(vocab: int, width: int, layers: int, positions: int, heads: int, mixing: str = "dense") -> dict[str, Any]:
    sizes = {"vocab_size": vocab, "hidden_size": width, "num_hidden_layers": layers}
    return sizes | {"max_position_embeddings": positions, "num_heads": heads, "mixing": mixing}


@strict
class MaskedMixerConfig(PreTrainedConfig):
    """Masked mixers (arXiv 2409.01482), Toeplitz MLP mixers (2605.06683) and structured recurrent mixers (2605.08696).

    Tokens are mixed by weights that depend on their positions and not on the input. Defaults are those of the masked
    mixer that the paper trains on TinyStories; a default that depends on another field is the author's for that model.

    Args:
        vocab_size: V, rows of the embedding.
        hidden_size: D, model width.
        num_hidden_layers: blocks.
        max_position_embeddings: N, number of positions with weights; no document may be longer.
        mixing: structure of a head's (N, N) matrix, of which the lower triangle is used: "dense", all weights free;
            "toeplitz", one weight for each distance; "row_repeat", one weight for each source, times a decay to the
            power of the distance; "column_repeat", the same with one weight for each target; "mixed_repeat", columns in
            the first half of the heads and rows in the second; "combined_repeat", the sum of a row and a column matrix.
            The repeats are recurrences whose state is one number for each channel.
        num_heads: H, heads of the mixing, each with a matrix and `hidden_size / num_heads` channels.
        kernel_size: k, number of neighbouring channels of a head that are also mixed, each with its own matrix.
        expanded: mix twice, with the activation of the MLP in between. Only for "dense" and "toeplitz" with
            `kernel_size=1`, in one direction; such a layer has no mixing matrix.
        use_projections: a linear layer before and after the mixing; if not given, only with several heads.
        use_decay: learn a decay for each head of a repeat, between 0.9 and 1 to the power of 1 / max(N // 512, 1);
            otherwise it is 1.
        intermediate_size: width of the MLP; `4 * hidden_size` if not given.
        hidden_act: activation of the MLP; if not given, "gelu" in dense mixers without attention, "silu" in others.
        mlp_first: put the MLP before the mixing; if not given, in all but dense mixers.
        mlp_type: "plain", or "gated" as in Llama; if not given, "gated" with attention.
        mlp_bias: bias in the MLP; if not given, only without attention.
        norm_type: "layer_norm" or "rms_norm"; if not given, "rms_norm" with attention.
        norm_eps: epsilon of every norm.
        final_norm: a norm before the head; if not given, only with attention.
        attention: "series": x + Attention(norm(x)) before every mixing; "parallel": attention and mixing read the same
            normed x, and both are added; "none".
        num_attention_heads: heads of attention.
        num_key_value_heads: key and value heads of attention; `num_attention_heads` if not given.
        head_dim: width of an attention head; `hidden_size / num_attention_heads` if not given.
        attention_bias: bias in the projections of attention.
        rope_parameters: rotary embedding of attention, as in transformers.
        bidirectional: add a second stream that mixes the tokens after each token; both are added after the last block.
            Such an encoder has no cache and no causal head. Only for "dense" and "toeplitz", without attention.
        lookahead: distance to the first token that the second stream mixes. 1: an output depends on the whole document,
            and masked tokens are filled in. 2: it depends on all but the next token, which a masked language model then
            predicts, as in the author's model, which needs no masked tokens.
        pad_mode: "shift": padding is left out and positions count a document's tokens, so that padded, packed and
            single documents give the same outputs. "as_trained": rows are padded on the left with `pad_token_id` to
            the whole context, and padding is mixed like any token, as in the training of such checkpoints; then there
            is no cache and no packing.
        context_overflow: behaviour of `generate` when the context is full: "error", or "window": drop the first half of
            the context and encode the rest again (`windowed_inputs` in `modeling_masked_mixer.py`).
        initializer_range: standard deviation of the embedding at initialisation; linear layers have their own.
    """

    model_type = "masked_mixer"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "masked-mixer-23m": _preset(4096, 512, 8, 512, 1),
        "masked-mixer-34m": _preset(4096, 512, 8, 512, 4),
        "masked-mixer-46m": _preset(8000, 512, 16, 512, 1),
        "masked-mixer-67m": _preset(8000, 512, 16, 512, 4),
        "masked-mixer-78m": _preset(4096, 1024, 8, 512, 1),
        "masked-mixer-101m": _preset(4096, 1024, 8, 512, 4),
        "masked-mixer-155m": _preset(8000, 1024, 16, 512, 1),
        "masked-mixer-168m": _preset(8000, 1024, 16, 1024, 1),
        "masked-mixer-201m": _preset(8000, 1024, 16, 512, 4),
        "masked-mixer-252m": _preset(8000, 1024, 16, 1024, 4),
        "toeplitz-mixer-184m": _preset(8000, 1024, 16, 512, 4, "toeplitz"),
        "recurrent-mixer-184m": _preset(8000, 1024, 16, 1024, 4, "mixed_repeat"),
    }

    vocab_size: int = 4096
    hidden_size: int = 512
    num_hidden_layers: int = 8
    max_position_embeddings: int = 512
    mixing: str = "dense"
    num_heads: int = 1
    kernel_size: int = 1
    expanded: bool = False
    use_projections: bool | None = None
    use_decay: bool = True
    intermediate_size: int | None = None
    hidden_act: str | None = None
    mlp_first: bool | None = None
    mlp_type: str | None = None
    mlp_bias: bool | None = None
    norm_type: str | None = None
    norm_eps: float = 1e-5
    final_norm: bool | None = None
    attention: str = "none"
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    rope_parameters: dict[str, Any] | None = None
    bidirectional: bool = False
    lookahead: int = 1
    pad_mode: str = "shift"
    context_overflow: str = "error"
    initializer_range: float = 1.0
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        attends, dense = self.attention != "none", self.mixing == "dense"
        derived: dict[str, Any] = {
            "use_projections": self.num_heads > 1,
            "intermediate_size": 4 * self.hidden_size,
            "hidden_act": "gelu" if dense and not attends else "silu",
            "mlp_first": not dense and not attends,
            "mlp_type": "gated" if attends else "plain",
            "mlp_bias": not attends,
            "norm_type": "rms_norm" if attends else "layer_norm",
            "final_norm": attends,
            "num_key_value_heads": self.num_attention_heads,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if attends:
            complete_heads(self)
        if self.pad_mode == "as_trained":
            self.use_cache = False  # a new token moves all others
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """Return the kind of cache layer of each block."""
        kind = "state" if self.mixing in REPEATS else "history"
        return [f"zoo_{kind}" if self.attention == "none" else f"zoo_attention_{kind}"] * self.num_hidden_layers

    def validate_layer_type(self) -> None:
        """Skip transformers' check: `layer_types` is derived and names cache layers of this project."""

    @property
    def is_bounded(self) -> bool:
        """Return True: a model has weights for `max_position_embeddings` positions only."""
        return True

    def validate_architecture(self) -> None:
        """Raise ValueError where the sizes or choices contradict each other."""
        check_position_mixing(self, self)
        check_sizes(self, "vocab_size", "num_hidden_layers", "intermediate_size")
        for name, accepted in (
            ("mlp_type", MLPS),
            ("norm_type", NORMS),
            ("attention", ATTENTIONS),
            ("pad_mode", PAD_MODES),
            ("context_overflow", OVERFLOWS),
        ):
            check_choice(name, getattr(self, name), accepted)
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be an activation of transformers, got {self.hidden_act!r}")
        for name in ("norm_eps", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.attention != "none":
            self._check_attention()
        if self.lookahead not in (1, 2):
            raise ValueError(f"lookahead must be 1 or 2, got {self.lookahead}")
        if self.bidirectional and (self.mixing in REPEATS or self.attention != "none"):
            raise ValueError(
                "bidirectional needs mixing='dense' or 'toeplitz' and attention='none', got "
                f"mixing={self.mixing!r} and attention={self.attention!r}"
            )
        if self.expanded and (self.mixing in REPEATS or self.kernel_size != 1 or self.bidirectional):
            raise ValueError(
                "expanded needs mixing='dense' or 'toeplitz', kernel_size=1 and bidirectional=False, got "
                f"mixing={self.mixing!r}, kernel_size={self.kernel_size} and bidirectional={self.bidirectional}"
            )
        if self.pad_mode == "as_trained" and self.pad_token_id is None:
            raise ValueError("pad_token_id must be given with pad_mode='as_trained', which pads rows with it, got None")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id must be None or from 0 to {self.vocab_size - 1}, got {self.pad_token_id}")
        if self.context_overflow == "window":
            self._check_window()

    def _check_attention(self) -> None:
        check_heads(self)
        if int(self.head_dim or 0) % 2:
            raise ValueError(f"head_dim must be even, for the rotary embedding, got {self.head_dim}")
        part = (self.rope_parameters or {}).get("partial_rotary_factor", 1.0)
        if part != 1.0:
            raise ValueError(f"rope_parameters['partial_rotary_factor'] must be 1, heads are rotated whole, got {part}")
        if self.mlp_first:
            raise ValueError("mlp_first must be False with attention, where the MLP comes last in a block, got True")

    def _check_window(self) -> None:
        if self.attention != "none" or self.pad_mode != "shift":
            raise ValueError(
                "context_overflow='window' needs attention='none' and pad_mode='shift', got "
                f"attention={self.attention!r} and pad_mode={self.pad_mode!r}"
            )
        if self.max_position_embeddings < 3:
            raise ValueError(
                "context_overflow='window' keeps half of a context: max_position_embeddings must be at least 3, "
                f"got {self.max_position_embeddings}"
            )


__all__ = ["MaskedMixerConfig"]
