"""How much of its input a model's hidden states hold: inputs are sought that give the same ones, by gradient descent.

From noise in the place of the input embeddings, plain gradient descent brings the hidden states close to those of a
text, and what it arrives at is read as tokens. Masked mixers (arXiv 2409.01482, "Masked Mixers for Language Generation
and Retrieval") measure by it how much of the input a representation keeps. Objective, schedule, noise and reading are
those of the author's `mixer_lm/single_mixer_representation.py` and `transformer_representation.py` (repository
blbadger/maskedmixers at 2270414): 500 steps on the sum of absolute differences, from normal noise, with a step size
that falls linearly to a tenth; tokens are the largest entries of the product with the embedding matrix's
pseudo-inverse.

Different here: the tokens sought are those given, not the ones read back from slightly shifted embeddings (how well
reading alone does is `Inversion.readable`); there may be several starts and step sizes, of which each text takes the
one that ends closest.

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
# Bound on the readings' logits alive at one time.
_LOGITS_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Inversion:
    """What was found.

    Attributes:
        hamming: share of the texts' tokens that are not among the `top_k` read at their place: the modified Hamming
            metric, 0 where all are found.
        accuracy: 1 - hamming.
        chance: accuracy of k different tokens drawn at random, k / V.
        readable: accuracy of reading the texts' own embeddings: no inversion can be expected to do better.
        row_hamming: (B,) the metric of each text.
        tokens: (B, L, k) read at each place, the likeliest first.
        objective: (B,) sum of absolute differences to the text's hidden states in the end, and
        initial: (B,) where the descent began.
        trace: (B, S + 1) the objective before every step and after the last.
        attempt: (B,) which attempt each text takes, counted over the starts and for each over the step sizes.
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
    """Seek the inputs of hidden states.

    Texts do not see each other. Weights, gradients and modes of the model are afterwards as they were. Every attempt
    takes the same number of steps, whatever the model.

    Args:
        model: a causal language model that takes `inputs_embeds`, of the zoo or of transformers, on its device.
        input_ids: (B, L) int64 token ids.
        attention_mask: (B, L), non-zero at real tokens; all are if None. Padding is neither compared nor counted.
        target: which hidden states: what a block puts out, by its number from 1 or from the end, -1; that of the last
            one is taken before the final norm, as the author does. Or "head": what the output head reads, after it.
        positions: compare the hidden states of all places, or of the last real one alone, which hold of the other
            tokens what has been moved there. All tokens are counted either way.
        steps: S, of gradient descent, positive.
        learning_rate: first step size, or several to try; positive. It falls linearly to a tenth. The author takes
            0.02 or 0.002 for mixers, and 2 in the transformers' script.
        restarts: attempts from different noise for every step size.
        initial_std: of the noise; None: the root mean square of the embedding matrix.
        reading: "pinv" takes the largest entries of the product with the embedding matrix's pseudo-inverse, "cosine"
            the nearest embeddings by angle.
        top_k: k, tokens read at a place; the author counts with 5.
        seed: of the noise, which is the same on every device.
        progress: show a progress bar.

    Raises:
        ValueError: if an argument is none of the above, a text has no real token, the hidden states of a text are not
            finite, or no attempt of a text ends with a finite objective.
    """
    rates = [learning_rate] if isinstance(learning_rate, int | float) else list(learning_rate)
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    _check(model, input_ids, real, steps, rates, restarts, initial_std, top_k, target, positions, reading)
    real = real.to(model.device) != 0
    ids, weight = input_ids.to(model.device), _embedding(model)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: got {seed}; accepted: 0 to {2**32 - 1:,}")
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model), _frozen(model), torch.no_grad():
        known = model.get_input_embeddings()(ids)
        compared = real if positions == "all" else real & (real.flip(1).cumsum(1).flip(1) == 1)
        wanted = _states(model, known, real, target)
        if not wanted[real].isfinite().all():
            raise ValueError("model: its hidden states of the texts are not finite; there is nothing to invert")
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
                f"learning_rate: got {learning_rate}; accepted: less, since text {int(lost.nonzero()[0])} ends with an "
                "objective that is not finite"
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
    """The (B, L, D) embeddings that the descent from the noise arrives at, and the (B, S + 1) objective."""
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
    """For every text keep what ends with the smaller objective; one that is not a number is the largest."""
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
    """(B, L, D) hidden states of embeddings."""
    inputs: dict[str, Any] = {"inputs_embeds": embeddings}
    if not real.all():
        inputs["attention_mask"] = real.long()
    if isinstance(target, str):
        return head_input(model, **inputs)
    count = len(blocks_of(model))
    return block_output(model, target if target > 0 else count + 1 + target, **inputs)


def _embedding(model: PreTrainedModel) -> Tensor:
    """(V, D) embedding matrix."""
    return model.get_input_embeddings().get_parameter("weight").detach()


def _reader(weight: Tensor, reading: str) -> Tensor:
    """(D, V) that embeddings are multiplied with."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if reading == "cosine":
        return nn.functional.normalize(weight, dim=1).T
    # On the CPU, whose singular values are the same wherever the model is.
    return torch.linalg.pinv(weight.cpu()).to(weight.device)


def _read(embeddings: Tensor, inverse: Tensor, reading: str, top_k: int) -> Tensor:
    """(B, L, k) tokens of (B, L, D) embeddings."""
    flat = embeddings.flatten(0, 1).to(inverse.dtype)
    if reading == "cosine":
        flat = nn.functional.normalize(flat, dim=1)
    rows = max(1, _LOGITS_BYTES // (inverse.shape[1] * inverse.itemsize))
    read = [(part @ inverse).topk(top_k, dim=-1).indices for part in flat.split(rows)]
    return torch.cat(read).view(*embeddings.shape[:2], top_k)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the weights for a while: only the inputs get them."""
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
    size = _embedding(model).shape[0]
    if input_ids.ndim != 2 or input_ids.dtype != torch.int64 or input_ids.numel() == 0:
        raise ValueError(f"input_ids: got {input_ids.dtype} of shape {tuple(input_ids.shape)}; accepted: int64 (B, L)")
    if input_ids.min() < 0 or input_ids.max() >= size:
        raise ValueError(f"input_ids: got {input_ids.min()} to {input_ids.max()}; accepted: 0 to {size - 1}")
    if real.shape != input_ids.shape:
        raise ValueError(f"attention_mask: got shape {tuple(real.shape)}; accepted: {tuple(input_ids.shape)}")
    if not (real != 0).any(1).all():
        raise ValueError("attention_mask: got a text of padding alone; accepted: a real token in every text")
    for name, value, least, most in (
        ("steps", steps, 1, None),
        ("restarts", restarts, 1, None),
        ("top_k", top_k, 1, size),
    ):
        if value < least or (most is not None and value > most):
            raise ValueError(f"{name}: got {value}; accepted: {least} or more{f', up to {most}' if most else ''}")
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise ValueError(f"learning_rate: got {rates}; accepted: positive numbers")
    if initial_std is not None and not 0 < initial_std < float("inf"):
        raise ValueError(f"initial_std: got {initial_std}; accepted: a positive number, or None")
    if isinstance(target, int):
        count = len(blocks_of(model))
        if not (1 <= target <= count or -count <= target <= -1):
            raise ValueError(f"target: got {target}; accepted: 1 to {count}, -{count} to -1, or 'head'")
    elif target != "head":
        raise ValueError(f"target: got {target!r}; accepted: the number of a block, or 'head'")
    if positions not in ("all", "last"):
        raise ValueError(f"positions: got {positions!r}; accepted: 'all' or 'last'")
    if reading not in ("pinv", "cosine"):
        raise ValueError(f"reading: got {reading!r}; accepted: 'pinv' or 'cosine'")
