"""Tasks of lm-evaluation-harness (the package lm-eval), for any causal language model that is loaded."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..harness.extras import install_command
from .finite_logits import finite_logits

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

# Parts of a report of lm-eval that say what was measured; the others describe the machine and the run.
_REPORTED = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")


def evaluate_lm_eval_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    task_manager: TaskManager | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a model on tasks of lm-evaluation-harness.

    The built-in tasks load their data sets from the Hub. Tasks of your own need no network if their data are local
    files.

    Args:
        model: the model, on its device.
        tokenizer: its tokenizer, with a token for the beginning or end of a text. It is given a padding token if it
            has none.
        tasks: names of tasks, groups or tags, or patterns such as "arc_*".
        include_path: folder with further tasks in YAML. They can name Python functions of that folder, which are run.
        task_manager: what :func:`find_lm_eval_tasks` returned for these tasks, if it was called before.
        num_fewshot: number of examples before every question; that of each task if None.
        limit: number of documents of every task, from its beginning; all if None.
        batch_size: number of texts in one forward pass.
        max_length: maximum number of tokens of a text; if None, that of the model or tokenizer, or else 2,048.
        seed: seed of the few-shot examples and of sampling.

    Returns:
        "results": the values of every task, by metric and filter, "higher_is_better" and further parts of lm-eval's
        report.

    Raises:
        ValueError: if lm-eval is not installed, an argument is out of range, no task has such a name, or the model
            computes logits that are not finite.
    """
    check_lm_eval_numbers(num_fewshot=num_fewshot, limit=limit, batch_size=batch_size, max_length=max_length)
    manager = find_lm_eval_tasks(tasks, include_path) if task_manager is None else task_manager
    import lm_eval

    run: Any = lm_eval.simple_evaluate  # its decorators hide its signature
    adapted = adapt_to_lm_eval(model, tokenizer, batch_size=batch_size, max_length=max_length)
    with finite_logits(model):
        report = run(
            adapted,
            tasks=list(manager.match_tasks(list(tasks))),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return {name: report[name] for name in _REPORTED if name in report}


def find_lm_eval_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> TaskManager:
    """Find tasks by their names; no data is loaded. Arguments as of :func:`evaluate_lm_eval_tasks`.

    Raises:
        ValueError: if lm-eval is not installed, there is no such folder, or no task has such a name.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(f"this needs the package lm-eval, which is not installed. {install_command('lm-eval')}")
    if not tasks or not all(tasks):
        raise ValueError(f"`tasks` must be one name or more, got {', '.join(tasks)!r}")
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"`include_path` must be an existing folder, got {str(include_path)!r}")
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else str(include_path)
    # Indexing the built-in tasks takes seconds; it is left out if the folder has all tasks.
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    if folder is not None and not all(manager.match_tasks([task]) for task in tasks):
        manager = TaskManager(include_path=folder)
    for task in tasks:
        if not manager.match_tasks([task]):
            raise ValueError(
                f"`tasks` must be tasks of lm-eval or of the include path, got {task!r}, which is in neither "
                "(lm-eval skips files that are not valid YAML)"
            )
    return manager


def check_lm_eval_numbers(
    *, num_fewshot: int | None, limit: int | None, batch_size: int, max_length: int | None
) -> None:
    """Raise a ValueError if an argument of :func:`evaluate_lm_eval_tasks` is out of range."""
    for field, value, least in (
        ("num_fewshot", num_fewshot, 0),
        ("limit", limit, 1),
        ("batch_size", batch_size, 1),
        ("max_length", max_length, 2),
    ):
        if value is not None and value < least:
            raise ValueError(f"`{field}` must be at least {least}, got {value}")


def adapt_to_lm_eval(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 8, max_length: int | None = None
) -> HFLM:
    """Return lm-eval's own adapter of a model; arguments as of :func:`evaluate_lm_eval_tasks`.

    Raises:
        ValueError: if the tokenizer has no token for the beginning or end of a text.
    """
    from lm_eval.models import huggingface

    ends: Any = (tokenizer.bos_token, tokenizer.eos_token)
    if not any(ends):
        raise ValueError("the tokenizer must have a token for the beginning or end of a text, which it has not")
    if tokenizer.pad_token is None:
        # Any token of the vocabulary will do, since padding is masked; lm-eval would add a new one.
        tokenizer.pad_token = ends[1] or ends[0]
    adapter: Any = huggingface.HFLM
    with _without_warnings():
        return adapter(model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence lm-eval, which warns of every model that is passed as an object."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
