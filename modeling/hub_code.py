"""Files that accompany a checkpoint on the Hub (code of the model, licence of the code), and the upload.

Only the package uses this module: a model loaded from exported code is saved with that code by transformers.
"""

import importlib.metadata
import sys
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from transformers.utils import logging

from .exported_code import collect_code
from .hub_upload import carry_out, check_base, files_to_send, plan_upload
from .saved_folder import write_atomically

logger = logging.get_logger(__name__)


def code_of(model: Any) -> dict[str, str]:
    """Return the code that loads a model without this package, by file name; see :mod:`exported_code`."""
    modules = (model.own_class().__module__, type(model.config).__module__)
    rows = getattr(model.config, "used_rows", dict)()
    paths = tuple(Path(str(sys.modules[name].__file__)) for name in modules)
    return dict(_collected(paths, frozenset((table, frozenset(keys)) for table, keys in rows.items())))


@cache
def _collected(paths: tuple[Path, ...], rows: frozenset[tuple[str, frozenset[str]]]) -> dict[str, str]:
    """Return what `collect_code` does; computed once, as it takes a second and checkpoints are saved often."""
    return collect_code(paths, dict(rows))


def write_code(folder: Path, model: Any) -> None:
    """Write the files of :func:`code_of` into `folder`, and the licence of the code beside them."""
    texts = code_of(model)
    licence = code_licence()
    if licence is not None and not (folder / "LICENSE").exists():
        texts["LICENSE"] = licence
    for name, text in texts.items():
        write_atomically(folder / name, text)


def code_licence() -> str | None:
    """Return the licence of the repository or of the installed distribution; None if there is neither."""
    repository = Path(__file__).resolve().parents[1] / "LICENSE"
    if repository.is_file():
        return repository.read_text(encoding="utf-8")
    for distribution in importlib.metadata.distributions(name="ssm-zoo"):
        text = distribution.read_text("licenses/LICENSE") or distribution.read_text("LICENSE")
        if text:
            return text
    return None


def upload(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
    replace: bool = False,
) -> str:
    """Upload `folder` to a model repository, which is created if necessary. A card that the repository has is kept.

    :mod:`hub_upload` defines which files are sent and which are removed.

    Args:
        replace: also remove files that no upload of ours wrote and that might be loaded instead of the new ones.

    Returns:
        URL of the commit.

    Raises:
        ValueError: if the folder cannot be sent, or files would have to be removed that only `replace` allows.
    """
    check_base(folder)
    files_to_send(folder)  # raises for a bad folder before a repository is created
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    if tags and (folder / "README.md").is_file():
        card = ModelCard.load(folder / "README.md")
        data: Any = card.data
        data.tags = sorted({*(data.tags or []), *tags})
        card.save(folder / "README.md")
    plan = plan_upload(api, folder, repo_id, revision=revision, keep_card=True, token=token)
    if plan.not_ours and not replace:
        raise ValueError(
            f"{repo_id} holds files that would have to be removed and that no upload of this kind wrote: "
            f"{', '.join(plan.not_ours)}. Remove them, or pass replace=True"
        )
    if plan.left_out:
        logger.warning("not sent: %s", ", ".join(plan.left_out))
    commit = carry_out(
        api,
        plan,
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        token=token,
    )
    return str(commit.commit_url)
