"""`claims/assisted.py` at a tiny size."""

import assisted
import pytest
from families import draw_ids, make_model


def test_all_ways_give_the_same_tokens_in_as_many_forwards_as_their_drafts_allow() -> None:
    model = make_model("sliding-discrete")
    rows = assisted.measure(model, draw_ids(1, 4).repeat(1, 4), tokens=9, draft=3, turns=2)
    assert all(row["same"] and row["prompt_tokens"] == 16 for row in rows.values())
    # A right draft of 3 brings 4 tokens; the last forward has a draft for what is left.
    assert {way: rows[way]["forwards"] for way in ("plain", "right", "wrong")} == {"plain": 9, "right": 3, "wrong": 9}
    assert 3 <= rows["lookup"]["forwards"] <= 9
    assert rows["plain"]["speedup"] == rows["plain"]["cpu_speedup"] == 1.0
    assert not model._forward_hooks


def test_a_single_token_has_no_time_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        assisted.main(["teacher", "--tokens", "1"])
    assert "--tokens must be at least 2, got 1" in capsys.readouterr().err
