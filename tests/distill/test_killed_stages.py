"""Newer kinds of stages, what comes before them, and stored logits, if killed, end as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from teachers import save_teacher, small_text

DEATHS = 7
STAGES: list[dict[str, Any]] = [
    {"name": "own", "objective": "hidden_state_alignment", "stream": "student", "refit": "sequential"},
    {"name": "blocks", "objective": "hidden_state_alignment", "stream": "student", "target": "block_output"},
    {"name": "states", "objective": "last_state_alignment", "train": "mixers+norms", "norm_learning_rate": 1e-4},
    {"name": "logits", "objective": "logit_distillation", "train": "all", "kl": "jsd", "embedding_learning_rate": 1e-4},
]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills processes as POSIX has them")
def test_killed_stages_and_logits_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text(small_text(80, seed=1), encoding="utf-8")
    recipe = {
        "teacher": str(tmp_path / "teacher"),
        "student": {"layers": "odd", "half_life": [1, 8], "calibration_tokens": 128},
        "data": {"train": str(tmp_path / "text.txt"), "heldout": str(tmp_path / "text.txt"), "sequence_length": 16},
        "stages": [{"tokens": 320, "batch_size": 4, "learning_rate": 1e-3, **stage} for stage in STAGES],
        "evaluation": {"tokens": 64, "prompts": [], "final": False},
        "checkpoint_every": 2,
        "stored_logits": str(tmp_path / "logits"),
    }
    recipe["stages"][-1]["tokens"] = 2048
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    of_logits, _, starts = killed(tmp_path, DEATHS)
    assert of_logits == [0, 0, 1, 2, 3, 4]
    # Killed before the first checkpoint, in different stages, and after the last step.
    assert len(starts) == DEATHS + 1 and starts[0] is None and starts[-1] == [4, 0]
    assert len({tuple(start) for start in starts[1:] if start and start > [0, 0]}) >= 3
    files = [sorted((tmp_path / name).glob("stage-*")) for name in ("logits", "whole-logits")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert len(files[0]) == 8 and not list((tmp_path / "logits").glob(".*"))
    assert_same_results(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills processes as POSIX has them")
def test_what_is_done_before_the_first_stage_is_not_repeated(tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text(small_text(80, seed=1), encoding="utf-8")
    memory = {"window": 4, "chunk_size": 2, "sinks": 1, "rows": 12, "slots": "calibrated"}
    recipe = {
        "teacher": str(tmp_path / "teacher"),
        "student": {
            "layers": "all",
            "mixer": "bounded_attention",
            **memory,
            "calibration": "sequential",
            "calibration_tokens": 128,
        },
        "data": {"train": str(tmp_path / "text.txt"), "heldout": str(tmp_path / "text.txt"), "sequence_length": 16},
        "stages": [{"tokens": 320, "batch_size": 4, "learning_rate": 1e-3, **STAGES[-1]}],
        "evaluation": {"tokens": 64, "prompts": [], "final": False},
        "checkpoint_every": 2,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    parts, starts = killed(tmp_path, 5)
    # Killed at the start, in the division of slots, in the calibration, after it, and while the results are written.
    assert starts == [starts[0], starts[1], [0], [0], [0, 0], [1, 0]] and starts[0] is None
    assert parts == [[], ["slots"], ["slots", "control", "calibration"], ["calibration"], [], []]
    assert_same_results(tmp_path)


def killed(folder: Path, deaths: int) -> list[Any]:
    """Kill the run of the recipe in a folder so often; return what the program prints."""
    done = subprocess.run(
        [
            sys.executable,
            Path(__file__).with_name("kill_distillations.py"),
            folder / "recipe.yaml",
            folder,
            str(deaths),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def assert_same_results(folder: Path) -> None:
    """Check the weights and the losses of the killed run against those of the one that was left alone."""
    ours, theirs = (load_file(folder / name / "student" / "model.safetensors") for name in ("killed", "whole"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    reports = [json.loads((folder / name / "report.json").read_text()) for name in ("killed", "whole")]
    histories = [[stage["history"] for stage in report["stages"]] for report in reports]
    assert histories[0] == histories[1]
    evaluations = [[row["loss"] for row in report["evaluations"]] for report in reports]
    assert evaluations[0] == evaluations[1]
