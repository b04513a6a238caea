"""Toeplitz mixers and structured recurrent mixers as their authors save them.

The `MLPMixer`s of ethan-w-roland/ToeplitzMixers@6a67297 (experiments 003 to 008) and of blbadger/mrm@b06563e have the
same keys, whichever matrix they build from their vectors. The MLP of the former has a dropout, so its second layer has
number 3 instead of 2. This decides between the two unless the user says which is meant (`mixing`).

The decay of a repeat is clip(decay_value, 0.9, 1)^(1 / c) with c = N // 512 or, with several taps, c = N // 256. Their
code fails at c = 0; 1 is used here instead. Our models always have c = max(N // 512, 1), so another `decay_constant`
changes the values. Three peculiarities of their code:

* heads in one tensor have two decays, and all heads use the second one;
* a combined head divides its row matrix by c, instead of the exponent of its decay;
* heads without projections are slices of the channels.
"""

from typing import Any

import torch
from torch import Tensor

from ...modeling import MaskedMixerConfig, MaskedMixerForCausalLM
from ..rules import Computed, Rule
from .bare_checkpoint import MixerCheckpoint, MixerReading, Settings, dropped, stacked
from .maskedmixers import in_proj_rules

_EPSILON = 1e-5  # torch's default for LayerNorm
_FASTEST, _SLOWEST = 0.9, 1.0
_TOKENS, _MIXER = "mixer_blocks.{layer}.token_mixing_layer.", "backbone.layers.{layer}.mixer."


def read_mlp_mixer(checkpoint: MixerCheckpoint, settings: Settings) -> MixerReading:
    """Read an `MLPMixer` with one vector, one for each tap, or heads: each a module, or all in one tensor."""
    first = "mixer_blocks.0."
    tied = checkpoint.tie("input_layer.weight", "output_layer.weight")
    vocabulary, width = checkpoint.shape("input_layer.weight", 2)
    inner = checkpoint.shape(f"{first}channel_mixing_layer.0.weight", 2)[0]
    last = 3 if checkpoint.has(rf"{first}channel_mixing_layer\.3\..*") else 2
    theirs, ours = "mixer_blocks.{layer}.", "backbone.layers.{layer}."
    rules = [
        Rule("input_layer.weight", "backbone.embeddings.weight"),
        Rule(f"{theirs}channel_norm.{{rest}}", f"{ours}channel_norm.{{rest}}"),
        Rule(f"{theirs}channel_mixing_layer.0.{{rest}}", f"{ours}mlp.up_proj.{{rest}}"),
        Rule(f"{theirs}channel_mixing_layer.{last}.{{rest}}", f"{ours}mlp.down_proj.{{rest}}"),
        Rule(f"{theirs}token_norm.{{rest}}", f"{ours}token_norm.{{rest}}"),
    ]
    if not tied:
        rules.append(Rule("output_layer.weight", "lm_head.weight"))
    tokens = f"{first}token_mixing_layer."
    read = _one_tensor if checkpoint.has(rf"{tokens}mixer_heads\.weight") else _no_heads
    read = _separate_heads if checkpoint.has(rf"{tokens}mixer_heads\.\d+\..*") else read
    sizes, more, notes = read(checkpoint, settings, tokens, last, width)
    config = MaskedMixerConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=checkpoint.count("mixer_blocks"),
        intermediate_size=inner,
        norm_eps=_EPSILON,
        mlp_first=True,
        tie_word_embeddings=tied,
        **sizes,
        **settings.common("silu"),
    )
    name = "Toeplitz MLPMixer" if config.mixing == "toeplitz" else "recurrent MLPMixer"
    return MixerReading(name, MaskedMixerForCausalLM, config, rules + more, notes)


_Read = tuple[dict[str, Any], list[Rule], list[str]]


def _no_heads(checkpoint: MixerCheckpoint, settings: Settings, tokens: str, last: int, width: int) -> _Read:
    """Return sizes, rules and lines for the report, for a mixing without heads."""
    taps, positions = checkpoint.shape(f"{tokens}weight", 2)
    decays = checkpoint.has(rf"{tokens}decay_value")
    accepted = ["toeplitz", "column_repeat"] if taps > 1 else ["toeplitz", "row_repeat", "column_repeat"]
    mixing, notes = _mixing(settings, accepted, "toeplitz" if last == 3 else accepted[1], decays)
    rules = [Rule(f"{_TOKENS}weight", f"{_MIXER}weight"), _bias_rule((f"{_TOKENS}bias",), positions)]
    if decays:
        power = _least(positions) / _constant(settings, positions, 256 if taps > 1 else 512)
        shape, index = ((2, 1), 1) if taps > 1 else ((1,), 0)
        rules.append(_decay_rule(checkpoint, (f"{_TOKENS}decay_value",), shape, [(0, index, power)]))
    return _sizes(mixing, positions, 1, decays, kernel_size=taps, use_projections=False), rules, notes


def _separate_heads(checkpoint: MixerCheckpoint, settings: Settings, tokens: str, last: int, width: int) -> _Read:
    """Return sizes, rules and lines for the report, for heads that are modules, each with or without a projection."""
    rows, positions = checkpoint.shape(f"{tokens}mixer_heads.0.weight", 2)
    count = checkpoint.count(f"{tokens}mixer_heads")
    decays = checkpoint.has(rf"{tokens}mixer_heads\.0\.decay_value")
    if rows > 2:
        raise ValueError(
            f"{checkpoint.name}: {tokens}mixer_heads.0.weight must have 1 row, or 2 for a combined head, got {rows}."
        )
    accepted = ["combined_repeat"] if rows == 2 else ["toeplitz", *_mixed(count), "column_repeat", "row_repeat"]
    default = "toeplitz" if last == 3 else "mixed_repeat" if decays else None
    mixing, notes = _mixing(settings, accepted, default, decays)

    def each(name: str) -> tuple[str, ...]:
        return tuple(f"{_TOKENS}mixer_heads.{head}.{name}" for head in range(count))

    constant = _constant(settings, positions, 512) if decays else 1
    weights = Computed(
        ((rows, positions),) * count,
        (rows * count, positions),
        torch.cat if rows == 1 else lambda tensors: _combined(tensors, constant),
    )
    rules = [Rule(each("weight"), f"{_MIXER}weight", weights), _bias_rule(each("bias"), positions)]
    if decays:
        shape = (1,) if rows == 1 else (2, 1)
        places = [(head, rows - 1, _least(positions) / constant) for head in range(count)]
        places += [(head, 0, float(_least(positions))) for head in range(count)] if rows == 2 else []
        rules.append(_decay_rule(checkpoint, each("decay_value"), shape, places))
    projections = checkpoint.has(rf"{tokens}out_proj\..*")
    if projections:
        rules += in_proj_rules(tuple(f"{_TOKENS}proj_head.{head}." for head in range(count)), _MIXER, width)
        rules.append(Rule(f"{_TOKENS}out_proj.{{rest}}", f"{_MIXER}out_proj.{{rest}}"))
    return _sizes(mixing, positions, count, decays, use_projections=projections), rules, notes


def _one_tensor(checkpoint: MixerCheckpoint, settings: Settings, tokens: str, last: int, width: int) -> _Read:
    """Return sizes, rules and lines for the report, for heads in one tensor.

    Their projections are in the checkpoint even if they are not applied.
    """
    count, positions = checkpoint.shape(f"{tokens}mixer_heads.weight", 2)
    decays = checkpoint.has(rf"{tokens}mixer_heads\.decay_value")
    accepted = ["toeplitz", *_mixed(count), "column_repeat"]
    mixing, notes = _mixing(settings, accepted, "toeplitz" if last == 3 else "mixed_repeat", decays)
    heads = f"{_TOKENS}mixer_heads."
    rules = [Rule(f"{heads}weight", f"{_MIXER}weight"), Rule(f"{heads}bias", f"{_MIXER}bias")]
    if decays:
        power = _least(positions) / _constant(settings, positions, 512)
        rules.append(_decay_rule(checkpoint, (f"{heads}decay_value",), (2, 1), [(0, 1, power)] * count))
    projections = settings.take("use_projections", bool) in (None, True)
    if projections:
        rules += [Rule(f"{_TOKENS}{name}.{{rest}}", f"{_MIXER}{name}.{{rest}}") for name in ("in_proj", "out_proj")]
    else:
        unused = checkpoint.drop(r"mixer_blocks\.\d+\.token_mixing_layer\.(in|out)_proj\..*")
        notes = [*notes, *dropped(unused, "use_projections=false says that they are not applied")]
    return _sizes(mixing, positions, count, decays, use_projections=projections), rules, notes


def _sizes(mixing: str, positions: int, count: int, decays: bool, **more: Any) -> dict[str, Any]:
    return {"mixing": mixing, "max_position_embeddings": positions, "num_heads": count, "use_decay": decays, **more}


def _mixed(count: int) -> list[str]:
    return ["mixed_repeat"] if count % 2 == 0 else []


def _mixing(settings: Settings, accepted: list[str], default: str | None, decays: bool) -> tuple[str, list[str]]:
    """Return the kind of the matrices, from the user's setting or the authors' code, and a line for the report.

    Raises:
        ValueError: if neither tells it.
    """
    accepted = [kind for kind in accepted if not (decays and kind == "toeplitz")]
    given = settings.take("mixing", str, accepted)
    if given is not None or len(accepted) == 1:
        return given or accepted[0], []
    if default not in accepted:
        raise ValueError(
            f"--set mixing must be given, since several kinds have these keys: {' or '.join(accepted)}. Pass e.g. "
            f"--set mixing={accepted[0]}."
        )
    return str(default), [f"mixing: assumed to be {default}, as in the authors' code; other kinds have the same keys"]


def _bias_rule(theirs: tuple[str, ...], positions: int) -> Rule:
    count = len(theirs)
    return Rule(theirs, f"{_MIXER}bias", Computed(((positions,),) * count, (count, positions), stacked))


def _combined(tensors: list[Tensor], constant: float) -> Tensor:
    """Return (2 H, N), the columns of all heads and then the rows, from H tensors (2, N) of a row and a column."""
    heads = torch.stack(tensors)
    return torch.cat([heads[:, 1], heads[:, 0] / constant])


def _least(positions: int) -> int:
    """Return the constant c of our models."""
    return max(positions // 512, 1)


def _constant(settings: Settings, positions: int, share: int) -> float:
    """Return the constant c of the authors' code, or the user's."""
    return settings.positive("decay_constant", float) or float(max(positions // share, 1))


def _decay_rule(
    checkpoint: MixerCheckpoint, theirs: tuple[str, ...], shape: tuple[int, ...], places: list[tuple[int, int, float]]
) -> Rule:
    """Return the rule for our decays, each of which is a power of one of their values.

    Args:
        checkpoint: the checkpoint with the values.
        theirs: patterns of the keys.
        shape: shape of each of their tensors.
        places: for each of our decays the number of the tensor, the index in it, and the power.

    Raises:
        ValueError: if a decay is faster than our models allow.
    """
    for layer in range(checkpoint.count("mixer_blocks")):
        keys = [key.format(layer=layer) for key in theirs]
        for number, index, power in places:
            tensor = checkpoint.tensors.get(keys[number])
            if tensor is None or tensor.shape != shape:
                continue  # reported later, together with all wrong keys
            given = tensor.load().flatten()[index]
            value = _decay(given, power).item()
            if value < _FASTEST and power != 1:
                raise ValueError(
                    f"{checkpoint.name}: {keys[number]} to the power of {power:g} must be a decay of at least "
                    f"{_FASTEST}, got {value:.4g} from {given:.4g}."
                )

    def make(tensors: list[Tensor]) -> Tensor:
        return torch.stack([_decay(tensors[number].flatten()[index], power) for number, index, power in places])

    return Rule(theirs, f"{_MIXER}decay_value", Computed((shape,) * len(theirs), (len(places),), make))


def _decay(value: Tensor, power: float) -> Tensor:
    return value if power == 1 else value.double().clip(_FASTEST, _SLOWEST) ** power
