"""The benchmark of transformers' own models: a whole run at a small size, and what it refuses to time."""

import json
from pathlib import Path

import native_models
import pytest
import torch

SMALL = ["--width", "64", "--forward", "24", "--training", "16", "--losses", "8", "--steps", "2", "--repeats", "1"]


def test_a_run_writes_ratios_of_both_clocks_and_the_difference_of_the_losses(tmp_path: Path) -> None:
    native_models.main([*SMALL, "--threads", "1", "--output", str(tmp_path)])
    (path,) = tmp_path.glob("native_models-*.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kinds = ("forward L24", "training step L16", "losses of 2 steps L8")
    expected = [f"{name} {kind}" for name in ("mamba2", "mamba") for kind in kinds]
    assert [row["case"].split(" d64 ")[0] for row in rows] == expected
    for row in rows:
        assert row["hardware"] and row["versions"] and row["date"] and row["command"]
        if "losses" in row["case"]:
            assert row["largest_difference"] < 1e-5 and row["last_loss"] != row["first_loss"]
        else:
            assert row["ratio"] == row["theirs_s"] / row["ours_s"] and row["difference"] < 1e-4
            assert row["cpu_ratio"] == row["theirs_cpu_s"] / row["ours_cpu_s"]


def test_sides_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_models, "AGREEMENT", -1.0)
    model = native_models.model_of("mamba2", 64)
    with pytest.raises(RuntimeError, match="mamba2: both sides must agree to"):
        native_models.measure("mamba2", model, native_models.forward, torch.arange(8)[None], 1)
