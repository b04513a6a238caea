"""The benchmark of rerankers at a tiny size: arms of equal size, the contents of the rows, resumption."""

import json
import shlex
from pathlib import Path

import pytest
import reranking_speed
import torch
from reranking_speed import ARMS, TRANSFORMER, Point, config_of, contrastive, main, parameters, sized, verdicts


@pytest.mark.parametrize(("width", "layers"), [(256, 6), (128, 4)])
def test_arms_are_of_equal_size(width: int, layers: int) -> None:
    point = Point(TRANSFORMER, "scoring", 32, 8, width, layers, 97, "float32", 2)
    target = parameters(sized(TRANSFORMER, point))
    assert target == parameters(config_of(TRANSFORMER, point, 8 * width // 3))
    for arm in ARMS:
        assert abs(parameters(sized(arm, point)) / target - 1) <= 0.05, arm


def test_the_loss_is_that_of_groups_of_eight() -> None:
    scores = torch.randn(16, 1, generator=torch.Generator().manual_seed(0))
    expected = -torch.stack([scores[start : start + 8, 0].log_softmax(0)[0] for start in (0, 8)]).mean()
    torch.testing.assert_close(contrastive(scores), expected)


def test_rows_are_written_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """In this process, as a new one takes seconds to start."""
    calls = []

    def here(script: str, arguments: list[str]) -> dict[str, object]:
        calls.append(arguments)
        return reranking_speed.measure(Point(**json.loads(arguments[0])))

    monkeypatch.setattr(reranking_speed, "in_a_process", here)
    line = shlex.split(
        "--arms transformer mamba2 --lengths 16 --width 64 --layers 8 --vocabulary 97 --repeats 2 --threads 1 --pairs 8"
    )
    main([*line, "--output", str(tmp_path)])
    (path,) = tmp_path.glob("reranking_speed-*.jsonl")
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    assert [(row["arm"], row["mode"]) for row in rows] == [
        (arm, mode) for mode in ("scoring", "training") for arm in ("transformer", "mamba2")
    ]
    for row in rows:
        assert row["pairs_per_second"] == pytest.approx(8 / row["seconds"]["median"])
        assert row["bytes"] >= row["bytes_before"] > 0 and row["versions"]
    printed = capsys.readouterr().out
    assert rows[0]["attention"] == "sdpa" and "1.00 x" in printed
    assert "training, 16 tokens: mamba2 is slower than the Transformer" in printed
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    main([*line, "--resume", str(path)])
    assert len(calls) == 4 and len(path.read_text().splitlines()) == 4
    with pytest.raises(SystemExit):
        main([*line[:-1], "12", "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("q1", "q3", "verdict"), [(3.0, 4.0, "confirmed"), (0.5, 0.9, "refuted"), (1.5, 4.0, "undecided")]
)
def test_slower_means_quartiles_apart(q1: float, q3: float, verdict: str) -> None:
    rows = [
        {"arm": arm, "mode": "training", "length": 64, "seconds": {"q1": low, "q3": high}}
        for arm, low, high in ((TRANSFORMER, 1.0, 2.0), ("mamba", q1, q3))
    ]
    assert verdicts(rows) == [f"training, 64 tokens: mamba is slower than the Transformer: {verdict}"]
    assert verdicts(rows[1:]) == []
