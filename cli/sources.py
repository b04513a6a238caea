"""Find the model that a command loads: a folder, the result in the folder of a run, or a Hub id."""

import os
from pathlib import Path

_SECONDS = 60.0


def model_source(source: str, revision: str | None = None) -> str:
    """Return a Hub id unchanged, or the folder that :func:`model_folder` finds.

    Args:
        source: the folder or Hub id.
        revision: the value of --revision, which a folder does not have.

    Raises:
        ValueError: if it is neither, or the folder of an unfinished run; or if a revision is given for a folder.
    """
    from ..harness.provenance import HUB_ID

    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"--revision must be left out for a folder such as {source}, got {revision!r}.")
        return str(model_folder(folder))
    if not HUB_ID.fullmatch(source):
        raise ValueError(f"there is no folder {source!r}, and a Hub id would be OWNER/NAME")
    limit_waiting()
    return source


def model_folder(folder: Path) -> Path:
    """Return the student of a distillation's folder, the model of a training's, and any other folder itself.

    Raises:
        ValueError: if it is the folder of a run that has not finished, or has trained only an adapter.
    """
    if not (folder / "run.json").is_file() or (folder / "config.json").exists():
        return folder
    for name in ("model", "student"):
        if (folder / name / "config.json").is_file():
            return folder / name
    if (folder / "adapter" / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} has an adapter but no model. Give {folder / 'adapter'}, or repeat the command of the run with "
            "--merge."
        )
    raise ValueError(f"{folder} has neither model/ nor student/. Give the folder of a finished run.")


def student_folder(run: Path) -> Path:
    """Return the folder of a distillation's student.

    Raises:
        ValueError: if there is none.
    """
    student = run / "student"
    if not (student / "config.json").is_file():
        raise ValueError(f"{run} has no student/config.json. Give the folder of a finished distillation.")
    return student


def limit_waiting() -> None:
    """Set a timeout for the requests of huggingface_hub, which has none by default.

    It is a minute, HF_HUB_DOWNLOAD_TIMEOUT if that is longer, or SSM_ZOO_HUB_TIMEOUT seconds.
    """
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    seconds = float(os.environ.get("SSM_ZOO_HUB_TIMEOUT", max(_SECONDS, constants.HF_HUB_DOWNLOAD_TIMEOUT)))

    def make() -> object:
        client = default_client_factory()
        client.timeout = seconds
        return client

    set_client_factory(make)  # pyright: ignore[reportArgumentType]
