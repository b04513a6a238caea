"""Measure how much of the input is left in a model's hidden states, by searching for inputs that produce them.

Gradient descent starts from noise in place of the input embeddings, and minimises the distance of the hidden states to
those of a text. The embeddings found are then read as tokens. The paper on masked mixers (arXiv 2409.01482, "Masked
Mixers for Language Generation and Retrieval") uses this to measure how much of the input a representation keeps.
Objective, schedule, noise and reading are those of the author's `mixer_lm/single_mixer_representation.py` and
`transformer_representation.py` (repository blbadger/maskedmixers at 2270414): 500 steps on the sum of absolute
differences, from normal noise, with a step size that falls linearly to a tenth; the tokens are the largest entries of
the product with the embedding matrix's pseudo-inverse.

Differences: the target tokens are those of the text, not those read back from slightly shifted embeddings
(`Inversion.readable` says how well reading alone works); and several starts and step sizes can be tried, of which every
text keeps the one with the smallest final objective.

Symbols: B texts, L length, D width, V vocabulary, S steps.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .hidden_states import block_output, blocks_of, evaluating, head_input

_FINAL_SHARE = 0.1
# Bound on the logits of the readings in memory at one time.
_LOGITS_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Inversion:
    """Result of an inversion.

    Attributes:
        hamming: share of the texts' tokens that are not among the `top_k` read at their position: the modified Hamming
            metric, 0 if all are found.
        accuracy: 1 - hamming.
        chance: accuracy of k different random tokens, k / V.
        readable: accuracy of reading the texts' own embeddings, an upper limit for any inversion.
        row_hamming: (B,) the metric of each text.
        tokens: (B, L, k) tokens read at each position, the most likely first.
        objective: (B,) final sum of absolute differences to the text's hidden states.
        initial: (B,) objective before the first step.
        trace: (B, S + 1) objective before every step and after the last.
        attempt: (B,) number of the attempt that each text keeps; attempts are ordered by start, then by step size.
    """

    hamming: float
    accuracy: float
    chance: float
    readable: float
    row_hamming: Tensor
    tokens: Tensor
    objective: Tensor
    initial: Tensor
    trace: Tensor
    attempt: Tensor


def invert_representation(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    target: int | Literal["head"] = -1,
    positions: Literal["all", "last"] = "all",
    steps: int = 500,
    learning_rate: float | Sequence[float] = 0.02,
    restarts: int = 1,
    initial_std: float | None = 1.0,
    reading: Literal["pinv", "cosine"] = "pinv",
    top_k: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> Inversion:
    """Search for inputs that produce the hidden states of some texts.

    Texts are independent of each other. Weights, gradients and mode of the model are unchanged afterwards. Every
    attempt takes the same number of steps, for any model.

    Args:
        model: a causal language model that takes `inputs_embeds`, of the zoo or of transformers, on its device.
        input_ids: (B, L) int64 token ids.
        attention_mask: (B, L), non-zero at real tokens; None: all are real. Padding is neither compared nor counted.
        target: hidden states to compare: the output of a block, by its number from 1, or from the end by -1 and less,
            before the final norm, as the author does; or "head", the input of the output head, after the final norm.
        positions: compare the hidden states at all positions, or only at the last real one, which contain what was
            moved there from the other tokens. All tokens are counted in either case.
        steps: S, number of steps of gradient descent, positive.
        learning_rate: initial step size, or several to try; positive. It falls linearly to a tenth. The author uses
            0.02 or 0.002 for mixers, and 2 in the script for transformers.
        restarts: number of attempts from different noise for every step size.
        initial_std: standard deviation of the noise; None: the root mean square of the embedding matrix.
        reading: "pinv" takes the largest entries of the product with the embedding matrix's pseudo-inverse, "cosine"
            the nearest embeddings by angle.
        top_k: k, number of tokens read at a position; the author uses 5.
        seed: seed of the noise, which is the same on every device.
        progress: show a progress bar.

    Raises:
        ValueError: if an argument is not as described, a text has no real token, the hidden states of a text are not
            finite, or no attempt of a text ends with a finite objective.
    """
    rates = [learning_rate] if isinstance(learning_rate, int | float) else list(learning_rate)
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    _check(model, input_ids, real, steps, rates, restarts, initial_std, top_k, target, positions, reading)
    real = real.to(model.device) != 0
    ids, weight = input_ids.to(model.device), _embedding(model)
    if not 0 <= seed < 2**32:
        raise ValueError(f"`seed` must be from 0 to {2**32 - 1:,}, got {seed}")
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model), _frozen(model), torch.no_grad():
        known = model.get_input_embeddings()(ids)
        compared = real if positions == "all" else real & (real.flip(1).cumsum(1).flip(1) == 1)
        wanted = _states(model, known, real, target)
        if not wanted[real].isfinite().all():
            raise ValueError("`model` must compute finite hidden states of the texts, which it does not")
        std = weight.float().square().mean().sqrt().item() if initial_std is None else initial_std
        best: dict[str, Tensor] = {}
        bar = tqdm(total=restarts * len(rates) * steps, desc="invert", unit="step", leave=False, disable=not progress)
        for restart in range(restarts):
            noise = (torch.randn(known.shape, generator=generator) * std).to(known)
            for index, rate in enumerate(rates):
                found, trace = _descend(model, noise, wanted, real, compared, target, steps, rate, bar)
                _keep(best, found, trace, restart * len(rates) + index)
        bar.close()
        lost = ~best["trace"][:, -1].isfinite()
        if lost.any():
            raise ValueError(
                f"`learning_rate` must be smaller, got {learning_rate}: the objective of text {int(lost.nonzero()[0])} "
                "is not finite in the end"
            )
        inverse = _reader(weight, reading)
        tokens, own = (_read(states, inverse, reading, top_k) for states in (best["found"], known))
    right = (tokens == ids[..., None]).any(-1) & real
    readable = (own == ids[..., None]).any(-1) & real
    hamming = 1 - (right.sum() / real.sum()).item()
    return Inversion(
        hamming=hamming,
        accuracy=1 - hamming,
        chance=top_k / weight.shape[0],
        readable=(readable.sum() / real.sum()).item(),
        row_hamming=(1 - right.sum(1) / real.sum(1)).cpu(),
        tokens=tokens.cpu(),
        objective=best["trace"][:, -1],
        initial=best["trace"][:, 0],
        trace=best["trace"],
        attempt=best["attempt"],
    )


def _descend(
    model: PreTrainedModel,
    noise: Tensor,
    wanted: Tensor,
    real: Tensor,
    compared: Tensor,
    target: int | str,
    steps: int,
    rate: float,
    bar: Any,
) -> tuple[Tensor, Tensor]:
    """Return the (B, L, D) embeddings at the end of a descent from the noise, and the (B, S + 1) objective."""
    states, trace = noise.clone(), []
    for step in range(steps + 1):
        with torch.enable_grad():
            inputs = states.requires_grad_()
            differences = (_states(model, inputs, real, target) - wanted).abs().sum(-1)
            objective = differences.masked_fill(~compared, 0.0).sum(-1)
            trace.append(objective.detach().cpu())
            if step == steps:
                break
            (gradient,) = torch.autograd.grad(objective.sum(), inputs)
        size = rate * ((steps - step) + _FINAL_SHARE * step) / steps
        states = inputs.detach() - size * gradient
        bar.update()
    return states.detach(), torch.stack(trace, dim=1)


def _keep(best: dict[str, Tensor], found: Tensor, trace: Tensor, attempt: int) -> None:
    """Keep for every text the attempt with the smaller final objective; NaN counts as the largest."""
    attempts = torch.full((len(trace),), attempt)
    if not best:
        best.update(found=found, trace=trace, attempt=attempts)
        return
    ends = trace[:, -1].nan_to_num(nan=torch.inf)
    better = ends < best["trace"][:, -1].nan_to_num(nan=torch.inf)
    best["found"] = torch.where(better.to(found.device)[:, None, None], found, best["found"])
    best["trace"] = torch.where(better[:, None], trace, best["trace"])
    best["attempt"] = torch.where(better, attempts, best["attempt"])


def _states(model: PreTrainedModel, embeddings: Tensor, real: Tensor, target: int | str) -> Tensor:
    """Compute the (B, L, D) hidden states of embeddings."""
    inputs: dict[str, Any] = {"inputs_embeds": embeddings}
    if not real.all():
        inputs["attention_mask"] = real.long()
    if isinstance(target, str):
        return head_input(model, **inputs)
    count = len(blocks_of(model))
    return block_output(model, target if target > 0 else count + 1 + target, **inputs)


def _embedding(model: PreTrainedModel) -> Tensor:
    """Return the (V, D) embedding matrix."""
    return model.get_input_embeddings().get_parameter("weight").detach()


def _reader(weight: Tensor, reading: str) -> Tensor:
    """Return the (D, V) matrix by which embeddings are multiplied to score the tokens."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if reading == "cosine":
        return nn.functional.normalize(weight, dim=1).T
    # On the CPU, so that the singular values are the same for a model on any device.
    return torch.linalg.pinv(weight.cpu()).to(weight.device)


def _read(embeddings: Tensor, inverse: Tensor, reading: str, top_k: int) -> Tensor:
    """Return the (B, L, k) tokens of (B, L, D) embeddings."""
    flat = embeddings.flatten(0, 1).to(inverse.dtype)
    if reading == "cosine":
        flat = nn.functional.normalize(flat, dim=1)
    rows = max(1, _LOGITS_BYTES // (inverse.shape[1] * inverse.itemsize))
    read = [(part @ inverse).topk(top_k, dim=-1).indices for part in flat.split(rows)]
    return torch.cat(read).view(*embeddings.shape[:2], top_k)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Compute no gradients of the weights, only of the inputs."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _check(
    model: PreTrainedModel,
    input_ids: Tensor,
    real: Tensor,
    steps: int,
    rates: Sequence[float],
    restarts: int,
    initial_std: float | None,
    top_k: int,
    target: int | str,
    positions: str,
    reading: str,
) -> None:
    """Raise a ValueError if an argument of :func:`invert_representation` is out of range."""
    size = _embedding(model).shape[0]
    if input_ids.ndim != 2 or input_ids.dtype != torch.int64 or input_ids.numel() == 0:
        raise ValueError(f"`input_ids` must be int64 (B, L), got {input_ids.dtype} of shape {tuple(input_ids.shape)}")
    if input_ids.min() < 0 or input_ids.max() >= size:
        raise ValueError(f"`input_ids` must be from 0 to {size - 1}, got {input_ids.min()} to {input_ids.max()}")
    if real.shape != input_ids.shape:
        raise ValueError(f"`attention_mask` must have shape {tuple(input_ids.shape)}, got {tuple(real.shape)}")
    if not (real != 0).any(1).all():
        raise ValueError("`attention_mask` must have a real token in every text, got a text of padding only")
    for name, value, least, most in (
        ("steps", steps, 1, None),
        ("restarts", restarts, 1, None),
        ("top_k", top_k, 1, size),
    ):
        if value < least or (most is not None and value > most):
            limits = f"at least {least}" if most is None else f"from {least} to {most}"
            raise ValueError(f"`{name}` must be {limits}, got {value}")
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise ValueError(f"`learning_rate` must be a positive number or several, got {rates}")
    if initial_std is not None and not 0 < initial_std < float("inf"):
        raise ValueError(f"`initial_std` must be a positive number or None, got {initial_std}")
    if isinstance(target, int):
        count = len(blocks_of(model))
        if not (1 <= target <= count or -count <= target <= -1):
            raise ValueError(f"`target` must be from 1 to {count}, from -{count} to -1, or 'head', got {target}")
    elif target != "head":
        raise ValueError(f"`target` must be the number of a block or 'head', got {target!r}")
    if positions not in ("all", "last"):
        raise ValueError(f"`positions` must be 'all' or 'last', got {positions!r}")
    if reading not in ("pinv", "cosine"):
        raise ValueError(f"`reading` must be 'pinv' or 'cosine', got {reading!r}")
