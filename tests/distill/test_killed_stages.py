"""Newer kinds of stages, and the computation of stored logits, that are killed end as if nothing had happened."""

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

DEATHS = 5
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
    done = subprocess.run(
        [
            sys.executable,
            Path(__file__).with_name("kill_distillations.py"),
            tmp_path / "recipe.yaml",
            tmp_path,
            str(DEATHS),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    of_logits, starts = map(json.loads, done.stdout.splitlines()[-2:])
    assert of_logits == [0, 0, 1, 2, 3, 4]
    # Killed before the first checkpoint, in different stages, and after the last step.
    assert len(starts) == DEATHS + 1 and starts[0] is None and starts[-1] == [4, 0]
    assert len({tuple(start) for start in starts[1:] if start}) >= 3
    files = [sorted((tmp_path / name).glob("stage-*")) for name in ("logits", "whole-logits")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert len(files[0]) == 8 and not list((tmp_path / "logits").glob(".*"))
    ours, theirs = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("killed", "whole"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("killed", "whole")]
    histories = [[stage["history"] for stage in report["stages"]] for report in reports]
    assert histories[0] == histories[1]
