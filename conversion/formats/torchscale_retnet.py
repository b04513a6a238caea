"""torchscale's RetNet and `zoo_retnet`.

Source: microsoft/torchscale@4d1e0e8 and its release 0.3.0, `architecture/retnet.py`, `architecture/config.py`
(`RetNetConfig`). torchscale saves no configuration. A checkpoint is a folder with the state dict of a `RetNetDecoder`
(fairseq's prefix `decoder.` is removed) and a config.json with the fields of `RetNetConfig`, as `vars(config)` has
them; missing ones have its defaults. `RetNetConfig(**json.load(file))` reads what is written here.

The rows of W_Q and W_K are permuted: torchscale rotates neighbouring channels of a head, the zoo the two halves. The
state dict also holds the angles and the logarithms of the decays, which are fixed. They are compared when a checkpoint
is read, and computed when one is written.

Fields for training, speed and what no forward reads (`dropout`, `chunkwise_recurrent`, `subln`, `xpos_rel_pos`) are
ignored; `moe_freq` must be 0. Some of torchscale's forms and releases normalise scores in
another way than the paper (`modeling/retention.py`), which changes logits through the epsilon of the norm of the heads.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...modeling import ZooRetNetConfig, ZooRetNetForCausalLM
from ...modeling.configuration_retnet import torchscale_rope_theta
from ..rules import Computed, LazyTensor, Rule
from .format import Format, filled, positive, read_config, require, require_one_of

_MODEL: dict[str, Any] = {
    "decoder_embed_dim": 768,
    "decoder_value_embed_dim": 1280,
    "decoder_retention_heads": 3,
    "decoder_ffn_embed_dim": 1280,
    "decoder_layers": 12,
    "decoder_normalize_before": True,
    "activation_fn": "gelu",
    "no_scale_embedding": True,
    "layernorm_embedding": False,
    "moe_freq": 0,
    "deepnorm": False,
    "subln": True,
    "multiway": False,
    "share_decoder_input_output_embed": False,
    "max_target_positions": 1024,
    "no_output_layer": False,
    "layernorm_eps": 1e-6,
    "vocab_size": -1,
}
_IGNORED = (
    "dropout",
    "drop_path_rate",
    "activation_dropout",
    "moe_top1_expert",
    "moe_expert_count",
    "moe_gating_use_fp32",
    "moe_eval_capacity_token_fraction",
    "moe_second_expert_policy",
    "moe_normalize_gate_prob_before_dropping",
    "use_xmoe",
    "rel_pos_buckets",
    "max_rel_pos",
    "chunkwise_recurrent",
    "recurrent_chunk_size",
    "checkpoint_activations",
    "fsdp",
    "ddp_rank",
    "xpos_rel_pos",
    "xpos_scale_base",
)
_ACTIVATIONS = {"swish": "silu", "gelu": "gelu"}
_EMBEDDING, _HEAD = "embed_tokens.weight", "output_projection.weight"
_ANGLE, _DECAY = "retnet_rel_pos.angle", "retnet_rel_pos.decay"
_BLOCK, _OURS = "layers.{layer}.", "backbone.layers.{layer}."


def _zoo_config(values: dict[str, Any]) -> ZooRetNetConfig:
    model = filled("", values, _MODEL, "torchscale's RetNetConfig", ignored=_IGNORED)
    sizes = ("decoder_embed_dim", "decoder_value_embed_dim", "decoder_retention_heads", "decoder_ffn_embed_dim")
    for name in (*sizes, "decoder_layers", "vocab_size", "max_target_positions"):
        positive(name, model[name])
    none = "zoo_retnet has none"
    for name in ("layernorm_embedding", "deepnorm", "multiway"):
        require(name, model[name], False, none)
    require("moe_freq", model["moe_freq"], 0, "zoo_retnet has no experts")
    require("no_output_layer", model["no_output_layer"], False, "a language model has a head")
    before = bool(model["subln"] or model["decoder_normalize_before"])  # as the class of the configuration decides
    require("decoder_normalize_before", before, True, "zoo_retnet's norms are before retention and MLP")
    require_one_of("activation_fn", model["activation_fn"], _ACTIVATIONS, "torchscale's GLU has no other in zoo_retnet")
    width, heads = model["decoder_embed_dim"], model["decoder_retention_heads"]
    for name in ("decoder_embed_dim", "decoder_value_embed_dim"):
        if model[name] % heads:
            raise ValueError(
                f"config.json: `decoder_retention_heads` must divide {name} ({model[name]}), got {heads!r}."
            )
    return ZooRetNetConfig(
        vocab_size=model["vocab_size"],
        hidden_size=width,
        intermediate_size=model["decoder_ffn_embed_dim"],
        num_hidden_layers=model["decoder_layers"],
        num_attention_heads=heads,
        v_head_dim=model["decoder_value_embed_dim"] // heads,
        hidden_act=_ACTIVATIONS[model["activation_fn"]],
        rms_norm_eps=model["layernorm_eps"],
        embedding_multiplier=1.0 if model["no_scale_embedding"] else math.sqrt(width),
        max_position_embeddings=model["max_target_positions"],
        tie_word_embeddings=bool(model["share_decoder_input_output_embed"]),
    )


def _config(config: ZooRetNetConfig) -> dict[str, Any]:
    heads, width = config.num_attention_heads, config.hidden_size
    require("num_key_value_heads", config.num_key_value_heads, heads, "equal to num_attention_heads in torchscale")
    if heads * int(config.head_dim or 0) != width:
        raise ValueError(
            f"config.json: `head_dim` must be hidden_size / num_attention_heads ({width} / {heads}) in torchscale, got "
            f"{config.head_dim!r}."
        )
    require("mlp_type", config.mlp_type, "gated", "torchscale's RetNet has no other")
    require("use_output_gate", config.use_output_gate, True, "torchscale's retention has one")
    require("normalize_scores", config.normalize_scores, True, "torchscale normalises them")
    require("elementwise_affine", config.elementwise_affine, False, "torchscale's norm of the heads has no weight")
    require("bidirectional", config.bidirectional, False, "torchscale's RetNet is causal")
    require_one_of("hidden_act", config.hidden_act, list(_ACTIVATIONS.values()), "torchscale has no other")
    scaled = math.sqrt(width)
    require_one_of("embedding_multiplier", config.embedding_multiplier, [1.0, scaled], "1 or the root of hidden_size")
    rotary, theta = config.rope_parameters or {}, torchscale_rope_theta(int(config.head_dim or 0))
    require("rope_parameters.rope_type", rotary.get("rope_type"), "default", "torchscale has no other")
    if not math.isclose(rotary.get("rope_theta", 0.0), theta, rel_tol=1e-9):
        raise ValueError(
            f"config.json: `rope_parameters.rope_theta` must be {theta!r}, which gives torchscale's frequencies, got "
            f"{rotary.get('rope_theta')!r}."
        )
    return _MODEL | {
        "decoder_embed_dim": width,
        "decoder_value_embed_dim": heads * int(config.v_head_dim or 0),
        "decoder_retention_heads": heads,
        "decoder_ffn_embed_dim": config.intermediate_size,
        "decoder_layers": config.num_hidden_layers,
        "activation_fn": next(name for name, act in _ACTIVATIONS.items() if act == config.hidden_act),
        "no_scale_embedding": config.embedding_multiplier != scaled,
        "share_decoder_input_output_embed": config.tie_word_embeddings,
        "max_target_positions": config.max_position_embeddings,
        "layernorm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
    }


@dataclass(frozen=True)
class _Embedding:
    """Transform for our embedding, with the fixed tensors that their state dict also holds.

    Attributes:
        heads: H.
        width: P, width of a key head.
        tied: whether their state dict holds the embedding a second time, as the head.
    """

    heads: int
    width: int
    tied: bool

    def fixed(self) -> dict[str, Tensor]:
        """Return the angles (P) and the logarithms of the decays (H), rounded as torchscale's."""
        angle = 1.0 / (10000 ** torch.linspace(0, 1, self.width // 2))
        decay = torch.log(1 - 2.0 ** (-5 - torch.arange(self.heads, dtype=torch.float32)))
        return {_ANGLE: angle.repeat_interleave(2), _DECAY: decay}

    def to_ours(self, theirs: list[LazyTensor]) -> list[LazyTensor]:
        """Return the embedding, which raises ValueError when it is loaded beside other angles, decays or head."""
        embedding, angle, decay, *head = theirs

        def load() -> Tensor:
            for (key, wanted), tensor in zip(self.fixed().items(), (angle, decay), strict=True):
                found = tensor.load()
                tolerance = 1e-6 + 2 * torch.finfo(found.dtype).eps * wanted.abs()
                if not bool(((found.float() - wanted).abs() <= tolerance).all()):
                    raise ValueError(
                        f"weights: {key} must be {wanted.tolist()}, the only values of zoo_retnet with {self.heads} "
                        f"heads of {self.width} channels, got {found.tolist()}"
                    )
            rows = embedding.load()
            if head and not torch.equal(head[0].load(), rows):
                raise ValueError(
                    f"weights: {_HEAD} must be equal to {_EMBEDDING}, as config.json says that they are shared, but "
                    "they differ. Set `share_decoder_input_output_embed` to false"
                )
            return rows

        return [LazyTensor(embedding.shape, embedding.dtype, load)]

    def from_ours(self, ours: list[LazyTensor]) -> list[LazyTensor]:
        """Return the embedding, angles and decays in float32 and, if it is tied, the head."""
        shapes = {_ANGLE: (self.width,), _DECAY: (self.heads,)}
        fixed = [LazyTensor(shape, torch.float32, lambda key=key: self.fixed()[key]) for key, shape in shapes.items()]
        return [ours[0], *fixed, *([ours[0]] if self.tied else [])]


def _rows(config: ZooRetNetConfig) -> Computed:
    """Return the transform from neighbouring channels to halves, of the rows of queries or keys."""
    heads, pairs = config.num_attention_heads, int(config.head_dim or 0) // 2

    def moved(tensor: Tensor, sizes: tuple[int, int]) -> Tensor:
        return tensor.unflatten(0, (heads, *sizes)).transpose(1, 2).flatten(0, 2)

    shape = (2 * heads * pairs, config.hidden_size)
    return Computed(
        (shape,), shape, lambda tensors: moved(tensors[0], (pairs, 2)), lambda tensor: [moved(tensor, (2, pairs))]
    )


def _rules(config: ZooRetNetConfig) -> list[Rule]:
    tied = bool(config.tie_word_embeddings)
    fixed = (_EMBEDDING, _ANGLE, _DECAY, *([_HEAD] if tied else []))
    embedding = _Embedding(config.num_attention_heads, int(config.head_dim or 0), tied)
    same = {
        "retention_layer_norm": "input_layernorm",
        "retention.v_proj": "mixer.v_proj",
        "retention.g_proj": "mixer.g_proj",
        "retention.out_proj": "mixer.o_proj",
        "final_layer_norm": "post_attention_layernorm",
        "ffn.fc1": "mlp.gate_proj",  # the one with the activation
        "ffn.gate": "mlp.up_proj",
        "ffn.fc2": "mlp.down_proj",
    }
    return [
        Rule(fixed, "backbone.embeddings.weight", embedding),
        *(
            Rule(f"{_BLOCK}retention.{name}.weight", f"{_OURS}mixer.{name}.weight", _rows(config))
            for name in ("q_proj", "k_proj")
        ),
        *(Rule(f"{_BLOCK}{theirs}.weight", f"{_OURS}{ours}.weight") for theirs, ours in same.items()),
        Rule("layer_norm.weight", "backbone.norm_f.weight"),
        *([] if tied else [Rule(_HEAD, "lm_head.weight")]),
    ]


def is_torchscale(values: dict[str, Any]) -> bool:
    """Return whether these are the values of a config.json of this layout, which has no model type."""
    return "model_type" not in values and "decoder_retention_heads" in values


TORCHSCALE_RETNET = Format(
    name="torchscale RetNet",
    library="torchscale",
    zoo_class=ZooRetNetForCausalLM,
    reads=is_torchscale,
    read=read_config,
    zoo_config=_zoo_config,
    config=_config,
    rules=_rules,
)
