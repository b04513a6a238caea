"""Configuration of `zoo_encdec`."""

from collections.abc import Collection
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from .configuration_hybrid import ZooHybridConfig
from .token_mixers import TOKEN_MIXERS

OF_THE_MODEL = (
    *("vocab_size", "hidden_size", "embedding_multiplier", "tie_word_embeddings", "lm_head_bias"),
    *("final_logit_softcapping", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "native_model_type"),
    *("recompute_length", "use_parallel_residual", "share_norm", "prefix_bidirectional"),
)
"""Keys of `ZooHybridConfig` that an encoder cannot have for itself."""
NOT_INHERITED = (
    *("mixer_types", "mlp_types", "position_types", "local_rope_parameters", "bidirectional"),
    *("lm_head_bias", "final_logit_softcapping", "tie_word_embeddings", "use_cache"),
)
"""Keys of `ZooHybridConfig` that the encoder does not take over from the decoder."""
UNUSED = {
    "bidirectional": "the decoder is causal; encoder['bidirectional'] is that of the encoder",
    "use_parallel_residual": "a block reads the source between its mixer and its MLP",
    "share_norm": "a block reads the source between its mixer and its MLP",
    "recompute_length": "generate never reads the text again",
    "native_model_type": "no other library has this family",
    "prefix_bidirectional": "the encoder reads the source in both directions",
}
"""Keys of `ZooHybridConfig` that have no effect here, and why."""
NO_MIXERS = ("selective_attention",)
"""Mixers whose further outputs and loss the model has no place for."""
_MAMBA_DECODER = {"mixer_types": ["mamba"] * 6, "mamba": {"state_size": 16}, "tie_word_embeddings": True}


@strict
class ZooEncDecConfig(ZooHybridConfig):
    """An encoder and a decoder of `zoo_hybrid`'s blocks, where those of the decoder also read the source.

    The keys are those of :class:`ZooHybridConfig` and describe the decoder, whose heads, biases, norms of queries and
    keys and soft cap are also those of the cross-attention. Each block is a mixer, cross-attention and an MLP.

    Args:
        encoder: keys of :class:`ZooHybridConfig` for the encoder: `num_hidden_layers`, `mixer_types`, `mlp_types` and
            so on. `mixer_types`, `mlp_types`, `position_types` and `local_rope_parameters` have their defaults if not
            given; `bidirectional` is True if not given; all others are those of the decoder. Settings of a kind of
            mixer are merged with those of the decoder, key by key.
        decoder_start_token_id: first token that the decoder reads; `bos_token_id` if not given.
    """

    model_type = "zoo_encdec"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "encoder_last_hidden_state"]

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "mt-encdec-mamba": _MAMBA_DECODER
        | {
            "encoder": {
                "num_hidden_layers": 8,
                "mixer_types": ["mamba"] * 8,
                "mlp_types": ["none"] * 8,
                "bidirectional": False,
            }
        },
        "mt-encdec-transformer": {
            "mlp_types": ["plain"] * 6,
            "position_types": ["none"] * 6,
            "learned_positions": True,
            "max_position_embeddings": 512,
            "norm_type": "layer_norm",
            "hidden_act": "gelu",
            "attention_bias": True,
            "mlp_bias": True,
            "encoder": {"mlp_types": ["plain"] * 6, "position_types": ["none"] * 6},
        },
        "mt-encdec-transformer-mamba": _MAMBA_DECODER
        | {"encoder": {"num_hidden_layers": 6, "mlp_types": ["plain"] * 6, "hidden_act": "gelu"}},
    }

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    encoder: dict[str, Any] | None = None
    decoder_start_token_id: int | None = None
    is_encoder_decoder: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.encoder = dict(self.encoder or {})
        super().__post_init__(**kwargs)

    @property
    def start_token_id(self) -> int | None:
        """Return the id of the first token that the decoder reads."""
        return self.bos_token_id if self.decoder_start_token_id is None else self.decoder_start_token_id

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "ZooEncDecConfig":
        """Return this configuration, from which caches of the decoder are made."""
        return self

    def encoder_config(self) -> ZooHybridConfig:
        """Return the complete configuration of the encoder."""
        given = dict(self.encoder or {})
        left_out = {*NOT_INHERITED}
        if "num_attention_heads" in given:  # from which the other two follow
            left_out |= {"num_key_value_heads", "head_dim"}
        names = {*_keys_of_a_stack()} - left_out
        values = {name: getattr(self, name) for name in sorted(names)}
        for kind in TOKEN_MIXERS.keys() & vars(self).keys():
            values[kind] = dict(getattr(self, kind))
        for key, value in given.items():
            values[key] = values[key] | value if key in TOKEN_MIXERS and key in values else value
        values.setdefault("bidirectional", True)
        return ZooHybridConfig(**values, use_cache=False)

    def used_rows(self) -> dict[str, set[str]]:
        encoder = self.encoder_config().used_rows()
        return {table: rows | encoder[table] for table, rows in super().used_rows().items()}

    def validate_architecture(self) -> None:
        """Raise ValueError where the sizes or choices contradict each other."""
        super().validate_architecture()
        for name, why in UNUSED.items():
            if getattr(self, name):
                raise ValueError(f"{name} must be left out, got {getattr(self, name)!r}: {why}")
        if not self.is_encoder_decoder:
            raise ValueError("is_encoder_decoder must be True, got False")
        given = self.encoder or {}
        known = [key for key in (*_keys_of_a_stack(), *TOKEN_MIXERS) if key not in OF_THE_MODEL]
        for key in given:
            if key in OF_THE_MODEL:
                raise ValueError(f"encoder[{key!r}] must be left out, got {given[key]!r}: {key} is that of the model")
            if key not in known:
                raise ValueError(f"encoder has no key {key!r}. It takes {', '.join(known)}")
        try:
            encoder = self.encoder_config()
        except (ValueError, StrictDataclassError) as error:
            raise ValueError(f"encoder: {error.__cause__ or error}") from error
        for where, kinds in (("", self.mixer_types), ("encoder: ", encoder.mixer_types)):
            _check_kinds(where, kinds or [])


def _keys_of_a_stack() -> list[str]:
    """Return the keys of `ZooHybridConfig`, without those of all models of transformers."""
    return [name for name in ZooHybridConfig.__annotations__ if name not in ("model_type", "presets")]


def _check_kinds(where: str, kinds: Collection[str]) -> None:
    """Raise ValueError for a kind of mixer that the family does not have."""
    for index, kind in enumerate(kinds):
        if kind in NO_MIXERS:
            raise ValueError(f"{where}mixer_types[{index}] must be another than {', '.join(NO_MIXERS)}, got {kind!r}")


__all__ = ["ZooEncDecConfig"]
