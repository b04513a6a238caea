"""Run transformers' own models with Mamba layers on the ops of this package: `accelerate_transformers()`.

    from ssm_zoo.modeling.native_models import accelerate_transformers

    accelerate_transformers()
    model = AutoModelForCausalLM.from_pretrained("state-spaces/mamba-130m-hf")

Where mamba_ssm and causal-conv1d are not installed, as on every CPU, transformers computes these layers with its own
torch code: Mamba-1 token by token, which makes training very slow, and packed rows either raise or are mixed up. Here
the `forward` of the mixer classes is replaced (:mod:`native_mixers`), and that of the models finds the documents of
packed rows (:mod:`native_packing`). Weights, configurations, caches, `generate`, peft and the Trainer stay as they are.
On a CUDA device the ops take their Triton kernels.

Why classes and not transformers' mechanism for kernels: `kernels.kernelize` needs the package `kernels` and one call
per model, and replaces single functions behind the mixer's `forward` (:mod:`~ssm_zoo.kernels.hub_layers` has ours).
That forward gives Mamba-1's scan neither documents nor the cached state, and reads the weight of `dt_proj` past its
adapters; `Mamba2ForCausalLM` does not pass documents on to it. No function put there can mend that. A class is also one
place for models that exist and models to come, and can be put back.

The module lies in `modeling/` because it knows transformers' models; `kernels/` imports torch only.
"""

import importlib
import inspect
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, NamedTuple

import transformers

from .native_mixers import mamba2_forward, mamba_forward, zamba_forward
from .native_packing import passing_on, separating


class _Served(NamedTuple):
    """The replacements for a model type: the mixer's forward, and models (and layers) that pass documents on."""

    mixer: str
    forward: Callable[..., Any]
    models: tuple[str, ...]
    hybrid: bool = True
    layer: str | None = None
    needs_mask: bool = False


_SERVED = {
    "bamba": _Served("BambaMixer", mamba2_forward, ("BambaModel",)),
    "falcon_h1": _Served("FalconH1Mixer", mamba2_forward, ("FalconH1Model",)),
    "falcon_mamba": _Served(
        "FalconMambaMixer", mamba_forward, ("FalconMambaModel", "FalconMambaForCausalLM"), hybrid=False
    ),
    "granitemoehybrid": _Served(
        "GraniteMoeHybridMambaLayer", mamba2_forward, ("GraniteMoeHybridModel",), needs_mask=True
    ),
    "jamba": _Served("JambaMambaMixer", mamba_forward, ("JambaModel",), layer="JambaMambaDecoderLayer"),
    "mamba": _Served("MambaMixer", mamba_forward, ("MambaModel", "MambaForCausalLM"), hybrid=False),
    "mamba2": _Served("Mamba2Mixer", mamba2_forward, ("Mamba2Model", "Mamba2ForCausalLM"), hybrid=False),
    "nemotron_h": _Served("NemotronHMamba2Mixer", mamba2_forward, ("NemotronHModel",)),
    "zamba": _Served("ZambaMambaMixer", zamba_forward, ("ZambaModel",), needs_mask=True),
    "zamba2": _Served("Zamba2MambaMixer", mamba2_forward, ("Zamba2Model",)),
}

MODEL_TYPES = tuple(_SERVED)
"""Model types of transformers that :func:`accelerate_transformers` serves."""

# Per model type that is served now: each class and the forward that it had.
_originals: dict[str, list[tuple[type, Callable[..., Any]]]] = {}


class Acceleration:
    """Methods that a call of :func:`accelerate_transformers` replaced; as a context manager it restores them.

    Attributes:
        model_types: the model types that this call replaced, without those that were replaced before.
        classes: names of the mixer classes of all requested model types.
    """

    def __init__(self, model_types: tuple[str, ...], classes: tuple[str, ...]) -> None:
        self.model_types, self.classes = model_types, classes

    def restore(self) -> None:
        """Put back what this call replaced."""
        restore_transformers(self.model_types)

    def __enter__(self) -> "Acceleration":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def __repr__(self) -> str:
        return f"Acceleration of {', '.join(self.classes)}"


def accelerate_transformers(model_types: Iterable[str] | None = None) -> Acceleration:
    """Let transformers' own classes compute their Mamba layers with the ops of this package.

    Call it before or after a model is made; models that exist are served too, unless accelerate's hooks have replaced
    the forward of their modules. Model types that are served already stay as they are. The call affects the process; to
    undo it, use the result as a context or call :func:`restore_transformers`.

    Args:
        model_types: some of :data:`MODEL_TYPES`, e.g. `["mamba", "jamba"]`; all of them if not given.

    Returns:
        What was replaced, with the names of the classes served.

    Raises:
        ValueError: if a model type is unknown, or this version of transformers does not have it in the expected form.
    """
    requested = _known(model_types)
    plans = {kind: _plan(kind) for kind in requested}  # all are checked before one is replaced
    new = tuple(kind for kind in requested if kind not in _originals)
    for kind in new:
        _originals[kind] = [(owner, owner.forward) for owner, _ in plans[kind]]
        for owner, forward in plans[kind]:
            owner.forward = forward
    return Acceleration(new, tuple(_SERVED[kind].mixer for kind in requested))


def restore_transformers(model_types: Iterable[str] | None = None) -> None:
    """Give transformers' classes their own forward back.

    Args:
        model_types: some of :data:`MODEL_TYPES`; all of them if not given; those not replaced stay.

    Raises:
        ValueError: if a model type is unknown.
    """
    for kind in _known(model_types):
        for owner, forward in _originals.pop(kind, []):
            owner.forward = forward


def accelerated_model_types() -> tuple[str, ...]:
    """Return the model types that run on the ops of this package now."""
    return tuple(sorted(_originals))


def _known(model_types: Iterable[str] | None) -> tuple[str, ...]:
    if model_types is None:
        return MODEL_TYPES
    if isinstance(model_types, str):
        raise ValueError(f"model_types must be a list of model types, got the string {model_types!r}")
    requested = tuple(dict.fromkeys(model_types))
    for kind in requested:
        if kind not in _SERVED:
            raise ValueError(f"model_types must be some of {', '.join(MODEL_TYPES)}, got {kind!r}")
    return requested


def _plan(kind: str) -> list[tuple[type, Callable[..., Any]]]:
    """Return the classes of a model type with their new forward."""
    if kind in _originals:
        return []
    served = _SERVED[kind]
    try:
        module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        # Weights that a mixer reads without calling their module have to be brought to its device first.
        hooked = importlib.import_module("transformers.integrations.accelerate").force_accelerate_hooks
        mixer = getattr(module, served.mixer)
        taken = set(inspect.signature(mixer.forward).parameters)
        if not {"self", "hidden_states", "attention_mask"} <= taken or not taken & {"cache", "cache_params"}:
            raise AttributeError(f"{served.mixer}.forward takes {', '.join(sorted(taken))}")
        direct = ["conv1d", "dt_proj"] if served.forward is mamba_forward else ["conv1d"]
        plan = [(mixer, hooked(direct)(served.forward))]
        for name in served.models:
            owner = getattr(module, name)
            plan.append((owner, separating(owner.forward, served.hybrid, served.needs_mask)))
        if served.layer is not None:
            owner = getattr(module, served.layer)
            plan.append((owner, passing_on(owner.forward)))
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"model_types must be ones that transformers {transformers.__version__} has in the expected form, got "
            f"{kind!r}: {error}. Leave it out, or install transformers 5.17 to 5.24."
        ) from error
    return plan
