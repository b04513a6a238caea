"""A check of a model's logits while other libraries evaluate it, which compare them without looking.

Of logits that are NaN, the first token or the first answer is the largest, so that accuracies look like numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["finite_logits"]


@contextmanager
def finite_logits(model: nn.Module) -> Iterator[None]:
    """Let every forward pass of a model check its logits while the context lasts.

    Raises:
        ValueError: by the forward pass, if a logit is not finite.
    """
    hook = model.register_forward_hook(_check)
    try:
        yield
    finally:
        hook.remove()


def _check(_model: object, _inputs: object, outputs: Any) -> None:
    if not outputs.logits.isfinite().all():
        raise ValueError("model: the logits are not finite. Try another dtype, e.g. float32.")
