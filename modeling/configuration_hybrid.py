"""Configuration of `zoo_hybrid`."""

import dataclasses
from collections.abc import Collection
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .layers import NORM_TYPES, POSITION_TYPES, QK_NORMS
from .mixer import MixerSettings, check_heads, check_sizes, complete_heads
from .prefix import check_prefix_option
from .token_mixers import TOKEN_MIXERS

MLP_TYPES = ("gated", "plain", "none")
NORM_PLACEMENTS = ("before", "after", "both")


def _mamba_with(kind: str, attention: Collection[int]) -> dict[str, Any]:
    """Return the translation study's 24 layers of Mamba with attention without positions in place of some of them."""
    return {
        "vocab_size": 32000,
        "hidden_size": 624,
        "intermediate_size": 0,
        "num_hidden_layers": 24,
        "mixer_types": [kind if index in attention else "mamba" for index in range(24)],
        "mlp_types": ["none"] * 24,
        "position_types": ["none"] * 24,
        "num_attention_heads": 8,
        "mamba": {"state_size": 16},
        "tie_word_embeddings": True,
    }


@strict
class ZooHybridConfig(PreTrainedConfig):
    """A decoder whose token mixer is chosen layer by layer; its blocks are Llama's unless settings say otherwise.

    The settings of a kind of mixer are a mapping under its name: `mamba2={"state_size": 64}`. The settings of a kind
    that some block has are completed with defaults; those of other kinds are kept as given. Configurations from before
    2026-11 held the settings as top-level keys: they are read, and saved in the present form.

    Args:
        vocab_size: V, rows of the embedding.
        hidden_size: D, model width.
        intermediate_size: width of the gated MLP; 0 only where no block has one.
        num_hidden_layers: blocks.
        mixer_types: token mixer of each block, a kind in `token_mixers.py` or "none"; all "full_attention" if not
            given.
        mlp_types: channel mixer of each block: "gated", "plain" (without a gate) or "none"; all "gated" if not given. A
            block has a token mixer, an MLP, or both, and a norm for each.
        num_attention_heads: H, heads of attention and of discrete Mamba-2.
        num_key_value_heads: key and value heads of attention; H if not given.
        head_dim: P, width of an attention or discrete Mamba-2 head; `hidden_size / num_attention_heads` if not
            given.
        hidden_act: activation of the MLP.
        rms_norm_eps: epsilon of every norm.
        attention_bias: bias in the projections of attention and of discrete Mamba-2.
        attention_output_bias: bias in their output projection; as `attention_bias` if not given.
        mlp_bias: bias in the MLP.
        lm_head_bias: bias in the language-modelling head.
        norm_type: "rms_norm", "layer_norm" (with a bias), or "unit_offset_rms_norm", which multiplies by 1 + weight.
        norm_placement: norms "before" the mixer and the MLP, "after" them (on what they add to the residual stream), or
            "both".
        use_parallel_residual: the MLP reads the block's input, and mixer and MLP are added to it together.
        share_norm: mixer and MLP read the output of one norm; only with `use_parallel_residual`.
        qk_norm: norm of the queries and keys of attention and discrete Mamba-2, before the rotary embedding: over each
            "head", over the "width" of all heads, or null.
        query_pre_attn_scalar: the scores of attention are multiplied by its inverse square root; `head_dim` if null.
        attn_logit_softcapping: c in c tanh(s / c) of the scaled scores s of attention; null: none.
        final_logit_softcapping: the same for the logits.
        embedding_multiplier: factor of the token embeddings.
        position_types: positions in each block: "rope"; "local_rope" for the second rotary embedding; "none" for
            queries and keys that are not rotated; all "rope" if not given.
        local_rope_parameters: the second rotary embedding, as `rope_parameters`.
        learned_positions: add to the embedding a learned vector for each of `max_position_embeddings` positions.
        max_position_embeddings: context length that the rotary embedding was made for. For a mixer with weights for
            positions ("masked_mixing") it is their number, which no document may exceed.
        rope_parameters: rotary embedding, as in transformers. `partial_rotary_factor` is the share of a head's channels
            that is rotated, counted from the first: 1 if not given, 0 for attention without positions.
        hidden_dropout: probability with which channels of the embeddings, and of what a mixer or an MLP adds to the
            residual stream, are set to 0 in training.
        bidirectional: every token sees its whole document. Such an encoder has no cache and no causal head, and only
            mixers whose row of the table says that they can be so.
        recompute_length: `generate` reads the text again, without the cache, once it is longer than this, since a
            rotary embedding of the type "longrope" changes for all positions, as in Phi-3; null: never.
        prefix_bidirectional: every mixer reads the tokens of a prefix (`prefix_mask`) in both directions, and all other
            tokens causally (`prefix.py`): full and sliding-window attention, retention and discrete Mamba-2 with the
            parameters that they have, the Mambas with those that their encoders have for the second direction. Other
            mixers have no such mode.
        initializer_range: standard deviation of projections and embedding at initialisation.
        native_model_type: model type of transformers from which the model was converted, and to which it is converted
            back if it still can be.
    """

    model_type = "zoo_hybrid"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "aux_loss", "router_logits", "selection_rate"]

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "mt-mamba-mha": _mamba_with("full_attention", (11, 23)),
        "mt-mamba-mha-interleaved": _mamba_with("full_attention", range(1, 24, 2)),
        "mt-mamba-mha-first-middle": _mamba_with("full_attention", (1, 11)),
        "mt-mamba-local": _mamba_with("sliding_attention", (11, 23)) | {"sliding_attention": {"sliding_window": 64}},
        "mt-transformer": {
            "vocab_size": 32000,
            "hidden_size": 496,
            "intermediate_size": 1984,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
        },
    }

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
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    mlp_bias: bool = False
    lm_head_bias: bool = False
    norm_type: str = "rms_norm"
    norm_placement: str = "before"
    use_parallel_residual: bool = False
    share_norm: bool = False
    qk_norm: str | None = None
    query_pre_attn_scalar: float | int | None = None
    attn_logit_softcapping: float | int | None = None
    final_logit_softcapping: float | int | None = None
    embedding_multiplier: float | int = 1.0
    position_types: list[str] | None = None
    local_rope_parameters: dict[str, Any] | None = None
    learned_positions: bool = False
    max_position_embeddings: int = 8192
    rope_parameters: dict[str, Any] | None = None
    hidden_dropout: float = 0.0
    bidirectional: bool = False
    recompute_length: int | None = None
    prefix_bidirectional: bool = False
    initializer_range: float = 0.02
    native_model_type: str | None = None
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
        if self.position_types == ["rope"] * self.num_hidden_layers:
            self.position_types = None
        complete_heads(self)
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        for kind in TOKEN_MIXERS:
            settings = self._read_settings(kind, kwargs)
            if kind in self.mixer_types or kwargs.get(kind) is not None:
                settings.complete(self)
                values = dataclasses.asdict(settings)  # tuples become lists, as in JSON
                setattr(self, kind, {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()})
        for kind, row in TOKEN_MIXERS.items():
            for key in (kind, *row.flat):
                kwargs.pop(key, None)
        super().__post_init__(**kwargs)

    def _read_settings(self, kind: str, given: dict[str, Any]) -> MixerSettings:
        """Return the settings of a kind, from the mapping under its name and from the older top-level keys."""
        row, nested = TOKEN_MIXERS[kind], given.get(kind)
        if not (nested is None or isinstance(nested, dict)):
            raise ValueError(f"{kind} must be a mapping of settings, got {nested!r}")
        values = dict(nested or {})
        for key, name in row.flat.items():
            if key not in given:
                continue
            if name in values and values[name] != given[key]:
                raise ValueError(
                    f"{key} must be left out, got {given[key]!r}: it is {kind}[{name!r}] now, which is {values[name]!r}"
                )
            values[name] = given[key]
        known = [field.name for field in dataclasses.fields(row.settings)]  # pyright: ignore[reportArgumentType]
        for name in values:
            if name not in known:
                raise ValueError(f"settings of {kind} must be among {', '.join(known) or 'none'}, got {name!r}")
        try:
            return row.settings(**values)
        except StrictDataclassError as error:
            raise ValueError(f"{kind}: {error.__cause__ or error}") from error

    def settings_of(self, kind: str) -> Any:
        """Return the settings of a kind of mixer; the defaults if no block has this kind."""
        settings: Any = TOKEN_MIXERS[kind].settings(**(getattr(self, kind, None) or {}))
        settings.complete(self)
        return settings

    def changed_settings(self) -> dict[str, dict[str, Any]]:
        """Return the settings that differ from their defaults, by kind."""
        found: dict[str, dict[str, Any]] = {}
        for kind in TOKEN_MIXERS.keys() & vars(self).keys():
            defaults: Any = TOKEN_MIXERS[kind].settings()
            for name, value in getattr(self, kind).items():
                default = getattr(defaults, name)
                if value != (list(default) if isinstance(default, tuple) else default):
                    found.setdefault(kind, {})[name] = value
        return found

    def used_rows(self) -> dict[str, set[str]]:
        """Return the rows of tables that a model of this configuration uses; an export leaves out the others."""
        return {"TOKEN_MIXERS": set(self.mixer_types or []) - {"none"}}

    @classmethod
    def more_keys(cls) -> list[str]:
        """Return the keys that are accepted besides the fields: kinds of mixers and the older top-level keys."""
        flat = {key for row in TOKEN_MIXERS.values() for key in row.flat}
        return [*TOKEN_MIXERS, *sorted(flat)]

    @property
    def layer_types(self) -> list[str]:
        """Return the kind of cache layer of each block."""
        kinds: dict[str, str] = {}
        for kind in set(self.mixer_types or []) & TOKEN_MIXERS.keys():
            layer = TOKEN_MIXERS[kind].cache_layer
            kinds[kind] = layer if isinstance(layer, str) else layer(getattr(self, kind, None) or {})
        return [kinds.get(kind, "zoo_recurrent") for kind in self.mixer_types or []]

    @property
    def attention_capacity(self) -> float:
        """Return the share of the tokens that layers with a gate should select."""
        return self._setting("attention_capacity")

    @property
    def router_aux_loss_coef(self) -> float:
        """Return the weight of their capacity loss in training."""
        return self._setting("router_aux_loss_coef")

    @router_aux_loss_coef.setter
    def router_aux_loss_coef(self, value: float) -> None:
        self._setting("router_aux_loss_coef")  # raises if no kind has it
        for kind in TOKEN_MIXERS:
            settings = getattr(self, kind, None) or {}
            if "router_aux_loss_coef" in settings:
                settings["router_aux_loss_coef"] = value

    def _setting(self, name: str) -> Any:
        """Return a setting of the first kind that has it."""
        for kind in TOKEN_MIXERS:
            settings = getattr(self, kind, None) or {}
            if name in settings:
                return settings[name]
        raise AttributeError(f"no block of this {self.model_type} has a mixer with the setting {name!r}")

    @property
    def is_bounded(self) -> bool:
        """Return whether the model has weights for `max_position_embeddings` positions only."""
        return self.learned_positions or any(
            TOKEN_MIXERS[kind].bounded for kind in set(self.mixer_types or []) - {"none"}
        )

    def validate_layer_type(self) -> None:
        """Skip transformers' check: `layer_types` is derived and names cache layers of this project."""

    def validate_architecture(self) -> None:
        """Raise ValueError where the sizes or choices contradict each other."""
        mixers, mlps = self.mixer_types or [], self.mlp_types or []
        check_sizes(self, "vocab_size", "hidden_size", "num_hidden_layers", "recompute_length")
        check_heads(self)
        if set(mlps) - {"none"} or self.intermediate_size != 0:
            check_sizes(self, "intermediate_size")
        lists = [("mixer_types", mixers, (*TOKEN_MIXERS, "none")), ("mlp_types", mlps, MLP_TYPES)]
        if self.position_types is not None:
            lists.append(("position_types", self.position_types, POSITION_TYPES))
        for name, kinds, accepted in lists:
            if len(kinds) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} must have one entry for each of the {self.num_hidden_layers} blocks, got {len(kinds)}"
                )
            for index, kind in enumerate(kinds):
                if kind not in accepted:
                    raise ValueError(f"{name}[{index}] must be one of {', '.join(accepted)}, got {kind!r}")
        for index, kinds in enumerate(zip(mixers, mlps, strict=True)):
            if set(kinds) == {"none"}:
                raise ValueError(
                    f"mlp_types[{index}] must be 'gated' or 'plain' where mixer_types[{index}] is 'none', got 'none'"
                )
        if int(self.head_dim or 1) % 2:
            raise ValueError(f"head_dim must be even, for the rotary embedding, got {self.head_dim}")
        for name in ("rope_parameters", "local_rope_parameters"):
            part = (getattr(self, name) or {}).get("partial_rotary_factor", 1.0)
            if not 0 <= part <= 1 or int(int(self.head_dim or 0) * part) % 2:
                raise ValueError(
                    f"{name}['partial_rotary_factor'] must be between 0 and 1 and give an even number of the "
                    f"{self.head_dim} channels of a head, got {part}"
                )
        local = "local_rope" in (self.position_types or [])
        if local != (self.local_rope_parameters is not None):
            raise ValueError(
                "local_rope_parameters must be given where position_types has 'local_rope', and only there, got "
                f"{self.local_rope_parameters}"
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be an activation of transformers, got {self.hidden_act!r}")
        positive = ("rms_norm_eps", "query_pre_attn_scalar", "embedding_multiplier")
        for name in (*positive, "attn_logit_softcapping", "final_logit_softcapping"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 <= self.hidden_dropout < 1:
            raise ValueError(f"hidden_dropout must be at least 0 and below 1, got {self.hidden_dropout}")
        self._check_block()
        both_ways = [kind for kind, row in TOKEN_MIXERS.items() if row.bidirectional]
        for index, kind in enumerate(mixers if self.bidirectional else []):
            if kind not in (*both_ways, "none"):
                raise ValueError(
                    f"mixer_types[{index}] must be one of {', '.join(both_ways)} with bidirectional=True, got {kind!r}"
                )
        for name in ("lm_head_bias", "final_logit_softcapping", "recompute_length") if self.bidirectional else ():
            if getattr(self, name):
                raise ValueError(f"{name} must be left out with bidirectional=True, got {getattr(self, name)}")
        check_prefix_option(self)
        without = [kind for kind in sorted(set(mixers) - {"none"}) if not TOKEN_MIXERS[kind].prefix]
        if self.prefix_bidirectional and without:
            raise ValueError(
                f"prefix_bidirectional must be False with the causal mixer_types {', '.join(without)}, got True"
            )
        for kind in sorted(set(mixers) - {"none"}):
            try:
                self.settings_of(kind).check(self)
            except (ValueError, StrictDataclassError) as error:
                raise ValueError(f"{kind}: {error.__cause__ or error}") from error

    def _check_block(self) -> None:
        """Raise ValueError where the norms and residuals of a block are unknown or contradict each other."""
        choices = {"norm_type": NORM_TYPES, "norm_placement": NORM_PLACEMENTS, "qk_norm": (None, *QK_NORMS)}
        for name, accepted in choices.items():
            value = getattr(self, name)
            if value not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(map(str, accepted))}, got {value!r}")
        if self.use_parallel_residual and self.norm_placement != "before":
            raise ValueError(
                f"norm_placement must be 'before' with use_parallel_residual=True, got {self.norm_placement!r}"
            )
        if self.share_norm and not self.use_parallel_residual:
            raise ValueError("use_parallel_residual must be True with share_norm=True, got False")
        if self.share_norm:
            halves = {*zip(self.mixer_types or [], self.mlp_types or [], strict=True)}
            if any("none" in half for half in halves):
                raise ValueError("every block must have a mixer and an MLP with share_norm=True, but one has 'none'")


__all__ = ["ZooHybridConfig"]
