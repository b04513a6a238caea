"""How good a language model is at predicting text, alone and against its teacher, and what it writes by itself.

Perplexity alone hides much: a student close to its teacher in loss may disagree with it token by token, or repeat
itself as soon as it has to write. So the divergence from the teacher, the agreement of the first choice and a
sample of generated text belong to every evaluation.

Symbols: B batch, L length, D width, V vocabulary, N windows.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .hidden_states import evaluating, head_input, head_of

__all__ = ["evaluate_language_model", "generation_sample", "repeated_share"]

# Bound on the logits alive at one time, the teacher's included. Full logits of SmolLM2 (V = 49,152) would be 0.2
# GB in float32 for every 1,024 tokens, several times over.
LOGITS_BYTES = 64 * 2**20
# Alive together in `_scores`: log-probabilities of student and teacher, the logits they come from, and a mask.
LOGITS_COPIES = 4


def evaluate_language_model(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    teacher: PreTrainedModel | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Score a causal language model on token windows, each read on its own, batch by batch with the teacher.

    Every number is over the N * (L - 1) predictions of windows' tokens from the second on. Logits are taken a few
    tokens at a time, at least in float32, and sums are in float64. Both models come back in the mode they were in.

    Args:
        model: the model to score.
        windows: (N, L) int64 token ids, N >= 1, L >= 2, without padding.
        teacher: another model of the same vocabulary, or None.
        batch_size: windows in one forward, positive.
        device: where both models are; the device of `model` if None. Nothing but the windows is moved.
        progress: show a progress bar.

    Returns:
        "loss" (nats a token), "perplexity" (its exponential) and "tokens" (number of predictions); with a teacher
        also "teacher_loss", "teacher_perplexity", "kl" (mean of KL(teacher || model), nats a token) and
        "top1_agreement" (share of predictions, in [0, 1], whose likeliest token is the same in both).

    Raises:
        ValueError: if an argument is none of the above, a token id is outside the vocabulary, the vocabularies
            differ, or a model changes its logits after the output head.
    """
    if windows.ndim != 2 or windows.dtype != torch.int64 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(
            f"windows: got {windows.dtype} of shape {tuple(windows.shape)}, accepted: int64 (N, L), N >= 1, L >= 2"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, accepted: at least 1")
    device = torch.device(device) if device is not None else model.device
    models = [model] if teacher is None else [model, teacher]
    for scored in models:
        if scored.device.type != device.type:
            raise ValueError(f"device: got {device}, but a model is on {scored.device}; accepted: one device for all")
    sums: dict[str, float] = {}
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    # no_grad and not inference mode: a rotary embedding that grows with the length keeps what it computes here.
    with evaluating(*models), torch.no_grad():
        sizes = [_checked_vocabulary(scored, windows, device) for scored in models]
        if len(set(sizes)) > 1:
            raise ValueError(f"teacher: its vocabulary has {sizes[1]} tokens, the model's {sizes[0]}; accepted: equal")
        for batch in tqdm(windows.split(batch_size), desc="evaluate", unit="batch", leave=False, disable=not progress):
            ids = batch.to(device)
            states = [head_input(scored, input_ids=ids)[:, :-1].flatten(0, 1) for scored in models]
            targets = ids[:, 1:].flatten()
            chunk = max(1, LOGITS_BYTES // (LOGITS_COPIES * sizes[0] * _score_dtype(states[0]).itemsize))
            for start in range(0, targets.numel(), chunk):
                rows = slice(start, start + chunk)
                scores = _scores(models, [part[rows] for part in states], targets[rows])
                for name, values in scores.items():
                    sums[name] = sums.get(name, 0.0) + values.cpu().double().sum().item()
    means: dict[str, float] = {name: total / tokens for name, total in sums.items()}
    for name in ("loss", "teacher_loss"):
        if name in means:
            means[name.replace("loss", "perplexity")] = math.exp(means[name]) if means[name] < 700 else math.inf
    return {**means, "tokens": tokens}


def generation_sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Continue each prompt greedily, one at a time, until the end token or the length limit.

    Sampling settings and penalties of the model's generation config are not used; its end token is.

    Args:
        model: a causal language model that can generate.
        tokenizer: its tokenizer.
        prompts: texts of at least one token.
        max_new_tokens: most tokens to write for a prompt, positive.

    Returns:
        For each prompt a dictionary with "prompt", "completion" (the new text, without special tokens) and
        "repetition" (share of repeated 4-grams among the new tokens, see `repeated_share`).

    Raises:
        ValueError: if a prompt has no tokens, or the arguments are none of the above.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts: got the text {prompts!r}, accepted: a list of texts")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, accepted: at least 1")
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    ends = set() if end is None else {end} if isinstance(end, int) else set(end)
    encoded = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
    for prompt, inputs in zip(prompts, encoded, strict=True):
        if inputs["input_ids"].shape[1] == 0:
            raise ValueError(f"prompts: got {prompt!r}, which has no tokens; accepted: texts of at least one token")
    # What is not set here is filled in from the model's own generation config.
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )
    samples, generate = [], cast(Any, model).generate
    with evaluating(model), torch.no_grad():
        for prompt, inputs in zip(prompts, encoded, strict=True):
            ids = inputs["input_ids"].to(model.device)
            written = generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
            new = written[0, ids.shape[1] :].tolist()
            if new and new[-1] in ends:
                new.pop()
            samples.append(
                {
                    "prompt": prompt,
                    "completion": tokenizer.decode(new, skip_special_tokens=True),
                    "repetition": repeated_share(new),
                }
            )
    return samples


def repeated_share(tokens: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams of a sequence that occurred in it before: 0 all different, towards 1 a loop.

    Args:
        tokens: token ids; fewer than n have no n-gram and give 0.
        n: length of the n-grams, positive.
    """
    ngrams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _scores(models: Sequence[PreTrainedModel], states: Sequence[Tensor], targets: Tensor) -> dict[str, Tensor]:
    """Scores of a chunk of predictions.

    Args:
        models: the model, then the teacher if there is one.
        states: for each of them (T, D), what its output head reads.
        targets: (T,) the tokens that follow.

    Returns:
        Under the names of `evaluate_language_model`, (T,) values whose mean is the score.
    """
    choice, student = _log_probabilities(models[0], states[0])
    scores = {"loss": -student.gather(-1, targets[:, None])[:, 0]}
    if len(models) > 1:
        teacher_choice, teacher = _log_probabilities(models[1], states[1])
        scores["teacher_loss"] = -teacher.gather(-1, targets[:, None])[:, 0]
        scores["top1_agreement"] = (choice == teacher_choice).float()
        # In place, to keep within the bound: sum of p (log p - log q), where 0 log 0 is 0.
        torch.sub(teacher, student, out=student)
        teacher.exp_()
        student.masked_fill_(teacher == 0, 0.0).mul_(teacher)
        scores["kl"] = student.sum(dim=-1)
    return scores


def _log_probabilities(model: PreTrainedModel, states: Tensor) -> tuple[Tensor, Tensor]:
    """Likeliest tokens (T,) and log-probabilities (T, V), at least in float32, from head inputs (T, D)."""
    logits = head_of(model)(states).to(_score_dtype(states))
    return logits.argmax(dim=-1), logits.log_softmax(dim=-1)


def _score_dtype(states: Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)


def _checked_vocabulary(model: PreTrainedModel, windows: Tensor, device: torch.device) -> int:
    """Size of the model's vocabulary, after a check that its logits are what the output head makes.

    Raises:
        ValueError: if a token id is outside the vocabulary, or the logits are changed later (soft-capped, scaled).
    """
    name, embedding = type(model).__name__, model.get_input_embeddings()
    size = embedding.get_parameter("weight").shape[0]
    if windows.min() < 0 or windows.max() >= size:
        raise ValueError(
            f"windows: got token ids {windows.min()} to {windows.max()}, accepted by {name}: 0 to {size - 1}"
        )
    probe = windows[:1, :2].to(device)
    made = head_of(model)(head_input(model, input_ids=probe))
    whole = model(input_ids=probe, use_cache=False).logits
    # Same operations on the same shapes: what is left is a rounding or two.
    tolerance = max(2 * torch.finfo(whole.dtype).eps, 1e-5) * whole.abs().max()
    if made.shape != whole.shape or (made - whole).abs().max() > tolerance:
        raise ValueError(f"model: {name} changes its logits after the output head; accepted: models that do not")
    return whole.shape[-1]
