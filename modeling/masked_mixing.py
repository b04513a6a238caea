"""Masked mixing: settings, their checks, the choice of a position mixer, and the row of the table of mixers.

`masked_mixer` and `zoo_hybrid` share the mixers of `position_mixers.py`, with settings of the same names.
"""

from dataclasses import dataclass
from typing import Any

from huggingface_hub.dataclasses import strict

from .mixer import FromAttention, MixerSettings, TokenMixer, check_sizes
from .position_mixers import DenseMixer, PositionMixer, RepeatMixer, ToeplitzMixer

MIXINGS = ("dense", "toeplitz", "row_repeat", "column_repeat", "mixed_repeat", "combined_repeat")
REPEATS = MIXINGS[2:]


def make_position_mixer(config: Any, settings: Any, layer_idx: int, diagonal: int = 0) -> PositionMixer:
    """Build the mixer that `settings` describe for the sizes in `config`; it sees tokens at least `diagonal` before."""
    sizes = (layer_idx, config.hidden_size, config.max_position_embeddings)
    options: dict[str, Any] = {
        "heads": settings.num_heads,
        "taps": settings.kernel_size,
        "projections": bool(settings.use_projections),
    }
    if settings.mixing in REPEATS:
        return RepeatMixer(*sizes, kind=settings.mixing, decay=settings.use_decay, **options)
    kind = DenseMixer if settings.mixing == "dense" else ToeplitzMixer
    inner = str(settings.hidden_act) if getattr(settings, "expanded", False) else None
    return kind(*sizes, diagonal=diagonal, inner=inner, **options)


def check_choice(name: str, value: Any, accepted: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of the accepted ones."""
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")


def check_position_mixing(config: Any, settings: Any) -> None:
    """Raise ValueError where the settings of position mixing are out of range or do not fit the model's sizes."""
    check_sizes(config, "hidden_size", "max_position_embeddings")
    check_sizes(settings, "num_heads", "kernel_size")
    check_choice("mixing", settings.mixing, MIXINGS)
    number = settings.num_heads
    if config.hidden_size % number:
        raise ValueError(f"num_heads must divide hidden_size ({config.hidden_size}), got {number}")
    if settings.mixing == "mixed_repeat" and number % 2:
        raise ValueError(f"num_heads must be even for mixing='mixed_repeat', half rows and half columns, got {number}")
    width = config.hidden_size // number
    if settings.kernel_size > width:
        raise ValueError(f"kernel_size must be at most the {width} channels of a head, got {settings.kernel_size}")


@strict
@dataclass
class MaskedMixingSettings(MixerSettings):
    """Masked mixing in `zoo_hybrid`. `MaskedMixerConfig` explains the keys."""

    mixing: str = "dense"
    num_heads: int = 1
    kernel_size: int = 1
    use_projections: bool | None = None
    use_decay: bool = True

    def complete(self, config: Any) -> None:
        if self.use_projections is None:
            self.use_projections = self.num_heads > 1

    def check(self, config: Any) -> None:
        check_position_mixing(config, self)


def _masked_mixing_keys(teacher: Any, spec: Any) -> dict[str, Any]:
    inner = teacher.num_attention_heads * teacher.head_dim
    if inner != teacher.hidden_size:
        raise ValueError(
            f"`student.mixer` must be 'discrete_mamba2' or 'sliding_attention' for this teacher, got 'masked_mixing', "
            f"which needs heads * head_dim ({inner}) to be the teacher's hidden_size ({teacher.hidden_size})"
        )
    longest = teacher.max_position_embeddings
    if teacher.learned_positions and spec.positions != longest:
        raise ValueError(
            f"`student.positions` must be {longest}, the positions that the teacher has learnt, got {spec.positions}"
        )
    ropes = (teacher.rope_parameters, teacher.local_rope_parameters or {})
    if any(rope.get("rope_type") == "dynamic" for rope in ropes) and spec.positions > longest:
        raise ValueError(
            f"`student.positions` must be at most {longest}, the teacher's max_position_embeddings, beyond which its "
            f"'dynamic' rotary embedding changes, got {spec.positions}"
        )
    sizes = {"num_heads": teacher.num_attention_heads, "use_projections": True}
    return {"masked_mixing": sizes, "max_position_embeddings": spec.positions}


MASKED_MIXING = TokenMixer(
    label="masked mixing: weights for pairs of positions, the same for every text",
    make=make_position_mixer,
    settings=MaskedMixingSettings,
    cache_layer=lambda settings: "zoo_state" if settings.get("mixing") in REPEATS else "zoo_history",
    bounded=True,
    student=FromAttention(_masked_mixing_keys, ("positions", "calibration", "copy_projections")),
    flat={
        "mixing": "mixing",
        "mixing_heads": "num_heads",
        "mixing_kernel": "kernel_size",
        "mixing_projections": "use_projections",
        "mixing_decay": "use_decay",
    },
)
