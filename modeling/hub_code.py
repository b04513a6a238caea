"""What travels with a checkpoint: the model's own code, flattened for the Hub, its licence, a card; the upload.

transformers loads remote code from one flat folder and finds a file's companions by their relative import lines.
In the package the ops live in `kernels/`; an exported file differs from the repository's in one respect only: what
it imports from there, it imports from beside itself.
"""

import ast
import importlib.metadata
import os
import re
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers.utils import logging

from .hub_upload import carry_out, check_base, files_to_send, plan_upload

logger = logging.get_logger(__name__)

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

_FROM_KERNELS = re.compile(r"^(\s*)from \.\.kernels\.(\w+) import", flags=re.MULTILINE)


def collect_code(module_names: list[str]) -> dict[str, str]:
    """The files that `module_names` and everything they import from the package need, by flat file name.

    Args:
        module_names: full names of loaded modules, `ssm_zoo.modeling.modeling_mamba2` say.

    Returns:
        File name to text, in a fixed order.

    Raises:
        ValueError: if a file imports the package in a way that does not survive flattening, or two files share a
            name.
    """
    pending = [Path(str(sys.modules[name].__file__)) for name in module_names]
    found: dict[str, Path] = {}
    texts: dict[str, str] = {}
    while pending:
        path = pending.pop()
        if found.get(path.name) == path:
            continue
        if path.name in found:
            raise ValueError(f"two files are called {path.name}: {found[path.name]} and {path}; a Hub folder is flat")
        found[path.name] = path
        text = path.read_text(encoding="utf-8")
        pending += _companions(path, text)
        texts[path.name] = _FROM_KERNELS.sub(r"\1from .\2 import", text)
    return dict(sorted(texts.items()))


@cache
def _companions(path: Path, text: str) -> tuple[Path, ...]:
    """The package's files that `path` imports."""
    companions = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        if any(name.split(".")[0] == "ssm_zoo" for name in names):
            raise ValueError(f"{path.name}, line {node.lineno}: an exported file must import the package relatively")
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        parts = (node.module or "").split(".")
        if node.level == 1 and len(parts) == 1 and parts[0]:
            companions.append(path.parent / f"{parts[0]}.py")
        elif node.level == 2 and len(parts) == 2 and parts[0] == "kernels":
            companions.append(path.parent.parent / "kernels" / f"{parts[1]}.py")
        else:
            raise ValueError(
                f"{path.name}, line {node.lineno}: only `from .name import` and `from ..kernels.name import` can "
                "be exported"
            )
    return tuple(companions)


def write_code(folder: Path, module_names: list[str]) -> None:
    """Write the files of :func:`collect_code` into `folder`, and the licence of the code beside them."""
    texts = collect_code(module_names)
    licence = code_licence()
    if licence is not None and not (folder / "LICENSE").exists():
        texts["LICENSE"] = licence
    for name, text in texts.items():
        write_atomically(folder / name, text)


def written_weights(folder: Path) -> dict[str, tuple[int, int]]:
    """When a folder's single file of weights and its index were written, and how long they are; of those there are."""
    stats = {name: folder / name for name in (_SINGLE, _INDEX) if (folder / name).is_file()}
    return {name: (path.stat().st_mtime_ns, path.stat().st_size) for name, path in stats.items()}


def remove_stale_weights(folder: Path, before: dict[str, tuple[int, int]]) -> None:
    """Remove what an earlier save in another sharding left: transformers would load the single file, old or new.

    Args:
        folder: that has been saved to.
        before: of :func:`written_weights`, before that.
    """
    after = written_weights(folder)
    new = {name for name, written in after.items() if before.get(name) != written}
    if len(after) == 2 and len(new) == 1:
        (folder / (after.keys() - new).pop()).unlink()


def write_default_card(folder: Path, *, model_type: str, class_name: str, auto_class: str, parameters: int) -> None:
    """Write a minimal README.md, unless there is one already: what the model is and how to load it."""
    if (folder / "README.md").exists():
        return
    data = ModelCardData(library_name="transformers", tags=["ssm-zoo", model_type, "custom_code"])
    card = ModelCard(
        f"""---
{data.to_yaml()}
---

# {folder.resolve().name}

A `{model_type}` model (`{class_name}`, {parameters:,} parameters) from ssm-zoo. The code is in this repository:
loading it needs torch and transformers only.

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("<this repository>", trust_remote_code=True)
```
"""
    )
    write_atomically(folder / "README.md", str(card))


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` through a temporary file beside it, so that no half-written file is ever seen."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def code_licence() -> str | None:
    """Text of the licence file of the repository, or of the installed distribution; None where neither is."""
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
    """Upload `folder` to a model repository, made if it does not exist. A card that the repository has is kept.

    See :mod:`hub_upload` for what is sent, and what of the repository is removed.

    Args:
        replace: also remove what no upload of ours wrote, where loading the repository might take it instead.

    Returns:
        Address of the commit.

    Raises:
        ValueError: if the folder cannot be sent, or something had to be removed that only `replace` allows.
    """
    check_base(folder)
    files_to_send(folder)  # whatever is wrong with the folder: before a repository is made
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
            f"{repo_id} holds files that would have to go and that no upload of this kind wrote: "
            f"{', '.join(plan.not_ours)}; remove them, or give replace=True"
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
