"""Hidden states that several measurements share: computed once, and never those of other weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from scored_models import related_models, token_windows
from torch import nn

from ssm_zoo.evaluation.by_position import evaluate_by_position
from ssm_zoo.evaluation.hidden_states import KeptStates, head_input
from ssm_zoo.evaluation.language_modeling import evaluate_language_model


@contextmanager
def lengths_read(model: nn.Module) -> Iterator[list[int]]:
    """Collect the lengths of the texts that a model reads, without the two tokens of the check of its vocabulary."""
    found: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: found.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    yield found
    handle.remove()
    found[:] = [length for length in found if length > 2]


def test_measurements_on_the_same_windows_read_them_once() -> None:
    (model, teacher), windows = related_models(), token_windows(3, 21)
    kept = KeptStates()
    kept.name(model, "model")
    kept.name(teacher, "teacher")
    with lengths_read(model) as ours, lengths_read(teacher) as theirs:
        first = evaluate_language_model(model, windows, teacher=teacher, batch_size=1, kept=kept, progress=False)
        evaluate_by_position({"a": model, "b": teacher}, windows, teacher="b", kept=kept, progress=False)
        again = evaluate_language_model(model, windows, teacher=teacher, batch_size=1, kept=kept, progress=False)
    assert ours == theirs == [21] * 3
    assert first == again
    assert first == evaluate_language_model(model, windows, teacher=teacher, batch_size=1, progress=False)


def test_other_windows_models_and_batches_are_read() -> None:
    (model, teacher), windows = related_models(), token_windows(4, 21)
    kept = KeptStates()
    kept.name(model, "model")
    with lengths_read(model) as ours, lengths_read(teacher) as theirs:
        for ids in (windows[:2], windows[1:3], windows[:2, :20], windows[:1], windows[:2]):
            for each in (model, teacher):
                assert torch.equal(kept.head_input(each, ids), head_input(each, input_ids=ids))
    assert len(ours) == 4 + 5  # the calls for comparison are never kept
    assert len(theirs) == 5 + 5


def test_a_trained_model_is_read_again_once_it_is_forgotten() -> None:
    (model, other), windows = related_models(), token_windows(2, 21)
    kept = KeptStates()
    kept.name(model, "student")
    kept.name(other, "teacher")
    with torch.no_grad():
        before, theirs = kept.head_input(model, windows), kept.head_input(other, windows)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        kept.forget("student")
        kept.name(model, "student")
        after = kept.head_input(model, windows)
    assert not torch.equal(before, after)
    assert torch.equal(after, head_input(model, input_ids=windows))
    assert kept.head_input(other, windows) is theirs


@pytest.mark.parametrize(("missing", "reads"), [(0, 1 + 2), (1, 2 + 2)])
def test_no_more_bytes_are_kept_than_the_limit(missing: int, reads: int) -> None:
    model, windows = related_models()[0], token_windows(4, 21)
    kept = KeptStates(head_input(model, input_ids=windows[:2]).nbytes - missing)
    kept.name(model, "model")
    with lengths_read(model) as found:
        for ids in (windows[:2], windows[:2], windows[2:], windows[2:]):
            kept.head_input(model, ids)
    assert len(found) == reads
