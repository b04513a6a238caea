"""The comparison of presets: how a preset is scaled down, and a run of it on a tiny teacher."""

import json
from pathlib import Path
from typing import Any

import presets
import pytest
from presets_plot import table_of
from teachers import save_teacher, small_text, trained_teacher

PLACES = presets.Places("teacher", 30, "train.txt", {"comparison": Path("a.txt"), "tuning": Path("b.txt")})


def run_of(preset: str, **changes: Any) -> presets.Run:
    values: dict[str, Any] = {"purpose": "comparison", "factor": 8.0, "tokens": 102_400, "layers": 15, "seed": 3}
    texts = {"teacher": "teacher", "train": "train.txt", "heldout": "heldout.txt"}
    return presets.Run(preset, **{**values, "dtype": "float32", "evaluation_tokens": 6144, **texts, **changes})


@pytest.mark.parametrize(
    ("tokens", "steps", "expected"),
    [
        ([80_000_000, 160_000_000, 2_760_000_000], 100, [3, 5, 92]),
        ([1, 1, 1_000_000], 10, [1, 1, 8]),
        ([5], 7, [7]),
        ([1, 1, 1], 4, [2, 1, 1]),
    ],
)
def test_stages_keep_their_shares_of_the_steps(tokens: list[int], steps: int, expected: list[int]) -> None:
    assert presets.steps_of(tokens, steps) == expected


@pytest.mark.parametrize("preset", presets.PRESETS)
@pytest.mark.parametrize("layers", [15, 22])
def test_every_preset_is_scaled_to_the_same_tokens_layers_and_evaluation(preset: str, layers: int) -> None:
    run = run_of(preset, layers=layers)
    recipe = presets.scaled(run, PLACES)
    assert sum(stage.tokens for stage in recipe.stages) == 102_400
    assert {(stage.batch_size, stage.sequence_length) for stage in recipe.stages} == {(4, 256)}
    assert len(presets.resolve_layers(recipe.student.layers, 30)) == layers
    assert recipe.stages[-1].layers is None
    assert (recipe.seed, recipe.evaluation.tokens, recipe.data.heldout) == (3, 6144, "a.txt")
    own = presets.load_recipe(preset, ["teacher=t", "data.train=a", "data.heldout=b"])
    for stage, theirs in zip(recipe.stages, own.stages, strict=True):
        assert stage.learning_rate == max(min(8 * theirs.learning_rate, 2e-3), theirs.learning_rate)
        assert (stage.objective, stage.train, stage.schedule) == (theirs.objective, theirs.train, theirs.schedule)


def test_a_comparison_tunes_runs_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_teacher(tmp_path / "teacher", trained_teacher())
    (tmp_path / "train.txt").write_text(small_text(800, seed=1), encoding="utf-8")
    (tmp_path / "heldout.txt").write_text(small_text(1600, seed=9), encoding="utf-8")
    options = [
        "--presets",
        "supra",
        "--layers",
        "2",
        "--tokens",
        "2048",
        "--tuning-tokens",
        "1024",
        "--factors",
        "1",
        "8",
    ]
    for name in ("teacher", "train", "heldout"):
        options += [f"--{name}", str(tmp_path / (name if name == "teacher" else f"{name}.txt"))]
    options += ["--evaluation-tokens", "1024"]
    options += ["--work", str(tmp_path / "work"), "--output", str(tmp_path)]
    presets.main(options)
    (path,) = tmp_path.glob("presets-*.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(row["purpose"], row["factor"]) for row in rows][:2] == [("tuning", 1.0), ("tuning", 8.0)]
    best = min(rows[:2], key=lambda row: row["loss"])["factor"]
    last = rows[-1]
    assert (last["purpose"], last["factor"], last["trained_tokens"]) == ("comparison", best, 2048)
    assert last["loss"] < last["start"]["loss"] and last["gap"] == pytest.approx(last["loss"] - last["teacher_loss"])
    assert str(tmp_path) not in path.read_text(encoding="utf-8") and path.with_suffix(".png").is_file()
    table = table_of(rows[-1:])
    assert table in capsys.readouterr().out and "| supra | discrete_mamba2 | 2 | 2048 |" in table
    before = path.read_bytes()
    presets.main([*options, "--resume", str(path)])
    assert path.read_bytes() == before
