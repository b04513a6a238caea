"""Agreement of continuations, on texts whose agreement is known."""

from typing import Any

import pytest

from ssm_zoo.evaluation.language_modeling import compare_continuations


def samples(*texts: list[int], repetition: float = 0.0) -> list[dict[str, Any]]:
    return [{"prompt": f"p{index}", "tokens": text, "repetition": repetition} for index, text in enumerate(texts)]


def test_a_text_agrees_with_itself() -> None:
    same = samples([1, 2, 3], [4])
    assert compare_continuations(same, same) == {
        "tokens": 4,
        "agreement": 1.0,
        "common_prefix": 2.0,
        "repetition": 0.0,
    }


def test_agreement_is_by_place_and_an_early_end_differs() -> None:
    # Equal at places 0, 1 and 3 of four; the second text lacks three of five tokens, and its two are equal.
    found = compare_continuations(
        samples([1, 2, 9, 4], [5, 6], repetition=0.25), samples([1, 2, 3, 4], [5, 6, 7, 8, 9])
    )
    assert found == {"tokens": 9, "agreement": 5 / 9, "common_prefix": 2.0, "repetition": 0.25}


def test_empty_continuations_agree() -> None:
    found = compare_continuations(samples([]), samples([]))
    assert (found["tokens"], found["agreement"], found["common_prefix"]) == (0, 1.0, 0.0)


@pytest.mark.parametrize(("one", "other"), [([], []), (samples([1]), samples([1], [2]))])
def test_other_prompts_are_refused(one: Any, other: Any) -> None:
    with pytest.raises(ValueError, match="`reference` must be continuations of the same prompts"):
        compare_continuations(one, other)
