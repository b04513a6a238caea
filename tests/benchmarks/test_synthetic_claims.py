"""Verdicts on the claims of the papers' synthetic tests, from the rows of their runs alone."""

from typing import Any

from synthetic_arms import MAMBA
from synthetic_claims import CONFIRMED, NOT_RUN, REFUTED, UNDECIDED, Above, Bound, Claim, NearBaseline
from synthetic_table import CLAIMS, SETTINGS


def found_with(**scores: list[float]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    return {
        ("t", arm): [{"tests": {"a": score}, "baseline": {"a": 0.9}} for score in found]
        for arm, found in scores.items()
    }


def test_bounds_are_kept_by_two_of_three_seeds():
    found = found_with(x=[0.5, 0.9, 0.95], y=[0.1, 0.2, 0.6])
    assert Bound("t", "x", "a", least=0.9).holds(found) is True
    assert Bound("t", "x", "a", least=0.94).holds(found) is False
    assert Bound("t", "y", "a", most=0.2).holds(found) is True
    assert Bound("t", "y", "a", most=0.15).holds(found) is False
    assert Bound("t", "z", "a", most=0.15).holds(found) is None
    assert Bound("t", "x", "b", most=0.15).holds(found) is None
    assert Above("t", "x", "y", "a").holds(found) is False
    found = found_with(x=[0.7, 0.9, 0.95], y=[0.1, 0.2, 0.6])
    assert Above("t", "x", "y", "a", margin=0.5).holds(found) is True
    assert Above("t", "x", "y", "a", margin=0.6).holds(found) is False
    assert Above("t", "x", "z", "a").holds(found) is None
    assert NearBaseline("t", "x", "a", 2.0).holds(found_with(x=[0.81, 0.85, 0.1])) is True
    assert NearBaseline("t", "x", "a", 2.0).holds(found_with(x=[0.81, 0.7, 0.1])) is False
    assert NearBaseline("t", "x", "a", 2.0, reverse=True).holds(found_with(x=[0.81, 0.7, 0.1])) is True


def test_verdicts():
    claim = Claim(
        "c",
        "paper",
        "text",
        expected=(Bound("t", "x", "a", least=0.9),),
        contrary=(Bound("t", "x", "a", most=0.5),),
        controls=(Bound("t", "y", "a", least=0.95),),
    )
    good = [1.0, 1.0, 1.0]

    def verdict(**scores: list[float]) -> tuple[str, list[str]]:
        about = claim.verdict(found_with(**scores))
        return about["verdict"], about["because"]

    assert verdict(x=[0.9, 0.95, 0.1], y=good) == (CONFIRMED, [])
    assert verdict(x=[0.5, 0.95, 0.1], y=good) == (REFUTED, ["found: x at most 0.5 in t, a"])
    assert verdict(x=[0.6, 0.7, 0.8], y=good) == (UNDECIDED, ["not found: x at least 0.9 in t, a"])
    assert verdict(x=[0.1, 0.1, 0.1], y=[0.9, 0.9, 1.0]) == (UNDECIDED, ["control failed: y at least 0.95 in t, a"])
    assert verdict(x=good) == (NOT_RUN, ["no results of t, y"])


def test_claims_are_about_tests_arms_and_estimators_that_are_run():
    for claim in CLAIMS:
        assert claim.expected
        assert claim.contrary
        for condition in (*claim.controls, *claim.expected, *claim.contrary):
            setting = SETTINGS[condition.task]
            arms = {condition.arm, condition.other} if isinstance(condition, Above) else {condition.arm}
            assert arms <= set(setting.arms)
            assert arms <= set(setting.tests[condition.test].arms or setting.arms)
            assert not isinstance(condition, NearBaseline) or setting.task.vectors


def test_nothing_is_decided_by_models_that_have_learnt_nothing():
    nothing: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for task, setting in SETTINGS.items():
        for arm in setting.arms:
            # By luck, Mamba's guesses are a little better.
            score = setting.task.chance + (0.01 if arm == MAMBA else 0.0)
            row = {"tests": dict.fromkeys(setting.tests, score), "baseline": dict.fromkeys(setting.tests, 0.9)}
            nothing[task, arm] = [row] * 3
    assert {claim.name: claim.verdict(nothing)["verdict"] for claim in CLAIMS} == {
        claim.name: UNDECIDED for claim in CLAIMS
    }
