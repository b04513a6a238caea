"""Initial values of a mixer that is built by itself, without a model that initialises it."""

from collections.abc import Callable
from typing import Any

import torch


def initialise_alone(initialise: Callable[..., None], *arguments: Any) -> None:
    """Call `initialise` and put torch's CPU generator back to where it was: a model draws its own values later, and
    with a given seed they are the same whatever its mixers have drawn for themselves."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        initialise(*arguments)
