"""What a training reports to while it goes on."""

import os
from pathlib import Path
from typing import Any

import pytest
from families import make_model
from tiny_checkpoints import save_tokenizer
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from ssm_zoo.training import trainer
from ssm_zoo.training.from_scratch import train_from_scratch
from ssm_zoo.training.from_scratch_settings import parse_from_scratch


def settings(report_to: list[str]) -> Any:
    texts = {"train": ["text.txt"], "heldout": ["text.txt"], "row_tokens": 32}
    how = {"steps": 3, "batch_size": 2, "warmup": 1, "config": "zoo", "tokenizer": "zoo"}
    return parse_from_scratch({**texts, **how, "report_to": report_to})


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model("mamba2-full").save_pretrained(tmp_path / "zoo")
    save_tokenizer(tmp_path / "zoo")
    (tmp_path / "text.txt").write_text("abc def ghi " * 20)
    monkeypatch.chdir(tmp_path)


def test_a_tracker_gets_every_point_and_is_no_part_of_what_a_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    monkeypatch.setattr(trainer, "get_available_reporting_integrations", lambda: ["tensorboard"])
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "somewhere")
    report = train_from_scratch(settings(["tensorboard"]), "run")
    assert [point["loss"] for point in seen if "loss" in point] == [point["loss"] for point in report["history"]]
    assert "report_to" not in report["settings"]
    assert train_from_scratch(settings([]), "run")["history"] == report["history"]  # which goes on with the same run


@pytest.mark.parametrize("given", [None, "somewhere"], ids=["own", "given"])
def test_each_run_of_a_process_writes_to_its_own_folder(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[str] = []

    class Tracker(TrainerCallback):
        def __init__(self) -> None:
            folders.append(os.environ["TENSORBOARD_LOGGING_DIR"])  # as transformers' does

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    monkeypatch.setattr(trainer, "get_available_reporting_integrations", lambda: ["tensorboard"])
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", given or "")
    if given is None:
        monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
    for name in ("one", "two"):
        train_from_scratch(settings(["tensorboard"]), name)
    assert folders == ([given] * 2 if given else ["one/tensorboard", "two/tensorboard"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "`report_to` must be among .*tensorboard.*, got 'tensorbord'"),
        ("wandb", "'wandb' is not installed"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_before_anything_is_written(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "get_available_reporting_integrations", list)
    with pytest.raises(ValueError, match=message):
        train_from_scratch(settings([name]), "run")
    assert not Path("run").exists()
