"""Toeplitz mixers with RMS norms: experiments 001, 002 and 010 of ethan-w-roland/ToeplitzMixers@6a67297.

Their norms have torch's default epsilon, the machine epsilon of float32. Tokens are mixed before channels, and there is
a norm before the head. Experiment 010 has heads. In its later form, the weights are the softplus of `weight_raw`, and
each position's output may be divided by the sum of its weights (`mean`), which makes the matrices dense.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...modeling import MaskedMixerConfig, MaskedMixerForCausalLM
from ..rules import Computed, Rule
from .bare_checkpoint import MixerCheckpoint, MixerReading, Settings, constant, stacked

_EPSILON = float(torch.finfo(torch.float32).eps)
_THEIRS, _OURS = "blocks.{layer}.", "backbone.layers.{layer}."


def read_fast_toeplitz(checkpoint: MixerCheckpoint, settings: Settings) -> MixerReading:
    """Read a `ToeplitzMixerModel` of experiments 001 and 002, which has one vector and no heads."""
    (positions,) = checkpoint.shape("blocks.0.mixer.weight", 1)
    vector = Computed(((positions,),), (1, positions), stacked)
    rules = [Rule(f"{_THEIRS}mixer.{name}", f"{_OURS}mixer.{name}", vector) for name in ("weight", "bias")]
    names = {"inp_emb": "backbone.embeddings", "norm": "backbone.norm_f", "out_emb": "lm_head"}
    norms = {"norm1": "token_norm", "norm2": "channel_norm"}
    sizes = {"mixing": "toeplitz", "max_position_embeddings": positions, "use_projections": False}
    return _reading("ToeplitzMixerModel", checkpoint, settings, names, norms, rules, sizes, "silu")


def read_optimised_toeplitz(checkpoint: MixerCheckpoint, settings: Settings) -> MixerReading:
    """Read an `MLPMixer` of experiment 010, with heads in one tensor, with or without projections.

    Raises:
        ValueError: if the user does not say whether outputs are divided by the sums of their weights.
    """
    raw = "weight_raw" if checkpoint.has(r"blocks\.0\.mixer\.weight_raw") else "weight"
    count, positions = checkpoint.shape(f"blocks.0.mixer.{raw}", 2)
    mean = settings.take("mean", bool)
    if mean is None:
        raise ValueError(
            "--set mean must be given, since the keys do not tell it. Pass --set mean=true if outputs are divided by "
            "the sum of their weights (do_toep_mean), otherwise --set mean=false."
        )
    weights = _weights(count, positions, raw == "weight_raw", mean)
    rules = [
        Rule(f"{_THEIRS}mixer.{raw}", f"{_OURS}mixer.weight", weights),
        Rule(f"{_THEIRS}mixer.bias", f"{_OURS}mixer.bias"),
    ]
    projections = checkpoint.has(r"blocks\.0\.mixer\.out_proj\..*")
    if projections:
        (width,) = checkpoint.shape("blocks.0.mlp_norm.weight", 1)
        rules += [
            Rule(f"{_THEIRS}mixer.inp_proj.{{rest}}", f"{_OURS}mixer.in_proj.{{rest}}"),
            Rule(f"{_THEIRS}mixer.out_proj.weight", f"{_OURS}mixer.out_proj.weight"),
            Rule(
                f"{_THEIRS}mixer.out_proj.weight",
                f"{_OURS}mixer.out_proj.bias",
                constant((width, width), torch.zeros(width)),
            ),
        ]
    names = {"inp_embed": "backbone.embeddings", "out_norm": "backbone.norm_f", "out_embed": "lm_head"}
    norms = {"mixer_norm": "token_norm", "mlp_norm": "channel_norm"}
    sizes = {
        "mixing": "dense" if mean else "toeplitz",
        "max_position_embeddings": positions,
        "num_heads": count,
        "use_projections": projections,
    }
    name = "Toeplitz MLPMixer of heads"
    return _reading(name, checkpoint, settings, names, norms, rules, sizes, "gelu_pytorch_tanh")


def _weights(count: int, positions: int, positive: bool, mean: bool) -> Computed | None:
    """Return the transform from their weights to ours; None if they are the same."""
    if not positive and not mean:
        return None

    def make(tensors: list[Tensor]) -> Tensor:
        return _by_distance(tensors[0], positive, mean)

    return Computed(((count, positions),), (count, positions, positions) if mean else (count, positions), make)


def _by_distance(weights: Tensor, positive: bool, mean: bool) -> Tensor:
    """Return (H, N) weights by distance or, if divided by the sum of a position's weights, (H, N, N) matrices."""
    weights = F.softplus(weights.double()) if positive else weights.double()
    if not mean:
        return weights
    place = torch.arange(weights.shape[1])
    matrix = weights[:, (place[:, None] - place).clamp(min=0)].tril()
    return matrix / weights.cumsum(-1)[..., None]


def _reading(
    name: str,
    checkpoint: MixerCheckpoint,
    settings: Settings,
    names: dict[str, str],
    norms: dict[str, str],
    rules: list[Rule],
    sizes: dict[str, Any],
    hidden_act: str,
) -> MixerReading:
    """Build the reading from what both forms share.

    `names` maps embedding, last norm and head, and `norms` the norms of a block, from their names to ours.
    """
    embedding, last, head = names
    tied = checkpoint.tie(f"{embedding}.weight", f"{head}.weight")
    vocabulary, width = checkpoint.shape(f"{embedding}.weight", 2)
    rules = [
        *rules,
        *(Rule(f"{key}.weight", f"{names[key]}.weight") for key in (embedding, last, head) if key != head or not tied),
        *(Rule(f"{_THEIRS}{key}.weight", f"{_OURS}{value}.weight") for key, value in norms.items()),
        Rule(f"{_THEIRS}mlp.fc1.{{rest}}", f"{_OURS}mlp.up_proj.{{rest}}"),
        Rule(f"{_THEIRS}mlp.fc2.{{rest}}", f"{_OURS}mlp.down_proj.{{rest}}"),
    ]
    config = MaskedMixerConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=checkpoint.count("blocks"),
        intermediate_size=checkpoint.shape("blocks.0.mlp.fc1.weight", 2)[0],
        norm_type="rms_norm",
        norm_eps=_EPSILON,
        final_norm=True,
        mlp_first=False,
        tie_word_embeddings=tied,
        **sizes,
        **settings.common(hidden_act),
    )
    return MixerReading(name, MaskedMixerForCausalLM, config, rules)
