"""Masked mixers as their author saves them (blbadger/maskedmixers@8f9515d, blbadger/memorymodels@b5bbc77).

Four kinds are read:

* `LanguageMixer`, which mixes by a convolution with positions as channels and k taps over the features, by a linear
  layer (`MLPMixerBlock`), or expanded: by two convolutions with a GELU between them;
* `MultiHeadedMixer`, which has a projection, a convolution and a bias for each head;
* the encoder of `AutoencodingMixer`;
* the two streams of `DoubleMixerBlock`.

Entries above the diagonal are never used there, but the optimiser changes them; they are set to zero. The first kind is
also written and, for models with projections, the second.

`MixerHead` has a second form, whose output projection is H times as wide as the input: because of a stale loop index,
each of its heads is the last convolution, without a projection of its input. This equals one head, with the sum of the
blocks of the output projection. Experiments with a softmax on the weights or on the mixing have the same keys, so they
cannot be told apart.

The transfixer (branch of blbadger/transformers) is a Llama with a masked convolution over positions in parallel to
attention. It has the config.json of a `LlamaForCausalLM`; without it, `num_attention_heads` must be given.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig

from ...modeling import (
    MaskedMixerConfig,
    MaskedMixerForCausalLM,
    MaskedMixerForMaskedLM,
    MaskedMixerModel,
    RetrievalMixer,
    RetrievalMixerConfig,
)
from ...modeling.layers import llama_rope_parameters
from ..rules import Computed, Rule
from .bare_checkpoint import MixerCheckpoint, MixerReading, Settings, constant, dropped, stacked, unstacked
from .format import Format, require

LIBRARY = "maskedmixers"
_EPSILON = 1e-5  # torch's default for LayerNorm
_OURS = "layers.{layer}."
_EMBEDDING = "backbone.embeddings.weight"
_LLAMA, _BACKBONE = "model.layers.{layer}.", "backbone." + _OURS
_LLAMA_FIRST = _LLAMA.format(layer=0)


def read_language_mixer(checkpoint: MixerCheckpoint, settings: Settings) -> MixerReading:
    """Read a `LanguageMixer`: causal or, with two streams, with a head for masked tokens."""
    two = checkpoint.has(r"mixerblocks\.\d+\.convf\..*")
    tied = checkpoint.tie("wte.weight", "lm_head.weight")
    model_class = MaskedMixerForMaskedLM if two else MaskedMixerForCausalLM
    notes = dropped(checkpoint.drop(r"wte_second\..*"), "no forward pass reads them")
    config, rules, more = _blocks(checkpoint, settings, "mixerblocks", two=two, prefix="backbone.", tied=tied)
    if not tied:
        rules.append(Rule("lm_head.weight", "lm_head.weight"))
    name = "LanguageMixer of two streams" if two else "MultiHeadedMixer" if config.use_projections else "LanguageMixer"
    return MixerReading(name, model_class, config, rules, [*notes, *more])


def read_autoencoder(checkpoint: MixerCheckpoint, settings: Settings) -> MixerReading:
    """Read the encoder, a model without a head: the embedding of a text is its last hidden state."""
    decoder = checkpoint.drop(r"(decoderblocks|lm_head|down|up|projection)\..*")
    notes = dropped(decoder, "they belong to the decoder, or to the compression before it")
    config, rules, more = _blocks(checkpoint, settings, "encoderblocks", two=False, prefix="", tied=False)
    return MixerReading("encoder of AutoencodingMixer", MaskedMixerModel, config, rules, [*notes, *more])


def read_retrieval(checkpoint: MixerCheckpoint, settings: Settings) -> MixerReading:
    """Read a `RetrievalMixer`, which reads embeddings of a query and of candidates; its matrices are not masked."""
    places, *_ = shape = checkpoint.square("mixerblocks.0.conv.weight", 3)
    inner, width = checkpoint.shape("mixerblocks.0.patch_ff.0.weight", 2)
    theirs = "mixerblocks.{layer}."
    whole = Computed((shape,), (places, places), lambda tensors: tensors[0][..., 0])
    rules = [
        Rule("retrieval_head.{rest}", "retrieval_head.{rest}"),
        Rule(f"{theirs}seq_layernorm.{{rest}}", f"{_OURS}token_norm.{{rest}}"),
        Rule(f"{theirs}conv.weight", f"{_OURS}mixer.weight", whole),
        Rule(f"{theirs}conv.bias", f"{_OURS}mixer.bias"),
        *_mlp_rules(theirs, _OURS),
    ]
    config = RetrievalMixerConfig(
        hidden_size=width,
        num_hidden_layers=checkpoint.count("mixerblocks"),
        max_position_embeddings=places,
        intermediate_size=inner,
        hidden_act=settings.take("hidden_act", str) or "gelu",
        norm_eps=_EPSILON,
    )
    return MixerReading("RetrievalMixer", RetrievalMixer, config, rules)


def _mlp_rules(theirs: str, ours: str) -> list[Rule]:
    """Return the rules for the channel mixing of a block."""
    return [
        Rule(f"{theirs}patch_layernorm.{{rest}}", f"{ours}channel_norm.{{rest}}"),
        Rule(f"{theirs}patch_ff.0.{{rest}}", f"{ours}mlp.up_proj.{{rest}}"),
        Rule(f"{theirs}patch_ff.2.{{rest}}", f"{ours}mlp.down_proj.{{rest}}"),
    ]


def _blocks(
    checkpoint: MixerCheckpoint, settings: Settings, blocks: str, *, two: bool, prefix: str, tied: bool
) -> tuple[MaskedMixerConfig, list[Rule], list[str]]:
    """Return the configuration, the rules for embedding and blocks, and lines for the report."""
    vocabulary, width = checkpoint.shape("wte.weight", 2)
    first, theirs, ours = f"{blocks}.0.", blocks + ".{layer}.", prefix + _OURS
    inner = checkpoint.shape(f"{first}patch_ff.0.weight", 2)[0]
    rules = [Rule("wte.weight", f"{prefix}embeddings.weight"), *_mlp_rules(theirs, ours)]
    sizes: dict[str, Any] = {}
    notes: list[str] = []
    head = next((name for name in ("mixerhead.", "conv.") if checkpoint.has(rf"{first}{name}convs\..*")), None)
    if two:
        sizes |= {"bidirectional": True, "lookahead": 2}
        positions = checkpoint.square(f"{first}convf.weight", 3)[0]
        for name, mixer, norm in (("f", "mixer", "token_norm"), ("r", "reverse", "reverse_norm")):
            rules.append(Rule(f"{theirs}seq_layernorm{name}.{{rest}}", f"{ours}{norm}.{{rest}}"))
            turned = name == "r"
            rules += convolution_rules(f"{theirs}conv{name}.", f"{ours}{mixer}.", (positions, positions, 1), turned)
        notes = [
            "positions of the second stream count from the end of a text, as in the authors' code for rows that fill "
            "the context"
        ]
    else:
        rules.append(Rule(f"{theirs}seq_layernorm.{{rest}}", f"{ours}token_norm.{{rest}}"))
        if checkpoint.has(rf"{first}conv\.0\..*"):
            positions = checkpoint.shape(f"{first}conv.2.weight", 3)[0]
            sizes["expanded"] = True
            biased = checkpoint.has(rf"{first}conv\.[02]\.bias")
            wide = checkpoint.shape(f"{first}conv.0.weight", 3)[0]
            rules += _expanded_rules(f"{theirs}conv.", f"{ours}mixer.", positions, wide, biased)
        elif head is None:
            shape = checkpoint.square(f"{first}conv.weight", 2, 3)
            positions = shape[0]
            sizes["kernel_size"] = shape[2] if len(shape) == 3 else 1
            rules += convolution_rules(f"{theirs}conv.", f"{ours}mixer.", shape)
        else:
            positions, *_, taps = checkpoint.square(f"{first}{head}convs.0.weight", 3)
            count = checkpoint.count(f"{first}{head}convs")
            more, sizes, notes = _head_rules(checkpoint, theirs + head, f"{ours}mixer.", positions, count, taps, width)
            rules += more
    config = MaskedMixerConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=checkpoint.count(blocks),
        max_position_embeddings=positions,
        intermediate_size=inner,
        norm_eps=_EPSILON,
        tie_word_embeddings=tied,
        **sizes,
        **settings.common("gelu"),
    )
    return config, rules, notes


def convolution_rules(
    theirs: str,
    ours: str,
    shape: tuple[int, ...],
    turned: bool = False,
    *,
    positions: int | None = None,
    biased: bool = True,
) -> list[Rule]:
    """Return the rules for the only head, a convolution (N, N, k) or a linear layer (N, N).

    The halves of an expanded mixer have as many rows or columns as there are places between them, and need `positions`.
    As both are causal, an output reads no more of these places than there are positions up to it. So further places are
    cut off, and missing ones are filled with zeros, which computes the same.
    """
    rows, columns = shape[:2]
    positions = rows if positions is None else positions
    taps = shape[2] if len(shape) == 3 else 1

    def make(tensors: list[Tensor]) -> Tensor:
        weight = tensors[0].movedim(2, 0) if len(shape) == 3 else tensors[0][None]
        # The second stream counts from the end, and its first two diagonals are not used.
        weight = weight.flip(1, 2).tril(-2) if turned else weight.tril()
        return F.pad(weight, (0, positions - columns, 0, positions - rows))  # negative padding cuts off

    def undo(tensor: Tensor) -> list[Tensor]:
        return [tensor.movedim(0, 2) if len(shape) == 3 else tensor[0]]

    def make_bias(tensors: list[Tensor]) -> Tensor:
        bias = tensors[0].flip(0) if turned else tensors[0]
        return F.pad(bias, (0, positions - rows))[None]

    weight = Rule(f"{theirs}weight", f"{ours}weight", Computed((shape,), (taps, positions, positions), make, undo))
    if not biased:
        return [weight, Rule(None, f"{ours}bias")]
    return [weight, Rule(f"{theirs}bias", f"{ours}bias", Computed(((rows,),), (1, positions), make_bias, unstacked))]


def _expanded_rules(theirs: str, ours: str, positions: int, wide: int, biased: bool) -> list[Rule]:
    """Return the rules for two convolutions, to `wide` places and back."""
    first = convolution_rules(f"{theirs}0.", f"{ours}inner_", (wide, positions, 1), positions=positions, biased=biased)
    return first + convolution_rules(f"{theirs}2.", ours, (positions, wide, 1), positions=positions, biased=biased)


def _head_rules(
    checkpoint: MixerCheckpoint, theirs: str, ours: str, positions: int, count: int, taps: int, width: int
) -> tuple[list[Rule], dict[str, Any], list[str]]:
    """Return the rules and sizes of a `MixerHead`, and lines for the report."""
    outputs = checkpoint.shape(f"{theirs.format(layer=0)}out_proj.weight", 2)[1]
    if outputs == width:
        sizes = {"num_heads": count, "kernel_size": taps, "use_projections": True}
        return _projected_rules(theirs, ours, positions, count, taps, width), sizes, []
    if outputs != count * width:
        raise ValueError(
            f"{checkpoint.name}: {theirs.format(layer=0)}out_proj.weight must have {width} columns or, with the stale "
            f"index of MixerHead, {count} times as many, got {outputs}."
        )
    last = f"{theirs}convs.{count - 1}."
    pattern = theirs.replace(".", r"\.").replace("{layer}", r"\d+")
    unused = checkpoint.drop(rf"{pattern}proj_head\..*", rf"{pattern}convs\.(?!{count - 1}\.)\d+\..*")
    notes = dropped(
        unused, "no forward pass reads them: with MixerHead's stale index, all heads use the last convolution"
    )
    folded = Computed(
        ((width, outputs),), (width, width), lambda tensors: tensors[0].unflatten(1, (count, width)).sum(1)
    )
    rules = [
        *convolution_rules(last, ours, (positions, positions, taps)),
        Rule(f"{theirs}out_proj.weight", f"{ours}out_proj.weight", folded),
        Rule(f"{theirs}out_proj.bias", f"{ours}out_proj.bias"),
        Rule(f"{theirs}out_proj.weight", f"{ours}in_proj.weight", constant((width, outputs), torch.eye(width))),
        Rule(f"{theirs}out_proj.bias", f"{ours}in_proj.bias", constant((width,), torch.zeros(width))),
    ]
    return rules, {"num_heads": 1, "kernel_size": taps, "use_projections": True}, notes


def _projected_rules(theirs: str, ours: str, positions: int, count: int, taps: int, width: int) -> list[Rule]:
    """Return the rules for a `MixerHead` without the stale index."""

    def each(name: str) -> tuple[str, ...]:
        return tuple(f"{theirs}{name.format(head)}" for head in range(count))

    def make(tensors: list[Tensor]) -> Tensor:
        return torch.stack([tensor.movedim(2, 0) for tensor in tensors], dim=1).flatten(0, 1).tril()

    def undo(tensor: Tensor) -> list[Tensor]:
        return [head.movedim(0, 2) for head in tensor.unflatten(0, (taps, count)).unbind(1)]

    weight = Computed(((positions, positions, taps),) * count, (taps * count, positions, positions), make, undo)
    return [
        Rule(each("convs.{}.weight"), f"{ours}weight", weight),
        Rule(
            each("convs.{}.bias"),
            f"{ours}bias",
            Computed(((positions,),) * count, (count, positions), stacked, unstacked),
        ),
        *in_proj_rules(each("proj_head.{}."), ours, width),
        Rule(f"{theirs}out_proj.{{rest}}", f"{ours}out_proj.{{rest}}"),
    ]


def in_proj_rules(theirs: tuple[str, ...], ours: str, width: int) -> list[Rule]:
    """Return the rules that join the linear layers of all heads into one; `theirs` are their keys' beginnings."""
    rows = width // len(theirs)
    rules = []
    for name, shape in (("weight", (rows, width)), ("bias", (rows,))):
        joined = Computed(
            (shape,) * len(theirs), (width, *shape[1:]), torch.cat, lambda tensor: list(tensor.split(rows))
        )
        rules.append(Rule(tuple(key + name for key in theirs), f"{ours}in_proj.{name}", joined))
    return rules


def read_transfixer(checkpoint: MixerCheckpoint, settings: Settings) -> MixerReading:
    """Read a transfixer from a folder with or without a configuration."""
    tied = checkpoint.tie("model.embed_tokens.weight", "lm_head.weight")
    vocabulary, width = checkpoint.shape("model.embed_tokens.weight", 2)
    positions, *_, taps = shape = checkpoint.square(f"{_LLAMA_FIRST}mixer_layer.conv.weight", 3)
    has_config = (checkpoint.folder / "config.json").is_file()
    fields = _of_config(checkpoint.folder) if has_config else _of_settings(checkpoint, settings)
    config = MaskedMixerConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=checkpoint.count("model.layers"),
        max_position_embeddings=positions,
        kernel_size=taps,
        intermediate_size=checkpoint.shape(f"{_LLAMA_FIRST}mlp.gate_proj.weight", 2)[0],
        attention="parallel",
        attention_bias=checkpoint.has(rf"{_LLAMA_FIRST}self_attn\.q_proj\.bias"),
        mlp_bias=checkpoint.has(rf"{_LLAMA_FIRST}mlp\.gate_proj\.bias"),
        tie_word_embeddings=tied,
        **(fields | settings.common(None if has_config else "silu")),
    )
    rules = [
        Rule("model.embed_tokens.weight", "backbone.embeddings.weight"),
        Rule(f"{_LLAMA}input_layernorm.weight", f"{_BACKBONE}token_norm.weight"),
        Rule(f"{_LLAMA}self_attn.{{rest}}", f"{_BACKBONE}attention.{{rest}}"),
        Rule(f"{_LLAMA}post_attention_layernorm.weight", f"{_BACKBONE}channel_norm.weight"),
        Rule(f"{_LLAMA}mlp.{{rest}}", f"{_BACKBONE}mlp.{{rest}}"),
        Rule("model.norm.weight", "backbone.norm_f.weight"),
        *convolution_rules(f"{_LLAMA}mixer_layer.conv.", f"{_BACKBONE}mixer.", shape),
        *([] if tied else [Rule("lm_head.weight", "lm_head.weight")]),
    ]
    return MixerReading("transfixer", MaskedMixerForCausalLM, config, rules)


def _of_config(folder: Path) -> dict[str, Any]:
    given: Any = LlamaConfig.from_pretrained(folder)
    same = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "use_cache")
    same += ("bos_token_id", "eos_token_id", "pad_token_id")
    rotary = {"rope_parameters": llama_rope_parameters(given), "norm_eps": given.rms_norm_eps}
    return {name: getattr(given, name) for name in same} | rotary


def _of_settings(checkpoint: MixerCheckpoint, settings: Settings) -> dict[str, Any]:
    heads = settings.positive("num_attention_heads", int)
    if heads is None:
        raise ValueError(
            "--set num_attention_heads must be given, since it cannot be inferred without a config.json. Pass e.g. "
            "--set num_attention_heads=4."
        )
    queries, keys = (checkpoint.shape(f"{_LLAMA_FIRST}self_attn.{name}_proj.weight", 2)[0] for name in "qk")
    if queries % heads or keys % (queries // heads):
        raise ValueError(
            f"--set num_attention_heads must divide the {queries} rows of q_proj into heads whose width divides the "
            f"{keys} rows of k_proj, got {heads}."
        )
    theta = settings.positive("rope_theta", float) or 10000.0
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": keys * heads // queries,
        "head_dim": queries // heads,
        "norm_eps": settings.positive("norm_eps", float) or 1e-6,  # LlamaConfig's
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }


def _no_config(config: MaskedMixerConfig) -> dict[str, Any]:
    """Raise a ValueError for a field that the author's classes cannot express; no config.json is written."""
    reasons = {
        "mixing": ("dense", "they have no other"),
        "attention": ("none", "they have none"),
        "bidirectional": (False, "only causal models are written"),
        "norm_type": ("layer_norm", "they have no other"),
        "norm_eps": (_EPSILON, "they have no other"),
        "final_norm": (False, "they have none"),
        "mlp_first": (False, "they mix tokens first"),
        "mlp_type": ("plain", "they have no other"),
        "mlp_bias": (True, "they have one"),
        "hidden_act": ("gelu", "they have no other"),
    }
    for name, (accepted, why) in reasons.items():
        require(name, getattr(config, name), accepted, f"masked mixers of maskedmixers: {why}")
    if config.num_heads > 1 and not config.use_projections:
        raise ValueError("config.json: `use_projections` must be True for several heads in maskedmixers, got False.")
    if config.expanded and (config.num_heads > 1 or config.use_projections):
        raise ValueError("config.json: `expanded` must be False with several heads or projections, got True.")
    return {}


def _written_rules(config: MaskedMixerConfig) -> list[Rule]:
    theirs, ours = "mixerblocks.{layer}.", "backbone." + _OURS
    width, positions, taps = config.hidden_size, config.max_position_embeddings, config.kernel_size
    rules = [Rule(f"{theirs}seq_layernorm.{{rest}}", f"{ours}token_norm.{{rest}}"), *_mlp_rules(theirs, ours)]
    if not config.tie_word_embeddings:
        rules.append(Rule("lm_head.weight", "lm_head.weight"))
    if config.use_projections and taps == 1:
        rules.append(Rule(("wte.weight", "wte_second.weight", "wte_second.bias"), _EMBEDDING, _with_second(config)))
    else:
        rules.append(Rule("wte.weight", _EMBEDDING))
    if config.expanded:
        return rules + _expanded_rules(f"{theirs}conv.", f"{ours}mixer.", positions, positions, biased=True)
    if not config.use_projections:
        return rules + convolution_rules(f"{theirs}conv.", f"{ours}mixer.", (positions, positions, taps))
    # `MultiHeadedMixer` or, with several taps, the block of mixer_autoencoder.py.
    place = "mixerhead." if taps == 1 else "conv."
    return rules + _projected_rules(theirs + place, f"{ours}mixer.", positions, config.num_heads, taps, width)


def _with_second(config: MaskedMixerConfig) -> Computed:
    """Return the transform to the embedding and the unused layer after it of `MultiHeadedMixer`, the identity here."""
    vocabulary, width = config.vocab_size, config.hidden_size

    def undo(tensor: Tensor) -> list[Tensor]:
        return [tensor, torch.eye(width, dtype=tensor.dtype), torch.zeros(width, dtype=tensor.dtype)]

    shapes = ((vocabulary, width), (width, width), (width,))
    return Computed(shapes, (vocabulary, width), lambda tensors: tensors[0], undo)


MASKED_MIXER = Format(
    name="maskedmixers LanguageMixer or MultiHeadedMixer",
    library=LIBRARY,
    zoo_class=MaskedMixerForCausalLM,
    reads=lambda values: False,  # there is no config.json; bare_formats.py recognises the keys
    read=lambda folder: None,
    zoo_config=lambda config: config,
    config=_no_config,
    rules=_written_rules,
    keeps_tied_head=True,
    bare=True,
)
