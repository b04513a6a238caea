"""The folder of a run, where a command wants a model: a distillation's student or what a finetuning made is meant."""

import re
from pathlib import Path

from .hub_client import limit_waiting

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def model_source(source: str) -> str:
    """What to load for `source`, a Hub id or a folder, of which :func:`model_folder` is meant.

    Raises:
        ValueError: if it is neither, or the folder of a run that is not finished.
    """
    folder = Path(source)
    if folder.is_dir():
        return str(model_folder(folder))
    if not _HUB_ID.fullmatch(source):
        raise ValueError(f"there is no folder {source!r}, and a Hub id would be OWNER/NAME")
    limit_waiting()
    return source


def model_folder(folder: Path) -> Path:
    """The student's folder if `folder` is a distillation run's, the model's if a finetuning's, otherwise `folder`.

    Raises:
        ValueError: if it is the folder of a run that is not finished.
    """
    is_run = (folder / "run.json").is_file() and not (folder / "config.json").exists()
    if is_run and (folder / "model" / "config.json").is_file():
        return folder / "model"
    return student_folder(folder) if is_run else folder


def student_folder(run: Path) -> Path:
    """Where the student of a distillation run is.

    Raises:
        ValueError: if there is none.
    """
    student = run / "student"
    if not (student / "config.json").is_file():
        raise ValueError(f"{run} has no student/config.json; accepted: the folder of a finished distillation")
    return student
