"""Runs that an earlier version began: they go on, or are refused with the remedy."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sweeps import SWEEP
from tiny_trainings import HOW, TEXTS, stop_in

from ssm_zoo.training import from_scratch
from ssm_zoo.training.from_scratch import train_from_scratch
from ssm_zoo.training.from_scratch_settings import parse_from_scratch
from ssm_zoo.training.new_model import resolve_configuration

FLAT = {
    "model_type": "zoo_hybrid",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "mixer_types": ["mamba2", "full_attention"],
    "num_attention_heads": 2,
    "mamba_head_dim": 8,
    "state_size": 8,
}


def record(run: Path, config: dict[str, Any]) -> None:
    """Have a run hold the configuration that an earlier version recorded, and no commit of it."""
    marker = json.loads((run / "run.json").read_text())
    marker["recipe"] = {key: value for key, value in marker["recipe"].items() if key != "sources"} | {"config": config}
    (run / "run.json").write_text(json.dumps(marker))


@pytest.mark.parametrize("source", ["hub", pytest.param("file", marks=SWEEP)])
def test_a_run_whose_configuration_an_earlier_version_recorded_goes_on(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("abc def ghi " * 20)
    config: Any = FLAT
    if source == "hub":
        config = "owner/name"
        monkeypatch.setattr(from_scratch, "configuration_commit", lambda *_: "a" * 40)
        monkeypatch.setattr(
            from_scratch, "resolve_configuration", lambda _, *given, revision: resolve_configuration(FLAT, *given)
        )
    settings = parse_from_scratch({**HOW, **TEXTS, "config": config, "tokenizer": "bytes"})
    train_from_scratch(settings, "whole")
    with monkeypatch.context() as patch:
        stop_in(6, patch)
        with pytest.raises(KeyboardInterrupt):
            train_from_scratch(settings, "run")
    recipe = json.loads(Path("run", "run.json").read_text())["recipe"]
    assert ("sources" in recipe) == (source == "hub") and recipe["config"]["mamba2"] == {"head_dim": 8, "state_size": 8}
    kept = {key: value for key, value in recipe["config"].items() if key != "mamba2"}
    flat = {**kept, "mamba_head_dim": 8, "state_size": 8}
    for wrong in ({"state_size": 16}, {"no_such_key": 1}, {"model_type": "zoo_gone"}):
        record(Path("run"), flat | wrong)
        with pytest.raises(ValueError, match="Finish the run with the version that began it"):
            train_from_scratch(settings, "run")
    assert not Path("run", "model").exists()
    record(Path("run"), flat)
    before = Path("run", "run.json").read_bytes()
    train_from_scratch(settings, "run")
    assert Path("run", "run.json").read_bytes() == before
    ours, theirs = (load_file(Path(name, "model", "model.safetensors")) for name in ("run", "whole"))
    assert ours.keys() == theirs.keys() != set()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
