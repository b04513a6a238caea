"""Loss of a language model on text, alone and against its teacher, and samples of what it generates.

Perplexity alone is not enough: a student with a loss close to its teacher's may still predict other tokens, or repeat
itself as soon as it generates. Every evaluation therefore reports the KL divergence from the teacher, the agreement of
the most likely tokens, and generated text.

Symbols: B batch, L length, D width, V vocabulary, N windows.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .hidden_states import KeptStates, evaluating, head_input, head_of

__all__ = [
    "compare_continuations",
    "end_tokens",
    "evaluate_language_model",
    "generation_sample",
    "repeat_loss",
    "repeated_share",
    "repeated_texts",
    "without_generation_config",
]

# Bound on the logits in memory at one time, the teacher's included. Full logits of SmolLM2 (V = 49,152) would take
# several times 0.2 GB in float32 for every 1,024 tokens.
LOGITS_BYTES = 64 * 2**20
# In memory together: logits and log-probabilities of student and teacher, and a mask.
LOGITS_COPIES = 5
# Tokens of the passage that :func:`repeat_loss` repeats, and those of its repetition that are not scored.
PASSAGE, CUE = 96, 8


def evaluate_language_model(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    teacher: PreTrainedModel | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    kept: KeptStates | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Score a causal language model on independent windows of tokens, with the metrics of `ssm_zoo.evaluation.metrics`.

    All numbers are over the N * (L - 1) predictions of the windows' tokens from the second on. Logits are computed for
    a few tokens at a time, at least in float32, and summed in float64. Both models are left in the mode they were in.

    Args:
        model: the model to score.
        windows: (N, L) int64 token ids, N >= 1, L >= 2, without padding.
        teacher: another model of the same vocabulary, or None.
        batch_size: windows in one forward, positive.
        device: device of both models; that of `model` if None. Only the windows are moved.
        kept: where hidden states are kept for measurements on the same windows.
        progress: show a progress bar.

    Returns:
        "loss" (nats per token), "perplexity" (its exponential) and "tokens" (number of predictions); with a teacher
        also "teacher_loss", "teacher_perplexity", "kl" (mean of KL(teacher || model), nats per token) and
        "top1_agreement" (share of predictions, in [0, 1], for which both have the same most likely token).

    Raises:
        ValueError: if an argument is not as described, a token id is outside the vocabulary, the vocabularies
            differ, or a model changes its logits after the output head.
    """
    # Here, since evaluate and datasets take seconds to import.
    import evaluate

    from .metrics import DistillationGap, KLDivergence, Perplexity, Top1Agreement

    check_windows(windows)
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
    device = torch.device(device) if device is not None else model.device
    models = [model] if teacher is None else [model, teacher]
    for scored in models:
        if scored.device.type != device.type:
            raise ValueError(f"`device` must be that of the models, {scored.device}, got {device}")
    compared: Any = [DistillationGap(), KLDivergence(), Top1Agreement()]
    read = kept or KeptStates(0)
    metrics: Any = Perplexity() if teacher is None else evaluate.combine(compared)
    # no_grad and not inference_mode: a rotary embedding that grows with the length keeps what it computes here.
    with evaluating(*models), torch.no_grad():
        sizes = [checked_vocabulary(scored, windows, device) for scored in models]
        if len(set(sizes)) > 1:
            raise ValueError(f"`teacher` must have the model's vocabulary of {sizes[0]} tokens, got {sizes[1]}")
        for batch in tqdm(windows.split(batch_size), desc="evaluate", unit="batch", leave=False, disable=not progress):
            ids = batch.to(device)
            states = [read.head_input(scored, ids)[:, :-1].flatten(0, 1) for scored in models]
            targets = ids[:, 1:].flatten()
            tokens = predictions_at_once(states[0], sizes[0])
            for labels, *inputs in zip(*(part.split(tokens) for part in (targets, *states)), strict=True):
                _add(metrics, models, inputs, labels)
    found = metrics.compute()
    names = ["loss", "perplexity", "tokens"]
    if teacher is not None:
        names[2:2] = ["teacher_loss", "teacher_perplexity", "kl", "top1_agreement"]
    return {name: found[name] for name in names}


def repeat_loss(model: PreTrainedModel, ids: Tensor, distance: int, *, texts: int = 3) -> float | None:
    """Return the loss on a passage that the model has read before, which shows whether it recalls it.

    A text is 96 tokens, the `distance` tokens that follow them, and the 96 tokens again. The first 8 of these only say
    what is to be recalled; the loss is the mean over the other 88.

    Args:
        model: a causal language model.
        ids: (tokens) int64 token ids.
        distance: tokens between the passage and its repetition, positive.
        texts: number of texts, spread evenly over `ids`.

    Returns:
        Nats per token, or None if `ids` has fewer than 96 + distance tokens.
    """
    if len(ids) < PASSAGE + distance:
        return None
    total = 0.0
    with evaluating(model), torch.no_grad():
        for text in repeated_texts(ids, distance, texts=texts).to(model.device):
            states = head_input(model, input_ids=text[None])[:, -PASSAGE + CUE - 1 : -1]
            logits = logits_of(model, states.flatten(0, 1))
            total += float(torch.nn.functional.cross_entropy(logits, text[-PASSAGE + CUE :]))
    return total / texts


def repeated_texts(ids: Tensor, distance: int, *, texts: int = 3) -> Tensor:
    """Return the (texts, 96 + distance + 96) texts of :func:`repeat_loss`, whose last 96 tokens are their first ones.

    Args:
        ids: (tokens) int64 token ids, at least 96 + distance of them.
        distance: tokens between the passage and its repetition, positive.
        texts: number of texts, spread evenly over `ids`.
    """
    length = PASSAGE + distance
    starts = [index * (len(ids) - length) // max(texts - 1, 1) for index in range(texts)]
    return torch.stack([torch.cat([ids[start : start + length], ids[start : start + PASSAGE]]) for start in starts])


def generation_sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Continue each prompt greedily, one at a time, until the end token or the length limit.

    Of the model's generation config only the end token is used, not the sampling settings and penalties.

    Args:
        model: a causal language model that can generate.
        tokenizer: its tokenizer.
        prompts: texts of at least one token.
        max_new_tokens: maximum number of tokens to generate for a prompt, positive.

    Returns:
        For each prompt a dictionary with "prompt", "completion" (the new text, without special tokens), "tokens" (ids
        of the new tokens before the end token) and "repetition" (share of repeated 4-grams among them, see
        `repeated_share`).

    Raises:
        ValueError: if a prompt has no tokens, or an argument is not as described.
    """
    if isinstance(prompts, str):
        raise ValueError(f"`prompts` must be a list of texts, got the text {prompts!r}")
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}")
    ends = end_tokens(model, tokenizer)
    encoded = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
    for prompt, inputs in zip(prompts, encoded, strict=True):
        if inputs["input_ids"].shape[1] == 0:
            raise ValueError(f"`prompts` must be texts of at least one token, got {prompt!r}")
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )
    samples, generate = [], cast(Any, model).generate
    with evaluating(model), without_generation_config(model), torch.no_grad():
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
                    "tokens": new,
                    "repetition": repeated_share(new),
                }
            )
    return samples


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end a text: those of the model's generation config, or else the tokenizer's."""
    end: Any = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    return set() if end is None else {end} if isinstance(end, int) else set(end)


@contextmanager
def without_generation_config(model: Any) -> Iterator[None]:
    """Let `generate` use only the settings that it is given, not those of the model's own generation config."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def compare_continuations(
    samples: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Compare continuations of the same prompts, token by token.

    Continuations that part at one token usually differ from there on, so that the common beginning says more than the
    share of equal tokens.

    Args:
        samples: continuations by a model, from `generation_sample`.
        reference: those by its teacher, of the same prompts in the same order.

    Returns:
        "tokens" (number of tokens compared: those of the longer continuation of each prompt), "agreement" (share of
        them, in [0, 1], that are equal at their place; 1 if there are none), "common_prefix" (mean number of equal
        tokens at the beginning) and "repetition" (mean share of repeated 4-grams in the model's continuations).

    Raises:
        ValueError: if there is no prompt, or the prompts differ.
    """
    prompts, expected = ([sample["prompt"] for sample in each] for each in (samples, reference))
    if not prompts or prompts != expected:
        raise ValueError(f"`reference` must be continuations of the same prompts, {prompts}, got {expected}")
    pairs = [(ours["tokens"], theirs["tokens"]) for ours, theirs in zip(samples, reference, strict=True)]
    same = [[one == other for one, other in zip(*pair, strict=False)] for pair in pairs]
    tokens = sum(max(map(len, pair)) for pair in pairs)
    return {
        "tokens": tokens,
        "agreement": sum(map(sum, same)) / tokens if tokens else 1.0,
        "common_prefix": sum([*equal, False].index(False) for equal in same) / len(same),
        "repetition": sum(sample["repetition"] for sample in samples) / len(samples),
    }


def repeated_share(tokens: Sequence[int], n: int = 4) -> float:
    """Return the share of a sequence's n-grams that occurred in it before: 0 if all differ, close to 1 for a loop.

    Args:
        tokens: token ids; 0 is returned for fewer than n.
        n: length of the n-grams, positive.
    """
    ngrams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _add(metrics: Any, models: Sequence[PreTrainedModel], states: Sequence[Tensor], targets: Tensor) -> None:
    """Add the predictions for (T,) tokens, from the (T, D) inputs of the models' output heads.

    In a function of its own, so that the logits are freed before the next ones are computed.
    """
    logits = [logits_of(scored, inputs) for scored, inputs in zip(models, states, strict=True)]
    if len(models) == 1:
        metrics.add_batch(predictions=logits[0], references=targets)
    else:
        metrics.add_batch(predictions=logits[0], references=logits[1], labels=targets)


def check_windows(windows: Tensor) -> None:
    """Raise a ValueError unless the windows are int64 (N, L) with something to predict."""
    if windows.ndim != 2 or windows.dtype != torch.int64 or windows.shape[0] < 1 or windows.shape[1] < 2:
        shape = tuple(windows.shape)
        raise ValueError(f"`windows` must be int64 (N, L) with N >= 1 and L >= 2, got {windows.dtype} of shape {shape}")


def predictions_at_once(states: Tensor, vocabulary: int) -> int:
    """Return the number of predictions whose logits fit into `LOGITS_BYTES`, from the input of the output head."""
    width = torch.promote_types(states.dtype, torch.float32).itemsize
    return max(1, LOGITS_BYTES // (LOGITS_COPIES * vocabulary * width))


def logits_of(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Return (T, V) logits, at least in float32, from the (T, D) input of the output head."""
    return head_of(model)(states).to(torch.promote_types(states.dtype, torch.float32))


def checked_vocabulary(model: PreTrainedModel, windows: Tensor, device: torch.device) -> int:
    """Return the size of a model's vocabulary, after checking the windows and that its logits are its head's output.

    Raises:
        ValueError: if a token id is outside the vocabulary, or the logits are changed later (soft-capped, scaled).
    """
    name, embedding = type(model).__name__, model.get_input_embeddings()
    size = embedding.get_parameter("weight").shape[0]
    if windows.min() < 0 or windows.max() >= size:
        raise ValueError(
            f"`windows` must hold token ids of {name}, 0 to {size - 1}, got {windows.min()} to {windows.max()}"
        )
    probe = windows[:1, :2].to(device)
    made = head_of(model)(head_input(model, input_ids=probe))
    whole = model(input_ids=probe, use_cache=False).logits
    # The same operations on the same shapes differ by a rounding or two at most.
    tolerance = max(2 * torch.finfo(whole.dtype).eps, 1e-5) * whole.abs().max()
    if made.shape != whole.shape or (made - whole).abs().max() > tolerance:
        raise ValueError(f"`model` must not change its logits after the output head, as {name} does")
    return whole.shape[-1]
